"""torch.compile of a whole penalised step: equal to eager, or an error."""

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
    given, y = data()
    results = []
    for model, compiled in zip(models, (False, True), strict=True):
        x = given.clone()  # each model has a tensor of its own
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
    with pytest.raises(Exception, match="cannot penalise 0 at 1 bit"):
        run()
    gl.set_bits(model, w=None, a=None)
    other = gl.GradL1(model, 0.3, 0.2, scale="none")
    assert other.sites
    with pytest.raises(Exception, match="another penalty with a different scale"):
        run()


class Branches(nn.Module):
    """Three layers and a residual branch read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.usefixtures("trace_autograd")
def test_layers_that_share_a_site_do_so_in_a_compiled_step(scale: str) -> None:
    model, x = gl.convert(Branches().double()), torch.randn(5, 3).double()
    penalty = gl.GradL1(model, 0.3, 0.2, scale)

    def step(x: Tensor) -> list[Tensor]:
        loss = model(x).square().mean()
        extra = penalty(loss)
        return [extra.detach(), *torch.autograd.grad(loss + extra, list(model.parameters()))]

    expected = step(x)
    assert len(penalty.sites) == 2
    assert_gradients(torch.compile(step, backend="aot_eager", fullgraph=True)(x), expected, 1e-12)


@pytest.mark.usefixtures("trace_autograd")
def test_a_computed_weight_in_a_compiled_step_is_refused_by_name() -> None:
    model = gl.convert(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    nn.utils.parametrizations.weight_norm(model[2])
    penalty, x = gl.GradL1(model, 0.3, 0.2), torch.randn(5, 3).double()
    step = torch.compile(lambda x: penalty(model(x).square().mean()), backend="aot_eager", fullgraph=True)
    with pytest.raises(
        Exception, match=r"the weight of 2 is computed and cannot be penalised under torch\.compile"
    ):
        step(x)
