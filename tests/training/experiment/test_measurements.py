"""Measurements against ordinary autograd and against the library's own switches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.training.experiment import measurements
from tests import oracle
from tests.networks import VGG, layers


def network():
    return gl.convert(VGG.make()).train()


def test_norms_equal_those_of_ordinary_autograd():
    model, plain = network(), VGG.make().eval()
    before = copy.deepcopy(model.state_dict())
    found = measurements.norms(model, VGG.batch(), 1.5)
    names = layers(plain)
    measured = oracle.measure(
        plain, VGG.loss, weights=[f"{name}.weight" for name in names], inputs_of=names[1:]
    )
    for kind, tensors, step in (
        ("w", measured.weights, oracle.symmetric_step),
        ("a", measured.activations, oracle.affine_step),
    ):
        grads = torch.autograd.grad(measured.loss, list(tensors.values()), retain_graph=True)
        expected = {
            f"l1_{kind}": sum(g.abs().sum() for g in grads),
            f"l2_{kind}": sum((g * g).sum() ** 0.5 for g in grads),
            f"step_l1_{kind}": sum(
                step(t, 4) * g.abs().sum() for t, g in zip(tensors.values(), grads, strict=True)
            ),
        }
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(float(value.detach()), rel=1e-10), name
    assert (found.epoch, found.loss) == (1.5, pytest.approx(float(measured.loss.detach())))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_small_moves_do_what_the_first_order_foretells():
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = [c for c in measurements.changes(model, VGG.batch()) if c.kind == "sign"]
    assert [c.size for c in found] == [2.0**power for power in range(-6, 3)]
    errors = [abs(c.measured / c.predicted - 1) for c in found]
    assert errors[0] < 0.05
    assert errors[0] < errors[3] < errors[6]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_slope_is_half_a_step_times_the_norm():
    model = network()
    mark = measurements.norms(model, VGG.batch(), 0.0)
    change = next(c for c in measurements.changes(model, VGG.batch()) if c.size == 1)
    assert change.predicted == pytest.approx(mark.step_l1_w / 2, rel=1e-10)


def test_quantized_moves_are_those_of_the_library():
    model, batch = network().eval(), VGG.batch()
    found = [c for c in measurements.changes(model, batch, (8, 4)) if c.kind == "quantized"]
    assert [c.size for c in found] == [7 / 127, 1.0]
    loss = float(VGG.loss(model).detach())
    with gl.bits(model, w=4, a=None):
        assert found[1].measured == pytest.approx(float(VGG.loss(model).detach()) - loss, rel=1e-10)


def test_one_tensor_at_a_time_is_quantized():
    model, batch = network().eval(), VGG.batch()
    gl.calibrate(model, [batch])
    found = measurements.alone(model, batch, 3)
    names = [f"{name}.weight" for name in named_layers(model)]
    assert [entry.tensor for entry in found[: len(names)]] == names
    assert len(found) > len(names)
    before = VGG.loss(model).detach()
    layer = next(iter(named_layers(model).values()))
    with torch.no_grad():
        weight = layer.weight.clone()
        layer.weight.copy_(_rounded(weight, 3))
        logits = model(batch[0])
        layer.weight.copy_(weight)
    assert found[0].rise == pytest.approx(float(F.cross_entropy(logits, batch[1]) - before), rel=1e-9)
    assert {entry.tensor for entry in found if entry.bits != 3} == {"0.input"}  # the images, at 8 bits
    assert all(layer.weight_quantizer.bits is None for layer in named_layers(model).values())


def _rounded(weight, bits):
    limit = 2 ** (bits - 1) - 1
    return oracle.fake_quantize(weight, oracle.symmetric_step(weight, bits), torch.zeros(()), -limit, limit)
