"""Achieved bandwidth of the kernels of each backend over that of a copy, measured in the same run on one GPU.

``python -m bench.kernels --out FOLDER`` writes ``FOLDER/<device>/kernels.json``. Bytes are those that a sweep
must move: whole tensors read and written, which tests count too. A sweep that disagrees with the reference
is reported as wrong, without a time, and the run fails; so does a backend that cannot be loaded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradl1_fast import _environment, _json, backends
from gradl1_fast.backends import compiled, reference

BACKENDS = ("triton", "cuda")
CHANNELS, SIZE = 256, 56
CACHES = 4  # so many times the L2 is a tensor, so that little of it is there when it is read again
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
    dy, v = torch.randn_like(x), torch.randn_like(x)
    one = torch.ones((), device=x.device)
    grid = (one * 0.1, one * 0, -7, 7, None)
    yield Sweep("tap_backward", (dy,), 1)
    yield Sweep("tap_double_backward", (v, one, dy), 3)
    yield Sweep("fake_quantize_forward", (x, *grid), 2)
    yield Sweep("fake_quantize_backward", (dy, x, *grid, True), 3)
    yield Sweep("fake_quantize_double_backward", (v, one, dy, x, *grid), 4)
    c = torch.rand(x.shape[1], device=x.device) + 0.5
    quantizer, none = (one * 0.1, one * 0, 0, 15), (None, None, 0, 0)
    for residual, q in ((None, none), (v, none), (None, quantizer), (v, quantizer)):
        added, quantized = residual is not None, q is quantizer
        label = ", ".join(["residual"] * added + ["quantized"] * quantized)
        forward = (x, c, c, None, None, residual, *q, True, 1e-5, "relu")
        yield Sweep("batch_norm_act_forward", forward, 4 + quantized if added else 3, label)
        y, activated, mean, rstd = reference.batch_norm_act_forward(*forward)
        saved = (dy, x, activated if added and quantized else y, c, c, mean, rstd, *q, True, "relu")
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
    torch.cuda._sleep(50_000_000)  # meanwhile launches queue up: no time of Python's is measured
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


def measure(sweep: Sweep, kernels: ModuleType, size: int, tolerance: float, copy: float) -> dict[str, Any]:
    """Return a row of the result: time, bandwidth and its share of the copy's; or that the sweep is wrong."""
    kernel = getattr(kernels, sweep.name)
    row: dict[str, Any] = {"sweep": f"{sweep.name} {sweep.label}".strip(), "bytes": sweep.passes * size}
    if not agrees(kernel(*sweep.args), getattr(reference, sweep.name)(*sweep.args), tolerance):
        return {**row, "wrong": True}
    time = milliseconds(lambda: kernel(*sweep.args))
    rate = row["bytes"] / time / 1e6
    return {**row, "milliseconds": time, "gb_per_s": rate, "of_copy": rate / copy}


def run(chosen: dict[str, ModuleType]) -> list[dict[str, Any]]:
    """Measure every sweep of every backend in both types and layouts."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            shape = (images(torch.cuda.get_device_properties().L2_cache_size, dtype), CHANNELS, SIZE, SIZE)
            x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
            size, copy = x.numel() * x.element_size(), copy_bandwidth(x)
            kind = {"dtype": str(dtype), "layout": str(layout), "shape": shape, "copy_gb_per_s": copy}
            for sweep in sweeps(x):
                for name, kernels in chosen.items():
                    row = measure(sweep, kernels, size, TOLERANCE[dtype], copy)
                    rows.append({"backend": name, **kind, **row})
    return rows + weights(chosen)


def images(cache: int, dtype: torch.dtype) -> int:
    """Return how many images a tensor needs to be several times as large as the L2 cache."""
    image = CHANNELS * SIZE * SIZE * dtype.itemsize
    return max(8, -(-CACHES * cache // image))


def copy_bandwidth(x: Tensor) -> float:
    """Return the gigabytes that a copy of ``x`` moves in a second, read and written."""
    out = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() / milliseconds(lambda: out.copy_(x)) / 1e6


def weights(chosen: dict[str, ModuleType]) -> list[dict[str, Any]]:
    """Measure the norms of all weights of a network, beside a copy of as many bytes."""
    tensors = [torch.randn(shape, device="cuda") for shape in WEIGHTS]
    count = sum(t.numel() for t in tensors)
    copy = copy_bandwidth(torch.randn(count, device="cuda"))
    kind = {"dtype": "torch.float32", "copy_gb_per_s": copy}
    sweep = Sweep("l1_norm_forward", (tensors,), 1, f"of {len(tensors)}")
    return [
        {"backend": name, **kind, **measure(sweep, kernels, 4 * count, 1e-4, copy)}
        for name, kernels in chosen.items()
    ]


def load(names: list[str]) -> tuple[dict[str, ModuleType], list[str]]:
    """Return the backends that can compute on a GPU here, and a sentence for each that cannot."""
    chosen, failures = {}, []
    for name in names:
        try:
            with backends.backend(name):
                chosen[name] = backends.resolve("batch_norm_act", torch.empty(0, device="cuda"))
        except backends.UnavailableError as reason:
            failures.append(f"{name}: {reason}")
    return chosen, failures


def write(out: Path, rows: list[dict[str, Any]], failures: list[str]) -> Path:
    """Write the rows beside what they depend on; return the file."""
    folder = out / torch.cuda.get_device_name().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **_environment.describe(),
        "extension": compiled.describe(),
        "cuda": str(torch.version.cuda),
    }
    result = {"environment": environment, "failures": failures, "rows": rows}
    (folder / "kernels.json").write_text(_json.dumps(result, indent=1) + "\n")
    return folder / "kernels.json"


def main() -> int:
    """Run the benchmark; return 1 if a sweep is wrong or a backend cannot be loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.kernels: no GPU, nothing measured", file=sys.stderr)
        return 1
    chosen, failures = load(args.backends)
    rows = run(chosen)
    for row in rows:
        share = "WRONG" if row.get("wrong") else f"{row['of_copy']:4.0%} of copy"
        print(f"{row['backend']:7} {row['dtype']:15} {row.get('layout', ''):24} {row['sweep']:40} {share}")
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"written to {write(args.out, rows, failures)}")
    return int(bool(failures) or any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
