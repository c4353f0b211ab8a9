"""How often each sweep reads and writes tensors as large as its input, counted by the interpreter."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy
import pytest
import torch
from triton.runtime import interpreter

from gradl1_fast.backends import contract, triton

X = torch.randn(4, 4, 32, 32)
ONE = torch.ones(())
CHANNELS = torch.rand(4) + 0.1
NAMES = {"create_masked_load": "reads", "create_masked_store": "writes"}  # those without a mask call these


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the elements that kernels load and store, in units of those of X, and their launches."""
    count: Counter[str] = Counter()

    def counting(name: str, kind: str) -> Any:
        original = getattr(interpreter.interpreter_builder, name)

        def access(pointers: Any, *args: Any, **kwargs: Any) -> Any:
            mask = next(
                a.data for a in args if getattr(getattr(a, "data", None), "dtype", None) == numpy.bool_
            )
            count[kind] += int(mask.sum())
            return original(pointers, *args, **kwargs)

        return access

    for name, kind in NAMES.items():
        monkeypatch.setattr(interpreter.interpreter_builder, name, counting(name, kind))
    launch = interpreter.GridExecutor.__call__

    def launching(*args: Any, **kwargs: Any) -> Any:
        count["launches"] += 1
        return launch(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launching)
    return count


def passes(count: Counter[str]) -> tuple[int, int]:
    """Return whole reads and writes of X; per-channel values and partial sums come to less than a tenth."""
    reads, writes = (count[kind] / X.numel() for kind in ("reads", "writes"))
    assert reads % 1 < 0.1
    assert writes % 1 < 0.1
    return int(reads), int(writes)


def test_tap(moved: Counter[str]) -> None:
    triton.tap_backward(X)
    assert passes(moved) == (1, 0)
    moved.clear()
    triton.tap_double_backward(X, ONE, X)
    assert passes(moved) == (2, 1)


@pytest.mark.parametrize("axis", [None, 1])
def test_fake_quantize(axis: int | None, moved: Counter[str]) -> None:
    grid = (ONE, ONE) if axis is None else (CHANNELS, CHANNELS)
    own = 0 if axis is None else 2  # the grid's values for each element, which caches hold
    triton.fake_quantize_forward(X, *grid, 0, 7, axis)
    assert passes(moved) == (1 + own, 1)
    moved.clear()
    triton.fake_quantize_backward(X, X, *grid, 0, 7, axis, True)
    assert passes(moved) == (2 + own, 1)
    moved.clear()
    triton.fake_quantize_double_backward(X, ONE, X, X, *grid, 0, 7, axis)
    assert passes(moved) == (3 + own, 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_batch_norm_act(
    quantized: bool, residual: bool, layout: torch.memory_format, moved: Counter[str]
) -> None:
    x = X.contiguous(memory_format=layout)
    other, grid = x if residual else None, (ONE, ONE, 0, 7) if quantized else (None, None, 0, 0)
    y, _, mean, rstd = triton.batch_norm_act_forward(
        x, CHANNELS, CHANNELS, None, None, other, *grid, True, 1e-5, "relu"
    )
    assert passes(moved) == ((3, 1 + quantized) if residual else (2, 1))
    saved = (x, x, y, CHANNELS, CHANNELS, mean, rstd, *grid, True, "relu")
    moved.clear()
    triton.batch_norm_act_backward(*saved, residual, True)
    assert passes(moved) == ((5, 2) if residual else (4, 1))
    moved.clear()
    triton.batch_norm_act_double_backward(x, CHANNELS, CHANNELS, other, ONE, *saved, residual)
    assert passes(moved) == ((9, 2) if residual else (6, 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_ends_of_batch_norm_act(residual: bool, layout: torch.memory_format, moved: Counter[str]) -> None:
    """The ends come out of the pass that writes y, and their gradient enters the passes that read dy."""
    x = X.contiguous(memory_format=layout)
    op = contract.prepare_batch_norm_act(
        triton, x, training=True, eps=1e-5, activation="relu", with_residual=residual, codes=None,
        with_ends=True,
    )  # fmt: skip
    other = x if residual else None
    y, _, mean, rstd, ends = op.forward(x, CHANNELS, CHANNELS, None, None, other, None, None)
    assert passes(moved) == ((3, 1) if residual else (2, 1))
    moved.clear()
    op.backward(x, x, y, CHANNELS, CHANNELS, mean, rstd, None, None, False, ends, torch.ones(2))
    assert passes(moved) == ((5, 2) if residual else (4, 1))


def test_ends_of_a_tap(moved: Counter[str]) -> None:
    tap = contract.prepare_tap(triton, X)
    ends = tap.ends(X)
    assert passes(moved) == (1, 0)
    moved.clear()
    tap.add_ends_gradient(X, X, ends, torch.ones(2))
    assert passes(moved) == (2, 1)


def test_l1_norm_of_a_network_takes_two_launches(moved: Counter[str]) -> None:
    weights = [torch.randn(i % 5 + 1, 3) for i in range(12)]
    triton.l1_norm_forward(weights)
    assert moved["launches"] == 2
    moved.clear()
    triton.l1_norm_double_backward(weights, weights)
    assert moved["launches"] == 2
    moved.clear()
    triton.l1_norm_backward(torch.ones(12), weights)
    assert moved["launches"] == 1
