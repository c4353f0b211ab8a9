"""Missing gradients stay missing, and the sign of zero is zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradl1_fast import functional as ours
from gradl1_fast.backends import backend
from tests.ops.cases import random
from tests.ops.sweeps import leaf


class Arguments(TorchDispatchMode):
    """Keeps the arguments of the last call of an operator."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.last: tuple[Any, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gradl1_fast" and func.overloadpacket.__name__ == self.name:
            self.last = args
        return func(*args, **(kwargs or {}))


def _quantize(x: Tensor, probe: Tensor) -> Tensor:
    return ours.fake_quantize(x, torch.ones(()), torch.zeros(()), -7, 7, probe=probe)


def _normalise(x: Tensor, probe: Tensor) -> Tensor:
    return ours.batch_norm_act(x, None, None, training=True, probe=probe)


# By the name of the operation: itself, and how many cotangents its double backward takes, that of l1 last.
SITES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "tap": (ours.tap, 2),
    "fake_quantize": (_quantize, 2),
    "batch_norm_act": (_normalise, 5),
}


@pytest.mark.parametrize("name", SITES)
def test_missing_gradients_are_not_passed_as_zeros_to_double_backward(name: str) -> None:
    site, count = SITES[name]
    x, probe = leaf(random((3, 4), 1)), torch.zeros((), requires_grad=True)
    with Arguments(f"{name}_double_backward") as seen:
        dx, l1 = torch.autograd.grad(site(x, probe).sin().sum(), (x, probe), create_graph=True)
        torch.autograd.grad(l1, x, retain_graph=True)
        assert [arg is None for arg in seen.last[:count]] == [True] * (count - 1) + [False]
        torch.autograd.grad(dx.sum(), x)
        assert [arg is None for arg in seen.last[:count]] == [False] + [True] * (count - 1)


@pytest.mark.parametrize("name", ["tap", "fake_quantize"])
def test_a_scaled_probe_receives_nothing_from_an_ordinary_backward_pass(name: str) -> None:
    x, probe = leaf(random((3, 4), 1)), torch.zeros((), requires_grad=True)
    scaled = ours.scale_probe(probe, torch.ones(()))
    SITES[name][0](x, scaled).sum().backward()
    assert x.grad is not None
    assert probe.grad is None


def test_zeros_among_the_tensors_of_a_norm_have_no_gradient() -> None:
    x, weight = leaf(torch.tensor([0.0, -2.0, 3.0])), torch.tensor([5.0, 7.0, 11.0])
    factor = leaf(torch.ones(1))
    (dx,) = torch.autograd.grad(ours.l1_norm([x]), x, factor, create_graph=True)
    assert dx.tolist() == [0.0, -1.0, 1.0]
    (second,) = torch.autograd.grad(dx, factor, weight)
    assert second.tolist() == [-7.0 + 11.0]


def test_a_norm_refuses_a_wrong_number_of_gradients() -> None:
    x = torch.ones(3)
    with torch.no_grad(), backend("reference"):
        with pytest.raises(ValueError, match="zip"):
            torch.ops.gradl1_fast.l1_norm_backward(torch.ones(2), [x])
        with pytest.raises(ValueError, match="zip"):
            torch.ops.gradl1_fast.l1_norm_double_backward([x, x], [x])
