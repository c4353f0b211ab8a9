"""torch.compile of a penalised step, cut in every place: equal to eager, or an error.

Whole steps at every width and scale are in tests/penalty/test_compile.py, operators in tests/ops.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gradl1_fast as gl
from tests.gradients import assert_gradients
from tests.interoperability.step import LAMBDAS, assert_penalty_counts, data, gradients, loss_of, network
from tests.ops.sweeps import leaf

Way = Callable[[nn.Module, gl.GradL1], list[Tensor]]
Model = Callable[[Tensor], Tensor]
compiled = partial(torch.compile, backend="aot_eager")


def total(model: Model, penalty: gl.GradL1, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    return loss + penalty(loss)


def of_parameters(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


def backward_inside(model: nn.Module, penalty: gl.GradL1) -> list[Tensor]:
    def step(x: Tensor, y: Tensor) -> None:
        total(model, penalty, x, y).backward()

    compiled(step, fullgraph=True)(*data())
    return [p.grad for p in model.parameters()]


def backward_outside(model: nn.Module, penalty: gl.GradL1) -> list[Tensor]:
    return of_parameters(compiled(partial(total, model, penalty), fullgraph=True)(*data()), model)


def broken_behind_the_penalty(model: nn.Module, penalty: gl.GradL1) -> list[Tensor]:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        value = total(model, penalty, x, y)
        torch._dynamo.graph_break()
        return of_parameters(value, model)

    return compiled(step)(*data())


def broken_before_the_penalty(model: nn.Module, penalty: gl.GradL1) -> None:
    # Here PyTorch itself would fill no gradient at all, and say nothing.
    def step(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(model(x), y)
        torch._dynamo.graph_break()
        (loss + penalty(loss)).backward()

    compiled(step)(*data())


def broken_before_the_criterion(model: nn.Module, penalty: gl.GradL1) -> list[Tensor]:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        output = model(x)
        torch._dynamo.graph_break()
        return of_parameters(total(lambda _: output, penalty, x, y), model)

    return compiled(step)(*data())


def model_alone(model: nn.Module, penalty: gl.GradL1) -> list[Tensor]:
    loss = loss_of(compiled(model))
    return of_parameters(loss + penalty(loss), model)


def one_layer(model: nn.Module, penalty: gl.GradL1) -> list[Tensor]:
    parameters = list(model.parameters())
    model.add_module("3", compiled(model.get_submodule("3")))
    loss = loss_of(model)
    return list(torch.autograd.grad(loss + penalty(loss), parameters))


def criterion_alone(model: nn.Module, penalty: gl.GradL1) -> list[Tensor]:
    x, y = data()
    loss = compiled(F.cross_entropy)(model(x), y)
    return of_parameters(loss + penalty(loss), model)


WORKS = [backward_inside, backward_outside, broken_behind_the_penalty]
RAISES = [broken_before_the_penalty, broken_before_the_criterion, model_alone, one_layer, criterion_alone]


@pytest.mark.parametrize("way", WORKS, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("trace_autograd")
def test_compiling_penalty_and_loss_together_equals_eager(way: Way) -> None:
    model = network()
    found = way(model, gl.GradL1(model, *LAMBDAS))
    assert_gradients(found, gradients(network()), 1e-12)
    assert_penalty_counts(found, gradients(network(), 0, 0))


@pytest.mark.parametrize("lambdas", [LAMBDAS, (LAMBDAS[0], 0)], ids=str)
@pytest.mark.parametrize("way", RAISES, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("trace_autograd")
def test_a_forward_pass_compiled_without_its_penalty_is_refused(
    way: Way, lambdas: tuple[float, float]
) -> None:
    model = network()
    with pytest.raises(RuntimeError, match=r"region of torch\.compile that ends before the penalty"):
        way(model, gl.GradL1(model, *lambdas))


@pytest.mark.usefixtures("trace_autograd")
def test_autocast_inside_a_compiled_step() -> None:
    def step(model: nn.Module, penalty: gl.GradL1, x: Tensor, y: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            value = total(model, penalty, x, y)
        return of_parameters(value, model)

    results = []
    for run in (step, compiled(step, fullgraph=True)):
        model = network(torch.float32)
        results.append(run(model, gl.GradL1(model, *LAMBDAS), *data(torch.float32)))
    # The eager step runs plans, the compiled one the modules, so that bfloat16 is rounded at other places.
    assert_gradients(results[1], results[0], torch.finfo(torch.bfloat16).eps / 2)  # the error of one rounding
    assert_penalty_counts(results[1], gradients(network(torch.float32), 0, 0))


@pytest.mark.usefixtures("trace_autograd")
def test_functional_call_inside_a_compiled_step() -> None:
    model = network()
    penalty = gl.GradL1(model, 0, LAMBDAS[1])

    def step(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(functional_call(model, parameters, (x,)), y)
        return list(torch.autograd.grad(loss + penalty(loss), list(parameters.values())))

    parameters = {name: leaf(p) for name, p in model.named_parameters()}
    found = compiled(step, fullgraph=True)(parameters, *data())
    assert_gradients(found, gradients(network(), 0, LAMBDAS[1]), 1e-12)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler (g++) on a CPU")
@pytest.mark.usefixtures("trace_autograd")
def test_inductor_compiles_a_whole_step() -> None:
    model = network()
    penalty = gl.GradL1(model, *LAMBDAS)
    step = torch.compile(lambda x, y: of_parameters(total(model, penalty, x, y), model), fullgraph=True)
    # Without its caches on disk, which outlive the schema of an operator.
    with torch._inductor.config.patch(force_disable_caches=True):
        found = step(*data())
    assert_gradients(found, gradients(network()), 1e-12)
    assert_penalty_counts(found, gradients(network(), 0, 0))
