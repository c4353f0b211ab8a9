"""BiTAT: the layer objective in its eigenbasis, the scales of groups, the stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.binary_transform import (
    BinaryGrid,
    correlation,
    groups_of,
    rows_of,
    transformed_error,
)
from gradl1_fast.training.methods.weights import leaf_of
from tests.gradients import assert_gradient
from tests.training.methods import small

GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(4, 6, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(50, 6, generator=GENERATOR, dtype=torch.float64) * torch.linspace(0.2, 2, 6).double()


def test_the_objective_is_the_error_of_the_output():
    matrix = correlation(nn.Linear(6, 4), X)
    importance, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6, dtype=torch.float64))
    expected = (X @ W.T).square().sum() / 50
    assert float(transformed_error(W, vectors, importance)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}])
def test_the_rows_of_a_convolution_are_its_patches(options):
    conv, x = nn.Conv2d(2, 4, 3, bias=False, **options).double(), torch.randn(3, 2, 7, 7).double()
    importance, vectors = torch.linalg.eigh(correlation(conv, x))
    y = conv(x).detach()
    expected = float(y.square().sum() / (y.numel() / 4))
    error = rows_of(conv.weight.detach(), 0)
    assert float(transformed_error(error, vectors, importance)) == pytest.approx(expected, rel=1e-10)


def test_a_grouped_convolution_has_no_correlation():
    assert correlation(nn.Conv2d(4, 4, 3, groups=4), torch.randn(1, 4, 5, 5)) is None


def test_one_group_is_xnor_net():
    value = BinaryGrid(W, 0).quantize(W, 1)
    torch.testing.assert_close(value, W.abs().mean(1, keepdim=True) * W.sign(), rtol=1e-12, atol=0)
    assert groups_of(torch.ones(6).double(), 4).unique().numel() == 1


def test_the_scales_of_groups_are_least_squares():
    grid = BinaryGrid(W, 0)
    grid.groups.copy_(torch.tensor([0, 2, 2, 1, 0, 2]))
    value = grid.quantize(W, 1)
    for group in range(3):
        at = grid.groups == group
        inner = (value * (W - value))[:, at].sum(1)
        torch.testing.assert_close(inner, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(value.sign(), W.sign())


def test_groups_follow_the_importance():
    assert groups_of(torch.tensor([0.1, 5.0, 0.12, 4.9, 0.11]).double(), 2).tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("axis", [0, 1])
def test_the_gradient_passes_where_the_weight_is_at_most_1(axis):
    w, g = W.clone().requires_grad_(), torch.randn_like(W)
    grid = BinaryGrid(W, axis)
    (found,) = torch.autograd.grad((grid.quantize(w, 1) * g).sum(), w)
    assert_gradient(found, g * (W.abs() <= 1), 1e-12)
    scales = rows_of(grid.quantize(W, 1), axis).abs()[:, 0]
    torch.testing.assert_close(scales, rows_of(W, axis).abs().mean(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_the_objective_draws_the_weight_to_its_binary_form(count):
    model = gl.convert(nn.Sequential(nn.Linear(6, 4, bias=False).double()))
    model[0].weight.data.copy_(W)
    terms, grads = small.step("bitat", model, lambda: 0 * model(X).sum(), a=None, gamma=0.5, groups=count)
    matrix = X.T @ X / 50
    groups = groups_of(matrix.diagonal(), count)
    assert len(groups.unique()) == count
    scales = torch.stack([W[:, groups == group].abs().mean(1) for group in groups], 1)
    error = W - scales * W.sign()
    assert_gradient(grads["0.parametrizations.weight.original"], error @ matrix, 1e-9)
    assert float(terms.penalty) == pytest.approx(0.5 * float((X @ error.T).square().sum() / 50))


def test_layers_become_binary_one_after_the_other():
    model = small.network()
    method = make("bitat", model, a=None, stage_steps=1)
    binary, trained = [], []
    for _ in range(4):
        model.zero_grad()
        seen = []
        handles = [
            model[i].register_forward_hook(
                lambda m, *_, seen=seen: seen.append(m.parametrizations.weight[0].bits)
            )
            for i in (0, 4, 8)
        ]
        method.backward(lambda: nn.functional.cross_entropy(model(small.IMAGES[0]), small.IMAGES[1]))
        for handle in handles:
            handle.remove()
        binary.append(seen)
        trained.append([leaf_of(model[i]).grad is not None for i in (0, 4, 8)])
        method.after_step()
    assert binary == [[1, None, None], [1, 1, None], [1, 1, 1], [1, 1, 1]]
    assert trained == [[True] * 3, [False, True, True], [False, False, True], [False, False, True]]
    assert not any(module._forward_pre_hooks for module in model)
