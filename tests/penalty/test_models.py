"""GradL1 with uncommon models: hooks, a layer as the whole model, data parallelism."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from tests import oracle
from tests.gradients import assert_gradients
from tests.networks import VGG


def penalised(model: nn.Module) -> list[Tensor]:
    penalty, loss = gl.GradL1(model, 0.3, 0.2), VGG.loss(model)
    (loss + penalty(loss)).backward()
    return [p.grad for p in model.parameters()]


def test_hooks_on_gradients_see_both_passes_and_change_nothing() -> None:
    hooked, seen = gl.convert(VGG.make()), []
    for name in ("1", "3"):
        hooked.get_submodule(name).register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].shape))
    parameter = hooked.get_submodule("3").weight
    parameter.register_hook(lambda grad: seen.append(grad.shape))
    assert_gradients(penalised(hooked), penalised(gl.convert(VGG.make())), 1e-12)
    assert seen.count(parameter.shape) == 2
    assert len(seen) == 2 * 3


def test_a_gradient_that_a_hook_changes_is_the_one_that_is_penalised() -> None:
    model = gl.convert(VGG.make())
    penalty = gl.GradL1(model, 1.0, 0.0, scale="none")
    plain = penalty(VGG.loss(model)).detach()
    for name in penalty.terms:
        model.get_parameter(name).register_hook(lambda grad: 3 * grad)
    torch.testing.assert_close(penalty(VGG.loss(model)).detach(), 3 * plain)


def test_a_convolution_is_a_whole_model() -> None:
    torch.manual_seed(2)
    plain, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 0.7, 0.0, scale="none")
    loss = model(x).square().mean()
    found = torch.autograd.grad(loss + penalty(loss), list(model.parameters()))

    def measured() -> oracle.Measured:
        y = F.conv2d(x, plain.weight, plain.bias)
        return oracle.Measured(y.square().mean(), {"weight": plain.weight}, {})

    expected = oracle.penalised_gradients(
        measured, dict(plain.named_parameters()), lambda_w=0.7, lambda_a=0.0
    )
    assert list(penalty.terms) == ["weight"]
    assert_gradients(list(found), list(expected.gradients.values()))


@pytest.mark.parametrize("inside", [False, True])
def test_data_parallel_over_several_devices_is_refused_by_name(inside: bool) -> None:
    model = gl.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)))
    wrapped = nn.DataParallel(model)
    whole = nn.Sequential(wrapped) if inside else wrapped
    gl.GradL1(whole, 0.1, 0.1)  # with one device, or none, it calls the model itself
    wrapped.device_ids = [0, 1]
    with pytest.raises(
        ValueError, match=r"DataParallel runs copies of the model on several .*DistributedDataParallel"
    ):
        gl.GradL1(whole, 0.1, 0.1)
