"""What a prepared call costs the host, with the launches themselves left out.

Times of a busy machine say little, so a call is held against the smallest thing that it does several times:
allocating a result. That takes 0.8 us on a quiet machine, where fifteen microseconds are ``BUDGET`` of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradl1_fast.backends import contract
from tests.compiled.prepared import CODES, Arguments

Call = tuple[str, Callable[..., Any], tuple[Any, ...]]
BUDGET = 20
ALLOCATIONS = {"aten.empty_like.default", "aten.new_empty.default", "aten.empty.memory_format"}


def calls_of(backend: Any, a: Arguments) -> Iterator[Call]:
    """Yield every prepared call: its name, the call, its arguments."""
    op = contract.prepare_batch_norm_act(
        backend, a.x, training=True, eps=1e-5, activation="relu", with_residual=True, codes=None,
        with_ends=True,
    )  # fmt: skip
    forward = (a.x, a.weight, a.bias, None, None, a.residual, None, None)
    y, _, mean, rstd, ends = op.forward(*forward)
    saved = (a.dy, a.x, y, a.weight, a.bias, mean, rstd, None, None)
    yield "batch_norm_act_forward", op.forward, forward
    yield "batch_norm_act_backward", op.backward, (*saved, True, None, None)
    yield "batch_norm_act_backward of ends", op.backward, (*saved, False, ends, a.d_ends)
    yield "batch_norm_act_double_backward", op.double_backward, (a.v, a.gw, a.gb, a.u, a.c, *saved)
    tap, grid = contract.prepare_tap(backend, a.x), (a.x, a.scale, a.zero)
    yield "tap_backward", tap.backward, (a.dy,)
    yield "tap_double_backward", tap.double_backward, (a.v, a.c, a.dy)
    yield "tap_ends", tap.ends, (a.x,)
    yield "tap_add_ends_gradient", tap.add_ends_gradient, (a.dy, a.x, ends, a.d_ends)
    if hasattr(backend, "prepare_taps"):  # one call for several tensors
        taps, pair = contract.prepare_taps(backend, [a.x, a.x]), [a.x, a.x]
        both = torch.stack([ends, ends]), torch.stack([a.d_ends, a.d_ends])
        yield "taps_ends", taps.ends, (pair,)
        yield "taps_add_ends_gradients", taps.add_ends_gradients, (pair, pair, *both)
    quantize = contract.prepare_fake_quantize(backend, a.x, CODES)
    yield "fake_quantize_forward", quantize.forward, grid
    yield "fake_quantize_backward", quantize.backward, (a.dy, *grid, True)
    yield "fake_quantize_double_backward", quantize.double_backward, (a.v, a.c, a.dy, *grid)


class Asked(TorchDispatchMode):
    """Notes which operators torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[str]:
    """Return the operators of one call."""
    with Asked() as asked:
        call(*arguments)
    return asked.names


def functions(call: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Return how many functions, of Python and of C, one call enters."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call(*arguments)
    finally:
        sys.setprofile(None)
    return count


def allocations(call: Callable[..., Any], arguments: tuple[Any, ...], tries: int = 12) -> float:
    """Return the time of a call in allocations of a result; the least of several tries, side by side."""
    x = torch.empty(4)
    found = [_seconds(call, arguments) / _seconds(torch.empty_like, (x,)) for _ in range(tries)]
    return min(found)


def _seconds(call: Callable[..., Any], arguments: tuple[Any, ...], repeats: int = 3) -> float:
    """Return the least time on the processor of a hundred calls; other processes may interrupt them."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(100):
            call(*arguments)
        times.append(time.thread_time() - start)
    return min(times)
