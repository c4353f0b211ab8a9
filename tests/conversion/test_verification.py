"""The comparison of a plan with its modules: which plans it rejects, and no side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.conversion import planned
from gradl1_fast.conversion.verification import difference
from tests.conversion.models import PLANNED, model
from tests.conversion.runs import assert_equal_steps, built, images, loss_of

WRONG: dict[str, Callable[[Any], Any]] = {
    "values": lambda y: y * 1.01,
    "one value": lambda y: y + torch.zeros_like(y).index_fill(0, torch.tensor(0), 1e-3),
    "shape": lambda y: y[:, :1],
    "type": lambda y: y.float(),
    "structure": lambda y: [y],
    "a number": lambda y: 3.0,
    "not a number": lambda y: y * float("nan"),
    "an error": lambda y: y.logits,
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_plan_is_not_run(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = planned.executable

    def wrong(*args: Any) -> tuple[Callable[..., Any], Any]:
        run, regions = original(*args)
        return lambda *args: WRONG[kind](run(*args)), regions

    monkeypatch.setattr(planned, "executable", wrong)
    x, make = images(), PLANNED["in_place_add"]
    converted = gl.convert(built(make))
    assert_equal_steps(built(make), converted, loss_of(x))
    reason = "raises AttributeError" if kind == "an error" else "its outputs differ from those of its modules"
    assert reason in converted._compiled_call_impl.reason
    ((_, _, state),) = gl.report(converted).plans
    assert reason in state


def test_the_comparison_changes_no_state() -> None:
    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.kept = 0, []
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.kept.append(x)
            self.total += x.sum()
            return x.mul_(torch.rand([]))

    module, x = Leaving(), torch.ones(3)
    torch.manual_seed(1)
    first = torch.rand([])
    torch.manual_seed(1)
    assert not difference(module, module.forward, module.forward, (x,))
    assert torch.equal(torch.rand([]), first)
    assert (module.calls, module.kept, float(module.total)) == (0, [], 0.0)
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_equal_non_finite_values_compare_equal(value: float) -> None:
    module, x = nn.Identity(), torch.tensor([1.0, value])
    assert not difference(module, lambda x: x, lambda x: x * 1, (x,))
    assert difference(module, lambda x: x, lambda x: x.nan_to_num(0, 0, 0), (x,))


def test_empty_batches_compare_equal() -> None:
    assert not difference(nn.Identity(), lambda x: x, lambda x: x * 1, (torch.empty(0, 3),))


def test_integers_and_booleans_are_compared_exactly() -> None:
    module, x = nn.Identity(), torch.arange(3)
    assert not difference(module, lambda x: (x, x > 1, "a"), lambda x: (x * 1, x > 1, "a"), (x,))
    assert difference(module, lambda x: x, lambda x: x + 1, (x,))
    assert difference(module, lambda x: x > 1, lambda x: x > 0, (x,))
    assert difference(module, lambda x: "a", lambda x: "b", (x,))


def test_statistics_are_counted_once_in_a_pass_that_compares() -> None:
    converted = gl.convert(built(PLANNED["in_place_relu"]))
    penalty = gl.GradL1(converted, 0.1, 0.1)
    for count in (1, 2, 3):
        penalty(loss_of(images())(converted))
        assert int(converted.bn1.num_batches_tracked) == count


def test_the_comparison_does_not_change_dropout() -> None:
    def make() -> nn.Module:
        return model(lambda m, x: m.conv2(m.drop(m.relu(m.conv1(x)))), drop=nn.Dropout(0.5))

    assert_equal_steps(built(make), gl.convert(built(make)), loss_of(images()))
