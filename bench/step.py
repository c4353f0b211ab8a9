"""A training step with the penalty beside the plain step, on a ResNet-18.

    python -m bench.step --json results.json

Every provider's gradient is compared with float64 double backprop before it is timed. Steps are
taken in turn and only ratios within one run are meant to be compared between machines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import interleaved_times, peak_bytes, quantiles
from bench.providers import PROVIDERS, Setting, gradient_error, make_step
from gradl1_fast import _environment
from gradl1_fast.training.models import resnet18

__all__ = ["measure", "print_rows", "resnet_setting"]


def measure(
    setting: Setting, rounds: int, providers: Sequence[str] = tuple(PROVIDERS), *, tolerance: float = 1e-4
) -> list[dict[str, Any]]:
    """Return one row for each provider: time, ratio to the plain step, peak of live bytes, error.

    Args:
        setting: what the step runs on.
        rounds: timed steps of each provider.
        providers: names of rows.
        tolerance: the largest relative error that rounding explains; a provider beyond it is wrong,
            and its time means nothing.

    Raises:
        RuntimeError: a provider's gradient is not that of double backprop.
    """
    errors = {name: gradient_error(name, setting) for name in providers}
    wrong = [name for name, error in errors.items() if not error < tolerance]
    if wrong:
        raise RuntimeError(
            f"wrong gradients, nothing was timed: {', '.join(f'{n} {errors[n]:.2g}' for n in wrong)}"
        )
    steps = {name: make_step(name, setting) for name in providers}
    times = interleaved_times(steps, rounds)
    plain = quantiles(times["plain"])[1]
    rows = []
    for name, step in steps.items():
        low, median, high = quantiles(times[name])
        rows.append(
            {
                "provider": name,
                "median_ms": round(median, 3),
                "p20_ms": round(low, 3),
                "p80_ms": round(high, 3),
                "ratio_to_plain": round(median / plain, 3),
                "peak_bytes": peak_bytes(step, setting.x.device),
                "gradient_error": errors[name],
            }
        )
    return rows


def resnet_setting(
    *,
    width: int,
    batch: int,
    size: int,
    device: str,
    layout: torch.memory_format = torch.channels_last,
    autocast: torch.dtype | None = None,
) -> Setting:
    """Return a ResNet-18, with the stem for its image size, and a batch of random images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator).to(device).to(memory_format=layout)
    y = torch.randint(0, 10, (batch,), generator=generator).to(device)

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return resnet18(width=width, classes=10, stem="imagenet" if size > 64 else "cifar")

    return Setting(make, x, y, layout, autocast)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table of rows, memory as a multiple of the plain step's."""
    plain = rows[0]["peak_bytes"]
    print(f"\n{title}")
    print(f"{'':53}{'ms':>9}{'20-80 %':>18}{'x plain':>9}{'memory x':>10}{'gradient error':>16}")
    for row in rows:
        spread = f"{row['p20_ms']:.1f}-{row['p80_ms']:.1f}"
        print(
            f"{row['provider']:53}{row['median_ms']:9.1f}{spread:>18}{row['ratio_to_plain']:9.2f}"
            f"{row['peak_bytes'] / plain:10.2f}{row['gradient_error']:16.1e}"
        )


def main() -> None:
    """Measure on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage (default 32)")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch (default 32)")
    parser.add_argument("--size", type=int, default=32, help="height and width of an image (default 32)")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each provider (default 15)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--json", type=Path, help="write rows and environment to this file")
    args = parser.parse_args()
    setting = resnet_setting(width=args.width, batch=args.batch, size=args.size, device=args.device)
    rows = measure(setting, args.rounds)
    print_rows(f"ResNet-18, width {args.width}, batch {args.batch}, {args.size} x {args.size}", rows)
    if args.json:
        result = {
            "environment": _environment.describe(),
            "settings": {key: value for key, value in vars(args).items() if key != "json"},
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
