"""A region is one node of the graph and equals its modules, however gradients are requested."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.conversion.regions import region as regions
from gradl1_fast.penalty import weight_steps
from tests.conversion.models import Base, model
from tests.conversion.runs import assert_equal_steps, built, images, loss_of

Features = Callable[[Base, Tensor], Tensor]


def residual(m: Base, x: Tensor) -> Tensor:
    y = m.relu(m.bn1(m.conv1(x)))
    return m.relu(m.bn2(m.conv2(y)) + y)


def concatenated(m: Base, x: Tensor) -> Tensor:
    y = m.relu(m.conv1(x))
    return m.conv2(torch.cat([m.conv1(y), y], 1)[:, :4] + y)


class Table(nn.Module):
    """Tensors that are no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.linspace(-1, 1, 100).reshape(1, 4, 5, 5))
        self.register_buffer("row", torch.linspace(-1, 1, 4).reshape(1, 4))


PARTS: dict[str, tuple[dict[str, Any], Features]] = {
    "residual": ({}, residual),
    "concatenation": (
        {"wide": nn.Conv2d(8, 4, 1)},
        lambda m, x: m.wide(torch.cat([m.conv1(x), m.conv2(x)], 1)),
    ),
    "max pooling": ({"pool": nn.MaxPool2d(2, 1, 1)}, lambda m, x: m.conv2(m.pool(m.conv1(x)))),
    "average pooling": ({"pool": nn.AvgPool2d(3, 2, 1)}, lambda m, x: m.conv2(m.pool(m.conv1(x)))),
    "global pooling": ({"pool": nn.AdaptiveAvgPool2d(1)}, lambda m, x: m.conv2(m.pool(m.conv1(x)))),
    "flattened": (
        {"flat": nn.Flatten(), "head": nn.Linear(100, 4)},
        lambda m, x: m.head(m.flat(m.relu(m.conv1(x))))[..., None, None],
    ),
    "linear on tokens": (
        {"one": nn.Linear(5, 6), "two": nn.Linear(6, 5, bias=False)},
        lambda m, x: m.two(m.relu(m.one(m.conv1(x)))),
    ),
    "ReLU6 alone": ({"act": nn.ReLU6()}, lambda m, x: (lambda y: m.conv2(m.act(y + y.relu())))(m.conv1(x))),
    "grouped and strided": (
        {"deep": nn.Conv2d(4, 4, 3, 2, 2, 2, groups=4)},
        lambda m, x: m.conv2(m.relu(m.deep(m.conv1(x)))),
    ),
    "the same layer twice": ({}, lambda m, x: m.conv1(m.relu(m.conv1(m.conv2(x))))),
    "parted by what no region takes": ({}, lambda m, x: m.conv2(torch.tanh(m.bn1(m.conv1(x))) * 2)),
    "without a batch": ({}, lambda m, x: m.conv2(m.relu(m.conv1(x))).reshape(-1, 4, 5, 5)),
    "one site behind an identity": (
        {"same": nn.Identity(), "off": nn.Dropout(0.0)},
        lambda m, x: (lambda y: m.conv1(y) + m.conv2(m.same(y)) + m.conv2(m.off(y)))(m.bn1(m.conv1(x))),
    ),
    "one site behind what may hand on": (
        {},
        lambda m, x: (lambda y: m.conv1(y) + m.conv2(y.contiguous()) + m.conv2(y.to(x.dtype)))(
            m.bn1(m.conv1(x))
        ),
    ),
    "one site behind a flatten of nothing": (
        {"flat": nn.Flatten(), "one": nn.Linear(4, 4), "two": nn.Linear(4, 4)},
        lambda m, x: (lambda y: m.one(y) + m.two(m.flat(y)))(m.conv1(x).mean((2, 3)))[..., None, None],
    ),
    "a sum that broadcasts": (
        {"gate": nn.Conv2d(4, 4, 1)},
        lambda m, x: (lambda y: m.conv2(m.gate(y.mean((2, 3), keepdim=True)) + y))(m.conv1(x)),
    ),
    "a parameter that is added": (
        {"table": Table()},
        lambda m, x: m.conv2(m.relu(m.bn1(m.conv1(x)) + m.table.place)),
    ),
    "a parameter that is joined": (
        {"table": Table()},
        lambda m, x: m.conv2(torch.cat([m.conv1(x), m.table.place])),
    ),
    "layers that read a buffer": (
        {"table": Table(), "one": nn.Linear(4, 4), "two": nn.Linear(4, 4)},
        lambda m, x: m.conv2(m.conv1(x)) * m.two(m.relu(m.one(m.table.row)))[..., None, None],
    ),
    "two outputs": ({}, lambda m, x: (lambda y: torch.sin(y) * m.bn2(m.conv2(y)))(m.bn1(m.conv1(x)))),
}


def make(part: str) -> Callable[[], nn.Module]:
    layers, features = PARTS[part]
    return lambda: model(features, **layers)


def regions_of(converted: nn.Module) -> list[regions.Region]:
    plan = converted._compiled_call_impl._plans[converted.training]
    return plan.regions


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("part", PARTS)
def test_a_region_computes_the_same_as_its_modules(part: str, scale: str, training: bool) -> None:
    converted = gl.convert(built(make(part), training))
    assert_equal_steps(built(make(part), training), converted, loss_of(images()), scale=scale, steps=2)
    found = regions_of(converted)
    assert found
    assert [converted._compiled_call_impl.reason, *(region.reason for region in found)] == [""] * (
        1 + len(found)
    )


@contextlib.contextmanager
def without_regions() -> Iterator[None]:
    """Let the fused operators of plans run, which are those of the library, each a node of the graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_why_not", lambda given: "asked not to")
        yield


Gradients = list[Tensor | None]


def together(loss: Tensor, penalty: Tensor, parameters: list[Tensor]) -> Gradients:
    (loss + penalty).backward()
    return [p.grad for p in parameters]


def loss_first(loss: Tensor, penalty: Tensor, parameters: list[Tensor]) -> Gradients:
    loss.backward(retain_graph=True)
    penalty.backward()
    return [p.grad for p in parameters]


def penalty_first(loss: Tensor, penalty: Tensor, parameters: list[Tensor]) -> Gradients:
    penalty.backward(retain_graph=True)
    loss.backward()
    return [p.grad for p in parameters]


def by_grad(loss: Tensor, penalty: Tensor, parameters: list[Tensor]) -> Gradients:
    return list(torch.autograd.grad(loss + penalty, parameters, allow_unused=True))


def for_a_few(loss: Tensor, penalty: Tensor, parameters: list[Tensor]) -> Gradients:
    return list(torch.autograd.grad(loss + penalty, parameters[:2]))


def a_few_of_the_penalty_first(loss: Tensor, penalty: Tensor, parameters: list[Tensor]) -> Gradients:
    torch.autograd.grad(penalty, parameters[-1:], retain_graph=True, allow_unused=True)
    loss.backward()
    return [p.grad for p in parameters]


def penalty_alone(loss: Tensor, penalty: Tensor, parameters: list[Tensor]) -> Gradients:
    penalty.backward()
    return [p.grad for p in parameters]


def twice(loss: Tensor, penalty: Tensor, parameters: list[Tensor]) -> Gradients:
    for _ in range(2):
        (loss + penalty).backward(retain_graph=True)
    return [p.grad for p in parameters]


WAYS = (
    *(
        together,
        loss_first,
        penalty_first,
        by_grad,
        for_a_few,
        a_few_of_the_penalty_first,
        penalty_alone,
        twice,
    ),
)


def gradients(converted: nn.Module, x: Tensor, scale: str, way: Any) -> tuple[Tensor, Tensor, Gradients]:
    penalty = gl.GradL1(converted, 0.3, 0.2, scale=scale)
    loss = loss_of(x)(converted)
    value = penalty(loss)
    return loss.detach(), value.detach(), way(loss, value, list(converted.parameters()))


def assert_same_bits(one: Any, other: Any, rtol: float = 0) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("part", ["residual", "parted by what no region takes", "two outputs"])
def test_gradients_are_bitwise_equal_however_they_are_requested(part: str, way: Any) -> None:
    for scale, rtol in (("none", 0), ("step", 1e-12)):  # steps add up in another order
        found = compared(part, lambda m, scale=scale: gradients(m, images(), scale, way))
        assert_same_bits(found[0][:2], found[1][:2], rtol)
        assert_same_bits(found[0][2], found[1][2], rtol)


def compared(part: str, run: Callable[[nn.Module], Any]) -> list[Any]:
    """Return what a function of a converted model gives with regions, and without."""
    found = [run(gl.convert(built(make(part))))]
    with without_regions():
        return [*found, run(gl.convert(built(make(part))))]


@pytest.mark.parametrize(
    "frozen", [["conv1.weight"], ["conv1.weight", "bn1.weight", "bn1.bias"], ["bn2.weight"]]
)
def test_frozen_parameters(frozen: list[str]) -> None:
    def run(converted: nn.Module) -> Gradients:
        for name in frozen:
            converted.get_parameter(name).requires_grad_(False)
        return gradients(converted, images(), "none", together)[2]

    assert_same_bits(*compared("residual", run))


def test_every_gradient_of_the_loss_may_be_differentiated() -> None:
    """Those of biases and of batch norms too, which no penalty asks for."""

    def run(converted: nn.Module) -> Gradients:
        penalty = gl.GradL1(converted, 0.3, 0.2)
        parameters = list(converted.parameters())
        grads = torch.autograd.grad(loss_of(images())(converted), parameters, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        assert penalty.enabled
        return [p.grad for p in parameters]

    assert_same_bits(*compared("residual", run), rtol=1e-12)


def doubled(m: nn.Module) -> None:
    m.get_parameter("conv1.weight").register_hook(lambda grad: 2 * grad)


def tied(m: nn.Module) -> None:
    m.conv2.weight = m.conv1.weight


def at_width(m: nn.Module) -> None:
    gl.set_bits(m, w=4, a=None)


def outside(m: nn.Module) -> None:
    m.conv2.padding_mode = "reflect"


@pytest.mark.parametrize(
    ("change", "by_region"),
    [
        (lambda m: None, [True]),
        (doubled, [True, False]),
        (tied, [True, False]),
        (at_width, [False]),
        (outside, [True, False]),
    ],
    ids=["as it is", "a hook", "tied", "at a width", "a layer outside"],
)
def test_steps_of_weights_are_differentiated_by_the_region_only_where_it_gave_their_gradients(
    change: Callable[[nn.Module], None], by_region: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[set[bool]] = []

    def noted(weights: Any, grads: Any) -> Any:
        found = group(weights, grads)
        groups.append({region is not None for region in found})
        return found

    def run(converted: nn.Module) -> Gradients:
        change(converted)
        return gradients(converted, images(), "step", together)[2]

    group = weight_steps._by_region
    monkeypatch.setattr(weight_steps, "_by_region", noted)
    assert_same_bits(*compared("residual", run), rtol=1e-12)
    assert groups == [set(by_region), {False}]


@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("of", ["loss", "penalty", "both"])
def test_a_hook_may_differentiate_the_graph_during_its_backward_pass(of: str, scale: str) -> None:
    def run(hooked: bool) -> Gradients:
        converted = gl.convert(built(make("parted by what no region takes")))
        penalty = gl.GradL1(converted, 0.3, 0.2, scale=scale)
        loss = loss_of(images())(converted)
        value = penalty(loss)
        total = {"loss": loss, "penalty": value, "both": loss + value}[of]
        inner: list[Tensor] = []

        def differentiate(grad: Tensor) -> None:
            inner.extend(torch.autograd.grad(total, converted.conv1.weight, retain_graph=True))

        if hooked:  # while the first of two regions has yet to run
            converted.conv2.weight.register_hook(differentiate)
        (loss + value).backward(retain_graph=True)
        assert len(inner) == hooked
        return [p.grad for p in converted.parameters()]

    assert_same_bits(run(True), run(False), rtol=1e-12)


def test_two_penalties_on_weights_add_up_in_a_region() -> None:
    def run(converted: nn.Module, *lambdas: float) -> Gradients:
        penalties = [gl.GradL1(converted, lambda_w, 0.0) for lambda_w in lambdas]
        loss = loss_of(images())(converted)
        sum(penalty(loss) for penalty in penalties).backward()
        return [p.grad for p in converted.parameters()]

    one, two = (gl.convert(built(make("residual"))) for _ in range(2))
    assert_same_bits(run(one, 0.5), run(two, 0.2, 0.3), rtol=1e-12)


def test_third_order_is_refused() -> None:
    converted = gl.convert(built(make("residual")))
    penalty = gl.GradL1(converted, 0.3, 0.2)
    loss = loss_of(images())(converted)
    grads = torch.autograd.grad(loss + penalty(loss), list(converted.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="first and second order"):
        sum(grad.square().sum() for grad in grads).backward()


def test_a_freed_graph_and_changed_tensors_raise() -> None:
    converted = gl.convert(built(make("residual")))
    penalty = gl.GradL1(converted, 0.3, 0.2)
    loss = loss_of(images())(converted)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = loss_of(images())(converted)
    value = penalty(loss)
    with torch.no_grad():
        converted.get_parameter("conv1.weight").add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        (loss + value).backward()


def test_hooks_added_and_removed_between_steps() -> None:
    seen: list[Tensor] = []
    converted, plain = (gl.convert(built(make("residual"))) for _ in range(2))
    penalties = [gl.GradL1(m, 0.3, 0.2) for m in (converted, plain)]
    for step in range(4):
        if step == 1:
            handle = converted.bn1.register_forward_hook(lambda m, args, out: seen.append(out))
        if step == 3:
            handle.remove()
        found = []
        for m, penalty in zip((converted, plain), penalties, strict=True):
            m.zero_grad()
            loss = loss_of(images())(m)
            (loss + penalty(loss)).backward()
            found.append([p.grad.clone() for p in m.parameters()])
        assert_same_bits(*found, rtol=1e-10)
        assert ("hooks" in converted._compiled_call_impl.reason) == (step in (1, 2))
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_loss_and_penalty_are_bitwise_equal_to_the_operators(dtype: torch.dtype) -> None:
    """Gradients of weights add up in the type of the weights, rather than in that of the products."""

    def run(converted: nn.Module) -> Gradients:
        converted.float()
        penalty = gl.GradL1(converted, 0.3, 0.2, scale="none")
        with torch.autocast("cpu", dtype=dtype):
            loss = converted(images().float()).float().square().mean()
        value = penalty(loss)
        (loss + value).backward()
        return [loss.detach(), value.detach(), *(p.grad for p in converted.parameters())]

    found, expected = compared("residual", run)
    assert_same_bits(found[:2], expected[:2])
    for gradient, wanted in zip(found[2:], expected[2:], strict=True):
        error = (gradient - wanted).norm() / wanted.norm().clamp(min=1e-3)
        assert error < torch.finfo(dtype).eps, error


def test_a_loss_that_is_not_finite_gives_a_penalty_and_gradients_that_are_not() -> None:
    converted = gl.convert(built(make("residual")))
    penalty = gl.GradL1(converted, 0.3, 0.2)
    loss = loss_of(images())(converted) * float("nan")
    value = penalty(loss)
    (loss + value).backward()
    assert value.isnan()
    assert all(p.grad.isnan().all() for p in converted.parameters())


@pytest.mark.parametrize("several", [False, True])
def test_with_several_processes_regions_end_when_a_bucket_is_full(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: several)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("gradl1_fast.conversion.regions.partition._BUCKET", 1500)
    converted = gl.convert(built(make("residual")))
    assert_equal_steps(built(make("residual")), converted, loss_of(images()), scale="step", steps=2)
    assert len(regions_of(converted)) == (2 if several else 1)


def test_programs_are_cached_by_shape_and_the_oldest_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = regions.Region._build
    monkeypatch.setattr(regions.Region, "_build", lambda *args: (made.append(1), original(*args))[1])
    converted = gl.convert(built(make("residual")))
    penalty = gl.GradL1(converted, 0.3, 0.2)
    for size in (4, 4, 2, 4, 2):
        loss = loss_of(images()[:size])(converted)
        (loss + penalty(loss)).backward()
    assert len(made) == 3  # two shapes, and the comparison with the modules, which has no gradients
    for size in range(5, 30):
        loss = loss_of(torch.randn(2, 4, 5, size, dtype=torch.float64))(converted)
        (loss + penalty(loss)).backward()
    assert all(len(region._programs) <= regions._CACHE_SIZE for region in regions_of(converted))


CHANGES: tuple[Callable[[nn.Module], Any], ...] = (
    lambda m: None,
    lambda m: setattr(m.bn1, "eps", 0.5),
    lambda m: (setattr(m.conv1, "dilation", (2, 2)), setattr(m.conv1, "padding", (2, 2))),
)


def test_a_changed_attribute_of_a_layer_builds_another_program() -> None:
    def run(converted: nn.Module) -> list[Tensor]:
        found, penalty = [], gl.GradL1(converted, 0.3, 0.2, scale="none")
        for change in CHANGES:
            change(converted)
            loss = loss_of(images())(converted)
            found += [loss.detach(), penalty(loss).detach()]
        return found

    found, expected = compared("residual", run)
    assert_same_bits(found, expected)
    assert len(set(map(float, found))) == len(found)


def test_operators_run_if_a_region_cannot() -> None:
    def run(converted: nn.Module) -> list[Tensor]:
        penalty = gl.GradL1(converted, 0.3, 0.2)
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(images())(converted)
        assert regions_of(converted)[0].reason
        return [loss.detach(), penalty(loss).detach()]

    assert_same_bits(*compared("residual", run))


def test_a_tensor_without_a_batch_dimension_uses_the_operators() -> None:
    def run(converted: nn.Module) -> list[Tensor]:
        penalty, found = gl.GradL1(converted, 0.3, 0.2), []
        for _ in range(2):
            loss = converted(images()[0]).square().mean()
            found += [loss.detach(), penalty(loss).detach()]
        assert regions_of(converted)[0].reason
        return found

    assert_same_bits(*compared("without a batch", run))
