"""When plans run, when they do not and why, and that a change of the container invalidates them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.conversion import planned
from gradl1_fast.conversion.planned import Planned
from gradl1_fast.nn.sites import named_quantizers, replaced_at
from gradl1_fast.quantization.calibration import observed
from tests.conversion.models import NOT_PLANNED, PLANNED, Base, functional_relu, model
from tests.conversion.runs import assert_equal_steps, assert_same, built, images, loss_of, penalised, truth
from tests.networks import NETWORKS, RESNET, VGG, Network


def armed(converted: nn.Module, x: Tensor) -> None:
    gl.GradL1(converted, 0.1, 0.1)(loss_of(x)(converted))


def reason(converted: nn.Module, x: Tensor | None = None) -> str:
    """Return why the last armed pass of the model did not run its plan; empty if it did."""
    armed(converted, images() if x is None else x)
    plan = converted._compiled_call_impl
    assert isinstance(plan, Planned)
    assert plan.has_run
    return plan.reason


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_model_of_plain_operations_runs_its_plan(name: str, training: bool) -> None:
    assert reason(gl.convert(built(PLANNED[name], training))) == ""


REASONS = {
    "assigned": "assigns to parts of a tensor",
    "written_into": "disables gradients",
    "without_gradient": "disables gradients in a part",
    "data_dependent": "control flow",
    "under_autocast": "enables autocast",
}


@pytest.mark.parametrize("name", REASONS)
def test_a_model_without_a_plan_reports_the_reason(name: str) -> None:
    converted = gl.convert(built(NOT_PLANNED[name]))
    assert REASONS[name] in reason(converted)
    ((container, _, state),) = gl.report(converted).plans
    assert container == ""
    assert state.startswith("not planned: ")
    assert REASONS[name] in state


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
def test_plans_cover_at_least_85_percent_of_the_layers(network: Network) -> None:
    converted = gl.convert(network.make())
    armed(converted, network.batch()[0])
    result = gl.report(converted)
    inside = sum(count for _, count, state in result.plans if not state)
    assert inside >= 0.85 * len(result.layers)


def test_plans_run_as_reported_and_only_while_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    original = planned.executable

    def counted(*args: Any) -> tuple[Callable[..., Any], Any]:
        run, regions = original(*args)
        return lambda *args: (calls.append("plan"), run(*args))[1], regions

    monkeypatch.setattr(planned, "executable", counted)
    converted, x = gl.convert(VGG.make()), VGG.batch()[0]
    converted(x)
    armed(converted, x)
    assert calls == ["plan", "plan"]  # once to compare, once to compute
    armed(converted, x)
    assert len(calls) == 3
    converted(x)
    with torch.no_grad():
        penalty = gl.GradL1(converted, 0.1, 0.1)
        converted(x)
    del penalty
    converted(x)
    assert len(calls) == 3


def test_a_small_model_inside_one_without_a_plan_has_its_own() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = model(functional_relu), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return self.fc(x if x.sum() > -1e9 else 2 * x)

    converted = gl.convert(built(Outer))
    assert "control flow" in reason(converted)
    assert converted.inner._compiled_call_impl.reason == ""
    assert {name: count for name, count, state in gl.report(converted).plans if not state} == {"inner": 3}
    assert_equal_steps(built(Outer), gl.convert(built(Outer)), loss_of(images()))


def drawn(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.inside(m.relu(m.bn1(m.conv1(x)))))


class Drawing(nn.Module):
    """Draws random numbers, counts its calls and has a branch: it is kept whole inside a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (2 if torch.rand([]) < 0.5 else 3) + self.calls


def test_an_untraceable_module_does_not_prevent_the_plan_of_its_parent() -> None:
    def make() -> nn.Module:
        return model(drawn, inside=Drawing())

    converted = gl.convert(built(make))
    assert reason(converted) == ""
    assert converted.inside.calls == 1  # the comparison does not count
    assert_equal_steps(built(make), gl.convert(built(make)), loss_of(images()), steps=4)


GENERATOR = torch.Generator()


class WithGenerator(nn.Module):
    """Draws from a generator of its own, and from a global one."""

    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.generator, self.shape = torch.Generator(), shape

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape(x)
        return x * torch.rand(shape, generator=self.generator) + torch.rand(shape, generator=GENERATOR)

    def state(self) -> Tensor:
        return torch.cat([self.generator.get_state(), GENERATOR.get_state()])


@pytest.mark.parametrize("shape", [lambda x: x.shape, lambda x: 5], ids=["of the input", "constant"])
def test_the_pass_that_compares_draws_once_from_other_generators(shape: Callable[[Tensor], Any]) -> None:
    plain = built(lambda: model(drawn, inside=WithGenerator(shape)))
    converted = gl.convert(built(lambda: model(drawn, inside=WithGenerator(shape))))
    states = []
    for each in (plain, converted):
        GENERATOR.manual_seed(3)
        each.inside.generator.manual_seed(4)
        if each is converted:
            assert reason(each) == ""
        else:
            each(images())
        states.append(each.inside.state())
    assert torch.equal(*states)


SETTINGS = {"gain": [1.5]}


def gain() -> float:
    return SETTINGS["gain"][0]


class Switched(Base):
    """Its forward pass reads attributes of its own, of a block inside, of objects, and what is outside."""

    power = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.hidden = types.SimpleNamespace(scale=1.5, more={"deep": [1.5]})
        self.array = np.array([1.5])
        self.factor, self.mode, self.steps, self.options = 2.0, "sum", [1, 2], {"relu": True}
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def features(self, x: Tensor) -> Tensor:
        y = self.block(self.conv1(x)) * self.factor * self.power * gain() * float(self.array[0])
        y = y * self.hidden.scale * self.hidden.more["deep"][0]
        y = y + x if self.mode == "sum" else y - x
        for step in self.steps:
            y = y * step
        return self.conv2(y.relu() if self.options["relu"] else y)


def _replace(name: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(m: nn.Module) -> None:
        torch.manual_seed(13)
        owner, _, child = name.rpartition(".")
        setattr(m.get_submodule(owner), child, make().double())

    return change


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a number": lambda m: setattr(m, "factor", 3.0),
    "a text": lambda m: setattr(m, "mode", "difference"),
    "an item of a list": lambda m: m.steps.append(3),
    "an item of a dictionary": lambda m: m.options.update(relu=False),
    "a module replaced": _replace("block.2", lambda: nn.Tanh()),
    "a layer replaced": _replace("conv2", lambda: nn.Conv2d(4, 4, 1)),
    "a module added": lambda m: m.block.append(nn.Tanh()),
    "a module removed": lambda m: m.block.pop(2),
    "a parameter replaced": lambda m: setattr(m.block[0], "weight", nn.Parameter(2 * m.block[0].weight.data)),
    "evaluation": lambda m: m.eval(),
    "one norm in evaluation": lambda m: m.block[1].eval(),
    "momentum": lambda m: setattr(m.block[1], "momentum", 0.7),
    "epsilon": lambda m: setattr(m.block[1], "eps", 0.5),
    "stride": lambda m: setattr(m.conv2, "stride", (2, 2)),
    "class": lambda m: setattr(m.block[2], "__class__", nn.Tanh),
    "norm without statistics": lambda m: setattr(m.block[1], "track_running_stats", False),
    "frozen": lambda m: m.block.requires_grad_(False),
    "an attribute of an object": lambda m: setattr(m.hidden, "scale", 3.0),
    "an item inside of an object": lambda m: m.hidden.more["deep"].__setitem__(0, 3.0),
    "an item of an array": lambda m: m.array.fill(3.0),
    "a class attribute": lambda m: setattr(Switched, "power", 3.0),
    "a global that a function reads": lambda m: SETTINGS["gain"].__setitem__(0, 3.0),
}


@pytest.fixture(autouse=True)
def _outside() -> Iterator[None]:
    yield
    Switched.power, SETTINGS["gain"][0] = 1.5, 1.5


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_take_effect(change: str) -> None:
    x = images()
    plain, converted = built(Switched), gl.convert(built(Switched))
    assert_equal_steps(plain, converted, loss_of(x))
    assert reason(converted) == ""
    plain(x)  # as that pass, for its statistics
    for one in (plain, converted):
        CHANGES[change](one)
    assert_equal_steps(plain, gl.convert(converted), loss_of(x))


def test_plans_are_cached_for_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    original = planned._plan_of

    def counted(module: nn.Module, arming: Any) -> Any:
        made.append(module.training)
        return original(module, arming)

    monkeypatch.setattr(planned, "_plan_of", counted)
    converted, x = gl.convert(built(Switched)), images()
    for training in (True, True, False, True, False):
        armed(converted.train(training), x)
    assert made == [True, False]
    converted.factor = 3.0
    armed(converted, x)
    armed(converted, x)
    assert made == [True, False, False]


CALLS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "keyword": (lambda m, x: m(x=x), "arguments other than positional tensors"),
    "number": (lambda m, x: m(x, 2.0), "arguments other than positional tensors"),
    "functional transform": (
        lambda m, x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
        "",
    ),
}


class Scaled(Base):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(self.conv1(x).mean((2, 3)) * scale)


@pytest.mark.parametrize("call", CALLS)
def test_unsupported_calls_run_the_modules(call: str) -> None:
    run, wanted = CALLS[call]
    plain, converted = built(Scaled), gl.convert(built(Scaled))

    def loss(m: nn.Module) -> Tensor:
        return run(m, images()).sin().sum()

    penalty = gl.GradL1(converted, 0.1, 0.1)
    torch.testing.assert_close(loss(converted), loss(plain))
    assert wanted in converted._compiled_call_impl.reason
    assert bool(wanted) == bool(converted._compiled_call_impl.reason)
    del penalty


class Noted:
    """An observer that notes the largest value of each tensor."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(float(x.max()))


@pytest.mark.parametrize("is_verified", [False, True])
def test_observed_and_replaced_tensors_are_seen_once_in_an_armed_pass(is_verified: bool) -> None:
    """By the modules: a region shows no tensor, and a plan that is verified would show each twice."""
    found = []
    for is_armed in (False, True):
        converted, x = gl.convert(RESNET.make().eval()), RESNET.batch()[0]
        penalty = gl.GradL1(converted, 0.1, 0.1)
        if is_verified:
            penalty(loss_of(x)(converted))
        penalty.enabled = is_armed
        sites = named_quantizers(converted)
        del sites["stem.0.input"]  # images, which are not replaced where they are known as such
        replaced: list[str] = []

        def doubled(name: str, tensor: Tensor, names: list[str] = replaced) -> Tensor:
            names.append(name)
            return 2 * tensor

        with replaced_at(sites, doubled):
            changed = converted(x)
        noted = {name: Noted() for name in sites}
        with observed(sites, noted):
            converted(x)
        if is_armed:
            assert "observed" in converted._compiled_call_impl.reason
        found.append((replaced, {name: each.seen for name, each in noted.items()}, changed))
    (expected_names, expected_values, expected), (names, values, changed) = found
    assert names == expected_names
    for name, seen in values.items():
        assert seen == pytest.approx(expected_values[name], rel=1e-12)
    assert len(names) > 5
    torch.testing.assert_close(changed, expected)


def test_another_dtype_or_shape_is_compared_again() -> None:
    converted = gl.convert(built(PLANNED["functional_relu"]))
    for size in (5, 7, 5):
        x = torch.randn(2, 4, size, size).double()
        assert_same(penalised(converted, loss_of(x), "none"), _fresh(converted, x))


@dataclasses.dataclass
class Output:
    features: Tensor
    parts: list[Tensor]


class Opaque:
    def __init__(self, features: Tensor) -> None:
        self.features = features


class Returning(nn.Module):
    """Returns its result in an object."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(4, 4), nn.Linear(4, 2), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.b(self.a(x).relu()))


@pytest.mark.parametrize(
    ("wrap", "why"),
    [(lambda y: Output(y, [2 * y]), ""), (Opaque, "Opaque")],
    ids=["a dataclass", "an object"],
)
def test_a_model_may_return_an_object(wrap: Callable[[Tensor], Any], why: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    converted = gl.convert(built(lambda: Returning(wrap)))
    penalty, expected = gl.GradL1(converted, 0.1, 0.1), converted(x).features
    loss = converted(x).features.square().sum()
    assert float(penalty(loss).detach()) > 0
    torch.testing.assert_close(converted(x).features, expected)
    found = converted._compiled_call_impl.reason
    assert why in found if why else found == ""


def test_a_plan_whose_values_change_in_every_pass_gives_way_to_the_modules() -> None:
    converted, x = gl.convert(built(Switched)), images()
    found = []
    for step in range(25):
        converted.factor = 1.0 + step
        found.append(reason(converted, x))
    assert found[0] == ""
    assert "changed in each of several passes" in found[-1]


def _fresh(converted: nn.Module, x: Tensor) -> Any:
    plain = built(PLANNED["functional_relu"])
    plain.load_state_dict(converted.state_dict())
    return truth(plain, loss_of(x))


def test_a_model_with_several_inputs_has_a_plan() -> None:
    class Two(Base):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc((self.relu(self.bn1(self.conv1(x)) + self.conv2(y))).mean((2, 3)))

    x, y = images(), images().flip(0)

    def loss(m: nn.Module) -> Tensor:
        return m(x, y).sin().sum()

    plain, converted = built(Two), gl.convert(built(Two))
    for _ in range(2):
        ours = penalised(converted, loss)
        assert converted._compiled_call_impl.reason == ""
        assert {n for n in ours.terms if "weight" not in n} == {"fc"}  # both images are inputs
        torch.testing.assert_close(ours.loss, loss(plain))


def test_plans_do_not_appear_in_state_dicts_and_attributes() -> None:
    converted = gl.convert(RESNET.make())
    before = attributes(converted)
    armed(converted, RESNET.batch()[0])
    assert attributes(converted) == before
    assert list(converted.state_dict()) == list(RESNET.make().state_dict())


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """Return the names of attributes, but for the one in which PyTorch keeps what is called instead."""
    return {name: set(vars(m)) - {"_compiled_call_impl"} for name, m in model.named_modules()}
