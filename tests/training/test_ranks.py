"""Distributed training over gloo: the gradient is the mean of the ranks', with accumulation too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.loop import ranks as module
from tests.gradients import assert_gradients
from tests.ports import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "results.pt"
    command = [sys.executable, "-m", "tests.training.two_ranks", str(path), free_port()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("case", ["plain 1", "gradl1 1", "gradl1 3", "l2 1", "kure 1", "defensive 1"])
def test_the_gradient_is_the_mean_of_the_gradients_of_the_ranks(results, case):
    expected = [(a + b) / 2 for a, b in zip(*results["expected"][case], strict=True)]
    for found in results["found"]:
        assert_gradients(found[f"gradients {case}"], expected, 1e-5)
    different = results["expected"][case]
    assert not all(torch.allclose(a, b, rtol=0.1) for a, b in zip(*different, strict=True))


def test_it_is_not_the_gradient_of_one_penalty_over_the_whole_batch(results):
    one, three = (results["found"][0][f"gradients gradl1 {accumulate}"] for accumulate in (1, 3))
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(one, three, strict=True))


def test_ranks_exchange_their_gradients_once_a_step(results):
    for found in results["found"]:
        assert found["exchanges gradl1 1"] == found["exchanges gradl1 3"] == 1


def test_all_ranks_have_the_same_weights_and_tell_the_same_loss(results):
    first, second = results["found"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert torch.equal(first["losses"], second["losses"])


def test_a_checkpoint_holds_the_random_state_of_each_rank(results):
    assert len(results["found"][0]["state"]["random"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sam", "2 ranks: the method 'sam', as configured, takes several passes"),
        ("qat", "2 ranks: the method 'qat'"),
        ("finite difference", "2 ranks: the method 'gradl1'"),
        ("odd", "2 ranks must divide the 9 images of a part of a batch"),
    ],
)
def test_what_would_be_wrong_on_several_ranks_is_refused(results, name, message):
    for found in results["found"]:
        assert message in found["refused"][name]


def test_every_rank_stops_where_one_meets_nan(results):
    for found in results["found"]:
        assert found["stopped"].startswith("the loss is nan since step 1 of epoch 1")


def test_a_checkpoint_of_another_number_of_ranks_is_refused(results):
    from tests.training.two_ranks import DATA, Trainer, config, network

    trainer = Trainer(network(), DATA, config())
    with pytest.raises(ValueError, match="written by 2 ranks, not 1"):
        trainer.load_state_dict(results["found"][0]["state"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("meta", "got 'meta'"),
        ("cuda:99", "there are"),
    ],
)
def test_a_device_that_is_not_there(name, message):
    with pytest.raises(ValueError, match=message), module.ranks(name):
        pass


def test_without_torchrun_there_is_one():
    with module.ranks("cpu") as group:
        assert (group.rank, group.count, group.first, str(group.device)) == (0, 1, True, "cpu")


def test_fsdp_is_refused_with_a_sentence():
    fsdp = pytest.importorskip("torch.distributed.fsdp", reason="torch was built without distributed")
    model = gl.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)))
    wrapped = fsdp.FullyShardedDataParallel.__new__(fsdp.FullyShardedDataParallel)  # needs no process group
    nn.Module.__init__(wrapped)
    wrapped.inside = model
    with pytest.raises(ValueError, match="FullyShardedDataParallel does not support double backprop"):
        gl.GradL1(wrapped, 0.1, 0.1)
