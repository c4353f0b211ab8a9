"""Checks of regions in a residual network, for every backend and device.

Each trains for two steps first: the first proves the plan and makes the programs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradl1_fast as gl
from gradl1_fast.backends import contract
from gradl1_fast.conversion.planned import Planned
from gradl1_fast.conversion.regions import region as regions
from tests.triton.checks.network import Training

CASES = [
    (scale, layout, bits)
    for scale in ("none", "step")
    for layout in (torch.contiguous_format, torch.channels_last)
    for bits in (None, 4)
]
# What would wait for a GPU: a look at a value, or a result whose size depends on values.
WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique", "masked_select"}


def trained(
    backend: str,
    device: torch.device,
    scale: str,
    bits: int | None = None,
    layout: torch.memory_format = torch.channels_last,
) -> Training:
    """Return a training whose next step runs regions of this backend."""
    with gl.backend(backend):
        training = Training(device, torch.float32, layout, bits, scale=scale)
        for _ in range(2):
            step(training)
    found = regions_of(training.model)
    assert [region.layers for region in found] == [5]
    return training


def step(training: Training) -> None:
    training.model.zero_grad(set_to_none=True)
    training.step()


def regions_of(model: nn.Module) -> list[regions.Region]:
    """Return the regions of a model's plans."""
    plans = [m._compiled_call_impl for m in model.modules() if isinstance(m._compiled_call_impl, Planned)]
    return [region for plan in plans for region in plan.regions]


@contextlib.contextmanager
def without_regions() -> Iterator[None]:
    """Let the operators of the modules run, each a node of the graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_why_not", lambda given: "asked not to")
        yield


def assert_equal_to_the_modules(
    backend: str, device: torch.device, scale: str, layout: torch.memory_format, bits: int | None = None
) -> None:
    """Compare loss, penalty, terms, gradients and statistics, to the last bit where that can be.

    In float, a norm that is multiplied by its step is summed by the batch norm inside a region, channel by
    channel, and by a tap outside, over the whole tensor: their sums may round differently.
    """
    found = _results(backend, device, scale, layout, bits)
    with without_regions():
        expected = _results(backend, device, scale, layout, bits)
    tolerance = 1e-5 if scale == "step" and bits is None else 0.0
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).double().norm()) <= tolerance * float(b.double().norm())


def _results(
    backend: str, device: torch.device, scale: str, layout: torch.memory_format, bits: int | None
) -> list[Tensor]:
    training = trained(backend, device, scale, bits, layout)
    training.model.zero_grad(set_to_none=True)
    with gl.backend(backend):
        found = training.results()
    ran = [not region.reason for region in regions_of(training.model)]
    assert ran == [regions._why_not(()) == ""]
    return found


class Asked(TorchDispatchMode):
    """Notes each operator and the shapes and types of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.what: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = [(t.shape, t.dtype, t.device) for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.what.append((func.overloadpacket.__name__, shapes))
        return result


def assert_the_same_whatever_the_values(backend: str, device: torch.device, scale: str) -> None:
    """Check that a step asks for no value, prepares nothing, and asks for the same with any batch."""
    training, asked = trained(backend, device, scale), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prepare_batch_norm_act", "prepare_fake_quantize", "prepare_tap", "prepare_taps"):
            patch.setattr(contract, name, None)
        for factor in (1.0, -1e3, 0.0):
            training.x.mul_(factor)
            with gl.backend(backend), Asked() as mode:
                step(training)
            asked.append(mode.what)
    assert not WAITS & {name for name, _ in asked[0]}
    assert len(asked[0]) > 100
    assert asked[0] == asked[1] == asked[2]
