"""Objectives: the gradient of each against its formula, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.methods import make
from tests.gradients import assert_gradient, relative_error
from tests.networks import VGG
from tests.training.methods import truth

each = pytest.mark.parametrize("name", truth.SETTINGS)


def converted(name):
    return gl.convert(truth.network_of(name).make())


def step(name, model, strength=1.0, multiply=None, **changes):
    """Make one backward pass; return the terms, with the objective closed again."""
    objective = make(name, model, **{**truth.SETTINGS[name], **changes})
    objective.strength = strength
    network = truth.network_of(name)
    terms = objective.backward(lambda: network.loss(model), *([multiply] if multiply else []))
    objective.close()
    return terms


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(model, expected, rtol=1e-10):
    found = gradients(model)
    assert found.keys() == expected.keys()
    unit = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        # A bias in front of batch norm has a gradient of rounding alone.
        if float(gradient.norm()) > 1e-8 * unit:
            assert_gradient(found[name], gradient, rtol, name)


@each
def test_the_gradient_equals_that_of_the_formula(name):
    model = converted(name)
    step(name, model)
    assert_same(model, truth.gradients(name))


def test_the_gradient_with_steps_equals_that_of_the_formula():
    model = converted("gradl1")
    step("gradl1", model, scale="step")
    assert_same(model, truth.gradients("gradl1", scale="step"))


@pytest.mark.parametrize("scale", ["none", "step"])
def test_the_finite_difference_is_near_the_exact_gradient(scale):
    model, lambdas = converted("gradl1"), {"lambda_w": 0.03, "lambda_a": 0.02}
    step("gradl1", model, method="finite_difference", epsilon=1e-7, scale=scale, **lambdas)
    expected = truth.gradients("gradl1", scale=scale, **lambdas)
    found = gradients(model)
    for name in ("0.weight", "4.weight", "14.weight"):
        assert relative_error(found[name], expected[name]) < 1e-4


@each
def test_a_scaled_loss_scales_the_gradient_and_not_the_terms(name):
    one, other = converted(name), converted(name)
    terms, scaled = step(name, one), step(name, other, multiply=lambda loss: 8 * loss)
    assert_same(other, {n: 8 * g for n, g in gradients(one).items()})
    for a, b in ((terms.loss, scaled.loss), (terms.penalty, scaled.penalty)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert not a.requires_grad
        assert a.dim() == 0


@pytest.mark.parametrize("name", [name for name in truth.SETTINGS if name not in ("plain", "qat")])
def test_the_penalty_is_what_the_objective_adds(name):
    """Through the gradient: the objective's, less the plain one, is that of the penalty."""
    model, plain, half = converted(name), converted(name), converted(name)
    terms = step(name, model)
    assert float(terms.penalty) > 0
    assert float(step("plain", plain).loss) == pytest.approx(float(terms.loss), rel=1e-12)
    assert step(name, half, strength=0.0).penalty == 0
    assert_same(half, gradients(plain))


def test_strength_multiplies_the_coefficients():
    one, other = converted("gradl1"), converted("gradl1")
    step("gradl1", one, strength=0.25)
    step("gradl1", other, lambda_w=0.075, lambda_a=0.05)
    assert_same(one, gradients(other))


def test_terms_are_the_norms_with_their_coefficients():
    for name in ("gradl1", "l2"):
        terms = step(name, converted(name))
        weights = sum(float(v) for k, v in terms.parts.items() if k.endswith("weight"))
        others = sum(float(v) for k, v in terms.parts.items() if not k.endswith("weight"))
        assert float(terms.penalty) == pytest.approx(0.3 * weights + 0.2 * others, rel=1e-10)


@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_every_counts_steps_across_a_resumption(method):
    model = converted("gradl1")
    settings = {**truth.SETTINGS["gradl1"], "every": 2, "method": method}
    objective = make("gradl1", model, **settings)
    first = objective.backward(lambda: VGG.loss(model))
    resumed = make("gradl1", model, **settings)
    resumed.load_state_dict(objective.state_dict())
    second = resumed.backward(lambda: VGG.loss(model))
    assert first.penalty == 0
    once = step("gradl1", converted("gradl1"), method=method)
    assert float(second.penalty) == pytest.approx(2 * float(once.penalty), rel=1e-3)  # statistics moved on


def everything(model):
    """Return all that an objective might leave changed, in a form that compares."""
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: t.clone() for name, t in named if "running" not in name}
    state = []
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        values = {k: getattr(module, k) for k in ("bits", "step_bits", "observer") if hasattr(module, k)}
        probe = getattr(module, "probe", None)
        state.append((name, module.training, hooks, values, None if probe is None else probe.requires_grad))
    return tensors, state


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in truth.SETTINGS), ("gradl1", {"scale": "step"})]
)
def test_an_objective_undoes_what_it_changes(name, changes, calibrated):
    model = converted(name)
    if calibrated:
        gl.calibrate(model, [truth.network_of(name).batch()])
    tensors, state = everything(model)
    step(name, model, **changes)
    after, state_after = everything(model)
    assert state_after == state
    assert after.keys() == tensors.keys()
    counted = {n for n in tensors if n.endswith("num_batches_tracked")}
    assert all(torch.equal(after[n], tensors[n]) for n in tensors.keys() - counted)
    assert all(after[n] == tensors[n] + 1 for n in counted)


@each
def test_an_objective_undoes_its_changes_after_an_error(name):
    model = converted(name)
    objective = make(name, model, **truth.SETTINGS[name])
    tensors, state = everything(model)

    def fail():
        truth.network_of(name).loss(model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        objective.backward(fail)
    after, state_after = everything(model)
    if name != "qat":  # ranges have moved, until it is closed
        assert after.keys() == tensors.keys()
    assert state_after == state


def test_sam_leaves_the_statistics_of_one_pass():
    model, once = converted("sam"), converted("sam")
    step("sam", model)
    step("plain", once)
    for (name, one), (_, other) in zip(model.named_buffers(), once.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def test_sam_sees_the_same_dropout_twice():
    torch.manual_seed(3)
    model = gl.convert(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))
    )
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_rng_state()))
    objective = make("sam", model, epsilon=0.1)
    x, y = VGG.batch(torch.float32)
    objective.backward(lambda: nn.functional.cross_entropy(model(x), y))
    assert torch.equal(*seen)


def test_sam_is_gradient_l1_to_first_order():
    one, other, plain, size = converted("sam"), converted("gradl1"), converted("plain"), 1e-8
    step("sam", one, epsilon=size)
    step("gradl1", other, lambda_w=size, lambda_a=0.0)
    step("plain", plain)
    added = [
        torch.cat([(m.get_parameter(n).grad - plain.get_parameter(n).grad).flatten() for n in ("4.weight",)])
        for m in (one, other)
    ]
    assert relative_error(*added) < 1e-3


def test_the_moving_range_takes_a_tenth_of_each_new_batch():
    model = gl.convert(nn.Sequential(nn.Linear(2, 2)))
    objective = make("qat", model, w=4, a=4)
    for high in (1.0, 2.0):
        x = torch.tensor([[-1.0, high]])
        objective.backward(lambda x=x: model(x).sum())
    state = objective.state_dict()
    assert sorted(float(v) for v in state.values()) == pytest.approx([-1.0, 1.1])
    resumed = make("qat", model, w=4, a=4)
    resumed.load_state_dict(state)
    assert resumed.state_dict().keys() == state.keys()


def test_a_nan_reaches_the_loss_and_no_weight():
    """What a loss scaler skips must not have changed the model."""
    for name in truth.SETTINGS:
        model = converted(name)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        objective = make(name, model, **truth.SETTINGS[name])
        terms = objective.backward(lambda m=model, n=name: truth.network_of(n).loss(m) * float("nan"))
        assert terms.loss.isnan()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        objective.close()


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("magic", {}, ValueError, "method must be one of plain, "),
        ("plain", {"lambda_w": 1.0}, TypeError, "method plain: .*'lambda_w'; its settings are none"),
        ("l2", {"lambda_w": 1.0}, TypeError, "missing .*lambda_a.*its settings are lambda_w, lambda_a"),
        ("l2", {"lambda_w": -1.0, "lambda_a": 0.0}, ValueError, "lambda_w must be finite and 0 or more"),
        ("gradl1", {"scale": "step"}, ValueError, "lambda_w and lambda_a are both 0"),
        ("gradl1", {"lambda_w": 1.0, "every": 0}, ValueError, "every must be 1 or more"),
        ("sam", {"epsilon": float("nan")}, ValueError, "epsilon must be finite"),
        ("kure", {"coefficient": "1"}, TypeError, "coefficient must be a number"),
        ("defensive", {"beta": float("inf")}, ValueError, "beta must be finite"),
        ("qat", {"w": 17, "a": 4}, ValueError, "w .*must be from 1 to 16"),
    ],
)
def test_a_wrong_setting_is_named(name, settings, error, message):
    with pytest.raises(error, match=message):
        make(name, gl.convert(VGG.make()), **settings)


@pytest.mark.parametrize("name", [name for name in truth.SETTINGS if name != "plain"])
def test_a_plain_model_is_refused(name):
    with pytest.raises(ValueError, match="convert"):
        make(name, VGG.make(), **truth.SETTINGS[name])
