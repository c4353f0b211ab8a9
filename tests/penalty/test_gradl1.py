"""GradL1 as an object: its arguments, what it counts, what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import gradl1_fast as gl
from tests import oracle
from tests.gradients import assert_gradients
from tests.networks import NO_NORM, RESNET, VGG


def linears(*tail: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 4), nn.Softplus(), *tail).double()


def data() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def curved(model: nn.Module) -> Tensor:
    return model(data()).square().mean()


def gradients(model: nn.Module, value: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(model.parameters()), allow_unused=True))


def truth(model: nn.Module, weights: list[str], inputs_of: list[str], **lambdas: float) -> oracle.Penalised:
    return oracle.penalised_gradients(
        lambda: oracle.measure(model, curved, weights=weights, inputs_of=inputs_of),
        dict(model.named_parameters()),
        **lambdas,
    )


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative lambda_w": ({"lambda_w": -1.0}, ValueError, "lambda_w must be finite and 0 or more"),
    "NaN lambda_a": ({"lambda_a": float("nan")}, ValueError, "lambda_a must be finite"),
    "infinite lambda_a": ({"lambda_a": float("inf")}, ValueError, "lambda_a must be finite"),
    "lambda_w True": ({"lambda_w": True}, TypeError, "lambda_w must be a number"),
    "lambda_w text": ({"lambda_w": "1"}, TypeError, "lambda_w must be a number"),
    "scale": ({"scale": "steps"}, ValueError, "scale must be one of 'none', 'step'"),
    "method": ({"method": "fast"}, ValueError, "method must be one of 'exact', 'finite_difference'"),
    "every 0": ({"every": 0}, ValueError, "every must be 1 or more"),
    "every 1.0": ({"every": 1.0}, TypeError, "every must be an int"),
    "step_bits 17": ({"step_bits": 17}, ValueError, "step_bits must be from 1 to 16"),
    "step_bits 0": ({"step_bits": 0}, ValueError, "step_bits must be from 1 to 16"),
    "step_bits True": ({"step_bits": True}, TypeError, "step_bits must be an int"),
    "epsilon 0": ({"epsilon": 0.0}, ValueError, "epsilon must be more than 0"),
    "epsilon -1": ({"epsilon": -1.0}, ValueError, "epsilon must be finite and 0 or more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        gl.GradL1(gl.convert(linears()), **{"lambda_w": 1.0, "lambda_a": 1.0, **arguments})


def test_lambdas_can_be_set_and_are_checked() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 1.0, 0.5)
    loss = curved(model)
    both = penalty(loss)
    penalty.lambda_a, penalty.lambda_w = 0, 2
    torch.testing.assert_close(penalty(loss), 2 * sum(penalty.terms.values()))
    assert all(name.endswith(".weight") for name in penalty.terms)
    penalty.lambda_a, penalty.lambda_w = 0.5, 1
    assert torch.equal(penalty(loss), both)
    with pytest.raises(ValueError, match="lambda_a"):
        penalty.lambda_a = -1
    with pytest.raises(TypeError, match="lambda_w"):
        penalty.lambda_w = None


def test_terms_have_the_names_and_values_of_the_oracle() -> None:
    plain = linears()
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 1.0, 1.0)
    penalty(curved(model))
    expected = truth(plain, ["0.weight", "2.weight"], ["2"], lambda_w=1.0, lambda_a=1.0).terms
    expected["activation_quantizers._1"] = expected.pop("2")
    assert penalty.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert not penalty.terms[name].requires_grad
        torch.testing.assert_close(penalty.terms[name], value, rtol=1e-12, atol=0)


def test_every_third_call_is_three_times_the_penalty() -> None:
    model = gl.convert(linears())
    penalty, sometimes = gl.GradL1(model, 1.0, 1.0), gl.GradL1(model, 1.0, 1.0, every=3)
    values = [sometimes(curved(model)) for _ in range(6)]
    assert [bool(v) for v in values] == [False, False, True, False, False, True]
    torch.testing.assert_close(values[2], 3 * penalty(curved(model)))
    assert not values[0].requires_grad
    before = dict(sometimes.terms)
    sometimes(curved(model))
    assert sometimes.terms == before


def test_with_every_above_one_each_call_counts_also_for_one_loss() -> None:
    model = gl.convert(linears())
    penalty, loss = gl.GradL1(model, 1.0, 1.0, every=2), curved(model)
    assert [bool(penalty(loss)) for _ in range(4)] == [False, True, False, True]


def test_both_lambdas_zero_give_zero() -> None:
    model = gl.convert(linears())
    value = gl.GradL1(model, 0, 0)(curved(model))
    assert value == 0
    assert not value.requires_grad


def test_called_twice_it_gives_the_same() -> None:
    model = gl.convert(VGG.make())
    penalty, loss = gl.GradL1(model, 1.0, 1.0), VGG.loss(model)
    first, second = penalty(loss), penalty(loss)
    assert torch.equal(first, second)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(first, parameters, allow_unused=True, retain_graph=True),
        torch.autograd.grad(second, parameters, allow_unused=True),
        strict=True,
    ):
        assert a is b is None or torch.equal(a, b)


def test_tied_weights_count_once_with_the_whole_gradient() -> None:
    plain = linears(nn.Linear(4, 4), nn.Softplus()).double()
    plain[4].weight = plain[2].weight
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 1.0, 0.0)
    total = gradients(model, (loss := curved(model)) + penalty(loss))
    expected = truth(plain, ["0.weight", "2.weight"], [], lambda_w=1.0, lambda_a=0.0)
    assert list(penalty.terms) == ["0.weight", "2.weight"]
    assert_gradients(total, list(expected.gradients.values()))


def test_a_module_called_twice_counts_both_calls() -> None:
    layer = nn.Linear(3, 3).double()
    plain = nn.Sequential(layer, nn.Softplus(), layer, nn.Softplus())
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 1.0, 1.0)
    total = gradients(model, (loss := curved(model)) + penalty(loss))
    x = data()

    def measured() -> oracle.Measured:
        h = F.softplus(layer(x))
        return oracle.Measured(F.softplus(layer(h)).square().mean(), {"w": layer.weight}, {"h": h})

    expected = oracle.penalised_gradients(
        measured, dict(plain.named_parameters()), lambda_w=1.0, lambda_a=1.0
    )
    assert_gradients(total, list(expected.gradients.values()))


def test_a_quantizer_called_twice_adds_up() -> None:
    torch.manual_seed(4)
    layer, tail = gl.QLinear(3, 3).double(), nn.Linear(3, 3).double()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.tail = layer, gl.QLinear.from_float(tail, quantize_input=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.layer(F.softplus(self.layer(x))))

    model = Twice()
    penalty = gl.GradL1(model, 0.0, 1.0)
    value = penalty(curved(model))
    x = data().requires_grad_()
    h = F.softplus(F.linear(x, layer.weight, layer.bias))
    loss = tail(F.linear(h, layer.weight, layer.bias)).square().mean()
    expected = sum(g.abs().sum() for g in torch.autograd.grad(loss, [x, h]))
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=0)


def test_frozen_weights_are_left_out() -> None:
    plain = VGG.make()
    plain[0].requires_grad_(False)
    plain[3].weight.requires_grad_(False)
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 1.0, 1.0)
    loss = VGG.loss(model)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = torch.autograd.grad(loss + penalty(loss), list(parameters.values()))
    weights = ["7.weight", "12.weight", "14.weight"]
    assert [name for name in penalty.terms if name.endswith("weight")] == weights
    expected = oracle.penalised_gradients(
        lambda: oracle.measure(plain, VGG.loss, weights=weights, inputs_of=["3", "7", "12", "14"]),
        parameters,
        lambda_w=1.0,
        lambda_a=1.0,
    )
    assert_gradients(total, list(expected.gradients.values()))


def test_all_weights_frozen_is_an_error() -> None:
    model = gl.convert(linears(nn.PReLU().double()))
    for layer in model.modules():
        if isinstance(layer, gl.QLinear):
            layer.requires_grad_(False)
    penalty = gl.GradL1(model, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="every weight is frozen"):
        penalty(curved(model))


class Skipping(nn.Module):
    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        z = torch.tanh(self.second(y))
        return self.third(z.detach() if self.detach else y) + (0 if self.detach else 0 * z.detach())


@pytest.mark.parametrize(
    ("detach", "names"), [(True, "first.weight, second.weight"), (False, r"second\.weight")]
)
def test_a_layer_that_the_loss_does_not_reach_is_named(detach: bool, names: str) -> None:
    model = gl.convert(Skipping(detach).double())
    with pytest.raises(RuntimeError, match=f"no gradient reached {names}"):
        gl.GradL1(model, 1.0, 0.0)(curved(model))


def test_an_activation_that_the_loss_does_not_reach_is_named() -> None:
    model = gl.convert(Skipping(True).double())
    with pytest.raises(RuntimeError, match=r"no gradient reached activation_quantizers\.tanh"):
        gl.GradL1(model, 0.0, 1.0)(curved(model))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * dy


def test_a_function_that_is_differentiable_once_is_refused() -> None:
    model = gl.convert(linears())
    loss = Cube.apply(model(data())).mean()
    with pytest.raises(RuntimeError, match=r"Cube is once_differentiable"):
        gl.GradL1(model, 1.0, 1.0)(loss)


def test_a_penalty_of_which_no_gradient_has_a_graph_is_an_error() -> None:
    model = nn.Sequential(gl.QLinear(3, 2, quantize_input=False), gl.nn.ActivationQuantizer()).double()
    penalty = gl.GradL1(model, 0.0, 1.0)
    assert penalty(model(data()).square().sum()).detach() > 0
    with pytest.raises(RuntimeError, match="the penalty is constant: no gradient depends on a parameter"):
        penalty(model(data()).sum())


def no_graph(model: nn.Module) -> Tensor:
    return curved(model).detach()


def not_scalar(model: nn.Module) -> Tensor:
    return model(data())


def computed_without_gradients(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return curved(model)


def a_number(model: nn.Module) -> Any:
    return 1.0


LOSSES: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "no graph": (no_graph, RuntimeError, "the loss has no graph"),
    "under no_grad": (computed_without_gradients, RuntimeError, "the loss has no graph"),
    "not scalar": (not_scalar, ValueError, r"single value, got shape \(5, 4\)"),
    "not a tensor": (a_number, TypeError, "must be a tensor, got float"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_that_cannot_be_penalised(case: str) -> None:
    make, error, message = LOSSES[case]
    model = gl.convert(linears())
    with pytest.raises(error, match=message):
        gl.GradL1(model, 1.0, 1.0)(make(model))


def test_a_forward_pass_before_the_penalty_is_an_error() -> None:
    model = gl.convert(linears())
    loss = curved(model)
    with pytest.raises(RuntimeError, match="Was the penalty made after this forward pass"):
        gl.GradL1(model, 1.0, 1.0)(loss)


def test_gradients_disabled_is_an_error() -> None:
    model = gl.convert(linears())
    penalty, loss = gl.GradL1(model, 1.0, 1.0), curved(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients disabled"):
        penalty(loss)


def test_a_loss_of_one_value_in_any_shape() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 1.0, 1.0)
    value = penalty(curved(model).reshape(1, 1))
    assert value.shape == ()
    assert torch.equal(value, penalty(curved(model)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_gives_a_penalty_that_is_not(value: float) -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 1.0, 1.0)(curved(model) * value)
    assert not penalty.isfinite()


def test_a_constant_penalty_has_no_gradient() -> None:
    model = gl.convert(nn.Linear(3, 2).double())
    value = gl.GradL1(model, 1.0, 0.0)(model(data()).sum())
    torch.testing.assert_close(value.detach(), 2 * data().sum(0).abs().sum())
    assert not any(g is not None and g.any() for g in gradients(model, value))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no quantizable layer; call gradl1_fast\.convert"):
        gl.GradL1(linears(), 1.0, 0.0)
    with pytest.raises(ValueError, match="activation quantizers and the model has none"):
        gl.GradL1(gl.convert(nn.Linear(3, 3)), 0.0, 1.0)


def test_a_weight_that_a_hook_recomputes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    nn.utils.spectral_norm(model[2])
    with pytest.raises(ValueError, match=r"2\.weight is not a parameter"):
        gl.GradL1(gl.convert(model), 1.0, 0.0)


def test_one_bit_weights_are_refused() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 1.0, 0.0)
    with gl.bits(model, w=1, a=None), pytest.raises(RuntimeError, match="not 0 at 1 bit"):
        penalty(curved(model))


def test_two_penalties_of_one_model_must_agree_on_the_scale() -> None:
    model = gl.convert(linears())
    first = gl.GradL1(model, 1.0, 1.0)
    gl.GradL1(model, 1.0, 1.0, scale="step")
    with pytest.raises(RuntimeError, match="another penalty with a different scale"):
        first(curved(model))


def test_the_scale_that_counts_is_that_of_the_forward_pass() -> None:
    model = gl.convert(linears())
    by_step = gl.GradL1(model, 1.0, 1.0, scale="step")
    loss = curved(model)
    expected = by_step(loss)
    plain = gl.GradL1(model, 1.0, 1.0)
    assert torch.equal(by_step(loss), expected)
    with pytest.raises(
        RuntimeError, match=r"another penalty with a different scale.*activation_quantizers\._1"
    ):
        plain(loss)
    wider = gl.GradL1(model, 1.0, 1.0, scale="step", step_bits=8)
    with pytest.raises(RuntimeError, match="another penalty with a different scale"):
        wider(loss)
    loss = curved(model)
    gl.GradL1(model, 1.0, 1.0)
    assert wider(loss).isfinite()


def test_the_width_that_counts_is_that_of_the_forward_pass() -> None:
    model = gl.convert(linears())
    gl.calibrate(model, [data()])
    penalty = gl.GradL1(model, 1.0, 0.0)
    with gl.bits(model, w=1, a=4):
        clamped = curved(model)
    with pytest.raises(RuntimeError, match="not 0 at 1 bit"):
        penalty(clamped)
    with pytest.raises(RuntimeError, match="not 0 at 1 bit"):
        penalty(clamped + curved(model))
    loss = curved(model)
    expected = penalty(loss)
    with gl.bits(model, w=1, a=4):
        assert torch.equal(penalty(loss), expected)


def test_a_layer_that_is_the_whole_model_is_refused_at_one_bit() -> None:
    model = gl.QLinear(3, 2).double()
    penalty = gl.GradL1(model, 1.0, 0.0)
    model.weight_quantizer.bits = 1
    with pytest.raises(RuntimeError, match="not the layer at 1 bit"):
        penalty(curved(model))


def test_weights_that_were_computed_and_put_in_place_are_refused_at_one_bit() -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 1.0, 0.0)
    objective = nn.Module()
    objective.model = model
    objective.forward = lambda: penalty(curved(model))
    computed = {f"model.{name}": 2 * p for name, p in model.named_parameters()}
    assert torch.func.functional_call(objective, computed, ()).isfinite()
    with gl.bits(model, w=1, a=None), pytest.raises(RuntimeError, match="not 0 at 1 bit"):
        torch.func.functional_call(objective, computed, ())


def test_a_frozen_layer_may_be_clamped() -> None:
    model = gl.convert(linears())
    model.get_submodule("0").weight.requires_grad_(False)
    penalty = gl.GradL1(model, 1.0, 0.0)
    with gl.bits(model, w={"0": 1}, a=None):
        penalty(curved(model))
    assert list(penalty.terms) == ["2.weight"]


def test_gradients_accumulate_over_micro_batches() -> None:
    model = gl.convert(NO_NORM.make())
    penalty = gl.GradL1(model, 0.3, 0.2)
    x, y = NO_NORM.batch()
    parts = []
    for half in (slice(0, 3), slice(3, 6)):
        loss = F.cross_entropy(model(x[half]), y[half])
        parts.append(gradients(model, loss + penalty(loss)))
        loss = F.cross_entropy(model(x[half]), y[half])
        (loss + penalty(loss)).backward()
    expected = [a + b for a, b in zip(*parts, strict=True)]
    assert_gradients([p.grad for p in model.parameters()], expected, 1e-12)


def test_a_third_order_raises_through_the_whole_penalty() -> None:
    model = gl.convert(RESNET.make())
    penalise = gl.GradL1(model, 1.0, 1.0)
    penalty = penalise(RESNET.loss(model))
    second = torch.autograd.grad(penalty, list(model.parameters()), create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in second if g is not None)
    with pytest.raises(RuntimeError, match="first and second order gradients only"):
        torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


def test_the_probes_keep_no_gradient() -> None:
    model = gl.convert(VGG.make())
    penalty, loss = gl.GradL1(model, 1.0, 1.0), VGG.loss(model)
    (loss + penalty(loss)).backward()
    assert all(site.probe.grad is None for site in penalty.sites)


def test_a_copy_of_the_model_has_a_penalty_of_its_own() -> None:
    model = gl.convert(linears())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    first, second = (gl.GradL1(m, 1.0, 1.0)(curved(m)) for m in (model, twin))
    assert not torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no gradient reached"):
        gl.GradL1(model, 1.0, 1.0)(curved(twin))


def test_autocast_sums_in_float32() -> None:
    model = gl.convert(VGG.make(torch.float32))
    penalty = gl.GradL1(model, 1.0, 1.0)
    x, y = VGG.batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
        value = penalty(loss)
    assert value.dtype == torch.float32
    exact = penalty(F.cross_entropy(model(x), y))
    torch.testing.assert_close(value, exact, rtol=0.1, atol=0)
    (loss + value).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_inside_autocast_it_is_what_it_is_outside() -> None:
    """A loss of float32, of which the backward pass has products that autocast would round."""
    model = gl.convert(linears().float())
    penalty, mix = gl.GradL1(model, 1.0, 1.0), torch.randn(4, 4)
    loss = (model(data().float()) @ mix).square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        inside = penalty(loss)
    assert torch.equal(inside, penalty(loss))
