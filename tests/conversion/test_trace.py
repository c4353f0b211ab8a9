"""Tracing a container: recorded operations, untraced parts, and no side effects."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.conversion.trace import is_leaf, trace
from gradl1_fast.conversion.tracing import parts_of
from gradl1_fast.conversion.unchanged import NotTraceableError
from gradl1_fast.nn.convertible import is_holder
from tests.conversion import changing, models
from tests.conversion.changing import CHANGING, OutputsListed, ScaleOptional
from tests.conversion.models import MODELS, Base
from tests.conversion.runs import assert_equal_steps, built, images, loss_of

# Why a model has no graph.
REASONS = {
    "assigned": "assigns to parts of a tensor",
    "written_into": "disables gradients",
    "without_gradient": "disables gradients in a part",
    "data_dependent": "control flow",
    "under_autocast": "enables autocast",
    "BufferGivenAnotherValue": "changes _buffers",
    "ParameterPointedElsewhere": "assigns to the data of a tensor",
    "CallsCounted": "changes calls",
    "OutputsListed": "changes seen",
    "OutputCached": "changes cache",
    "BufferPointedElsewhere": "assigns to the data of a tensor",
    "OutputsInTheDepth": "changes kept",
    "OutputsByName": "changes by_name",
    "TensorMade": "computes randn independently of its input",
    "DefaultNotTraceable": "control flow",
}


@pytest.mark.parametrize("name", REASONS)
def test_code_that_a_graph_would_change_is_refused(name: str) -> None:
    converted = gl.convert(built({**MODELS, **CHANGING}[name]))
    with pytest.raises(NotTraceableError, match=REASONS[name]):
        trace(converted)


@pytest.mark.parametrize("name", {**MODELS, **CHANGING})
def test_tracing_changes_nothing(name: str) -> None:
    model = gl.convert(built({**MODELS, **CHANGING}[name]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes, shown, state = list(vars(model)), str(vars(model)), torch.get_rng_state()
    try:
        trace(model)
    except NotTraceableError:
        assert name in REASONS or name in CHANGING
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (list(vars(model)), str(vars(model))) == (attributes, shown)
    assert torch.equal(torch.get_rng_state(), state)


def test_changes_during_tracing_are_undone() -> None:
    model = built(OutputsListed)
    converted = gl.convert(model)
    with pytest.raises(NotTraceableError):
        trace(converted)
    assert model.seen == converted.seen == []
    assert not [name for name in vars(converted) if name.startswith("_tensor_constant")]


class OtherMemory(nn.Module):
    """Gives a parameter other memory, by no operation that is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        self.tensors = [self.linear.weight, torch.ones(3, 3)]

    def forward(self, x: Tensor) -> Tensor:
        self.tensors[0].data = self.tensors[1]
        return self.linear(x)


def test_memory_replaced_during_tracing_is_restored() -> None:
    model = gl.convert(OtherMemory())
    before = model.linear.weight.detach().clone()
    with pytest.raises(NotTraceableError, match=r"changes linear\.weight"):
        trace(model)
    assert torch.equal(model.linear.weight, before)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > -1e9 else 2 * x


class PythonRandom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 if random.random() < 0.5 else 2)


INNER: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a branch": (Branching, "control flow"),
    "any number of arguments": (lambda: _Any(), ""),
    "hooks on a block": (lambda: _hooked(nn.Sequential(nn.ReLU())), "has hooks"),
    "its own forward": (lambda: _own(nn.Sequential(nn.ReLU())), "was replaced"),
}


class _Any(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0].relu()


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def _own(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x * 2
    return module


@pytest.mark.parametrize("kind", INNER)
def test_a_container_that_cannot_be_traced_becomes_one_call(kind: str) -> None:
    make, reason = INNER[kind]
    model = gl.convert(nn.Sequential(nn.Conv2d(4, 4, 1), make(), nn.Conv2d(4, 2, 1)))
    traced = trace(model)
    assert bool(traced.untraced) == bool(reason)
    if reason:
        assert reason in traced.untraced["1"]
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]


def test_python_random_numbers_are_not_frozen_in_the_graph() -> None:
    model = gl.convert(nn.Sequential(nn.Conv2d(4, 4, 1), PythonRandom()))
    state = random.getstate()
    with pytest.raises(NotTraceableError, match="random numbers"):
        trace(model)
    assert random.getstate() == state


def in_place(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    y += 1
    y *= 2
    y -= x
    y /= 3
    return m.conv2(y)


def test_in_place_operators_are_recorded() -> None:
    graph = trace(gl.convert(models.model(in_place))).graph
    names = [node.target.__name__ for node in graph.nodes if node.op == "call_function"]
    assert [n for n in names if n.startswith("i")] == ["iadd", "imul", "isub", "itruediv"]
    x = images()
    assert_equal_steps(
        built(lambda: models.model(in_place)), gl.convert(built(lambda: models.model(in_place))), loss_of(x)
    )


def by_type(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    y = y.relu() if isinstance(y, torch.Tensor) else y[-1].relu()
    y = y * 2 if type(x) is Tensor or isinstance(x, (list, torch.Tensor)) else y
    return m.conv2(torch.cat([y] if isinstance(y, Tensor) else y))


def by_duck(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    if isinstance(y, (tuple, list)):
        y = y[0]
    elif torch.is_tensor(y):
        y = y.tanh()
    return m.conv2(y if not isinstance(y, dict) else y["out"])


def by_parameter(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.conv2(y.sigmoid() if isinstance(y, nn.Parameter) else y.relu())


def by_attribute(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    if hasattr(y, "last_hidden_state"):
        y = y.last_hidden_state * 2
    y = getattr(y, "logits", y)
    return m.conv2(y.relu() if hasattr(y, "shape") else y)


def by_trial(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    try:
        y = y.decompose()
    except AttributeError:
        y = y.tanh()
    return m.conv2(y)


def by_call(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.conv2(y() if callable(y) else y)


def by_match(m: Base, x: Tensor) -> Tensor:
    match m.conv1(x):
        case torch.Tensor() as y:
            return m.conv2(y.tanh())
        case y:
            return m.conv2(y[0])


def by_exact_type(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    return m.conv2(y.tanh() if type(y) is Tensor else y.relu())


BY_TYPE = (by_type, by_duck, by_parameter, by_attribute, by_trial, by_call, by_match, by_exact_type)


@pytest.mark.parametrize("features", BY_TYPE)
@pytest.mark.parametrize("training", [True, False])
def test_a_branch_on_the_type_of_a_value_takes_the_same_path(features: Callable, training: bool) -> None:
    x = images()
    plain, converted = (built(lambda: models.model(features), training) for _ in range(2))
    assert_equal_steps(plain, gl.convert(converted), loss_of(x))


SIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda y: torch.arange(y.shape[3]).to(y),
    "zeros": lambda y: torch.zeros(y.shape[0], 1, 1, 1).to(y),
    "full": lambda y: torch.full((y.size(0), 1, 1, 1), 2.0).to(y),
    "linspace": lambda y: torch.linspace(0, 1, y.shape[-1]).to(y),
    "new_ones": lambda y: y.new_ones(y.shape[-1]),
    "eye": lambda y: torch.eye(y.shape[-1]).to(y),
    "tensor": lambda y: torch.tensor(y.shape[-1]).to(y),
    "ones_like": lambda y: torch.ones_like(y),
    "Size": lambda y: torch.ones(torch.Size([y.shape[3]])).to(y),
    "tril": lambda y: torch.ones(y.shape[2], y.shape[3]).tril().to(y),
}


@pytest.mark.parametrize("maker", SIZED)
def test_a_tensor_made_by_the_size_of_another(maker: str) -> None:
    """A proxy must not reach PyTorch's C++ code as a tensor, which would read memory that is none."""

    def features(m: Base, x: Tensor) -> Tensor:
        y = m.conv1(x)
        return m.conv2(y + SIZED[maker](y))

    x = images()
    plain, converted = (built(lambda: models.model(features)) for _ in range(2))
    assert_equal_steps(plain, gl.convert(converted), loss_of(x))


class Scaled(Base):
    """Reads numbers out of buffers and parameters."""

    def __init__(self, read: Callable[[Scaled], float]) -> None:
        super().__init__()
        self.read = read
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("sizes", torch.tensor([2, 3]))

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.conv1(x) * self.read(self)))


READERS: dict[str, Callable[[Scaled], float]] = {
    "item": lambda m: m.scale.item(),
    "float": lambda m: float(m.scale),
    "tolist": lambda m: m.sizes.tolist()[0],
    "comparison": lambda m: 2.0 if m.scale > 2 else 1.0,
    "a tensor": lambda m: m.scale,
    "a method": lambda m: m.scale.clamp(max=1.7),
    "of a parameter": lambda m: m.conv1.bias.abs().sum().item(),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_number_read_from_a_buffer_is_current(reader: str) -> None:
    x = images()
    plain, converted = (built(lambda: Scaled(READERS[reader])) for _ in range(2))
    converted = gl.convert(converted)
    assert_equal_steps(plain, converted, loss_of(x))
    state = {**plain.state_dict(), "scale": torch.tensor(4.0).double(), "sizes": torch.tensor([5, 6])}
    state["conv1.bias"] = state["conv1.bias"] + 1
    for model in (plain, converted):
        model.load_state_dict(state, strict=True)
    assert torch.equal(plain(x), converted(x))
    assert_equal_steps(plain, converted, loss_of(x))


def test_sets_of_any_order_can_be_traced() -> None:
    model = built(lambda: models.model(models.batch_norm_alone))
    model.numbers = set(range(1000))
    for number in {*range(1000)} - {9, 16}:
        model.numbers.discard(number)
    assert list(model.numbers) != list(model.numbers.copy()), "another set is needed to show it"
    trace(gl.convert(model))


def test_models_with_sparse_buffers_can_be_traced() -> None:
    model = built(lambda: models.model(models.batch_norm_alone))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    trace(gl.convert(model))


def test_default_arguments_are_constants_in_the_graph() -> None:
    model = built(ScaleOptional)
    converted = gl.convert(model)
    assert [n.name for n in trace(converted).graph.nodes if n.op == "placeholder"] == ["x"]
    penalty = gl.GradL1(converted, 0.1, 0.1)
    for arguments in ((), (3.0,), ()):
        torch.testing.assert_close(converted(images(), *arguments), model(images(), *arguments))
    del penalty


def test_leaves_and_containers() -> None:
    assert is_leaf(nn.ReLU())
    assert is_leaf(nn.MultiheadAttention(4, 2))
    assert is_leaf(changing.Base().bn1)
    assert not is_leaf(changing.Base())
    for holder in (nn.Module(), nn.Sequential(), nn.ModuleList(), nn.ModuleDict()):
        assert is_holder(holder)
        assert not is_leaf(holder)


@pytest.mark.parametrize("features", [by_type, by_duck])
def test_a_branch_on_the_type_of_a_tensor_is_not_planned(features: Callable) -> None:
    plain, converted = (built(lambda: models.model(features)) for _ in range(2))
    converted = gl.convert(converted)
    assert_equal_steps(plain, converted, loss_of(images()))
    error = "TypeError: cat(): argument 'tensors' (position 1) must be tuple of Tensors, not Tensor"
    expected = {by_type: f"its plan raises {error}", by_duck: "its outputs differ from those of its modules"}
    assert converted._compiled_call_impl.reason == expected[features]


@pytest.mark.parametrize("features", [by_parameter, by_attribute, by_trial])
def test_a_traced_value_looks_like_a_tensor(features: Callable) -> None:
    converted = gl.convert(built(lambda: models.model(features)))
    penalty = gl.GradL1(converted, 0.1, 0.1)
    penalty(loss_of(images())(converted))
    assert converted._compiled_call_impl.reason == ""


class Branching(nn.Module):
    """Decides by values, so that no graph of it can be made."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return y if y.sum() > 0 else -y


class Reading(nn.Module):
    """Is given arguments that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, before: Tensor, x: Tensor, behind: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.conv(x).relu()


def test_unused_arguments_remain_arguments() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Conv2d(4, 4, 1), Reading()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x, self.first(x), x).mean((2, 3))
            return y if y.sum() > -1e9 else 2 * y

    converted = gl.convert(built(Outer))
    assert_equal_steps(built(Outer), converted, loss_of(images()))
    assert converted.inner._compiled_call_impl.reason == ""


def test_a_module_inside_an_untraced_container_is_not_in_the_graph() -> None:
    blocks = [Branching(Branching(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))) for _ in range(3)]
    model = gl.convert(nn.Sequential(*blocks))
    assert list(trace(model).untraced) == ["0", "1", "2"]
    names = [part.name for part in parts_of(model)]
    assert names == ["", *(f"{i}{below}" for i in range(3) for below in ("", ".part", ".part.part"))]
