"""GradL1's arguments, the losses it accepts, and the models it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.penalty.small import curved, data, gradients, linears, truth

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
    "no lambda_a": ({"lambda_a": None}, TypeError, "give both lambda_w and lambda_a, or share"),
    "no lambda": (
        {"lambda_w": None, "lambda_a": None},
        TypeError,
        "give both lambda_w and lambda_a, or share",
    ),
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
    penalty = gl.GradL1(model, 1.0, 1.0, scale="none")
    penalty(curved(model))
    expected = truth(plain, ["0.weight", "2.weight"], ["2"], scale="none").terms
    expected["2.input"] = expected.pop("2")
    assert penalty.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert not penalty.terms[name].requires_grad
        torch.testing.assert_close(penalty.terms[name], value, rtol=1e-12, atol=0)


def test_the_step_is_the_default_scale() -> None:
    model = gl.convert(linears())
    by_default, by_name = gl.GradL1(model, 1.0, 1.0), gl.GradL1(model, 1.0, 1.0, scale="step")
    loss = curved(model)
    assert torch.equal(by_default(loss), by_name(loss))
    assert by_default.scale == "step"


def test_both_lambdas_zero_give_zero() -> None:
    model = gl.convert(linears())
    value = gl.GradL1(model, 0, 0)(curved(model))
    assert value == 0
    assert not value.requires_grad


def test_all_weights_frozen_is_an_error() -> None:
    model = gl.convert(linears(nn.PReLU().double()))
    for layer in model.modules():
        if isinstance(layer, gl.QLinear):
            layer.requires_grad_(False)
    penalty = gl.GradL1(model, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="every weight is frozen"):
        penalty(curved(model))


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
    penalty = gl.GradL1(model, 1.0, 1.0)
    with pytest.raises(error, match=message):
        penalty(make(model))


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
    penalty = gl.GradL1(model, 1.0, 1.0)
    assert not penalty(curved(model) * value).isfinite()


def test_a_constant_penalty_has_no_gradient() -> None:
    model = gl.convert(nn.Linear(3, 2).double())
    value = gl.GradL1(model, 1.0, 0.0, scale="none")(model(data()).sum())
    torch.testing.assert_close(value.detach(), 2 * data().sum(0).abs().sum())
    assert not any(g is not None and g.any() for g in gradients(model, value))


def test_a_penalty_that_does_not_depend_on_parameters_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 2), gl.nn.ActivationQuantizer()).double()
    penalty = gl.GradL1(model, 0.0, 1.0, scale="none")
    assert penalty(model(data()).square().sum()).detach() > 0
    with pytest.raises(RuntimeError, match="the penalty is constant: no gradient depends on a parameter"):
        penalty(model(data()).sum())


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no quantizable layer; call gradl1_fast\.convert"):
        gl.GradL1(linears(), 1.0, 0.0)
    with pytest.raises(
        ValueError, match="lambda_a needs activations that feed a layer, and the model has none"
    ):
        gl.GradL1(gl.convert(nn.Linear(3, 3)), 0.0, 1.0)


def test_a_loss_whose_graph_was_freed_raises_an_error_that_says_what_to_do() -> None:
    model = gl.convert(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)))
    penalty = gl.GradL1(model, 0.1, 0.1)
    loss = model(torch.randn(4, 3)).square().mean()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"has freed the graph .* once, on loss \+ penalty\(loss\)"):
        penalty(loss)
