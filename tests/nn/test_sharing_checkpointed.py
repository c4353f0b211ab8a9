"""Sites in checkpointed regions, under AMP and in compiled steps equal those of eager mode, or raise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from tests.conversion.runs import assert_equal_steps, assert_same, built, loss_of, penalised, truth
from tests.gradients import assert_gradients, relative_error


def tokens() -> Tensor:
    return torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.out((self.q(x) * self.k(x)).softmax(-1) * self.v(x))


class Stack(nn.Module):
    """Some blocks, of which the named ones are checkpointed."""

    def __init__(self, checkpointed: tuple[int, ...], count: int = 3) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, 6), nn.ModuleList(Block() for _ in range(count))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if i in self.checkpointed else block(x)
        return x


def stack(*checkpointed: int) -> Callable[[], nn.Module]:
    return lambda: Stack(checkpointed)


@pytest.mark.parametrize("checkpointed", [(0, 1, 2), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("scale", ["none", "step"])
def test_a_checkpointed_step_equals_the_plain_one(checkpointed: tuple[int, ...], scale: str) -> None:
    x = tokens()
    assert_equal_steps(
        built(stack()), gl.convert(built(stack(*checkpointed))), loss_of(x), scale=scale, steps=3
    )


@pytest.mark.parametrize("armed", [False, True])
def test_checkpointing_is_kept(armed: bool) -> None:
    """Every checkpointed block runs as often as in the original, and again in the backward pass."""
    counts = []
    for model in (built(stack(0, 1, 2)), gl.convert(built(stack(0, 1, 2)))):
        penalty = gl.GradL1(model, 0.0, 0.1) if armed and isinstance(model.stem, gl.QLinear) else None
        loss = loss_of(tokens())(model)
        if penalty is not None:
            (loss + penalty(loss)).backward()
        elif armed:
            gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
            (loss + sum(g.abs().sum() for g in gradients)).backward()
        else:
            loss.backward()
        counts.append([block.calls for block in model.blocks])
    assert min(counts[1]) >= 2
    if not armed:
        assert counts[0] == counts[1]


class Wrapped(nn.Module):
    """Checkpoints a Sequential of convolutions, batch norms and dropout from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Conv2d(4, 4, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, self.stem(x), use_reentrant=False).mean((2, 3))


def test_a_checkpointed_part_with_a_batch_norm() -> None:
    x = torch.randn(3, 2, 5, 5).double()
    plain, converted = built(Wrapped).eval(), gl.convert(built(Wrapped).eval())
    assert_equal_steps(plain, converted, loss_of(x))


class Across(nn.Module):
    """One layer reads a tensor inside a checkpointed part, another outside of it."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.stem, self.inside, self.outside = (nn.Linear(6, 6) for _ in range(3))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if self.order == "outside first":
            z = self.outside(y)
            return z * checkpoint(self.inside, y, use_reentrant=False)
        z = checkpoint(self.inside, y, use_reentrant=False)
        return z * self.outside(y)


@pytest.mark.parametrize("order", ["inside first", "outside first"])
def test_a_tensor_read_inside_and_outside_a_region_is_correct_or_refused_by_name(order: str) -> None:
    x, converted = tokens(), gl.convert(built(lambda: Across(order)))
    error = None
    try:
        actual = penalised(converted, loss_of(x))
    except RuntimeError as raised:
        error = str(raised)
    if error is None:
        assert_same(actual, truth(built(lambda: Across(order)), loss_of(x)))
    else:
        assert "checkpoint" in error
        assert ".input" in error


@pytest.mark.parametrize("order", ["inside first", "outside first"])
def test_without_a_penalty_such_a_tensor_is_accepted(order: str) -> None:
    plain, converted = built(lambda: Across(order)), gl.convert(built(lambda: Across(order)))
    gl.calibrate(converted, [tokens()])
    for model in (plain, converted):
        loss_of(tokens())(model).backward()
    ours, theirs = ([p.grad for p in m.parameters()] for m in (converted, plain))
    assert_gradients(ours, theirs, 1e-12)
    with gl.bits(converted, w=8, a=8):
        loss_of(tokens())(converted).backward()


@pytest.mark.parametrize("read", ["eager", "autocast"])
def test_autocast_finds_the_same_sites_and_a_similar_penalty(read: str) -> None:
    x = tokens().float()
    converted = gl.convert(built(stack()).float())
    with torch.autocast("cpu", torch.bfloat16, enabled=read == "autocast"):
        penalty = gl.GradL1(converted, 0.3, 0.2)
        loss = converted(x).sin().sum()
    penalty(loss)
    names = {n.removesuffix(".input") for n in named_quantizers(converted)}
    assert names == {"stem", *(f"blocks.{i}.{n}" for i in range(3) for n in ("q", "out"))}
    exact = gl.convert(built(stack()).float())
    other = gl.GradL1(exact, 0.3, 0.2)
    other(exact(x).sin().sum())
    assert penalty.terms.keys() == other.terms.keys()
    ours, theirs = (torch.stack([p.terms[n].float() for n in other.terms]) for p in (penalty, other))
    assert relative_error(ours, theirs) < (0.1 if read == "autocast" else 1e-5)


@pytest.mark.usefixtures("trace_autograd")
@pytest.mark.parametrize("bits", [None, 4])
def test_a_compiled_step_has_the_sites_of_the_eager_one(bits: int | None) -> None:
    results = []
    for compiled in (False, True):
        x = tokens()
        model = gl.convert(built(lambda: Stack((), count=1)))
        gl.calibrate(model, [x])
        gl.set_bits(model, w=bits, a=bits)
        penalty = gl.GradL1(model, 0.0, 0.2, scale="none")

        def step(x: Tensor, model: nn.Module = model, penalty: gl.GradL1 = penalty) -> list[Tensor]:
            loss = model(x).sin().sum()
            extra = penalty(loss)
            gradients = torch.autograd.grad(loss + extra, list(model.parameters()))
            return [loss.detach(), extra.detach(), *gradients]

        model.blocks[0].calls = 0
        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        results.append(run(x))
    assert_gradients(results[1], results[0], 1e-12)
