"""``gradl1 bench ops``: every operation and sweep by itself, against plain PyTorch and against a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gradl1_fast as gl
from bench.convolutions import convolutions
from bench.measure import quantiles, wait
from bench.sweeps import Sweep, elementwise
from gradl1_fast import backends
from gradl1_fast._progress import track

__all__ = ["measure"]

Row = dict[str, Any]
Run = Callable[[], Any]
BACKENDS = ("reference", "host", "triton", "cuda")
# Distance from the reference in float64, relative to its norm. bfloat16 rounds by 2**-9, so that where plain
# PyTorch rounds before it adds the residual some 2**-8 of the values fall on the other side of a ReLU, and
# the norm of what they change is the square root of that.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 0.1}


def measure(
    device: str, *, smoke: bool = False, rounds: int = 15, compiler: str | None = "inductor"
) -> list[Row]:
    """Return a row for each operation, sweep, provider, type and layout.

    A provider whose result is not that of the reference in float64 is not timed.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        smoke: tiny sizes and few cases.
        rounds: timed calls of each provider.
        compiler: backend of torch.compile; None to leave it out.
    """
    rows: list[Row] = []
    dtypes = ("float32", "bfloat16") if device == "cpu" or smoke else ("float32", "tf32", "bfloat16")
    for dtype in dtypes:
        for layout in ("channels_last", "NCHW"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
            about = {"dtype": dtype, "layout": layout, "device": device}
            compiled = compiler if (dtype, layout) == ("float32", "channels_last") else None
            rows += _family(elementwise(device, dtype, layout, smoke), about, rounds, compiled)
            rows += _family(convolutions(device, dtype, layout, smoke), about, rounds, None)
    return rows


def _family(sweeps: Sequence[Sweep], about: Row, rounds: int, compiler: str | None) -> list[Row]:
    rows: list[Row] = []
    for sweep in track(sweeps, f"operations, {about['dtype']}, {about['layout']}"):
        found, runs = _check(sweep, about, compiler)
        times = _interleaved({"copy": sweep.copy(), **runs}, rounds)
        copy = sweep.copied_bytes / quantiles(times["copy"])[1]
        for provider, row in found.items():
            if provider in runs:
                row |= _statistics(sweep, times[provider], copy)
            rows.append(row)
    return rows


def _check(sweep: Sweep, about: Row, compiler: str | None) -> tuple[dict[str, Row], dict[str, Run]]:
    """Return a row for each provider, and how to run those whose results are right."""
    found, runs = {}, {}
    truth = sweep.truth()
    for provider, make in _providers(sweep, compiler).items():
        row = found[provider] = _row(sweep, provider, about)
        try:
            run = make()
            error = row["error"] = _difference(run(), truth)
        except backends.UnavailableError as reason:
            row["unavailable"] = str(reason)
            continue
        if error <= TOLERANCE[about["dtype"]]:
            runs[provider] = run
        else:
            row["failed"] = f"error {error:.1e} is more than {TOLERANCE[about['dtype']]:.0e}: not timed"
    return found, runs


def _providers(sweep: Sweep, compiler: str | None) -> dict[str, Callable[[], Run]]:
    """Return by name what makes a function without arguments."""

    def by_backend(name: str) -> Run:
        with gl.backend(name):
            compute = getattr(backends.resolve(sweep.operation, sweep.x), sweep.function)
        return lambda: compute(*sweep.args)

    def compiled(compiler: str) -> Run:
        torch._dynamo.reset()
        compute = torch.compile(getattr(backends.reference, sweep.function), backend=compiler)
        return lambda: compute(*sweep.args)

    # Convolution and linear are the same code in every backend: cuDNN and oneDNN, through the reference.
    names: tuple[str, ...] = ("reference",) if sweep.operation in backends.PRODUCTS else BACKENDS
    makers: dict[str, Callable[[], Run]] = {name: partial(by_backend, name) for name in names}
    if sweep.plain is not None:
        makers["plain PyTorch"] = sweep.plain
    if compiler:
        makers["torch.compile"] = partial(compiled, compiler)
    return makers


def _row(sweep: Sweep, provider: str, about: Row) -> Row:
    empty = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "gb_per_s", "of_copy", "error"))
    return {
        "family": "ops",
        "operation": sweep.operation,
        "sweep": sweep.title,
        "provider": provider,
        "size": sweep.size,
        **about,
        "passes": sweep.passes,
        "bytes": sweep.bytes,
        **empty,
    }


def _statistics(sweep: Sweep, times: list[float], copy: float) -> Row:
    """Return times in milliseconds, and the bandwidth over a copy's, which is in bytes a millisecond."""
    low, median, high = quantiles(times)
    found = {"median_ms": round(median, 4), "p20_ms": round(low, 4), "p80_ms": round(high, 4)}
    if sweep.bytes:
        rate = sweep.bytes / median
        found |= {"gb_per_s": float(f"{rate / 1e6:.3g}"), "of_copy": float(f"{rate / copy:.3g}")}
    return found


def _interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, rounds):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _difference(ours: Any, truth: Any) -> float:
    """Return the largest relative distance of a tensor from the true one; None stands for no answer."""
    if isinstance(truth, Tensor):
        if ours is None or not truth.numel():
            return 0.0
        if ours.shape != truth.shape:
            raise ValueError(f"shape {tuple(ours.shape)} instead of {tuple(truth.shape)}")
        return float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30))
    return 0.0 if truth is None else max(_difference(a, b) for a, b in zip(ours, truth, strict=True))
