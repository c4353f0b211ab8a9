"""A training that is killed at any moment goes on to the same weights, bit for bit."""

import csv
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.config import Config, Data, Model, Optimizer, Penalty, Training
from gradl1_fast.training.data import digits
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.runs import checkpoints

ROOT = Path(__file__).parents[2]
DATA = tuple(part[:60] for part in digits(0).train)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run in peace, and one that was killed many times."""
    made = [tmp_path_factory.mktemp(name) / "run" for name in ("whole", "killed")]
    run = subprocess.run(
        [sys.executable, "-m", "tests.training.kills", *map(str, made), "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 8, run.stdout  # of 12 deaths, some may come after the end of the training
    return made


@pytest.mark.parametrize("name", ["weights.safetensors", "ranges.safetensors"])
def test_the_result_is_the_same_to_the_last_bit(folders, name):
    whole, killed = (load_file(folder / name) for folder in folders)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_the_metrics_are_the_same(folders):
    tables = []
    for folder in folders:
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        tables.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    assert len(tables[0]) == 3
    assert tables[0] == tables[1]


def test_the_log_says_where_it_was_taken_up(folders):
    assert "resumed after" in (folders[1] / "log.txt").read_text()
    assert "resumed" not in (folders[0] / "log.txt").read_text()


def test_one_whole_checkpoint_stays(folders):
    for folder in folders:
        names = [path.name for path in (folder / "checkpoint").iterdir() if not path.name.startswith(".")]
        assert names == ["step-000000000036"]


def test_no_step_is_told_twice_to_tensorboard(folders):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    for folder in folders:
        events = accumulator.EventAccumulator(
            str(folder / "tensorboard"), size_guidance={"scalars": 0}
        ).Reload()
        assert [event.step for event in events.Scalars("loss")] == list(range(36))
        names = events.Tags()["scalars"]
        assert {"loss", "penalty", "learning_rate", "test_accuracy"} < set(names)
        assert "step_norm/0.weight" in names
        assert "penalty_term/0.weight" in names


class Dropped(nn.Module):
    """Draws random numbers in its forward pass."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4 * 36, 10)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def config(method="gradl1", settings=None, **training):
    return Config(
        Data(crop=1, flip=True),
        Model(),
        Optimizer("sgd", 0.01, weight_decay=1e-3, warmup_epochs=1),
        Training(**{"epochs": 3, "batch_size": 20, **training}),
        Penalty(method, 2, 1, settings or {"lambda_w": 0.01, "lambda_a": 0.01, "every": 2}),
    )


def trainer(settings):
    torch.manual_seed(3)
    return Trainer(gl.convert(Dropped()), DATA, settings)


def advance(made, steps):
    for _ in range(steps):
        if made.step == made.steps:
            made.next_epoch()
        until = made.step + 1
        steps_in_epoch, made.steps = made.steps, until
        made.run_epoch()
        made.steps = steps_in_epoch


@functools.cache
def undisturbed(name):
    """Return the training of a case after all of its steps."""
    made = trainer(CASES[name])
    advance(made, 9)
    return made


CASES = {
    "gradl1": config(),
    "average": config(ema=0.9, accumulate=2),
    "float16": config(precision="float16"),
    "qat": config("qat", {"w": 4, "a": 4}),
    "finite difference": config(settings={"lambda_w": 0.01, "lambda_a": 0.01, "method": "finite_difference"}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stop", [0, 1, 3, 5, 8])
def test_after_any_step_it_goes_on_as_if_nothing_had_happened(name, stop, tmp_path):
    whole = undisturbed(name)
    stopped = trainer(CASES[name])
    advance(stopped, stop)
    checkpoints.save(tmp_path, stopped, stopped.state_dict(), [{"epoch": 1.0}])
    torch.manual_seed(99)
    resumed = trainer(CASES[name])
    torch.rand(7)
    rows = checkpoints.load(checkpoints.latest(tmp_path), resumed)
    assert rows == [{"epoch": 1.0}]
    advance(resumed, 9 - stop)
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert torch.equal(torch.stack(resumed.seen.losses), torch.stack(whole.seen.losses))
    assert torch.equal(torch.stack(resumed.seen.penalties), torch.stack(whole.seen.penalties))
    assert resumed.rate == whole.rate
    if whole.average is not None:
        assert all(
            torch.equal(value, whole.average.state[key]) for key, value in resumed.average.state.items()
        )
