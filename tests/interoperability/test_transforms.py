"""torch.func, vmap, make_fx, autocast and inference mode around a model and its penalty."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import gradl1_fast as gl
from gradl1_fast import functional as ours
from tests.gradients import assert_gradients
from tests.interoperability.step import (
    LAMBDAS,
    assert_penalty_counts,
    data,
    gradients,
    loss_of,
    network,
    plain_network,
)
from tests.ops.sweeps import leaf

refused_by_name = pytest.raises(RuntimeError, match=r"torch\.func\.grad, vjp, .* cannot differentiate")


def batches() -> Tensor:
    return torch.randn(3, 5, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_vmap_over_evaluation(mode: Callable[[], torch.no_grad], bits: int | None) -> None:
    model, x = network().eval(), batches()
    gl.calibrate(model, [x[0]])
    with mode(), gl.bits(model, w=bits, a=bits):
        assert torch.equal(torch.vmap(model)(x), torch.stack([model(part) for part in x]))


def test_a_penalty_on_a_forward_pass_under_vmap() -> None:
    results = []
    for vectorised in (False, True):
        model, x = network().eval(), batches()
        penalty = gl.GradL1(model, *LAMBDAS, "none")
        y = torch.vmap(model)(x) if vectorised else torch.stack([model(part) for part in x])
        extra = penalty(y.sin().mean())
        results.append(list(torch.autograd.grad(extra, list(model.parameters()), allow_unused=True)))
    assert_gradients(results[1], results[0])
    assert results[1][0].abs().max() > 1e-3


@pytest.mark.parametrize("lambdas", [LAMBDAS, (0, LAMBDAS[1])], ids=str)
def test_a_penalty_by_the_step_on_a_pass_under_vmap_is_refused_by_name(lambdas: tuple[float, float]) -> None:
    model = network().eval()
    penalty = gl.GradL1(model, *lambdas, "step")
    with pytest.raises(
        RuntimeError, match=r"GradL1: 3\.input is measured with scale='step' under torch\.vmap"
    ):
        torch.vmap(model)(batches())
    del penalty
    assert torch.vmap(model)(batches()).shape == (3, 5, 3)  # nobody measures it any more


def test_a_penalty_by_the_step_on_weights_of_a_pass_under_vmap() -> None:
    results = []
    for vectorised in (False, True):
        model, x = network().eval(), batches()
        penalty = gl.GradL1(model, LAMBDAS[0], 0, "step")
        y = torch.vmap(model)(x) if vectorised else torch.stack([model(part) for part in x])
        extra = penalty(y.sin().mean())
        results.append(list(torch.autograd.grad(extra, list(model.parameters()), allow_unused=True)))
    assert_gradients(results[1], results[0])
    assert results[1][0].abs().max() > 1e-3


def test_vmap_over_training_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="vmap"):  # each batch would have statistics of its own
        torch.vmap(network())(batches())


def test_batched_gradients() -> None:
    model = network().eval()
    y, parameters = model(data()[0]).sum(0), list(model.parameters())
    together = torch.autograd.grad(y, parameters, torch.eye(3).double(), True, is_grads_batched=True)
    each = [torch.autograd.grad(value, parameters, retain_graph=True) for value in y]
    assert_gradients(together, [torch.stack(rows) for rows in zip(*each, strict=True)])


def test_functional_call_beside_an_ordinary_call_has_the_weights_of_both_measured() -> None:
    def both(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        other = functional_call(model, parameters, (data()[0],)).square().mean()
        return loss_of(model) + other * loss_of(model).detach()

    model, plain = network().eval(), plain_network().eval()
    penalty = gl.GradL1(model, LAMBDAS[0], 0, "none")
    copies = {name: leaf(p) for name, p in model.named_parameters()}
    found = penalty(both(model, copies))
    expected = weights_norm(both(plain, copies), [*plain.parameters(), *copies.values()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert_gradients(
        torch.autograd.grad(found, [*model.parameters(), *copies.values()], allow_unused=True),
        torch.autograd.grad(expected, [*plain.parameters(), *copies.values()], allow_unused=True),
    )


@pytest.mark.parametrize("copies", [False, True], ids=["the model's own", "copies"])
def test_functional_call_of_a_module_that_computes_the_penalty(copies: bool) -> None:
    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()
            self.penalty = gl.GradL1(self.model, *LAMBDAS)

        def forward(self) -> Tensor:
            loss = loss_of(self.model)
            return loss + self.penalty(loss)

    objective = Objective()
    parameters = {n: leaf(p) if copies else p for n, p in objective.named_parameters()}
    total = functional_call(objective, parameters, ())
    found = list(torch.autograd.grad(total, list(parameters.values())))
    assert_gradients(found, gradients(network()))
    assert_penalty_counts(found, gradients(network(), 0, 0))


def called(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    return loss_of(lambda x: functional_call(model, parameters, (x,)))


def weights_norm(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """Return the weights' term by PyTorch's own double backprop."""
    weights = [p for p in parameters if p.dim() > 1]
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    return LAMBDAS[0] * torch.stack([grad.abs().sum() for grad in grads]).sum()


@pytest.mark.parametrize("replaced", ["all", "0.weight"])
def test_functional_call_with_other_tensors_and_a_penalty_outside(replaced: str) -> None:
    model, plain = network(), plain_network()
    used = [dict(m.named_parameters()) for m in (model, plain)]
    copies = {name: leaf(p) for name, p in used[0].items() if replaced in ("all", name)}
    for parameters in used:
        parameters |= copies
    penalty = gl.GradL1(model, LAMBDAS[0], 0, "none")
    found, expected = penalty(called(model, copies)), weights_norm(called(plain, copies), [*used[1].values()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert_gradients(
        torch.autograd.grad(found, [*used[0].values()], allow_unused=True),
        torch.autograd.grad(expected, [*used[1].values()], allow_unused=True),
    )
    for lambdas in (LAMBDAS, (0, LAMBDAS[1])):  # the probes of activations belong to the modules
        penalty = gl.GradL1(model, *lambdas)
        loss = called(model, copies)
        both = torch.autograd.grad(loss + penalty(loss), [*used[0].values()])
        assert_gradients(both, gradients(network(), *lambdas))


TRANSFORMS: dict[str, Callable[..., object]] = {
    "grad": torch.func.grad,
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(()).double()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "vmap of grad": lambda f: lambda x: torch.vmap(torch.func.grad(f))(x[None]),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.vmap(f)(x[None]).sum()),
}
ONE, ZERO, PROBE = torch.ones(()).double(), torch.zeros(()).double(), torch.zeros((), requires_grad=True)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tap": lambda x: ours.tap(x, PROBE),
    "scale_probe": lambda x: ours.scale_probe(x[0, 0], ONE),
    "fake_quantize": lambda x: ours.fake_quantize(x, ONE, ZERO, -3, 3),
    "l1_norm": lambda x: ours.l1_norm([x]),
    "conv": lambda x: ours.conv(x[None], x[..., None]),
    "linear": lambda x: ours.linear(x, x),
    "batch_norm_act": lambda x: ours.batch_norm_act(x, None, None, training=True),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_derivatives_are_refused_by_name(function: str, transform: str) -> None:
    listed = (function, transform) == ("l1_norm", "grad of vmap")  # vmap takes no list of tensors apart
    message = (
        "Batching rule not implemented" if listed else r"torch\.func\.grad, vjp, jvp, jacrev and hessian"
    )
    with pytest.raises(RuntimeError, match=message):
        TRANSFORMS[transform](lambda x: FUNCTIONS[function](x).sum())(torch.randn(3, 3).double())


@pytest.mark.parametrize("lambdas", [LAMBDAS, (LAMBDAS[0], 0), (0, LAMBDAS[1])], ids=str)
def test_a_functional_gradient_of_a_penalised_loss_is_refused(lambdas: tuple[float, float]) -> None:
    model = network()
    penalty = gl.GradL1(model, *lambdas)

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        loss = called(model, parameters)
        return loss + penalty(loss)

    with refused_by_name:
        torch.func.grad(objective)(dict(model.named_parameters()))


def test_make_fx_of_a_whole_step() -> None:
    model = network()
    penalty = gl.GradL1(model, *LAMBDAS)

    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(model(x), y)
        return list(torch.autograd.grad(loss + penalty(loss), list(model.parameters())))

    graph = make_fx(step)(*data())
    found = graph(*data())
    assert_gradients(found, gradients(network()), 1e-12)
    assert_penalty_counts(found, gradients(network(), 0, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("lambdas", [(LAMBDAS[0], 0), (0, LAMBDAS[1])], ids=str)
def test_the_penaltys_gradient_under_autocast(
    dtype: torch.dtype, backward_inside: bool, lambdas: tuple[float, float]
) -> None:
    def gradient(enabled: bool, *lambdas: float) -> Tensor:
        model = network(torch.float32)
        penalty, autocast = gl.GradL1(model, *lambdas), torch.autocast("cpu", dtype, enabled=enabled)
        with autocast:
            loss = loss_of(model, torch.float32)
            total = loss + penalty(loss)
            if backward_inside:
                total.backward()
        if not backward_inside:
            total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    found, expected = (gradient(on, *lambdas) - gradient(on, 0, 0) for on in (True, False))
    assert F.cosine_similarity(found, expected, dim=0) > 0.999
    torch.testing.assert_close(found.norm(), expected.norm(), rtol=0.02, atol=0)


@pytest.mark.parametrize("bits", [None, 4])
def test_inference_mode_gives_the_same_result(bits: int | None) -> None:
    model, (x, _) = network().eval(), data()
    gl.calibrate(model, [x])
    with gl.bits(model, w=bits, a=bits):
        with torch.inference_mode():
            found = model(x)
        assert found.is_inference()
        assert torch.equal(found, model(x))


def made_in_inference_mode(part: str) -> list[Tensor]:
    """Return the gradient at 4 bits of a model for which one thing was done in inference mode."""
    plain = plain_network()
    with torch.inference_mode(part == "convert"):
        model = gl.convert(plain)
    with torch.inference_mode(part == "move"):
        model = model.to("cpu", torch.float64)
    with torch.inference_mode(part == "calibrate"):
        gl.calibrate(model, [data()[0]])
    with torch.inference_mode(part == "penalty"):
        gl.GradL1(model, *LAMBDAS)
    with torch.inference_mode(part == "set_bits"):
        gl.set_bits(model, w=4, a=4)
    return gradients(model)


@pytest.mark.parametrize("part", ["convert", "move", "calibrate", "penalty", "set_bits"])
def test_a_model_prepared_in_inference_mode_trains(part: str) -> None:
    assert_gradients(made_in_inference_mode(part), made_in_inference_mode("nothing"), 1e-12)


def test_training_in_inference_mode_is_refused() -> None:
    model = network()
    penalty = gl.GradL1(model, *LAMBDAS)
    with torch.inference_mode():
        loss = loss_of(model)
        with pytest.raises(RuntimeError, match="gradients disabled"):
            penalty(loss)
    with pytest.raises(RuntimeError, match="the loss has no graph"):
        penalty(loss)


def test_data_made_in_inference_mode_is_pytorchs_own_error() -> None:
    model = network()
    with torch.inference_mode():
        x = data()[0] * 1
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(x)
