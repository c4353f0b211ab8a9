"""torch.compile of a whole penalised step: equal to eager, or an error, never a wrong number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from tests.gradients import assert_gradients


def network() -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return gl.convert(model.double())


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.arange(5) % 3


@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.usefixtures("trace_autograd")
def test_a_compiled_step_equals_the_eager_one(scale: str, bits: int | None) -> None:
    models = [network() for _ in range(2)]
    x, y = data()
    results = []
    for model, compiled in zip(models, (False, True), strict=True):
        gl.calibrate(model, [x])
        gl.set_bits(model, w=bits, a=bits)
        penalty = gl.GradL1(model, 0.3, 0.2, scale)

        def step(x: Tensor, y: Tensor, model=model, penalty=penalty) -> list[Tensor]:
            loss = F.cross_entropy(model(x), y)
            extra = penalty(loss)
            gradients = torch.autograd.grad(loss + extra, list(model.parameters()))
            return [loss.detach(), extra.detach(), *gradients]

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        results.append([*run(x, y), *(b.clone() for b in model.buffers())])
    assert_gradients(results[1], results[0], 1e-12)


@pytest.mark.parametrize("whole", [False, True], ids=["model", "step"])
@pytest.mark.parametrize("lambdas", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_without_tracing_of_autograd_it_raises(whole: bool, lambdas: tuple[float, float]) -> None:
    model, (x, y) = network(), data()
    penalty = gl.GradL1(model, *lambdas)
    torch._dynamo.reset()
    forward = model if whole else torch.compile(model, backend="aot_eager")

    def step() -> None:
        loss = F.cross_entropy(forward(x), y)
        (loss + penalty(loss)).backward()

    with pytest.raises(RuntimeError, match=r"region of torch\.compile that ends before the penalty"):
        (torch.compile(step, backend="aot_eager") if whole else step)()
    torch._dynamo.reset()


@pytest.mark.parametrize("scale", ["none", "step"])
def test_a_model_that_is_traced_but_not_compiled_has_the_scale_of_its_penalty(scale: str) -> None:
    values = []
    for traced in (False, True):
        torch._dynamo.reset()
        model, (x, y) = network(), data()
        penalty = gl.GradL1(model, 0.3, 0.2, scale)
        forward = torch.compile(model, backend="eager") if traced else model
        torch.manual_seed(0)
        values.append(penalty(F.cross_entropy(forward(torch.ones_like(x).cumsum(0)), y)).detach())
    torch.testing.assert_close(*values)


@pytest.mark.usefixtures("trace_autograd")
def test_a_compiled_step_refuses_clamped_weights_and_another_scale() -> None:
    model, (x, y) = network(), data()
    penalty = gl.GradL1(model, 0.3, 0.2)

    def step() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        return penalty(loss)

    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    gl.set_bits(model, w=1, a=None)
    with pytest.raises(Exception, match="not 0 at 1 bit"):
        run()
    gl.set_bits(model, w=None, a=None)
    gl.GradL1(model, 0.3, 0.2, scale="step")
    with pytest.raises(Exception, match="another penalty with a different scale"):
        run()
