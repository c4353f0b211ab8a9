"""Whole training steps: memory, repeatability, and refused configurations."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradl1_fast as gl
from tests.conversion.region_checks import regions_of
from tests.gradients import assert_gradients
from tests.networks import NO_NORM, RESNET, VGG, Network


def trained(network: Network, steps: int, scale: str = "none", each: object = None) -> nn.Module:
    """Train a float32 network; call ``each`` after every step."""
    model = gl.convert(network.make(torch.float32))
    penalty = gl.GradL1(model, 1e-3, 1e-3, scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = network.loss(model, torch.float32)
        (loss + penalty(loss)).backward()
        optimizer.step()
        del loss
        if callable(each):
            each()
    return model


def tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def storage_bytes() -> int:
    """Return the bytes of the memory of all live tensors."""
    storages = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("scale", ["none", "step"])
def test_memory_is_flat_over_200_steps_through_regions(scale: str) -> None:
    """In a process of its own, whose memory holds nothing of other tests."""
    code = f"from tests.test_faults_training import check_flat_memory; check_flat_memory({scale!r})"
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def check_flat_memory(scale: str) -> None:
    counted: list[tuple[int, int, int]] = []
    steps = iter(range(200))

    def each() -> None:
        if next(steps) % 50 == 49:
            size = resident_bytes() if Path("/proc/self/statm").exists() else 0
            gc.collect()
            counted.append((tensors(), storage_bytes(), size))

    regions = regions_of(trained(VGG, 200, scale, each))
    assert regions
    assert not any(region.reason for region in regions)
    numbers, storages, sizes = zip(*counted, strict=True)
    assert len(set(numbers)) == 1, numbers
    assert len(set(storages)) == 1, storages
    assert sizes[-1] - sizes[0] < 4e6


def test_a_step_creates_no_reference_cycles() -> None:
    counted: list[int] = []
    gc.collect()
    gc.disable()
    try:
        trained(VGG, 3, each=lambda: counted.append(tensors()))
    finally:
        gc.enable()
    assert counted[1] == counted[2]


@pytest.mark.parametrize("network", [VGG, RESNET, NO_NORM], ids=lambda n: n.id)
@pytest.mark.parametrize("scale", ["none", "step"])
def test_two_runs_from_one_seed_are_bitwise_equal(network: Network, scale: str) -> None:
    one, two = (trained(network, 3, scale).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = gl.convert(network.make(torch.float32)).state_dict()
    assert not all(torch.equal(one[name], start[name]) for name in one)


class Waiting(TorchDispatchMode):
    """Notes what would wait for a GPU: a look at a value, or a result whose size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique", "masked_select"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_step_never_reads_a_value(bits: int | None, scale: str) -> None:
    model = gl.convert(VGG.make(torch.float32))
    x, y = VGG.batch(torch.float32)
    gl.calibrate(model, [x])
    penalty = gl.GradL1(model, 1e-3, 1e-3, scale=scale)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    with gl.bits(model, w=bits, a=bits):
        model(x)  # the first pass compares plans with modules
    with gl.bits(model, w=bits, a=bits), Waiting() as mode:
        loss = F.cross_entropy(model(x), y)
        (loss + penalty(loss)).backward()
        optimizer.step()
    assert mode.waits == []


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.body, self.use_reentrant = VGG.build(), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def checkpointed(use_reentrant: bool | None) -> tuple[nn.Module, gl.GradL1]:
    torch.manual_seed(1)
    model = Checkpointed(None).double()
    model.body = gl.convert(model.body)
    model.use_reentrant = use_reentrant
    return model, gl.GradL1(model, 0.3, 0.2)


def test_checkpointing_without_reentry_gives_the_same_gradient() -> None:
    results = []
    for use_reentrant in (None, False):
        model, penalty = checkpointed(use_reentrant)
        x, y = VGG.batch()
        loss = F.cross_entropy(model(x), y)
        (loss + penalty(loss)).backward()
        results.append([p.grad for p in model.parameters()])
    assert_gradients(results[1], results[0], 1e-12)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused() -> None:
    model, penalty = checkpointed(True)
    x, y = VGG.batch()
    loss = F.cross_entropy(model(x.requires_grad_()), y)
    with pytest.raises(RuntimeError, match="checkpointed with use_reentrant=True"):
        penalty(loss)


def test_a_batch_of_one_raises_pytorchs_error() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = torch.ones(1, 3, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value") as theirs:
        plain(x)
    with pytest.raises(ValueError, match="more than 1 value") as error:
        gl.convert(plain)(x)
    assert str(error.value) == str(theirs.value)


def test_an_empty_batch_in_evaluation() -> None:
    model = gl.convert(VGG.make().eval())
    assert model(VGG.batch()[0][:0]).shape == (0, 5)


def test_weights_changed_in_place_between_forward_and_penalty_are_an_error() -> None:
    model = gl.convert(VGG.make())
    penalty, loss = gl.GradL1(model, 1.0, 1.0), VGG.loss(model)
    with torch.no_grad():
        model.get_submodule("3").weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        penalty(loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantization_does_not_hide_non_finite_weights(value: float) -> None:
    model = gl.convert(VGG.make().eval())
    gl.calibrate(model, [VGG.batch()])
    with torch.no_grad():
        model.get_submodule("14").weight[0, 0] = value
    with gl.bits(model, w=4, a=4):
        assert not model(VGG.batch()[0])[:, 0].isfinite().any()
