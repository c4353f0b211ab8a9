"""Every provider takes its step, with the gradient it claims, on a tiny network; or says why it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.counting import Counted
from bench.oracle import relative_error, true_gradients
from bench.providers import LAMBDA, PROVIDERS, STEP_BITS, CannotRunError
from bench.workloads import Workload
from gradl1_fast.backends import UnavailableError
from gradl1_fast.training.models import BasicBlock, InvertedResidual

TINY = Workload("stack", 2, 3, 6, 2)
NOWHERE = {
    "gradl1_fast, triton": "CUDA tensors",
    "gradl1_fast, cuda": "cuda",
    "gradl1_fast, CUDA graph": "CUDA",
}


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name not in NOWHERE])
def test_a_provider_steps_with_the_gradient_it_claims(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.steps.LEARNING_RATE", 0.1)
    if "JAX" in name:
        pytest.importorskip("jax", reason="the providers in JAX need the extra jax")
        monkeypatch.setattr("bench.jax_step.LEARNING_RATE", 0.1)
    provider, task = PROVIDERS[name], TINY.task()
    try:
        step = provider.step(TINY, "aot_eager")
    except UnavailableError as reason:
        pytest.skip(str(reason))
    before = step.gradients()
    error = relative_error(before, true_gradients(task.make, task.x, task.y, *provider.objective))
    assert error < (1e-5 if provider.exact else 0.5)
    step()
    after = step.gradients()
    assert any(not torch.equal(before[key], after[key]) for key in before)  # it has moved


@pytest.mark.parametrize("name", NOWHERE)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_provider_without_a_place_says_why(name: str) -> None:
    with pytest.raises((UnavailableError, CannotRunError), match=NOWHERE[name]):
        PROVIDERS[name].step(TINY, "aot_eager")


def test_jax_computes_the_same_network() -> None:
    jax = pytest.importorskip("jax", reason="the providers in JAX need the extra jax")
    from bench.jax_network import from_torch, network, to_torch
    from bench.jax_step import from_nchw
    from bench.sites import shapes

    head = [nn.MaxPool2d(3, 2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, padding=3), nn.BatchNorm2d(4), nn.ReLU6(),
        InvertedResidual(4, 4, 1, expansion=2), BasicBlock(4, 6, stride=2), *head,
    )  # fmt: skip
    x = torch.randn(2, 3, 18, 18)
    parameters = {name: from_torch(name, p) for name, p in model.named_parameters()}
    logits = jax.jit(network(model))(parameters, from_nchw(x), [0.0] * len(shapes(model, x)))
    torch.testing.assert_close(to_torch("", logits), model(x).detach(), rtol=1e-4, atol=1e-5)


RESIDUAL = Workload("resnet18", 2, 4, 8)  # a tensor that two layers read, and that goes past them


@pytest.mark.parametrize("workload", [TINY, RESIDUAL], ids=lambda w: w.network)
def test_the_oracle_agrees_with_that_of_the_tests(workload: Workload) -> None:
    from tests import oracle

    task = workload.task()
    model = task.network().double()
    weights = [name for name, p in model.named_parameters() if p.dim() > 1]
    inputs = [name.removesuffix(".weight") for name in weights[1:]]
    for scale, bits in (("none", None), ("step", STEP_BITS)):
        truth = oracle.penalised_gradients(
            lambda: oracle.measure(
                model,
                lambda m: torch.nn.functional.cross_entropy(m(task.x.double()), task.y),
                weights=weights,
                inputs_of=inputs,
            ),
            dict(model.named_parameters()),
            lambda_w=LAMBDA,
            lambda_a=LAMBDA,
            scale=scale,
        )
        ours = true_gradients(task.make, task.x, task.y, LAMBDA, LAMBDA, bits)
        assert relative_error(ours, truth.gradients) < 1e-12


@pytest.mark.parametrize("name", ["eager double backprop", "torch.func, jvp of grad", "gradl1_fast"])
def test_peers_penalise_the_same_tensors_of_a_residual_network(name: str) -> None:
    task, provider = RESIDUAL.task(), PROVIDERS[name]
    gradients = provider.step(RESIDUAL, "").gradients()
    assert relative_error(gradients, true_gradients(task.make, task.x, task.y, *provider.objective)) < 1e-3


def test_collected_activations_are_what_the_layers_of_a_residual_network_are_given() -> None:
    from bench.sites import collecting

    task = RESIDUAL.task()
    model = collecting(task.network().double())
    logits, activations = model(task.x.double())
    loss = torch.nn.functional.cross_entropy(logits, task.y)
    grads = torch.autograd.grad(loss, activations, create_graph=True)
    (loss + sum(g.abs().sum() for g in grads)).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert relative_error(found, true_gradients(task.make, task.x, task.y, 0.0, 1.0)) < 1e-10


def test_the_penalty_is_a_good_part_of_the_gradient() -> None:
    task = Workload("vgg_like", 4, 4, 16).task()
    with_it, without = (true_gradients(task.make, task.x, task.y, c, c) for c in (LAMBDA, 0.0))
    assert relative_error(without, with_it) > 0.1  # so that its absence cannot pass


def test_gradients_of_other_parameters_or_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"other parameters: \['a', 'b'\]"):
        relative_error({"a": torch.ones(1)}, {"b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"another shape: \['a'\]"):
        relative_error({"a": torch.ones(1, 2)}, {"a": torch.ones(2)})


def test_operators_and_bytes_are_counted() -> None:
    x, y = torch.ones(10), torch.ones(4, 1)
    with Counted() as counted:
        _ = x.view(2, 5).t()  # views
        _ = x + x
        _ = y.expand(4, 100).sum()
    assert counted.calls == 2
    assert counted.bytes == 3 * 40 + (16 + 4)


def test_what_the_reference_calls_is_counted_and_a_backend_of_loops_is_one_call() -> None:
    calls = {}
    for name in ("gradl1_fast, reference", "eager double backprop"):
        step = PROVIDERS[name].step(TINY, "")
        step.gradients()  # the first pass compares plans with modules
        with Counted() as counted:
            step.gradients()
        calls[name] = counted.calls, counted.bytes
    assert calls["gradl1_fast, reference"] < calls["eager double backprop"]
