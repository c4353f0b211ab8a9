"""How often each sweep of the extension reads and writes tensors as large as its input.

Every access to memory is counted, of the CPU loops and of the CUDA kernels compiled for the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels import sweeps
from gradl1_fast.backends import compiled, contract
from tests.compiled.calls import NO_GRID

X = torch.randn(4, 8, 16, 32)  # as many elements as a CUDA block takes in several turns, 16-byte packs
ONE = torch.ones(())
CHANNELS = torch.rand(8) + 0.1


class Counter:
    """Calls sweeps of one half of the module and tells what they did to tensors of the size of X."""

    def __init__(self, path: Path, half: str) -> None:
        self.half, self.counts = half, ctypes.CDLL(str(path))
        self.counts.gradl1_watch.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
        for name in ("bytes_read", "bytes_written", "widest", "narrowest"):
            count = self.counts[f"gradl1_{name}"]
            count.argtypes, count.restype = (ctypes.c_size_t,), ctypes.c_uint64
        self.watched: list[Tensor] = []
        self.place: Callable[[Tensor], Tensor] = torch.clone

    def __call__(self, sweep: str | Callable[..., Any], *arguments: Any) -> tuple[list[int], list[int]]:
        """Return how often each argument and new tensor was read, and each new one written."""
        self.watched.clear()
        self.counts.gradl1_watch_nothing()
        copies = [self.copy(a) for a in arguments]
        given = len(self.watched)
        with pytest.MonkeyPatch.context() as patch:
            new = torch.empty_like
            patch.setattr(torch, "empty_like", lambda like: self.watch(new(like)))
            (getattr(compiled, sweep) if isinstance(sweep, str) else sweep)(*copies)
        read, written = (
            [whole(n / self.bytes) for n in self.all(name)] for name in ("bytes_read", "bytes_written")
        )
        assert not any(written[:given]), "wrote to an argument"
        return read, written[given:]

    @property
    def bytes(self) -> int:
        return self.watched[0].numel() * self.watched[0].element_size()

    def all(self, name: str) -> list[int]:
        """Return a count of each tensor that was watched in the last call."""
        return [self.counts[f"gradl1_{name}"](i) for i in range(len(self.watched))]

    def copy(self, argument: Any) -> Any:
        """Return the argument in memory of its own, watched."""
        if isinstance(argument, list):
            return [self.copy(a) for a in argument]
        return self.watch(self.place(argument)) if isinstance(argument, Tensor) else argument

    def watch(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == X.numel():
            self.counts.gradl1_watch(tensor.data_ptr(), tensor.numel() * tensor.element_size())
            self.watched.append(tensor)
        return tensor


@pytest.fixture
def passes(emulated_half: tuple[Path, str]) -> Counter:
    return Counter(*emulated_half)


def whole(times: float) -> int:
    """Return whole passes.

    Beside them each thread reads the first element of its channel, by which the statistics are shifted:
    the cache holds it.
    """
    assert times % 1 < 0.3, times
    return int(times)


def test_tap(passes: Counter) -> None:
    assert passes("tap_backward", X) == ([1], [])
    assert passes("tap_double_backward", X, ONE, X) == ([1, 1, 0], [1])


@pytest.mark.parametrize("axis", [None, 1])
def test_fake_quantize(axis: int | None, passes: Counter) -> None:
    grid = (ONE.view(1), ONE.view(1)) if axis is None else (CHANNELS, CHANNELS)
    assert passes("fake_quantize_forward", X, *grid, 0, 7, axis) == ([1, 0], [1])
    assert passes("fake_quantize_backward", X, X, *grid, 0, 7, axis, True) == ([1, 1, 0], [1])
    assert passes("fake_quantize_double_backward", X, ONE, X, X, *grid, 0, 7, axis) == ([1, 1, 1, 0], [1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_batch_norm_act(
    quantized: bool, residual: bool, layout: torch.memory_format, passes: Counter
) -> None:
    """Without a residual 2, 4 and 6 reads; with one, it and the output which gives the mask come to them.

    A quantizer adds nothing, but behind a residual it keeps what it was given: one write.
    """
    x = X.contiguous(memory_format=layout)
    other, grid = x if residual else None, (ONE, ONE, 0, 7) if quantized else NO_GRID
    forward = (x, CHANNELS, CHANNELS, None, None, other, *grid, True, 1e-5, "relu")
    written = [1, 1] if residual and quantized else [1]
    read = [2, *[1] * residual, *(0 for _ in written)]
    assert passes("batch_norm_act_forward", *forward) == (read, written)
    saved = (x, x, x, CHANNELS, CHANNELS, CHANNELS, CHANNELS, *grid, True, "relu", residual)
    dy_x_y, new = ([1, 2, 1, 0, 1], [1, 1]) if residual else ([2, 2, 0, 0], [1])
    assert passes("batch_norm_act_backward", *saved, True) == (dy_x_y, new)
    cotangents = (x, CHANNELS, CHANNELS, other, ONE)
    read = [2, 1, 2, 2, 2, 0, 0] if residual else [2, 2, 2, 0, 0, 0]
    assert passes("batch_norm_act_double_backward", *cotangents, *saved) == (read, [1, 1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_ends_of_batch_norm_act(
    activation: str, residual: bool, layout: torch.memory_format, passes: Counter
) -> None:
    """The ends come out of the pass that writes y, and their gradient enters the passes that read dy."""
    x = X.contiguous(memory_format=layout)
    op = contract.prepare_batch_norm_act(
        compiled, x, training=True, eps=1e-5, activation=activation, with_residual=residual, codes=None,
        with_ends=True,
    )  # fmt: skip
    forward = (x, CHANNELS, CHANNELS, None, None, x if residual else None, None, None)
    assert passes(op.forward, *forward) == ([2, *[1] * residual, 0], [1])
    saved = (x, x, x, CHANNELS, CHANNELS, CHANNELS, CHANNELS, None, None)
    expected = ([1, 2, 1, 0, 1], [1, 1]) if residual else ([2, 2, 0, 0], [1])
    assert passes(op.backward, *saved, True, torch.ones(4), torch.ones(2)) == expected


def test_ends_of_a_tap(passes: Counter) -> None:
    tap = contract.prepare_tap(compiled, X)
    assert passes(tap.ends, X) == ([1], [])
    assert passes(tap.add_ends_gradient, X, X, torch.ones(4), torch.ones(2)) == ([1, 1, 0], [1])
    assert passes(tap.add_ends_gradient, None, X, torch.ones(4), torch.ones(2)) == ([1, 0], [1])


def test_ends_of_several_taps(passes: Counter) -> None:
    taps = contract.prepare_taps(compiled, [X, X])
    assert passes(taps.ends, [X, X]) == ([1, 1], [])
    gradients = (torch.ones(2, 4), torch.ones(2, 2))
    assert passes(taps.add_ends_gradients, [X, X], [X, X], *gradients) == ([1, 1, 1, 1, 0, 0], [1, 1])
    assert passes(taps.add_ends_gradients, [None, X], [X, X], *gradients) == ([1, 1, 1, 0, 0], [1, 1])


def test_l1_norm(passes: Counter) -> None:
    assert passes("l1_norm_forward", [X, X]) == ([1, 1], [])
    assert passes("l1_norm_backward", torch.ones(2), [X, X]) == ([1, 1, 0, 0], [1, 1])
    assert passes("l1_norm_double_backward", [X, X], [X, X]) == ([1, 1, 1, 1], [])


def test_the_benchmark_counts_the_same(passes: Counter) -> None:
    for sweep in sweeps(X):
        read, written = passes(sweep.name, *sweep.args)
        assert sum(read) + sum(written) == sweep.passes, f"{sweep.name} {sweep.label}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_aligned_memory_is_accessed_in_16_byte_words(dtype: torch.dtype, passes: Counter) -> None:
    if passes.half == "host":
        pytest.skip("the compiler vectorises the CPU loops; here they are compiled without")
    for layout in (torch.contiguous_format, torch.channels_last):
        for sweep in sweeps(X.to(dtype).contiguous(memory_format=layout)):
            passes(sweep.name, *sweep.args)
            assert set(passes.all("widest")) <= {0, 16}, sweep.name
            if sweep.name != "batch_norm_act_forward":  # which reads the first element of each channel too
                assert set(passes.all("narrowest")) <= {16, passes.bytes}, sweep.name
