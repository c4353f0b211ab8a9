"""Fusion in plans: which operations are fused, which are not, and that results are equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gradl1_fast as gl
from gradl1_fast.conversion.execution import batch_norm_act
from gradl1_fast.conversion.fusion import fuse
from gradl1_fast.conversion.regions.measuring import Site
from gradl1_fast.conversion.trace import trace
from tests.conversion.models import PLANNED, Base, model
from tests.conversion.runs import assert_equal_steps, built, images, loss_of
from tests.networks import RESNET, VGG

Features = Callable[[Base, Tensor], Tensor]


def add_behind(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(x + m.bn1(m.conv1(x))))


def add_before(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + x))


def add_to_the_residual(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    z = y * 1
    z += m.bn1(y)  # the residual changes, not the batch norm's result
    return m.conv2(m.relu(z)) + z


def add_to_the_norm(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    z = m.bn1(y)
    z += y
    return m.conv2(m.relu_(z))


def residual_changed_before(m: Base, x: Tensor) -> Tensor:
    y = x * 1
    z = m.bn1(m.conv1(x))
    y.mul_(2)
    return m.conv2(m.relu(z + y))


def residual_changed_after(m: Base, x: Tensor) -> Tensor:
    y = x * 1
    z = m.bn1(m.conv1(x)) + y
    y.mul_(2)
    return m.conv2(m.relu(z) + y)


def input_changed_behind_the_norm(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    z = m.bn1(y * 1)
    y.zero_()
    return m.conv2(m.relu(z)) + y


def sum_read_twice(m: Base, x: Tensor) -> Tensor:
    z = m.bn1(m.conv1(x)) + x
    return m.conv2(m.relu(z)) + z


def relu_in_place_of_a_sum_read_before(m: Base, x: Tensor) -> Tensor:
    z = m.bn1(m.conv1(x)) + x
    w = z * 2
    return m.conv2(m.relu_(z)) + w


def relu_in_place_aliased(m: Base, x: Tensor) -> Tensor:
    z = m.bn1(m.conv1(x))
    m.relu_(z)
    return m.conv2(z) + z


def residual_of_other_type(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + x.float()))


def residual_of_whole_numbers(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + (x > 0).long()))


def residual_of_one_channel(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + x[:, :1]))


def residual_of_one_row(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + x[0, 0, 0]))


def residual_with_a_bigger_batch(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x[:1])) + x))


def parameter_as_residual(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + m.bn2.weight.view(1, 4, 1, 1)))


def number_first(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(1 + m.bn1(m.conv1(x))))


def relu6_behind_a_sum(m: Base, x: Tensor) -> Tensor:
    return m.conv2(F.relu6(3 * x + m.bn1(m.conv1(x))))


def sum_of_the_same(m: Base, x: Tensor) -> Tensor:
    z = m.bn1(m.conv1(x))
    return m.conv2(m.relu(torch.add(z, z)))


def added_by_keyword(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(torch.add(input=m.bn1(m.conv1(x)), other=x)))


def subtracted(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(x - m.bn1(m.conv1(x))))


def norm_called_by_keyword(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(input=m.conv1(x))))


def result_returned_and_read(m: Base, x: Tensor) -> Tensor:
    y = m.relu(m.bn1(m.conv1(x)))
    return m.conv2(y) * m.fc.weight.sum() + y.detach()


FUSED: tuple[Features, ...] = (
    *(
        add_behind,
        add_before,
        add_to_the_norm,
        residual_of_one_channel,
        residual_of_one_row,
        relu6_behind_a_sum,
    ),
    result_returned_and_read,
)
OTHERS: tuple[Features, ...] = (
    *(add_to_the_residual, residual_changed_before, residual_changed_after, input_changed_behind_the_norm),
    *(sum_read_twice, relu_in_place_of_a_sum_read_before, residual_of_other_type, residual_of_whole_numbers),
    *(residual_with_a_bigger_batch, parameter_as_residual, number_first, sum_of_the_same, added_by_keyword),
    *(subtracted, norm_called_by_keyword, relu_in_place_aliased),
)


@pytest.mark.parametrize("features", [*FUSED, *OTHERS], ids=lambda f: f.__name__)
def test_a_plan_computes_the_same_as_the_modules(features: Features) -> None:
    x = images()
    for training in (True, False):
        plain, converted = (built(lambda: model(features), training) for _ in range(2))
        converted = gl.convert(converted)
        assert_equal_steps(plain, converted, loss_of(x))
        assert converted._compiled_call_impl.reason == ""


def operations(root: nn.Module) -> list[str]:
    """Return what is left of a graph behind fusion, but for layers and attributes."""

    def fused(*_: Any) -> None:
        raise AssertionError

    graph = trace(root).graph
    fuse(root, graph, fused)
    names = [
        str(getattr(node.target, "__name__", node.target)) for node in graph.nodes if _computes(root, node)
    ]
    assert not any(node.op == "call_module" and "bn" in str(node.target) for node in graph.nodes)
    return names


def _computes(root: nn.Module, node: fx.Node) -> bool:
    layer = node.op == "call_module" and isinstance(
        root.get_submodule(str(node.target)), gl.nn.QuantizedLayer
    )
    return node.op.startswith("call") and not layer


@pytest.mark.parametrize("features", FUSED, ids=lambda f: f.__name__)
def test_norm_sum_and_activation_are_fused(features: Features) -> None:
    names = operations(gl.convert(model(features)))
    assert names.count("fused") == 1
    assert not {n for n in names if "relu" in n}


def test_every_norm_of_a_residual_network_is_fused_with_its_sum_and_activation() -> None:
    names = operations(gl.convert(RESNET.make()))
    assert set(names) == {"fused", "blocks.0.shortcut", "pool", "flatten"} | {
        n for n in names if n.endswith("shortcut")
    }
    assert names.count("fused") == 1 + 8 + 8 + 3


@pytest.mark.parametrize("scale", ["none", "step"])
def test_a_norm_is_fused_with_the_site_of_its_only_reader(scale: str) -> None:
    """Its quantizer too, but for a step, which is measured on the values before."""
    converted = gl.convert(VGG.make())
    gl.calibrate(converted, [VGG.batch()[0]])
    gl.set_bits(converted, w=None, a=4)
    penalty = gl.GradL1(converted, 0.0, 0.1, scale=scale)
    penalty(VGG.loss(converted))
    (region,) = converted._compiled_call_impl._plans[True].regions
    program, quantizers = [*region._programs.values()][-1]
    alone = sum(isinstance(operation, Site) for operation in program.operations)
    # Of four sites behind batch norms one is read by a layer alone; pools come between.
    assert (alone, len(quantizers)) == {"none": (3, 4), "step": (4, 4)}[scale]


SITES: dict[str, Features] = {
    "one layer": lambda m, x: m.conv2(m.relu(m.bn1(m.conv1(x)))),
    "two layers": lambda m, x: (lambda y: m.conv2(y) * m.other(y))(m.relu(m.bn1(m.conv1(x)))),
    "a layer and a sum": lambda m, x: (lambda y: m.conv2(y) + y)(m.relu(m.bn1(m.conv1(x)))),
    "with residual": lambda m, x: m.conv2(m.relu(m.bn1(m.conv1(x)) + x)),
    "the output": lambda m, x: m.relu(m.bn1(m.conv2(m.relu(m.bn2(m.conv1(x)))))),
}


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("scale", ["none", "step"])
def test_a_fused_call_with_a_site_equals_the_modules(kind: str, bits: int | None, scale: str) -> None:
    results = []
    for planned in (False, True):
        converted = gl.convert(built(lambda: model(SITES[kind], other=nn.Conv2d(4, 4, 3, padding=1))))
        gl.calibrate(converted, [images()])
        gl.set_bits(converted, w=bits, a=bits)
        if not planned:
            converted.conv1.register_forward_hook(lambda *_: None)
        for _ in range(2):
            penalty = gl.GradL1(converted, 0.3, 0.2, scale=scale)
            loss = loss_of(images())(converted)
            extra = penalty(loss)
            gradients = torch.autograd.grad(loss + extra, list(converted.parameters()), allow_unused=True)
        assert bool(converted._compiled_call_impl.reason) != planned
        results.append(([loss, extra, *gradients], penalty.terms))
    for ours, theirs in zip(results[1][0], results[0][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert results[0][1].keys() == results[1][1].keys()
    for name, term in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], term, rtol=1e-9, atol=1e-12)


def test_a_missing_range_does_not_count_the_batch() -> None:
    norm, reader = nn.BatchNorm2d(4), gl.QConv2d(4, 4, 1)
    reader.input_quantizer.bits = 4
    with pytest.raises(RuntimeError, match="calibrate first"):
        batch_norm_act(norm, torch.randn(5, 4, 3, 2), None, "relu", reader)
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()


def test_a_fused_batch_norm_raises_pytorchs_errors() -> None:
    for x in (torch.ones(1, 3, 1, 1), torch.ones(3, 1)):
        with pytest.raises(ValueError, match=r"expected|got") as theirs:
            nn.BatchNorm2d(3)(x)
        with pytest.raises(ValueError, match=r"expected|got") as ours:
            batch_norm_act(nn.BatchNorm2d(3), x, None, "none", None)
        assert str(ours.value) == str(theirs.value)


NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cumulative average": {"momentum": None},
    "fast": {"momentum": 0.9, "eps": 0.1},
    "no statistics": {"track_running_stats": False},
    "not affine": {"affine": False},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_of_batch_norm(options: str, training: bool) -> None:
    def make() -> nn.Module:
        norms = [nn.BatchNorm2d(4, **NORMS[options]) for _ in range(2)]
        return nn.Sequential(nn.Conv2d(4, 4, 1), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 1), norms[1])

    x = images()
    assert_equal_steps(built(make, training), gl.convert(built(make, training)), loss_of(x), steps=3)


def test_every_planned_model_fuses_its_norms() -> None:
    for name in ("functional_relu", "in_place_add", "relu6", "shared_batch_norm", "two_batch_norms"):
        assert "fused" in operations(gl.convert(PLANNED[name]()))
