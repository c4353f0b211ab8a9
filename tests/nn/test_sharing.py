"""Layers share a site if and only if they have the same input tensor."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gradl1_fast as gl
from gradl1_fast.nn import inputs, sharing
from gradl1_fast.nn.arming import armings_of
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.training.methods.activations import seen_at_sites
from tests.conversion.runs import assert_equal_steps, assert_same, built, loss_of, penalised, truth


def tokens() -> Tensor:
    return torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


class Attention(nn.Module):
    """Queries, keys and values of one tensor; ``read`` says how the three get it."""

    def __init__(self, read: Callable[[Attention, Tensor], list[Tensor]]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(self, self.first(x).tanh() * 1)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def same(m: Attention, y: Tensor) -> list[Tensor]:
    return [m.q(y), m.k(y), m.v(y)]


def identity_between(m: Attention, y: Tensor) -> list[Tensor]:
    return [m.q(y), m.k(nn.Identity()(y)), m.v(y)]


def changed_between(m: Attention, y: Tensor) -> list[Tensor]:
    q = m.q(y * 1)
    k = m.k(y)
    y.mul_(0.5)
    return [q, k, m.v(y)]


def view_between(m: Attention, y: Tensor) -> list[Tensor]:
    return [m.q(y), m.k(y), m.v(y.view(y.shape))]


def later(m: Attention, y: Tensor) -> list[Tensor]:
    q = m.q(y)
    return [q, m.k(q), m.v(y)]


def branching(m: Attention, y: Tensor) -> list[Tensor]:
    return [m.q(y), m.k(y), m.v(y)] if y.sum() > -1e9 else [y, y, y]


# The sites that a penalty counts, by the first layer that each feeds.
READS: dict[Callable[..., list[Tensor]], set[str]] = {
    same: {"q", "out"},
    identity_between: {"q", "out"},
    later: {"q", "k", "out"},
    view_between: {"q", "v", "out"},
    changed_between: {"q", "k", "v", "out"},
    branching: {"q", "out"},
}
each_read = pytest.mark.parametrize("read", READS, ids=lambda f: f.__name__)
# A tensor that a layer has read cannot be changed where gradients are needed.
READS_WITH_GRADIENT = [read for read in READS if read is not changed_between]
each_read_with_gradient = pytest.mark.parametrize("read", READS_WITH_GRADIENT, ids=lambda f: f.__name__)


def make(read: Callable[..., list[Tensor]]) -> Callable[[], nn.Module]:
    return lambda: Attention(read)


def sites(model: nn.Module) -> set[str]:
    return {name.removesuffix(".input") for name, q in named_quantizers(model).items() if not q.is_input}


@each_read_with_gradient
@pytest.mark.parametrize("scale", ["none", "step"])
def test_sites_and_terms_equal_those_of_the_oracle(read: Callable[..., list[Tensor]], scale: str) -> None:
    converted = gl.convert(built(make(read)))
    assert_equal_steps(built(make(read)), converted, loss_of(tokens()), scale=scale, steps=3)


@each_read_with_gradient
def test_only_the_input_of_the_network_has_no_term(read: Callable[..., list[Tensor]]) -> None:
    x, converted = tokens(), gl.convert(built(make(read)))
    for _ in range(2):
        assert_same(penalised(converted, loss_of(x)), truth(built(make(read)), loss_of(x)))
    assert sites(converted) == READS[read]


@each_read_with_gradient
def test_plans_and_modules_find_the_same_sites(read: Callable[..., list[Tensor]]) -> None:
    names = []
    for hooked in (False, True):
        converted = gl.convert(built(make(read)))
        if hooked:  # no plan
            converted.first.register_forward_hook(lambda *_: None)
        for _ in range(2):
            penalised(converted, loss_of(tokens()))
        names.append(sites(converted))
    assert names[0] == names[1]


@each_read
def test_calibration_finds_the_same_sites(read: Callable[..., list[Tensor]]) -> None:
    converted = gl.convert(built(make(read)))
    gl.calibrate(converted, [tokens()])
    assert sites(converted) == READS[read]
    low = {name: float(q.low) for name, q in named_quantizers(converted).items()}
    if read is changed_between:
        assert low["v.input"] == pytest.approx(low["k.input"] / 2)
    with gl.bits(converted, w=8, a=8):
        y = converted(tokens())
    torch.testing.assert_close(y, built(make(read))(tokens()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("read", [same, branching, later], ids=lambda f: f.__name__)
def test_a_quantized_step_reads_one_quantized_tensor(read: Callable[..., list[Tensor]]) -> None:
    converted, seen = gl.convert(built(make(read))), []
    gl.calibrate(converted, [tokens()])
    gl.set_bits(converted, w=None, a=4)
    converted.q.input_quantizer.register_forward_hook(lambda m, args, out: seen.append(out))
    converted(tokens())
    assert len(seen) == 1


def test_reusing_a_leaf_in_every_step_does_not_reuse_notes() -> None:
    """Full-batch training on one tensor object, and calibration with the same batch twice."""
    x = tokens()
    plain, converted = built(make(same)), gl.convert(built(make(same)))
    # Small steps: large ones multiply the rounding of one step in the next.
    optimizers = [torch.optim.SGD(m.parameters(), 0.001) for m in (plain, converted)]
    for _ in range(4):
        theirs, ours = truth(plain, loss_of(x)), penalised(converted, loss_of(x))
        assert_same(ours, theirs, 1e-8)
        for model, result, optimizer in zip((plain, converted), (theirs, ours), optimizers, strict=True):
            for name, p in model.named_parameters():
                p.grad = result.gradients[name]
            optimizer.step()
    ranges = []
    for _ in range(2):
        gl.calibrate(converted, [x, x])
        ranges.append([float(q.high) for q in named_quantizers(converted).values()])
    assert ranges[0] == ranges[1]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def test_a_leaf_that_is_read_twice_in_a_pass_is_one_site_and_counts_in_every_step() -> None:
    """A part is given a leaf that requires a gradient, as its activations."""
    converted = gl.convert(built(lambda: nn.Sequential(nn.Linear(6, 6), Body())))
    part, x = converted[1], tokens().requires_grad_()
    values = []
    for _ in range(3):
        penalty = gl.GradL1(converted, 0.0, 1.0, scale="none")
        values.append(float(penalty(part(x).sin().sum()).detach()))
    plain = built(lambda: nn.Sequential(nn.Linear(6, 6), Body()))[1]
    expected = torch.autograd.grad(plain(x).sin().sum(), x)[0].abs().sum()
    assert values == pytest.approx([float(expected)] * 3)


def intermediates(model: nn.Module) -> list[weakref.ref[Tensor]]:
    """Take a penalised step and return references to what the model's layers were given."""
    refs: list[weakref.ref[Tensor]] = []
    original = sharing.leave_note

    def noting(x: Tensor, *args: object, **kwargs: object) -> None:
        refs.append(weakref.ref(x))
        original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "leave_note", noting)
        penalised(model, loss_of(tokens()))
    return refs


def notes_of(model: nn.Module) -> int:
    return sum(len(arming.notes) for arming in armings_of(model.modules()))


def test_passes_that_are_not_differentiated_leave_nothing() -> None:
    """The step of a range leads back to its tensor, through a graph that the collector cannot see."""
    converted, counts = gl.convert(built(make(same))), []
    penalty = gl.GradL1(converted, 0.1, 0.1)
    for _ in range(4):
        converted(tokens()).sum()
        loss = converted(tokens()).sin().sum()
        (loss + penalty(loss)).backward()
        del loss
        gc.collect()
        counts.append(sum(isinstance(o, Tensor) for o in gc.get_objects()))
    assert counts[1] == counts[3]


def test_nothing_of_a_step_outlives_it() -> None:
    """No reference cycle: tensors go without the collector."""
    converted = gl.convert(built(make(same)))
    gc.collect()
    before = notes_of(converted)
    gc.disable()
    try:
        for _ in range(2):
            refs = intermediates(converted)
            assert len(refs) >= 2
            assert not any(ref() is not None for ref in refs)
        assert notes_of(converted) == before
    finally:
        gc.enable()


def test_memory_is_flat_over_200_penalised_steps() -> None:
    converted = gl.convert(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double())
    penalty, x, counts = gl.GradL1(converted, 0.1, 0.1), tokens(), []
    gc.collect()
    for step in range(201):
        loss = converted(x).sin().sum()
        (loss + penalty(loss)).backward()
        if step in (20, 200):
            gc.collect()
            counts.append((notes_of(converted), sum(isinstance(o, Tensor) for o in gc.get_objects())))
    assert counts[0] == counts[1]


def test_tensors_after_a_pass_carry_nothing() -> None:
    converted, x = gl.convert(built(make(same))), tokens()
    penalised(converted, lambda m: m(x).sum())
    gl.calibrate(converted, [x])
    assert not vars(x)
    size = io.BytesIO()
    torch.save(x, size)
    plain = io.BytesIO()
    torch.save(tokens(), plain)
    assert len(size.getvalue()) == len(plain.getvalue())
    assert torch.equal(copy.deepcopy(x), pickle.loads(pickle.dumps(x)))


def two_models() -> list[nn.Module]:
    return [gl.convert(built(lambda: nn.Sequential(nn.Linear(6, 6), Body()))) for _ in range(2)]


def test_two_models_may_read_one_activation() -> None:
    """A teacher and a student on the same features: each has a site of its own."""
    models, x = two_models(), tokens()
    values = []
    for together in (False, True):
        penalty = gl.GradL1(models[0], 0.0, 1.0, scale="none")
        other = gl.GradL1(models[1], 0.0, 1.0, scale="none") if together else None
        y = models[0][0](x)
        loss = models[0][1](y).sum() + (0 * models[1][1](y).sum() if together else 0)
        values.append(float(penalty(loss).detach()))
        assert models[0][1].a.input_quantizer is not models[1][1].a.input_quantizer
        del other
    assert values[0] == pytest.approx(values[1])


def test_two_models_may_get_the_same_batch() -> None:
    models, x = two_models(), tokens()
    for model in models:
        gl.calibrate(model, [x])
        gl.set_bits(model, w=4, a=4)
        model(x)
    assert models[0][0].input_quantizer is not models[1][0].input_quantizer
    models[0][0].input_quantizer.set_range(torch.tensor(-9.0), torch.tensor(9.0))
    expected = models[1](x.clone())
    with torch.no_grad():
        models[0](x)
        torch.testing.assert_close(models[1](x), expected)


class Reading(nn.Module):
    """Its first layer is given what ``read`` makes of the input; the last one looks at values, if told to."""

    def __init__(self, read: Callable[[Tensor], Tensor], *, branches: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 2)
        self.read, self.branches = read, branches

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.read(x)).tanh()
        return self.second(-y if self.branches and y.sum() > 1e9 else y)


class Inside(nn.Module):
    """Hands on a copy of its input to a part that can be traced, as it cannot be itself."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.read, self.part = read, Reading(nn.Identity(), branches=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.read(x) if x.sum() < 1e9 else x)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.flatten(1),
    "permuted copy": lambda x: x.permute(0, 2, 1).flatten(1),
    "reshaped copy": lambda x: x.transpose(1, 2).reshape(-1, 16),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().view(-1, 16),
    "clone": lambda x: x.clone().unflatten(0, (-1, 1)).flatten(1),
    "other order": lambda x: x.flip(1).movedim(2, 1).flatten(1),
    "function": lambda x: torch.flatten(torch.swapaxes(x, 1, 2), 1),
    "pixels": lambda x: nn.functional.pixel_unshuffle(x.unsqueeze(1), 2).flatten(1),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: (x * 2).flatten(1),
    "part": lambda x: torch.cat([x[:, :2], x[:, :2]], 1).flatten(1),
    "relu": lambda x: x.relu().flatten(1),
}


def variants(read: Callable[[Tensor], Tensor]) -> list[nn.Module]:
    torch.manual_seed(0)
    parts = Reading(read, branches=False), Reading(read, branches=True), Inside(read)
    return [gl.convert(part) for part in parts]


def kinds(model: nn.Module) -> dict[str, bool]:
    return {n.removeprefix("part."): q.is_input for n, q in named_quantizers(model).items()}


@pytest.mark.parametrize("name", [*INPUTS, *ACTIVATIONS])
@pytest.mark.parametrize("how", ["penalty", "penalty on data with a gradient", "calibrate"])
def test_a_copy_of_the_input_is_the_input_traced_or_not(name: str, how: str) -> None:
    expected = {"first.input": name in INPUTS, "second.input": False}
    assert kinds(variants((INPUTS | ACTIVATIONS)[name])[0]) == expected  # traced, before any pass
    for model in variants((INPUTS | ACTIVATIONS)[name]):
        x = torch.randn(6, 4, 4, requires_grad="gradient" in how)
        if how == "calibrate":
            gl.calibrate(model, [x])
        else:
            found = penalised(model, lambda m: m(x).square().mean())  # noqa: B023  # it runs at once
            assert {n.removeprefix("part.") for n in found.terms} == {
                *("first.weight", "second.weight"),
                *(n.removesuffix(".input") for n, is_input in expected.items() if not is_input),
            }
        assert kinds(model) == expected


BATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda data: data,
    "slice": lambda data: data[2:5],
    "view of a slice": lambda data: data[1:].flatten(1)[:2].unflatten(1, (4, 4)),
    "every other": lambda data: data[::2],
}


@pytest.mark.parametrize("batch", BATCHES)
def test_the_input_is_recognised_in_any_shape(batch: str) -> None:
    x = BATCHES[batch](torch.randn(6, 4, 4))
    for name in ("view", "permuted copy"):
        model = gl.convert(Reading(INPUTS[name], branches=True))
        penalised(model, lambda m: m(x).square().mean())
        assert sites(model) == {"second"}


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.MaxPool2d(1), nn.Hardtanh(0, 1)])
def test_a_computed_tensor_is_an_activation_even_with_unchanged_values(activation: nn.Module) -> None:
    model = gl.convert(nn.Sequential(activation, nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 4)))
    penalised(model, lambda m: m(torch.rand(6, 4, 4)).square().mean())
    assert sites(model) == {"2", "4"}


def test_constant_values_are_not_taken_for_the_input() -> None:
    for x in (torch.zeros(6, 4, 4), torch.full((6, 4, 4), torch.nan)):
        model = gl.convert(Reading(lambda x: (x * 2).flatten(1), branches=True))
        penalised(model, lambda m: m(x).square().mean())  # noqa: B023  # it runs at once
        assert sites(model) == {"first", "second"}


@pytest.mark.parametrize("seen", ["make_fx", "vmap", "fake"])
def test_a_copy_is_not_recognised_if_values_cannot_be_read(seen: str) -> None:
    model = gl.convert(Reading(INPUTS["permuted copy"], branches=False))
    model.first.input_quantizer.is_input, x = False, torch.randn(6, 4, 4)
    gl.calibrate(model, [x])
    gl.set_bits(model, w=4, a=4)
    inputs.mark_input(x)
    if seen == "make_fx":
        make_fx(model)(x)
    elif seen == "vmap":
        torch.vmap(model)(x.unsqueeze(1))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            inputs.mark_input(fake := mode.from_tensor(x))
            model(fake)


def test_marks_of_inputs_do_not_outlive_them() -> None:
    data, before = torch.randn(64, 4), len(inputs._marks)
    for i in range(64):
        inputs.mark_input(data[i : i + 1])
    assert len(inputs._marks) == before


def test_tensors_at_sites_do_not_outlive_the_pass() -> None:
    model = gl.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    with seen_at_sites(model) as seen:
        y = model(torch.randn(2, 4))
    given = weakref.ref(seen[0][1]._base)
    del seen, y
    gc.collect()
    assert given() is None
