"""Both coefficients from the share of the penalty in the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from tests.networks import VGG
from tests.penalty.small import curved, linears


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 6, 3, 8, 8, generator=generator).double()
    return [(x, torch.arange(6) % 5) for x in inputs]


def step(model: nn.Module, penalty: gl.GradL1, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(model(x), y)
    return loss.detach(), penalty(loss).detach()


def of_activations(terms: dict[str, Tensor]) -> tuple[float, float]:
    """Return the sums over weights and over activations."""
    inputs = sum(float(v) for name, v in terms.items() if name.endswith(".input"))
    return sum(map(float, terms.values())) - inputs, inputs


@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("share", [0.25, 0.05])
def test_after_eight_batches_the_penalty_has_its_share_of_the_loss(share: float, scale: str) -> None:
    model = gl.convert(VGG.make())
    penalty = gl.GradL1(model, share=share, scale=scale)
    for x, y in batches(8):
        step(model, penalty, x, y)
    losses, weights, activations = [], [], []
    for x, y in batches(8):
        losses.append(float(step(model, penalty, x, y)[0]))
        w, a = of_activations(penalty.terms)
        weights.append(penalty.lambda_w * w)
        activations.append(penalty.lambda_a * a)
    # The same batches again: each term is half of the share to the last digits.
    assert sum(weights) / sum(losses) == pytest.approx(share / 2, rel=1e-9)
    assert sum(activations) / sum(losses) == pytest.approx(share / 2, rel=1e-9)


def test_the_share_is_close_on_an_unseen_batch() -> None:
    model = gl.convert(VGG.make())
    penalty = gl.GradL1(model, share=0.25)
    *first, last = batches(9)
    for x, y in first:
        step(model, penalty, x, y)
    loss, extra = step(model, penalty, *last)
    assert 0.15 < float(extra / loss) < 0.4


def test_from_the_first_batch_on_the_penalty_has_the_share() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, share=0.2)
    loss = curved(model)
    assert float(penalty(loss) / loss) == pytest.approx(0.2)
    weights, activations = of_activations(penalty.terms)
    assert penalty.lambda_w * weights == pytest.approx(penalty.lambda_a * activations)


def test_the_coefficients_are_fixed_afterwards() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, share=0.2)
    seen = []
    for i in range(12):
        penalty((1 + i) * curved(model).square())
        seen.append((penalty.lambda_w, penalty.lambda_a))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)
    assert len(set(seen[:8])) == 8
    assert set(seen[7:]) == {seen[7]}


def test_a_batch_with_a_non_finite_loss_is_skipped() -> None:
    model = gl.convert(linears())
    penalty, other = gl.GradL1(model, share=0.2), gl.GradL1(model, share=0.2)
    for i in range(8):
        penalty(curved(model))
        if i % 2:
            penalty(curved(model) * float("nan"))
            penalty(curved(model) * float("inf"))
        other(curved(model))
    assert (penalty.lambda_w, penalty.lambda_a) == (other.lambda_w, other.lambda_a)
    assert penalty.lambda_w > 0


def test_only_calls_that_apply_the_penalty_are_measured() -> None:
    model = gl.convert(linears())
    rarely, always = gl.GradL1(model, share=0.2, every=2), gl.GradL1(model, share=0.2)
    for _ in range(2):
        rarely(curved(model))
    always(curved(model))
    assert (rarely.lambda_w, rarely.lambda_a) == (always.lambda_w, always.lambda_a)


def test_a_model_of_one_layer_gives_the_whole_share_to_the_weights() -> None:
    model = gl.convert(nn.Linear(3, 2).double())
    penalty = gl.GradL1(model, share=0.2)
    loss = curved(model)
    assert float(penalty(loss) / loss) == pytest.approx(0.2)
    assert penalty.lambda_a == 0


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "and a lambda": ({"share": 0.2, "lambda_w": 0.1}, ValueError, "not both"),
    "and both": ({"share": 0.2, "lambda_w": 0.1, "lambda_a": 0.1}, ValueError, "not both"),
    "0": ({"share": 0.0}, ValueError, "share must be more than 0"),
    "negative": ({"share": -0.2}, ValueError, "share must be finite and 0 or more"),
    "NaN": ({"share": float("nan")}, ValueError, "share must be finite"),
    "True": ({"share": True}, TypeError, "share must be a number"),
    "text": ({"share": "0.2"}, TypeError, "share must be a number"),
    "approximation": (
        {"share": 0.2, "method": "finite_difference"},
        ValueError,
        "share needs method='exact'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_share(case: str) -> None:
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        gl.GradL1(gl.convert(linears()), **arguments)
