"""Copies of a converted model are complete and independent, before, between and after penalised steps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

import gradl1_fast as gl
from gradl1_fast.nn import QuantizedLayer
from tests.conversion.models import MODELS, Base, data_dependent
from tests.conversion.runs import assert_same, built, images, loss_of, penalised, run, truth
from tests.conversion.small import TWO_BLOCKS
from tests.gradients import assert_gradients
from tests.networks import VGG, Network


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model)
    average.update_parameters(model)
    return average.module


COPIES = {f.__name__: f for f in (copy.deepcopy, pickled, saved, averaged)}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
each_network = pytest.mark.parametrize("network", [VGG, TWO_BLOCKS], ids=lambda n: n.id)


@each_copy
@each_network
@pytest.mark.parametrize("stepped", [False, True], ids=["before a step", "after a step"])
def test_copies_are_whole_and_independent(
    copied: Callable[[nn.Module], nn.Module], network: Network, stepped: bool
) -> None:
    model, x = gl.convert(network.make().eval()), network.batch()[0]
    gl.calibrate(model, [x])
    penalty = gl.GradL1(model, 0.1, 0.1) if stepped else None  # the copy is made of an armed model
    if penalty is not None:
        penalty(network.loss(model)).backward()
    twin = copied(model)
    assert type(twin) is type(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert list(twin.state_dict()) == list(model.state_dict())
    assert not any(m.arming.armed for m in twin.modules() if isinstance(m, QuantizedLayer))
    with gl.bits(model, w=4, a=4), gl.bits(twin, w=4, a=4):
        torch.testing.assert_close(network.loss(twin), network.loss(model), rtol=0, atol=0)
    assert_same(penalised(twin, loss_of(x)), truth(network.make().eval(), loss_of(x)))


@each_copy
def test_a_copy_shares_sites_like_the_model(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = gl.convert(TWO_BLOCKS.make())
    twin = copied(model)
    for one in (model, twin):
        block = one.blocks[1]
        assert block.conv1.input_quantizer is block.shortcut[0].input_quantizer
    assert twin.blocks[1].conv1.input_quantizer is not model.blocks[1].conv1.input_quantizer


class DataDependent(Base):
    features = data_dependent


@each_copy
def test_copies_of_a_model_without_a_plan(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = gl.convert(built(DataDependent))
    assert_gradients(run(copied(model), images()), run(copy.deepcopy(model), images()), 1e-15)


def test_a_shallow_copy_is_the_same_model() -> None:
    model = gl.convert(VGG.make())
    twin, x = copy.copy(model), VGG.batch()[0]
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert_same(penalised(twin, loss_of(x)), truth(VGG.make(), loss_of(x)))
    assert_same(penalised(copy.copy(model), loss_of(x)), truth(VGG.make(), loss_of(x)))


def test_a_shallow_copy_of_a_model_that_ran_plans_does_not_run_the_models() -> None:
    model, x = gl.convert(VGG.make().eval()), VGG.batch()[0]
    penalised(model, loss_of(x))
    twin = copy.copy(model)
    twin._modules = {**model._modules, "5": nn.Hardtanh()}
    theirs = VGG.make().eval()
    theirs[5] = nn.Hardtanh()
    for _ in range(2):
        assert_same(penalised(twin, loss_of(x)), truth(theirs, loss_of(x)))
    assert_same(penalised(model, loss_of(x)), truth(VGG.make().eval(), loss_of(x)))


@pytest.mark.parametrize("armed", [False, True])
def test_a_replica_of_data_parallelism_computes_with_its_own_parameters(armed: bool) -> None:
    model, x = gl.convert(VGG.make()), VGG.batch()[0]
    penalty = gl.GradL1(model, 0.1, 0.1) if armed else None
    expected = model(x)
    replica = replicated(model)
    torch.testing.assert_close(replica(x), expected)
    for module in replica.modules():  # as replicate() does, with copies on another device
        for name, parameter in module.__dict__["_former_parameters"].items():
            if parameter is not None:
                setattr(module, name, torch.zeros_like(parameter))
    assert not replica(x).any()
    torch.testing.assert_close(model(x), expected)
    del penalty


def replicated(model: nn.Module) -> nn.Module:
    """Do what ``torch.nn.parallel.replicate`` does, on one device."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        replica._former_parameters = dict(module._parameters)
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[model]


@pytest.mark.parametrize("armed", [False, True])
@pytest.mark.parametrize("name", ["functional_relu", "in_place_add", "data_dependent"])
def test_functional_call_uses_the_given_parameters(name: str, armed: bool) -> None:
    model = built(MODELS[name], training=False)
    converted = gl.convert(model)
    penalty = gl.GradL1(converted, 0.1, 0.1) if armed else None
    torch.manual_seed(3)
    other = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for given in (other, dict(model.named_parameters()), {n: 2 * p for n, p in other.items()}):
        actual = functional_call(converted, given, (images(),))
        torch.testing.assert_close(actual, functional_call(model, given, (images(),)), rtol=1e-9, atol=1e-12)
    del penalty


def test_a_model_moves_with_its_probes_and_plans() -> None:
    model, (x, y) = gl.convert(VGG.make(torch.float32)), VGG.batch()
    penalty = gl.GradL1(model, 1.0, 1.0)
    penalty(nn.functional.cross_entropy(model(x.float()), y))
    model.double()
    assert penalty(nn.functional.cross_entropy(model(x), y)).dtype == torch.float64


def test_converting_a_traced_model() -> None:
    x = VGG.batch()[0]
    for copied in (lambda model: model, copy.deepcopy, pickled):
        converted = copied(gl.convert(torch.fx.symbolic_trace(VGG.make())))
        assert len([m for m in converted.modules() if isinstance(m, QuantizedLayer)]) == 5
        assert_same(penalised(converted, loss_of(x)), truth(VGG.make(), loss_of(x)))
