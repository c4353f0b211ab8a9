"""What a region keeps alive, and until when."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from bench.measure import peak_bytes
from gradl1_fast.conversion.regions.operations import Operation, _Product, _Unary
from tests.conversion.runs import built, images, loss_of
from tests.conversion.test_regions import make


def test_saved_tensors_are_freed_during_the_last_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    for kind in (*Operation.__subclasses__(), *_Product.__subclasses__()):
        if "backward" in vars(kind):
            monkeypatch.setattr(kind, "backward", counting(kind.backward, alive))
    converted = gl.convert(built(make("residual")))
    penalty = gl.GradL1(converted, 0.3, 0.2)
    loss = loss_of(images())(converted)
    value = penalty(loss)
    assert len(set(alive)) == 1
    alive.clear()
    (loss + value).backward()
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] == 1


def test_the_double_backward_pass_frees_a_tangent_after_its_last_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a chain one operation reads and one writes; only a residual is kept for longer."""
    alive: list[int] = []
    for kind in (*Operation.__subclasses__(), *_Product.__subclasses__(), *_Unary.__subclasses__()):
        if "double_backward" in vars(kind):
            monkeypatch.setattr(kind, "double_backward", counting_tangents(kind.double_backward, alive))
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(6)]
    converted = gl.convert(nn.Sequential(nn.Conv2d(3, 4, 1), *layers).train())
    penalty = gl.GradL1(converted, 0.3, 0.2)
    loss = converted(torch.randn(2, 3, 16, 16)).square().mean()
    (loss + penalty(loss)).backward()
    assert len(alive) > 12
    assert max(alive) <= 2


def test_steps_of_quantization_do_not_raise_the_peak_of_memory() -> None:
    """In this network the weights are a third of the activations."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())]
    x, peaks = torch.randn(2, 64, 16, 16), {}
    for scale in ("none", "step"):
        model = gl.convert(nn.Sequential(*copy.deepcopy(layers)).train())
        penalty = gl.GradL1(model, 0.3, 0.2, scale)

        def step(model: Any = model, penalty: Any = penalty) -> None:
            model.zero_grad()
            loss = model(x).square().mean()
            (loss + penalty(loss)).backward()

        peaks[scale] = peak_bytes(step, x.device)
    assert peaks["step"] <= 1.02 * peaks["none"]


def counting_tangents(original: Callable[..., None], alive: list[int]) -> Callable[..., None]:
    def double_backward(self: Operation, run: Any, dy: Any) -> None:
        original(self, run, dy)
        alive.append(sum(entry is not None for entry in run.tangents))

    return double_backward


def counting(original: Callable[..., None], alive: list[int]) -> Callable[..., None]:
    def backward(self: Operation, run: Any, dy: Tensor) -> None:
        alive.append(sum(entry is not None for entry in run.saved))
        original(self, run, dy)

    return backward


def test_a_region_is_one_node_and_creates_no_reference_cycle() -> None:
    converted = gl.convert(built(make("residual")))
    penalty = gl.GradL1(converted, 0.3, 0.2)
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False):
            loss = loss_of(images())(converted)
            value = penalty(loss)
            node = weakref.ref(find(loss))
            if backward:
                (loss + value).backward()
            del loss, value
            assert node() is None
    finally:
        gc.enable()


def find(loss: Tensor) -> Any:
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if "_Region" in node.name():
            return node
        pending += [parent for parent, _ in node.next_functions if parent is not None]
    raise AssertionError("no region")
