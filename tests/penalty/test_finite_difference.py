"""The finite difference converges to the exact gradient and has no side effects."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradl1_fast as gl


def smooth(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.Softplus(),
        nn.Dropout(dropout),
        nn.Conv2d(3, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return gl.convert(model.double())


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return lambda: model(x).sin().square().mean()


def gradients(model: nn.Module, method: str, scale: str, epsilon: float = 1e-3, every: int = 1) -> Tensor:
    """Return the gradient of all parameters after one step from equal random numbers."""
    model = copy.deepcopy(model)
    options = {"scale": scale, "method": method, "epsilon": epsilon, "every": every}
    penalty = gl.GradL1(model, 0.3, 0.2, **options)
    torch.manual_seed(8)
    penalty.backward(closure_of(model))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_it_converges_to_the_exact_gradient(scale: str, dropout: float) -> None:
    model = smooth(dropout)
    exact = gradients(model, "exact", scale)
    errors = [
        float((gradients(model, "finite_difference", scale, epsilon) - exact).norm() / exact.norm())
        for epsilon in (1e-4, 1e-5, 1e-6)
    ]
    assert errors[2] < 1e-4
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # the error falls with epsilon


@pytest.mark.parametrize("scale", ["none", "step"])
def test_loss_and_terms_are_the_exact_ones(scale: str) -> None:
    model = smooth()
    exact, fast = (gl.GradL1(copy.deepcopy(model), 0.3, 0.2, scale, method=m) for m in METHODS)
    losses = [penalty.backward(closure_of(penalty.model)) for penalty in (exact, fast)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    assert exact.terms.keys() == fast.terms.keys()
    for name, value in exact.terms.items():
        torch.testing.assert_close(fast.terms[name], value, rtol=1e-10, atol=0)


METHODS = ("exact", "finite_difference")


def test_every_second_step_is_twice_the_penalty() -> None:
    model = smooth()
    plain = torch.autograd.grad(closure_of(model)(), list(model.parameters()))
    penalty = gl.GradL1(model, 0.3, 0.2, "none", method="finite_difference", every=2)
    penalty.backward(closure_of(model))
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)
        p.grad = None
    once = gradients(model, "finite_difference", "none")
    penalty.backward(closure_of(model))
    twice = torch.cat([p.grad.flatten() for p in model.parameters()])
    flat = torch.cat([g.flatten() for g in plain])
    torch.testing.assert_close(twice - flat, 2 * (once - flat), rtol=1e-6, atol=1e-9)


def state(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def test_weights_are_restored_bitwise_and_statistics_count_one_step() -> None:
    model, once = smooth(), smooth()
    closure_of(once)()
    gl.GradL1(model, 0.3, 0.2, method="finite_difference").backward(closure_of(model))
    assert all(torch.equal(a, b) for a, b in zip(state(model), state(once), strict=True))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_leaves_weights_and_hooks_as_they_were(call: int) -> None:
    model = smooth()
    weights = [p.detach().clone() for p in model.parameters()]
    compute, calls = closure_of(model), []

    def closure() -> Tensor:
        loss = compute()
        calls.append(loss)
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        gl.GradL1(model, 0.3, 0.2, method="finite_difference").backward(closure)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_first_layers() -> None:
    model = smooth()
    model.get_submodule("0").requires_grad_(False)
    model.get_submodule("1").requires_grad_(False)
    flat = []
    for method in METHODS:
        twin = copy.deepcopy(model)
        gl.GradL1(twin, 0.3, 0.2, method=method, epsilon=1e-6).backward(closure_of(twin))
        flat.append(torch.cat([p.grad.flatten() for p in twin.parameters() if p.requires_grad]))
    assert (flat[0] - flat[1]).norm() < 1e-4 * flat[0].norm()


def test_the_loss_alone_is_refused() -> None:
    model = smooth()
    penalty = gl.GradL1(model, 0.3, 0.2, method="finite_difference")
    with pytest.raises(ValueError, match=r"call penalty.backward\(closure\)"):
        penalty(closure_of(model)())


def test_a_quantized_model_is_refused() -> None:
    model = smooth()
    penalty = gl.GradL1(model, 0.3, 0.2, method="finite_difference")
    with gl.bits(model, w=8, a=None), pytest.raises(RuntimeError, match="needs all widths to be float"):
        penalty.backward(closure_of(model))


def test_weights_of_low_precision_and_several_ranks_are_refused() -> None:
    low = gl.GradL1(smooth().bfloat16(), 0.3, 0.2, method="finite_difference")
    with pytest.raises(RuntimeError, match=r"float32 or float64, not .*bfloat16"):
        low.backward(lambda: pytest.fail("computed"))
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # needs no process group
    wrapped.module = smooth()
    distributed = gl.GradL1(wrapped, 0.3, 0.2, method="finite_difference")
    with pytest.raises(RuntimeError, match="does not average over ranks; use method='exact'"):
        distributed.backward(lambda: pytest.fail("computed"))


@pytest.mark.parametrize("lambdas", [(0.3, 0.0), (0.0, 0.2)])
def test_autocast_is_refused_where_a_layer_or_an_activation_is_computed(
    lambdas: tuple[float, float],
) -> None:
    model, x = smooth().float(), torch.ones(2, 2, 6, 6)
    penalty = gl.GradL1(model, *lambdas, method="finite_difference")

    def closure(inside: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            return y.float().sin().square().mean()

    with pytest.raises(RuntimeError, match="autocast is on where 0 is computed"):
        penalty.backward(lambda: closure(inside=True))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    penalty.backward(lambda: closure(inside=False))
    model.double()
    with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
        penalty.backward(closure_of(model))


def test_checkpointing_is_refused_where_activations_move() -> None:
    model = smooth()
    x = torch.ones(2, 2, 6, 6, dtype=torch.float64)
    penalty = gl.GradL1(model, 0.0, 0.2, method="finite_difference")
    with pytest.raises(RuntimeError, match="does not support activation checkpointing"):
        penalty.backward(lambda: checkpoint(model, x, use_reentrant=False).square().mean())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_closure_that_differs_at_its_second_call_is_refused() -> None:
    model, tails = smooth(), [nn.Linear(3, 3).double() for _ in range(2)]
    compute, calls = closure_of(model), iter(tails)
    model[0].tails = nn.ModuleList(tails)  # of which the network's own forward pass knows nothing
    penalty = gl.GradL1(model, 0.3, 0.2, method="finite_difference")
    with pytest.raises(RuntimeError, match="different parameters in its second call"):
        penalty.backward(lambda: compute() + next(calls).weight.square().sum())


def used_and_spare() -> nn.Module:
    torch.manual_seed(4)
    model = nn.Module()
    model.used, model.spare = gl.QLinear(3, 3), gl.QLinear(3, 3)
    return model.double()


def test_a_layer_that_is_not_used_contributes_nothing() -> None:
    x, values = torch.ones(2, 3).double(), []
    for method in METHODS:
        model = used_and_spare()
        penalty = gl.GradL1(model, 1.0, 0.5, method=method, epsilon=1e-6)
        penalty.backward(lambda model=model: model.used(x).sin().square().sum())
        assert model.spare.weight.grad is None or not model.spare.weight.grad.any()
        values.append(model.used.weight.grad)
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)


def test_tensors_without_a_gradient_are_named() -> None:
    model, other = used_and_spare(), nn.Linear(3, 3).double()
    penalty = gl.GradL1(model, 1.0, 0.5, method="finite_difference")
    with pytest.raises(RuntimeError, match=r"no gradient reached used\.weight, spare\.weight"):
        penalty.backward(lambda: other(torch.ones(2, 3).double()).square().sum())


class Branches(nn.Module):
    """Two layers and a residual branch read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem, self.left, self.right = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return x + torch.sigmoid(self.left(x)) * self.right(x)


@pytest.mark.parametrize("scale", ["none", "step"])
def test_other_readers_of_a_shared_site_get_the_unmoved_tensor(scale: str) -> None:
    model, x = gl.convert(Branches().double()), torch.linspace(-1, 1, 12).double().reshape(4, 3)
    flat = []
    for method in METHODS:
        twin = copy.deepcopy(model)
        penalty = gl.GradL1(twin, 0.3, 0.2, scale, method=method, epsilon=1e-6)
        penalty.backward(lambda twin=twin: twin(x).square().mean())
        assert set(penalty.terms) == {"stem.weight", "left.weight", "right.weight", "left.input"}
        flat.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    assert (flat[0] - flat[1]).norm() < 1e-4 * flat[0].norm()
