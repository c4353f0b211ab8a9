"""A penalised step of all operations: compiled and traced, it equals eager.

By inductor, tests/interoperability/test_compile.py compiles a step of a network.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gradl1_fast import functional as ours
from tests.gradients import assert_gradients
from tests.ops.cases import random
from tests.ops.sweeps import leaf

SHAPES = ((4, 3, 6, 6), (4, 3, 3, 3), (4,), (4,), (4, 1, 3, 3), (5, 4), (5,), (), (), (), ())


def arguments() -> list[Tensor]:
    leaves = [leaf(random(shape, i)) for i, shape in enumerate(SHAPES)]
    return [*leaves, torch.zeros(4).double(), torch.ones(4).double()]


def penalised_step(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    depthwise: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    p_w: Tensor,
    p_x: Tensor,
    p_y: Tensor,
    p_h: Tensor,
    mean: Tensor,
    var: Tensor,
) -> list[Tensor]:
    """Return loss, penalty and their gradients; two layers, one with a residual, all three kinds of site."""
    grid_of_w = [
        t.detach() for t in ours.quantization_grid(*ours.value_range(w.detach(), 0), 4, symmetric=True)[:2]
    ]
    w_hat = ours.fake_quantize(w, *grid_of_w, -7, 7, axis=0, probe=p_w)
    step, zero = x.new_tensor(0.25), x.new_tensor(8.0)
    h = ours.conv(ours.fake_quantize(x, step, zero, 0, 15, probe=p_x), w_hat, padding="same")
    h = ours.batch_norm_act(h, mean, var, gamma, beta, training=True, activation="relu", probe=p_y)
    z = ours.conv(h, depthwise, padding=1, groups=4)
    grid = (step, zero, 0, 15)
    h = ours.batch_norm_act(
        z, None, None, training=True, residual=h, activation="relu6", grid=grid, probe=p_h
    )
    h = ours.batch_norm_act(h, mean, var, training=False, grid=grid)
    loss = ours.linear(h.mean((2, 3)), w_out, b_out).sin().sum()
    weights, probes = [depthwise, w_out], [p_w, p_x, p_y, p_h]
    gradients = torch.autograd.grad(loss, weights + probes, create_graph=True)
    penalty = ours.l1_norm(gradients[:2]).sum() + sum(gradients[2:])
    total = torch.autograd.grad(loss + penalty, [x, w, gamma, beta, depthwise, w_out, b_out])
    return [loss.detach(), penalty.detach(), *total, mean, var]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.usefixtures("trace_autograd")
def test_aot_eager_equals_eager(dynamic: bool) -> None:
    compiled = torch.compile(penalised_step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_gradients(compiled(*arguments()), penalised_step(*arguments()), 1e-12)


@pytest.mark.usefixtures("trace_autograd")
def test_a_compiled_third_order_raises() -> None:
    def third_order(x: Tensor, w: Tensor) -> Tensor:
        value = ours.conv(x, w).exp().sum()
        for _ in range(3):
            value = torch.autograd.grad(value, w, create_graph=True)[0].square().sum()
        return value

    compiled = torch.compile(third_order, backend="aot_eager")
    with pytest.raises(Exception, match="first and second order gradients only"):
        compiled(*arguments()[:2])


def test_make_fx_agrees() -> None:
    graph = make_fx(penalised_step)(*arguments())
    assert any("batch_norm_act_double_backward" in str(node.target) for node in graph.graph.nodes)
    assert_gradients(graph(*arguments()), penalised_step(*arguments()), 1e-12)
