"""fully_shard, FullyShardedDataParallel and SyncBatchNorm: a correct gradient, or an error.

DistributedDataParallel is tested in tests/training/test_ranks.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from tests.gradients import assert_gradients
from tests.interoperability.two_ranks import LAMBDAS
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
KEEP = (
    r"is sharded before both backward passes are done; keep it unsharded: fully_shard\(\.\.\., reshard_after_"
)

REFUSED = {
    "after the forward pass": f"GradL1: 0.weight {KEEP}",
    "after the first backward pass": f"GradL1: 0.weight {KEEP}",
    "activations alone": f"GradL1: 0.weight {KEEP}",
    # Wrapped when the penalty was made already: nobody asked this library, and its operators cannot run.
    "FSDP1 afterwards": "GradL1: the memory of 0.weight was freed before both backward passes",
    "FSDP1 afterwards, activations": "data is not allocated yet",
    "FSDP1 afterwards, flat": "GradL1: the memory of 0.weight was freed before both backward passes",
    "FSDP1 afterwards, flat, activations": "data is not allocated yet",
    "static_graph": r"GradL1: DistributedDataParallel\(static_graph=True\) does not average",
    "SyncBatchNorm": "GradL1: 1 is a SyncBatchNorm, which has no second derivative on several ranks;",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ranks") / "results.pt"
    command = [sys.executable, "-m", "tests.interoperability.two_ranks", str(path), free_port()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("each_layer", [False, True], ids=["whole model", "each layer"])
@pytest.mark.parametrize("name", LAMBDAS)
def test_fully_shard_gives_the_mean_of_the_ranks_gradients(
    results: dict[str, Any], name: str, each_layer: bool
) -> None:
    expected, plain = results["expected"][name], results["expected"]["plain"]
    for found in results["found"]:
        assert_gradients(found[f"{name} {each_layer}"], expected, 1e-12)
    assert not any(torch.allclose(e, p, rtol=1e-2) for e, p in zip(expected, plain, strict=True))


def test_fully_shard_trains_to_the_same_weights(results: dict[str, Any]) -> None:
    for found in results["found"]:
        assert_gradients(found["trained"], results["expected"]["trained"], 1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_configurations_that_would_lose_the_penalty_are_refused(results: dict[str, Any], name: str) -> None:
    for found in results["found"]:
        assert re.search(REFUSED[name], found["refused"][name]), found["refused"][name]


def plain() -> nn.Module:
    torch.manual_seed(4)
    first, second = nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(3, 3, 3, bias=False)
    norms = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.Flatten()).double()


def test_synchronised_norms_before_convert_are_plain_ones_in_one_process() -> None:
    x, results = torch.randn(4, 2, 6, 6).double(), []
    for model in (plain(), nn.SyncBatchNorm.convert_sync_batchnorm(plain())):
        converted = gl.convert(model)
        penalty = gl.GradL1(converted, 0.3, 0.2)
        loss = converted(x).exp().mean()
        extra = penalty(loss)
        results.append(list(torch.autograd.grad(extra, list(converted.parameters()), allow_unused=True)))
    assert_gradients(results[1], results[0], 1e-10)
    assert any(g is not None and g.abs().max() > 1e-3 for g in results[0])


def test_synchronised_norms_after_convert_are_plain_ones_in_one_process() -> None:
    x, results = torch.randn(4, 2, 6, 6).double(), []
    for model in (gl.convert(plain()), nn.SyncBatchNorm.convert_sync_batchnorm(gl.convert(plain()))):
        penalty = gl.GradL1(model, 0.3, 0.2)
        loss = model(x).exp().mean()
        total = loss + penalty(loss)
        results.append(list(torch.autograd.grad(total, list(model.parameters()))))
    assert_gradients(results[1], results[0], 1e-10)


def test_a_wrapped_model_is_refused_by_convert() -> None:
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # needs no process group
    wrapped.module = plain()
    for model in (wrapped, nn.DataParallel(plain())):
        with pytest.raises(ValueError, match=rf"wrapped in {type(model).__name__}; convert the model first"):
            gl.convert(model)
