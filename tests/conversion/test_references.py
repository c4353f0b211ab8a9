"""References from attributes into a model refer to the converted model after conversion."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.conversion.runs import assert_equal_steps, loss_of


class Net(nn.Module):
    """Two convolutions with a batch norm, called in a way that ``prepare`` chooses."""

    def __init__(self, prepare: Callable[[Any], None]) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)
        self.seen: Tensor | None = None
        prepare(self)

    def run(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()) * scale

    def keep(self, _module: nn.Module, _args: Any, y: Tensor) -> None:
        self.seen = y

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def own_forward(net: Net) -> None:
    net.forward = net.run  # type: ignore[method-assign]


def closure(net: Net) -> None:
    def forward(x: Tensor, *, scale: float = 1.0) -> Tensor:
        return net.run(x, scale)

    net.forward = forward  # type: ignore[method-assign]


def wrapped(net: Net) -> None:
    run = functools.partial(net.run, scale=1.0)

    @functools.wraps(net.run)
    def forward(x: Tensor) -> Tensor:
        return run(x)

    net.forward = forward  # type: ignore[method-assign]


class ByList(Net):
    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class ByTable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.steps["second"][0](self.steps["norm"](self.steps["first"](x)).relu())


class ByHook(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x)
        assert self.seen is not None
        return y + self.seen.mean()


def listed(net: Any) -> None:
    net.steps = [net.first, net.norm, torch.relu, net.second]


def table(net: Any) -> None:
    net.steps = OrderedDict(first=net.first, norm=net.norm, second=(net.second, {net.first}))


def hooked(net: Any) -> None:
    net.second.register_forward_hook(net.keep)


WAYS: dict[str, Callable[[], Net]] = {
    "own forward": lambda: Net(own_forward),
    "closure": lambda: Net(closure),
    "wrapped partial": lambda: Net(wrapped),
    "list": lambda: ByList(listed),
    "table": lambda: ByTable(table),
    "hook": lambda: ByHook(hooked),
}
each_way = pytest.mark.parametrize("way", WAYS)


def made(way: str) -> nn.Module:
    torch.manual_seed(0)
    return WAYS[way]().double()


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@each_way
def test_the_layers_of_the_converted_model_run(way: str) -> None:
    plain, x = made(way), images()
    model = gl.convert(plain).eval()
    assert torch.equal(model(x), plain.eval()(x))
    with gl.bits(model, w=2, a=None):
        assert not torch.allclose(model(x), plain(x))
    assert isinstance(model.first, gl.QConv2d)
    assert type(plain.first) is nn.Conv2d
    assert not hasattr(model, "steps") or model.steps is not plain.steps


@pytest.mark.parametrize("way", [way for way in WAYS if way != "hook"])
def test_the_penalty_is_that_of_plain_double_backprop(way: str) -> None:
    """Through the same network without references, which deepcopy would not redirect in closures."""
    torch.manual_seed(0)
    plain = Net(lambda net: None).double()
    assert_equal_steps(plain, gl.convert(made(way)), loss_of(images()))


@each_way
def test_folded_copies_run_their_own_layers(way: str) -> None:
    model, x = gl.convert(made(way)).eval(), images()
    folding = gl.fold_batch_norm(model, x)
    assert folding.folded == {"norm": "first"}
    assert folding.difference < 1e-12
    again = gl.prepare(model, [x], w=3, a=4).model
    assert torch.equal(model(x), gl.convert(made(way)).eval()(x))
    assert not torch.allclose(again(x), model(x))


def test_attributes_without_references_stay_the_same_object() -> None:
    net = made("own forward")
    net.table, net.function = {"a": [1, 2]}, lambda x: x
    model = gl.convert(net)
    assert model.table is net.table
    assert model.function is net.function


def test_cyclic_references() -> None:
    net = made("own forward")
    circle: list[Any] = [net.first]
    circle.append(circle)
    net.circle = circle
    assert gl.convert(net).circle[0] is not net.first
