"""Rounding methods compared with independent results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.foreign import product_in
from gradl1_fast.quantization.rounding.base import Problem
from gradl1_fast.quantization.rounding.second_moments import SecondMoments

GPTQ, AdaRound = gl.rounding.GPTQ, gl.rounding.AdaRound


def problem(bits: int, *, groups: int = 1, rows: int = 3, columns: int = 7, seed: int = 0) -> Problem:
    """Return a problem with correlated inputs, one of which is always zero."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance, dtype=torch.float64)

    x = normal(groups, columns, columns) @ normal(groups, columns, 4 * columns)
    x[:, columns // 2] = 0
    weight = normal(groups, rows, columns)
    limit = max(2 ** (bits - 1) - 1, 1)
    scale = weight.abs().amax(-1, keepdim=True) / limit
    return Problem(weight, x @ x.mT / x.shape[-1], scale, -limit, limit if bits > 1 else 0)


def textbook(p: Problem, group: int, damping: float, order: Tensor) -> Tensor:
    """Return what GPTQ gives by its definition: after each column, the rest is solved for anew."""
    h, weight = p.moments[group].clone(), p.weight[group].clone()
    dead = h.diagonal() == 0
    h += torch.diag(damping * h.diagonal().mean() + dead)
    codes = torch.empty_like(weight)
    left = order.tolist()
    while left:
        i, left = left[0], left[1:]
        codes[:, i] = (weight[:, i] / p.scale[group, :, 0]).round().clamp(p.q_min, p.q_max)
        error = weight[:, i] - codes[:, i] * p.scale[group, :, 0]
        if left:  # min over d of the output's error with column i off by -error: H_ll d = H_li error
            weight[:, left] += torch.linalg.solve(h[left][:, left], h[left, i])[None] * error[:, None]
    return codes


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_gptq_follows_its_definition(block: int, order: bool) -> None:
    p = problem(3, groups=2)
    codes = GPTQ(block=block, order=order)._in_order(p, GPTQ(order=order)._order(p.moments))
    for group in range(2):
        diagonal = p.moments[group].diagonal()
        places = diagonal.argsort(descending=True, stable=True) if order else torch.arange(7)
        assert torch.equal(codes[group], textbook(p, group, 0.01, places))
    assert not torch.equal(codes, p.nearest(p.weight))


METHODS: dict[str, gl.rounding.RoundingMethod] = {"gptq": GPTQ(), "adaround": AdaRound(steps=100)}


@pytest.mark.parametrize("name", METHODS)
def test_no_row_has_a_larger_error_than_with_nearest_codes(name: str) -> None:
    gained = 0.0
    for bits in (1, 2, 3, 8, 16):
        for seed in range(2 if bits < 8 else 1):
            p = problem(bits, groups=1 + seed, seed=seed)
            codes, nearest = METHODS[name].codes(p), p.nearest(p.weight)
            d, before = p.weight - codes * p.scale, p.weight - nearest * p.scale
            errors = torch.diagonal(d @ p.moments @ d.mT, dim1=-2, dim2=-1)
            others = torch.diagonal(before @ p.moments @ before.mT, dim1=-2, dim2=-1)
            assert bool((errors <= others).all())
            assert torch.equal(codes, codes.round().clamp(p.q_min, p.q_max))
            gained += float((others > 1.05 * errors).double().mean()) / 8
    assert gained > 0.3


@pytest.mark.parametrize("name", METHODS)
def test_independent_inputs_give_nearest_codes(name: str) -> None:
    p = problem(4, rows=5, columns=12)
    alone = Problem(p.weight, torch.eye(12, dtype=torch.float64)[None], p.scale, p.q_min, p.q_max)
    assert torch.equal(METHODS[name].codes(alone), p.nearest(p.weight))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 8, 7)),
    "same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), (2, 3, 6, 7)),
    "valid, without a batch": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 6, 7)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 5, 4, 6)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_moments_determine_the_error_of_the_output(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradl1_fast.quantization.rounding.second_moments._LARGEST", 300)  # in several parts
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    layer = gl.convert(make().double())
    x = torch.randn(shape, dtype=torch.float64)
    moments = SecondMoments()
    moments.update(product_in(layer, (x,), {}))
    d = torch.randn_like(layer.weight)
    rows = d.reshape(getattr(layer, "groups", 1), -1, d[0].numel())
    told = ((rows @ moments.mean()) * rows).sum() * moments.count
    with torch.no_grad():
        y = layer(x)
        layer.weight += d
        torch.testing.assert_close(told, (layer(x) - y).square().sum())
