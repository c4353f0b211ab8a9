"""The oracle compared with closed forms and finite differences."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests import oracle
from tests.gradients import assert_gradients


class Twice(nn.Module):
    """One layer, a block used twice, another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.last = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(self.first(x))))


def penalise(model: nn.Module, x: Tensor, scale: str = "none", **sites: list[str]) -> oracle.Penalised:
    return oracle.penalised_gradients(
        lambda: oracle.measure(model, lambda m: m(x).square().sum() / 2, **sites),
        dict(model.named_parameters()),
        lambda_w=0.3,
        lambda_a=0.2,
        scale=scale,
    )


def test_one_linear_layer_in_closed_form() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False)).double()
    x, w = torch.randn(1, 3, dtype=torch.float64), model[0].weight
    result = penalise(model, x, weights=["0.weight"], inputs_of=["0"])
    y = x @ w.detach().t()
    assert result.terms["0.weight"].item() == pytest.approx((y.abs().sum() * x.abs().sum()).item())
    back = y @ w.detach()  # dL/dx
    assert result.terms["0"].item() == pytest.approx(back.abs().sum().item())
    expected = (y + 0.3 * y.sign() * x.abs().sum()).t() * x
    s = back.sign()
    expected = expected + 0.2 * ((s @ w.detach().t()).t() * x + y.t() * s)
    assert_gradients([result.gradients["0.weight"]], [expected])


@pytest.mark.parametrize("scale", ["none", "step"])
def test_gradients_are_those_of_the_objective(scale: str) -> None:
    model, x = Twice(), torch.randn(5, 3, dtype=torch.float64)
    sites = {"weights": ["first.weight", "shared.0.weight"], "inputs_of": ["shared.0", "last"]}
    result = penalise(model, x, scale, **sites)
    for name, weight in model.named_parameters():
        values = []
        for step in (1e-6, -2e-6):
            weight.data.view(-1)[1] += step
            changed = penalise(model, x, scale, **sites)
            values.append(changed.loss + changed.penalty)
        weight.data.view(-1)[1] += 1e-6
        slope = (values[0] - values[1]).item() / 2e-6
        assert result.gradients[name].view(-1)[1].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


class Branches(nn.Module):
    """Two layers that are given one tensor, and a residual that goes past them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = (nn.Linear(3, 3).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + self.one(y) + self.other(y)


def test_layers_with_one_input_share_a_site_and_other_readers_are_not_measured() -> None:
    model, x = Branches(), torch.randn(2, 3, dtype=torch.float64)
    sites = {"inputs_of": ["one", "other"]}
    result = penalise(model, x, **sites)
    assert list(result.terms) == ["one"]
    dy = model(x).detach()
    back = dy @ (model.one.weight + model.other.weight).detach()
    assert result.terms["one"].item() == pytest.approx(back.abs().sum().item())


def test_a_layer_called_twice_has_two_sites() -> None:
    measured = oracle.measure(
        Twice(),
        lambda m: m(torch.randn(2, 3, dtype=torch.float64)).sum(),
        inputs_of=["shared.0", "last"],
    )
    assert list(measured.activations) == ["shared.0", "shared.0 #1", "last"]


def test_a_tensor_changed_in_place_is_a_different_tensor() -> None:
    seen = []
    sites = oracle.Sites(lambda name, t: seen.append(name) or t)
    t = torch.ones(2)
    sites.see("one", t)
    sites.see("two", t)
    sites.see("three", t.add_(1))
    assert seen == ["one", "three"]


def test_the_computed_tensor_of_a_parametrized_weight_is_measured() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    grid = oracle.FakeQuantize(torch.tensor(0.25).double(), torch.tensor(0.0).double(), -7, 7)
    parametrize.register_parametrization(model[0], "weight", grid)
    x = torch.ones(1, 3, dtype=torch.float64)
    measured = oracle.measure(model, lambda m: m(x).sum(), weights=["0.weight"])
    assert torch.equal(measured.weights["0.weight"] * 4, (measured.weights["0.weight"] * 4).round())
    assert torch.autograd.grad(measured.loss, measured.weights["0.weight"])[0].eq(1).all()


def test_the_oracle_does_not_import_the_package() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {name.split(".")[0] for name in names} <= {
        "__future__",
        "collections",
        "dataclasses",
        "operator",
        "torch",
    }
