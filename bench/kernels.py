"""Achieved bandwidth of each Triton kernel over the bandwidth of a copy, measured in the same run on one GPU.

``python -m bench.kernels --out FOLDER`` writes ``kernels.json``. Bytes are those that the sweep must move:
whole tensors read and written, as the module docstrings of ``gradl1_fast/backends/triton`` count them. A
sweep that disagrees with the reference is reported as wrong, without a time, and the run fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHAPE = (64, 256, 56, 56)
WEIGHTS = [(512, 512, 3, 3)] * 8 + [(256, 256, 3, 3)] * 12 + [(64, 64, 1, 1)] * 20
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
REPEATS = 20


class Sweep(NamedTuple):
    """One call of the backend's function ``name``, and how many tensors as large as the first it moves."""

    name: str
    args: tuple[Any, ...]
    passes: int
    label: str = ""


def sweeps(x: Tensor) -> Iterator[Sweep]:
    """Yield every sweep on tensors like ``x``."""
    from gradl1_fast.backends import triton

    dy, v = torch.randn_like(x), torch.randn_like(x)
    one = torch.ones((), device=x.device)
    grid = (one * 0.1, one * 0, -7, 7, None)
    yield Sweep("tap_backward", (dy,), 1)
    yield Sweep("tap_double_backward", (v, one, dy), 3)
    yield Sweep("fake_quantize_forward", (x, *grid), 2)
    yield Sweep("fake_quantize_backward", (dy, x, *grid, True), 3)
    yield Sweep("fake_quantize_double_backward", (v, one, dy, x, *grid), 4)
    c = torch.rand(x.shape[1], device=x.device) + 0.5
    for residual in (None, v):
        added, label = residual is not None, "" if residual is None else "residual"
        forward = (x, c, c, None, None, residual, True, 1e-5, "relu")
        yield Sweep("batch_norm_act_forward", forward, 4 if added else 3, label)
        y, mean, rstd = triton.batch_norm_act_forward(*forward)
        saved = (dy, x, y, c, c, mean, rstd, True, "relu")
        yield Sweep("batch_norm_act_backward", (*saved, added, True), 7 if added else 5, label)
        yield Sweep(
            "batch_norm_act_double_backward",
            (v, c, c, residual, one, *saved, added),
            11 if added else 8,
            label,
        )


def milliseconds(run: Callable[[], Any]) -> float:
    """Return the median time of one call on the device, by events, after a warm-up."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def agrees(ours: Any, truth: Any, tolerance: float) -> bool:
    """Return whether all results equal the reference's, relative to the largest element of each."""
    if isinstance(ours, Tensor):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        return not ours.numel() or (ours - truth).abs().max().item() <= tolerance * largest
    return all(agrees(a, b, tolerance) for a, b in zip(ours, truth, strict=True))


def measure(sweep: Sweep, size: int, tolerance: float, copy: float) -> dict[str, Any]:
    """Return a row of the result: time, bandwidth and its share of the copy's; or that the sweep is wrong."""
    from gradl1_fast.backends import reference, triton

    kernel = getattr(triton, sweep.name)
    row: dict[str, Any] = {"sweep": f"{sweep.name} {sweep.label}".strip(), "bytes": sweep.passes * size}
    if not agrees(kernel(*sweep.args), getattr(reference, sweep.name)(*sweep.args), tolerance):
        return {**row, "wrong": True}
    time = milliseconds(lambda: kernel(*sweep.args))
    rate = row["bytes"] / time / 1e6
    return {**row, "milliseconds": time, "gb_per_s": rate, "of_copy": rate / copy}


def run() -> list[dict[str, Any]]:
    """Measure every sweep in both types and layouts."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(SHAPE, device="cuda", dtype=dtype).contiguous(memory_format=layout)
            size, out = x.numel() * x.element_size(), torch.empty_like(x)
            copy = 2 * size / milliseconds(lambda x=x, out=out: out.copy_(x)) / 1e6
            kind = {"dtype": str(dtype), "layout": str(layout), "copy_gb_per_s": copy}
            rows += [{**kind, **measure(s, size, TOLERANCE[dtype], copy)} for s in sweeps(x)]
    return [*rows, {"dtype": "torch.float32", "copy_gb_per_s": copy, **_weights(copy)}]


def _weights(copy: float) -> dict[str, Any]:
    tensors = [torch.randn(shape, device="cuda") for shape in WEIGHTS]
    size = sum(t.numel() * t.element_size() for t in tensors)
    return measure(Sweep("l1_norm_forward", (tensors,), 1, f"of {len(tensors)}"), size, 1e-4, copy)


def environment() -> dict[str, str]:
    """Return what the numbers depend on."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def main() -> int:
    """Run the benchmark; return 1 if a sweep is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of kernels.json")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("bench.kernels: no GPU, nothing measured", file=sys.stderr)
        return 1
    rows = run()
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    for row in rows:
        share = "WRONG" if row.get("wrong") else f"{row['of_copy']:.0%} of copy"
        print(f"{row['dtype']:15} {row.get('layout', ''):24} {row['sweep']:40} {share}")
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
