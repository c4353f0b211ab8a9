"""The search compared with all choices, and its budget."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.quantization.bits import widths_of
from tests.networks import NO_NORM, RESNET, VGG

CHOICES = (8, 4, 2)
FACTORS = {"0": 5.0, "3": 1.0, "7": 3.0, "12": 0.1, "14": 20.0}


@pytest.fixture
def model() -> nn.Module:
    model = gl.convert(VGG.make().eval())
    gl.calibrate(model, [VGG.batch()])
    return model


def loss(model: nn.Module) -> float:
    """Return a sum over layers of what rounding costs: separable, and convex in the bits of each."""
    return sum(FACTORS[name] * 4.0 ** -(bits or 16) for name, bits in widths_of(model)[0].items())


def all_choices() -> list[tuple[float, float]]:
    """Return cost and loss of each of the 3**5 choices."""
    weights = gl.costs(gl.convert(VGG.make())).weights
    return [
        (
            sum(weights[n] * b for n, b in zip(FACTORS, widths, strict=True)) / 8,
            sum(f * 4.0**-b for f, b in zip(FACTORS.values(), widths, strict=True)),
        )
        for widths in itertools.product(CHOICES, repeat=len(FACTORS))
    ]


def test_no_other_choice_is_better_than_a_point_of_the_path(model: nn.Module) -> None:
    plan = gl.search(model, loss, size=500, choices=CHOICES, higher_is_better=False)
    front = plan.pareto()
    assert len(front) > 6
    for point in front:
        if not point.uniform:
            assert not any(c <= point.cost and v < point.value * (1 - 1e-12) for c, v in all_choices())
    assert [p.cost for p in front] == sorted((p.cost for p in front), reverse=True)
    assert [p.value for p in front] == sorted(p.value for p in front)


@pytest.mark.parametrize("budget", [400.0, 500.0, 700.0])
def test_the_best_point_is_within_budget_and_better_than_a_uniform_width(
    model: nn.Module, budget: float
) -> None:
    gl.set_bits(model, w=None, a=6)
    plan = gl.search(model, loss, size=budget, choices=CHOICES, higher_is_better=False)
    assert plan.best.cost <= budget
    assert plan.best.value == min(p.value for p in plan.points if p.cost <= budget)
    assert plan.best.value < min(p.value for p in plan.points if p.uniform and p.cost <= budget)
    assert set(widths_of(model)[0].values()) == {None}
    plan.apply(model)
    weights, activations = widths_of(model)
    assert weights == plan.best.w
    assert activations == {name: 8 if name == "0.input" else 6 for name in activations}
    assert loss(model) == plan.best.value
    counted = gl.costs(model)
    assert counted.size(weights) == plan.best.cost


def test_a_bit_operation_budget_also_chooses_activation_widths() -> None:
    model = gl.convert(NO_NORM.make().eval())
    gl.calibrate(model, [NO_NORM.batch()])
    x, y = NO_NORM.batch()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(nn.functional.cross_entropy(model(x), y))

    counted = gl.costs(model, x)
    w, a = widths_of(model)
    budget = counted.bit_operations(dict.fromkeys(w, 5), dict.fromkeys(a, 5))
    plan = gl.search(model, accuracy, bit_operations=budget, example=x, choices=(8, 4, 2), input_bits=1)
    assert plan.best.a.keys() == a.keys()
    assert counted.bit_operations(plan.best.w, plan.best.a) == plan.best.cost <= budget
    assert len(set(plan.best.w.values()) | set(plan.best.a.values())) > 1
    with gl.bits(model, w=plan.best.w, a=plan.best.a):
        assert accuracy(model) == plan.best.value
    assert set(widths_of(model)[1].values()) == {None}


def test_text_and_plot(model: nn.Module, tmp_path: Path) -> None:
    plan = gl.search(model, loss, size=500, choices=CHOICES, higher_is_better=False)
    text = str(plan)
    assert "pareto, best within the budget" in text
    assert "budget: 500 bytes" in text
    assert ["w", "0", str(plan.best.w["0"])] in [line.split() for line in text.splitlines()]
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    plan.plot(tmp_path / "p.png", title="a title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "give exactly one budget"),
    ({"size": 1.0, "bit_operations": 1.0}, ValueError, "give exactly one budget"),
    ({"bit_operations": 1e9}, ValueError, "needs an example"),
    ({"size": 3.0}, ValueError, r"the narrowest choice costs 282 bytes, more than the budget of 3"),
    ({"size": float("nan")}, ValueError, "budget must be finite"),
    ({"size": "1"}, TypeError, "budget must be a number"),
    ({"size": 1e6, "choices": ()}, ValueError, "choices is empty"),
    ({"size": 1e6, "choices": (8, 17)}, ValueError, "choices .*must be from 1 to 16"),
    ({"size": 1e6, "choices": (None,)}, TypeError, "numbers of bits, got None"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_invalid_searches_are_refused_before_the_work(
    model: nn.Module, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gl.search(model, lambda m: pytest.fail("evaluated"), **wrong)


def test_sweep_and_search_change_neither_ranges_nor_statistics(model: nn.Module) -> None:
    x = VGG.batch()[0]

    def norm(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(3 * x).norm())

    before = {name: t.clone() for name, t in (*model.named_buffers(), *model.named_parameters())}
    modes = [m.training for m in model.modules()]
    gl.sweep(model, norm, [(4, 4), (2, None)])
    gl.sensitivity(model, norm)
    gl.search(model, norm, bit_operations=1e9, example=x, choices=(4, 2))
    gl.fold_batch_norm(model, x)
    gl.correct_bias(model, [x], w=4)
    after = dict((*model.named_buffers(), *model.named_parameters()))
    assert before.keys() == after.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert [m.training for m in model.modules()] == modes
    assert {m.bits for m in model.modules() if hasattr(m, "bits")} == {None}


def test_a_loss_that_every_width_has_does_not_keep_a_tensor_wide(model: nn.Module) -> None:
    def with_constant(model: nn.Module) -> float:
        return loss(model) + (50.0 if widths_of(model)[0]["12"] is not None else 0.0)

    plain = gl.search(model, loss, size=400, choices=CHOICES, higher_is_better=False)
    shifted = gl.search(model, with_constant, size=400, choices=CHOICES, higher_is_better=False)
    assert [p.w for p in shifted.points] == [p.w for p in plain.points]
    assert shifted.best.w == plain.best.w


def test_the_cheapest_of_equal_values_is_best(model: nn.Module) -> None:
    plan = gl.search(model, lambda m: 0.5, size=500, choices=CHOICES)
    assert plan.best.cost == min(p.cost for p in plan.points)
    assert any(point is plan.best for point in plan.pareto())


def test_a_nan_result_is_an_error(model: nn.Module) -> None:
    def broken(model: nn.Module) -> float:
        return float("nan") if widths_of(model)[0]["3"] == 2 else loss(model)

    with pytest.raises(ValueError, match=r"evaluate returned NaN at w = \{'3': 2\}, a = \{\}"):
        gl.search(model, broken, size=500, choices=CHOICES, higher_is_better=False)
    assert set(widths_of(model)[0].values()) == {None}


def test_a_plan_leaves_the_network_input_its_bits_and_counts_a_shared_site_once() -> None:
    model = gl.convert(RESNET.make(torch.float32).eval())
    batch = RESNET.batch(torch.float32)
    gl.calibrate(model, [batch])
    counted = gl.costs(model, batch)
    sites = set(counted.inputs.values())
    shared = counted.inputs["blocks.2.conv1"]
    assert shared == counted.inputs["blocks.2.shortcut.0"] == "blocks.2.conv1.input"
    plan = gl.search(model, lambda m: 0.0, bit_operations=1e12, example=batch, choices=(4, 2))
    assert set(plan.best.a) == sites
    assert len(plan.best.a) == len(counted.inputs) - 3
    assert {p.a["stem.0.input"] for p in plan.points} == {8}
    uniform = [p for p in plan.points if p.uniform]
    assert [set(p.w.values()) for p in uniform] == [{4}, {2}]
    assert "all 4" in str(plan)
    plan.apply(model)
    assert model.stem[0].input_quantizer.bits == 8


def test_a_model_with_keyword_arguments_is_searched() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    model, x = gl.convert(Named().eval()), torch.randn(4, 3)
    gl.calibrate(model, [{"x": x}])
    plan = gl.search(model, lambda m: 0.0, bit_operations=1e6, example={"x": x}, choices=(4, 2))
    other = gl.search(
        model,
        lambda m: 0.0,
        bit_operations=1e6,
        example=x,
        forward=lambda model, x: model(x=x),
        choices=(4, 2),
    )
    assert plan.best == other.best
