"""torch.compile and other transforms of converted models: equal to eager, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gradl1_fast as gl
from tests.conversion.lookalikes import OF_IMAGES
from tests.conversion.models import MODELS
from tests.conversion.runs import assert_same, built, images, loss_of, penalised, run, truth
from tests.gradients import assert_gradients
from tests.networks import RESNET, VGG

COMPILED = ("in_place_add", "conv_called_twice", "data_dependent")


@pytest.fixture(autouse=True)
def _nothing_outlives_a_test() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_equals_the_original(name: str) -> None:
    plain, converted = built(MODELS[name]), gl.convert(built(MODELS[name]))
    compiled = torch.compile(converted, backend="aot_eager")
    for _ in range(2):
        assert_gradients(run(compiled, images()), run(plain, images()), 1e-12)


def test_a_network_is_one_graph() -> None:
    converted = gl.convert(VGG.make().eval())
    x = VGG.batch()[0]
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), VGG.make().eval()(x))
    gl.calibrate(converted, [x])
    with gl.bits(converted, w=4, a=4):
        torch.testing.assert_close(compiled(x), converted(x))
    torch.testing.assert_close(compiled(x), converted(x))


def test_module_compile_is_left_to_the_user() -> None:
    """``module.compile()`` uses the place that plans use: neither displaces the other."""
    x = VGG.batch()[0]
    converted = gl.convert(VGG.make())
    converted.compile(backend="aot_eager")
    own = converted._compiled_call_impl
    torch.testing.assert_close(converted(x), VGG.make()(x))
    gl.GradL1(converted, 0.1, 0.1)
    assert converted._compiled_call_impl is own
    after = gl.convert(VGG.make())
    penalised(after, loss_of(x))
    after.compile(backend="aot_eager")
    torch.testing.assert_close(after.eval()(x), VGG.make().eval()(x), rtol=1, atol=10)
    assert after._compiled_call_impl is not None


def test_eager_steps_before_and_after_a_compiled_pass() -> None:
    x = VGG.batch()[0]
    plain, converted = VGG.make().eval(), gl.convert(VGG.make().eval())
    assert_same(penalised(converted, loss_of(x)), truth(plain, loss_of(x)))
    torch.testing.assert_close(torch.compile(converted, backend="aot_eager")(x), plain(x))
    assert_same(penalised(converted, loss_of(x)), truth(plain, loss_of(x)))


@pytest.mark.parametrize("armed", [False, True])
def test_jit_tracing_of_a_converted_model_is_correct(armed: bool) -> None:
    x = VGG.batch()[0]
    plain, converted = VGG.make().eval(), gl.convert(VGG.make().eval())
    penalty = gl.GradL1(converted, 0.1, 0.1) if armed else None
    if armed:
        loss_of(x)(converted)
    for context in (torch.no_grad(),) if armed else (torch.no_grad(), torch.enable_grad()):
        with context:
            traced = torch.jit.trace(converted, x, check_trace=False)
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), plain(other))
    del penalty


def test_fx_tracing_sees_the_layers_as_those_of_torch() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, nn.Conv2d | nn.Linear) or super().is_leaf_module(m, name)

    converted, x = gl.convert(VGG.make().eval()), VGG.batch()[0]
    graph = torch.fx.GraphModule(converted, Tracer().trace(converted))
    torch.testing.assert_close(graph(x), VGG.make().eval()(x))


def flops(model: nn.Module, x: torch.Tensor) -> tuple[int, dict]:
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops(), {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", ["vgg", "resnet", *("encoder", "autoencoder", "scaled and standardised")])
def test_flops_of_an_ordinary_step_equal_those_of_the_original(name: str, stepped: bool) -> None:
    makes = {"vgg": VGG.make, "resnet": RESNET.make}
    make = makes.get(name, lambda: built(OF_IMAGES[name]))
    x = {"vgg": VGG.batch()[0], "resnet": RESNET.batch()[0]}.get(name, images())
    plain, converted = make(), gl.convert(make())
    if stepped:
        penalised(converted, loss_of(x))
    assert flops(converted, x) == flops(plain, x)
    assert flops(plain, x)[0] > 0


def test_a_penalised_step_counts_more_flops() -> None:
    x = VGG.batch()[0]
    converted = gl.convert(VGG.make())
    ordinary = flops(converted, x)[0]
    penalty = gl.GradL1(converted, 0.1, 0.1)
    with FlopCounterMode(display=False) as counter:
        loss = loss_of(x)(converted)
        (loss + penalty(loss)).backward()
    assert 1.5 * ordinary < counter.get_total_flops() < 5 * ordinary
