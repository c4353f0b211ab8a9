"""The training step on a GPU: networks, types and layouts, written beside the environment.

    python -m bench.gpu --out results

Writes ``<out>/<device>/step.json``. Takes a few minutes; needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.step import measure, print_rows, resnet_setting
from gradl1_fast import _environment

NETWORKS = {
    "ResNet-18, CIFAR size": {"width": 64, "batch": 256, "size": 32},
    "ResNet-18, ImageNet size": {"width": 64, "batch": 64, "size": 224},
}
TYPES: dict[str, tuple[bool, torch.dtype | None]] = {
    "fp32": (False, None),
    "tf32": (True, None),
    "bf16 autocast": (True, torch.bfloat16),
}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def main() -> int:
    """Measure every combination; return 1 if there is no device or a gradient was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each provider (default 10)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device here", file=sys.stderr)
        return 1
    rows, failures = _all(args.rounds)
    folder = args.out / torch.cuda.get_device_name().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    result = {"environment": _environment.describe(), "failures": failures, "rows": rows}
    (folder / "step.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {folder / 'step.json'}")
    return 1 if failures else 0


def _all(rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    rows, failures = [], []
    for network, sizes in NETWORKS.items():
        for type_name, (tf32, autocast) in TYPES.items():
            for layout_name, layout in LAYOUTS.items():
                title = f"{network}, {type_name}, {layout_name}"
                keys = {"network": network, "type": type_name, "layout": layout_name}
                try:
                    found = _one(sizes, tf32, autocast, layout, rounds)
                except RuntimeError as error:  # the other combinations are still worth their time
                    failures.append(f"{title}: {error}")
                    print(failures[-1], file=sys.stderr)
                    continue
                print_rows(title, found)
                rows += [keys | row for row in found]
    return rows, failures


def _one(
    sizes: dict[str, int], tf32: bool, autocast: torch.dtype | None, layout: torch.memory_format, rounds: int
) -> list[dict[str, Any]]:
    setting = resnet_setting(**sizes, device="cuda", layout=layout, autocast=autocast)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    try:
        # A sign that flips by rounding changes a whole term, so low precision leaves a wide margin.
        return measure(setting, rounds, tolerance=0.5 if tf32 else 1e-3)
    finally:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
