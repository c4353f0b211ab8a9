"""The number of convolutions in a penalised step, counted in PyTorch's dispatcher."""

from __future__ import annotations

import pytest
import torch

from gradl1_fast import functional as ours
from tests.convolutions import Convolutions
from tests.ops.sweeps import leaf


def penalised_step(
    x_needs_grad: bool, on_weight: bool, on_activation: bool, groups: int = 1
) -> list[dict[str, int]]:
    """Count in the forward pass, the first backward and the second; the loss is curved."""
    x = torch.randn(2, 4, 6, 6, requires_grad=x_needs_grad)
    w, b = leaf(torch.randn(4, 4 // groups, 3, 3)), leaf(torch.randn(4))
    probe = leaf(torch.zeros(()))
    counted = []
    with Convolutions() as mode:
        # A probe before the layer needs the layer's input gradient, one after it does not.
        h = ours.tap(x, probe) if x_needs_grad else x
        y = ours.conv(h, w, b, padding=1, groups=groups)
        loss = y.sin().sum()
        counted.append(dict(mode.counts))
        sites = ([w] if on_weight else []) + ([probe] if on_activation else [])
        gradients = torch.autograd.grad(loss, sites, create_graph=True)
        counted.append(dict(mode.counts))
        penalty = ours.l1_norm([g for g in gradients if g.dim()] or [torch.zeros(1)]).sum()
        penalty = penalty + sum(g for g in gradients if not g.dim())
        torch.autograd.grad(loss + penalty, [w, b, *([x] if x_needs_grad else [])])
        counted.append(dict(mode.counts))
    return counted


STEPS = {
    "weights and activations": ((True, True, True), {"fprop": 3, "dgrad": 3, "wgrad": 3}),
    "activations": ((True, False, True), {"fprop": 2, "dgrad": 2, "wgrad": 2}),
    "first layer": ((False, True, False), {"fprop": 2, "dgrad": 0, "wgrad": 2}),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("groups", [1, 4], ids=["dense", "depthwise"])
def test_no_convolution_is_wasted(step: str, groups: int) -> None:
    arguments, expected = STEPS[step]
    total = penalised_step(*arguments, groups=groups)[-1]
    assert {kind: total.get(kind, 0) for kind in expected} == expected


def test_a_penalty_on_activations_computes_no_weight_gradient_in_the_first_backward() -> None:
    forward, first, _ = penalised_step(True, False, True)
    assert forward == {"fprop": 1}
    assert first == {"fprop": 1, "dgrad": 1, "wgrad": 0}


def test_no_gradient_is_computed_for_a_frozen_weight() -> None:
    x, w, probe = leaf(torch.randn(2, 4, 6, 6)), torch.randn(4, 4, 3, 3), leaf(torch.zeros(()))
    with Convolutions() as mode:
        loss = ours.conv(ours.tap(x, probe), w, padding=1).sin().sum()
        (l1,) = torch.autograd.grad(loss, probe, create_graph=True)
        torch.autograd.grad(loss + l1, x)
    assert {kind: n for kind, n in mode.counts.items() if n} == {"fprop": 2, "dgrad": 2}


def test_an_unpenalised_step_takes_three() -> None:
    x, w = leaf(torch.randn(2, 4, 6, 6)), leaf(torch.randn(4, 4, 3, 3))
    with Convolutions() as mode:
        ours.conv(x, w).sum().backward()
    assert dict(mode.counts) == {"fprop": 1, "dgrad": 1, "wgrad": 1}


def test_a_plain_probe_after_the_layer_adds_nothing_to_the_first_backward() -> None:
    x, w, probe = leaf(torch.randn(2, 4, 6, 6)), leaf(torch.randn(4, 4, 3, 3)), leaf(torch.zeros(()))
    with Convolutions() as mode:
        y = ours.tap(ours.conv(x, w), probe)
        torch.autograd.grad(y.sin().sum(), probe, create_graph=True)
    assert dict(mode.counts) == {"fprop": 1}
