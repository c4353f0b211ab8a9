"""``torch.utils.flop_counter`` counts the products of every pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gradl1_fast import functional as ours
from tests.ops.sweeps import leaf


class Layer(NamedTuple):
    """A product, the shapes of its operands, its plain twin, and twice the multiplications of one."""

    function: Callable[[Tensor, Tensor], Tensor]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    twin: nn.Module
    product: int


LAYERS = {
    "conv": Layer(
        lambda x, w: ours.conv(x, w, padding=1, stride=2),
        (2, 3, 8, 6),
        (5, 3, 3, 3),
        nn.Conv2d(3, 5, 3, padding=1, stride=2, bias=False),
        2 * (2 * 4 * 3) * (5 * 3 * 3 * 3),  # images x output pixels x weights
    ),
    "conv_transpose": Layer(
        lambda x, w: ours.conv_transpose(x, w, stride=2),
        (2, 3, 8, 6),
        (3, 5, 2, 2),
        nn.ConvTranspose2d(3, 5, 2, stride=2, bias=False),
        2 * (2 * 8 * 6) * (3 * 5 * 2 * 2),  # images x input pixels x weights
    ),
    "linear": Layer(ours.linear, (4, 7), (5, 7), nn.Linear(7, 5, bias=False), 2 * 4 * (7 * 5)),
    "linear of a sequence": Layer(
        ours.linear, (2, 4, 7), (5, 7), nn.Linear(7, 5, bias=False), 2 * (2 * 4) * (7 * 5)
    ),
}
each = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def counted(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@each
def test_each_pass(layer: Layer) -> None:
    x, w = leaf(torch.randn(layer.x)), leaf(torch.randn(layer.weight))
    with torch.no_grad():
        assert counted(lambda: layer.function(x, w)) == layer.product
    y = layer.function(x, w)
    assert counted(lambda: torch.autograd.grad(y.sum(), x, retain_graph=True)) == layer.product
    assert counted(lambda: torch.autograd.grad(y.sum(), [x, w], retain_graph=True)) == 2 * layer.product
    of_constant = layer.function(x.detach(), w).sum()
    assert counted(lambda: torch.autograd.grad(of_constant, w)) == layer.product
    dy = leaf(torch.randn(y.shape))
    dx, dw = torch.autograd.grad(y, (x, w), dy, create_graph=True)
    # Of dx: fprop for dy and wgrad for the weight. Of dw: fprop for dy and dgrad for the input.
    for gradient, other in ((dx, w), (dw, x)):
        second = counted(lambda g=gradient, o=other: torch.autograd.grad(g.sum(), [dy, o], retain_graph=True))
        assert second == 2 * layer.product
    both = counted(lambda: torch.autograd.grad([dx.sum(), dw.sum()], [dy, x, w]))
    assert both == 4 * layer.product


@each
def test_a_step_costs_what_pytorch_counts_for_its_own_layer(layer: Layer) -> None:
    x, w = leaf(torch.randn(layer.x)), layer.twin.weight
    theirs = counted(lambda: layer.twin(x).sum().backward())
    assert theirs == 3 * layer.product
    assert counted(lambda: layer.function(x, w).sum().backward()) == theirs


@each
def test_a_double_backward_of_both_gradients_at_once_is_four_products(layer: Layer) -> None:
    op = next(name.split()[0] for name, other in LAYERS.items() if other is layer)
    double_backward = getattr(torch.ops.gradl1_fast, f"{op}_double_backward")
    geometry = {
        "conv": ([2, 2], [1, 1], [1, 1], 1),
        "conv_transpose": ([2, 2], [0, 0], [1, 1], [0, 0], 1),
        "linear": (),
    }[op]
    x, w = torch.randn(layer.x), torch.randn(layer.weight)
    dy = layer.function(x, w)
    assert counted(lambda: double_backward(x, w, dy, x, w, *geometry, [True] * 3)) == 4 * layer.product
    assert counted(lambda: double_backward(None, w, dy, x, w, *geometry, [False] * 3)) == 0


def test_groups_divide_the_count() -> None:
    x, w = leaf(torch.randn(2, 4, 6, 6)), leaf(torch.randn(4, 1, 3, 3))
    # PyTorch's own formula for a weight gradient leaves groups out and counts four times as much.
    step = counted(lambda: ours.conv(x, w, groups=4).sum().backward())
    assert step == 3 * 2 * (2 * 4 * 4) * (4 * 1 * 3 * 3)


@pytest.mark.parametrize("first", ["gradl1_fast", "torch.utils.flop_counter"])
def test_formulas_are_registered_in_either_order_of_imports(first: str) -> None:
    code = f"""
import sys, {first}
assert {first!r} != "gradl1_fast" or "torch.utils.flop_counter" not in sys.modules
import torch, gradl1_fast
from torch.utils.flop_counter import FlopCounterMode, flop_registry
print(sum("gradl1_fast" in str(op) for op in flop_registry))
"""
    root = Path(__file__).parent.parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120, check=False
    )
    assert (result.stdout.strip(), result.returncode) == ("9", 0), result.stderr
