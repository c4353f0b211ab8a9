"""Unused layers contribute zero; a penalty without any gradient raises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.penalty.small import assert_same, data, ours, truth


class LayerDrop(nn.Module):
    """Residual layers of which each is skipped by chance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem = nn.Linear(3, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)
        self.used: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        x, self.used = torch.tanh(self.stem(x)), []
        for i, layer in enumerate(self.layers):
            if torch.rand([]) < 0.5:
                x = x + torch.tanh(layer(x))
                self.used.append(f"layers.{i}")
        return self.head(x)


class Experts(nn.Module):
    """Each row goes to one of four experts; some get none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.gate = nn.Linear(3, 4)
        self.experts = nn.ModuleList(nn.Linear(3, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)
        self.used: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        x, self.used = torch.tanh(x), []
        scores = self.gate(x).softmax(-1)
        chosen = (scores + torch.rand(len(scores), 4).round()).argmax(-1)
        y = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            if len(rows):
                y = y.index_add(0, rows, scores[rows, i, None] * torch.tanh(expert(x[rows])))
                self.used.append(f"experts.{i}")
        return self.head(y)


CASES = {"layer drop": (LayerDrop, "stem", "layers"), "experts": (Experts, "gate", "experts")}


def loss_with(seed: int) -> object:
    def loss(model: nn.Module) -> Tensor:
        torch.manual_seed(seed)
        return model(data()).square().mean()

    return loss


@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("case", CASES)
def test_twenty_of_twenty_steps_run_and_equal_the_oracle_without_the_unused_layers(
    case: str, scale: str
) -> None:
    make, first, several = CASES[case]
    plain = make().double()
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 1.0, 1.0, scale)
    counts = set()
    for seed in range(20):
        loss = loss_with(seed)
        found = ours(model, penalty, loss)
        loss(plain)
        used = [first, *plain.used, "head"]
        sites = used[1:] if case == "layer drop" else used
        assert_same(found, truth(plain, [f"{n}.weight" for n in used], sites, loss=loss, scale=scale))
        unused = {f"{several}.{i}.weight" for i in range(4)} - {f"{n}.weight" for n in used}
        assert {n for n, value in penalty.terms.items() if n.endswith("weight") and value == 0} == unused
        counts.add(len(unused))
    assert len(counts) > 2


class Heads(nn.Module):
    """A head of its own for training, which the loss may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body, self.head, self.auxiliary = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.body(x))
        return self.head(x), self.auxiliary(torch.sigmoid(x))


def test_an_auxiliary_head_that_the_loss_leaves_out_contributes_zero() -> None:
    plain = Heads().double()
    model = gl.convert(plain)

    def loss(model: nn.Module) -> Tensor:
        return model(data())[0].square().mean()

    penalty = gl.GradL1(model, 1.0, 1.0)
    assert_same(ours(model, penalty, loss), truth(plain, ["body.weight", "head.weight"], ["head"], loss=loss))
    assert penalty.terms["auxiliary.weight"] == penalty.terms["auxiliary.input"] == 0


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))).detach())


def test_layers_before_a_detached_tensor_contribute_zero() -> None:
    model = gl.convert(Detached().double())
    penalty = gl.GradL1(model, 1.0, 0.0)
    penalty(model(data()).square().mean())
    assert [bool(value) for value in penalty.terms.values()] == [False, False, True]


def test_if_no_weight_gets_a_gradient_all_are_named() -> None:
    model = gl.convert(Detached().double())
    penalty = gl.GradL1(model, 1.0, 0.0)
    loss = (model.third.bias * model(data()).detach()).square().mean()
    names = r"first\.weight, second\.weight, third\.weight"
    with pytest.raises(RuntimeError, match=f"no gradient reached any weight: {names}"):
        penalty(loss)


def test_a_step_that_uses_no_penalised_activation_counts_its_weights() -> None:
    model = gl.convert(Detached().double())
    penalty, weights = gl.GradL1(model, 1.0, 1.0), gl.GradL1(model, 1.0, 0.0)
    loss = model.first(data()).square().mean()
    value = penalty(loss)
    assert value > 0
    assert penalty.terms["second.input"] == penalty.terms["third.input"] == 0
    torch.testing.assert_close(value, weights(model.first(data()).square().mean()))


def test_a_pass_before_the_penalty_names_the_activations() -> None:
    model = gl.convert(Detached().double())
    loss = model.first(data()).square().mean()
    with pytest.raises(RuntimeError, match=r"reached any activation: second\.input, third\.input"):
        gl.GradL1(model, 1.0, 1.0)(loss)


def test_long_lists_of_names_are_shortened() -> None:
    model = gl.convert(nn.Sequential(*(nn.Linear(3, 3) for _ in range(7))).double())
    penalty = gl.GradL1(model, 1.0, 0.0)
    loss = torch.ones(3, requires_grad=True).sum()
    with pytest.raises(RuntimeError, match=r"4\.weight and others\. Was the penalty created"):
        penalty(loss)
