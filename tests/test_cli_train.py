"""``gradl1 train``."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import msgspec
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gradl1_fast as gl
from gradl1_fast.cli import app
from gradl1_fast.training import config
from gradl1_fast.training.config import Config, Penalty, Training
from gradl1_fast.training.runs import folder as runs

WIDE = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
QUICK = ["--epochs", "2", "--penalty-epochs", "1", "--width", "4", "--batch-size", "200", "--device", "cpu"]


def gradl1(*args):
    return CliRunner(env=WIDE).invoke(app, [str(arg) for arg in args])


def configured(*args):
    """Return the configuration that a dry run prints; whether it could run is for other tests."""
    with patch("gradl1_fast.training.runs.launch.rehearse"):
        result = gradl1("train", "--dry-run", *args)
    assert result.exit_code == 0, result.output
    return config.toml.from_dict(Config, msgspec.toml.decode(result.stdout), "printed")


def refused(*args):
    result = gradl1("train", *args)
    assert result.exit_code == 1, result.output
    return result.output


def test_help_teaches_by_examples():
    output = gradl1("train", "--help").output
    assert "gradl1 train --recipe fashion-mnist" in output
    assert "gradl1 train --resume" in output
    assert "torchrun" in output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    result = gradl1("train", *QUICK, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_a_run_leaves_everything_in_its_folder(finished):
    folder, output = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("config.toml", "metrics.csv", "log.txt", "weights.safetensors", "ranges.safetensors"),
        *("checkpoint", "report.html"),
    }
    assert "digits_net on digits" in output
    assert str(folder / "report.html") in output
    assert runs.load(folder).config.training.epochs == 2
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[0]["penalty"]) == 0 < float(rows[1]["penalty"])
    assert "epoch 2 of 2" in (folder / "log.txt").read_text()


def test_the_report_is_complete(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count('role="img"') == 5
    for word in (
        "Accuracy over bit widths",
        "Loss and penalty",
        "penalty.settings.lambda_w",
        "torch",
        "0.weight",
    ):
        assert word in page


def test_resuming_a_finished_run_prints_the_same(finished):
    before = (finished[0] / "metrics.csv").read_text()
    result = gradl1("train", "--resume", finished[0], "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (finished[0] / "metrics.csv").read_text() == before
    accuracies = [
        re.findall(r"\d+\.\d\d", text.split("equal bits")[1]) for text in (finished[1], result.output)
    ]
    assert accuracies[0] == accuracies[1]


def test_a_folder_with_a_run_is_not_written_over(finished):
    assert "already holds a run" in refused("--out", finished[0])


def test_nothing_to_resume(tmp_path):
    assert "no run to resume" in refused("--resume", tmp_path)


def test_a_resumed_run_is_not_changed(finished):
    output = refused("--resume", finished[0], "--epochs", "3", "--lambda", "1")
    assert "leave out --epochs, --lambda" in output
    elsewhere = refused("--resume", finished[0], "--recipe", "fashion-mnist", "--out", finished[0].parent)
    assert "leave out --recipe, --out" in elsewhere


@pytest.mark.parametrize("begun", [True, False])
def test_a_stopped_run_says_how_to_resume_if_possible(tmp_path, monkeypatch, begun):
    def stopped(config, folder, **_options):
        if begun:
            runs.Folder(folder).write_config(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("gradl1_fast.training.runs.launch.launch", stopped)
    folder = tmp_path / "my run"
    folder.mkdir()
    result = gradl1("train", "--out", folder)
    assert result.exit_code == 130
    assert "stopped" in result.output
    assert (f"resume with: gradl1 train --resume '{folder}'" in result.output) == begun


def test_ctrl_c_writes_a_checkpoint_and_exits_with_130(tmp_path):
    command = [
        sys.executable,
        "-m",
        "gradl1_fast",
        "train",
        *QUICK,
        "--epochs",
        "500",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, **WIDE, "OMP_NUM_THREADS": "1"}

    def receive_signals():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it

    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=receive_signals
    ) as process:
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert first.startswith("epoch 1 of 500: loss ")
    assert process.returncode == 130
    stopped = re.search(
        r"^stopped after (\d+) steps, in epoch \d+ of 500; the checkpoint is written$", rest, re.M
    )
    assert rest.endswith(f"gradl1: stopped; resume with: gradl1 train --resume {tmp_path}\n")
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [f"step-{int(stopped[1]):012}"]


def test_without_a_terminal_there_is_one_line_an_epoch(tmp_path):
    result = gradl1("train", *QUICK, "--out", tmp_path / "run")
    lines = [line.split(":")[0] for line in result.stderr.splitlines()]
    assert lines == ["epoch 1 of 2", "epoch 2 of 2", "finished"]


def test_on_a_terminal_there_is_a_bar_with_the_epoch_and_the_time_left(tmp_path, terminal):
    from gradl1_fast.cli.train import _bar

    shown = terminal()
    trainer = SimpleNamespace(epoch=2, steps=10, steps_done=25)
    with _bar(Config(training=Training(7), penalty=Penalty(epochs=0))) as (on_step, say):
        on_step(trainer)
        say("a line [of] the log")
    assert "epoch 3 of 7" in shown.getvalue()
    assert "25/70" in shown.getvalue()
    assert "left:" in shown.getvalue()
    assert "a line [of] the log" in shown.getvalue()


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("[training]\nepoch = 3\n")
    output = refused("--resume", tmp_path)
    assert "unknown key 'epoch'" in output
    assert "config.toml" in output


def test_without_options_the_defaults():
    assert configured() == Config()


@pytest.mark.parametrize("name", config.recipes())
def test_a_recipe_by_name(name):
    assert configured("--recipe", name) == Config.read(config.recipe(name))


OPTIONS = {
    "--data-set cifar10": ("data", "name", "cifar10"),
    "--data /d": ("data", "folder", "/d"),
    "--size 64": ("data", "size", 64),
    "--flip": ("data", "flip", True),
    "--crop 2": ("data", "crop", 2),
    "--model resnet18": ("model", "name", "resnet18"),
    "--width 9": ("model", "width", 9),
    "--stem imagenet": ("model", "stem", "imagenet"),
    "--per-channel": ("model", "per_channel", True),
    "--optimizer sgd": ("optimizer", "name", "sgd"),
    "--learning-rate 0.5": ("optimizer", "learning_rate", 0.5),
    "--momentum 0.5": ("optimizer", "momentum", 0.5),
    "--weight-decay 0.5": ("optimizer", "weight_decay", 0.5),
    "--warmup-epochs 3": ("optimizer", "warmup_epochs", 3),
    "--epochs 12": ("training", "epochs", 12),
    "--batch-size 64": ("training", "batch_size", 64),
    "--accumulate 2": ("training", "accumulate", 2),
    "--label-smoothing 0.1": ("training", "label_smoothing", 0.1),
    "--ema 0.9": ("training", "ema", 0.9),
    "--seed 4": ("training", "seed", 4),
    "--precision bfloat16": ("training", "precision", "bfloat16"),
    "--checkpointing": ("training", "checkpointing", True),
    "--compile": ("training", "compile", True),
    "--cuda-graph": ("training", "cuda_graph", True),
    "--checkpoint-steps 7": ("training", "checkpoint_steps", 7),
    "--method plain": ("penalty", "method", "plain"),
    "--penalty-epochs 3": ("penalty", "epochs", 3),
    "--penalty-from 20": ("penalty", "epochs", 1),
    "--penalty-warmup 2": ("penalty", "warmup_epochs", 2),
    "--lambda 0.5": ("penalty", "settings", {"lambda_w": 0.5, "lambda_a": 0.5, "scale": "step"}),
    "--scale none": ("penalty", "settings", {"lambda_w": 0.1, "lambda_a": 0.1, "scale": "none"}),
    "--every 2": ("penalty", "settings", {"lambda_w": 0.1, "lambda_a": 0.1, "scale": "step", "every": 2}),
    "--method defensive --setting beta=0.002": ("penalty", "settings", {"beta": 0.002}),
    "--method gradl1 --setting method=finite_difference": (
        "penalty",
        "settings",
        {"lambda_w": 0.1, "lambda_a": 0.1, "scale": "step", "method": "finite_difference"},
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_changes_its_value_and_no_other(options):
    section, field, value = OPTIONS[options]
    found, expected = config.toml.to_dict(configured(*options.split())), config.toml.to_dict(Config())
    assert found[section].pop(field) == value
    expected[section].pop(field, None)
    if "--method defensive" in options:
        found["penalty"].pop("method")
        expected["penalty"].pop("method")
    if options == "--method plain":
        found["penalty"].pop("settings")
        expected["penalty"].pop("settings")
    assert found == expected


MISTAKES = pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "mnist"], "recipe must be one of"),
        (["--recipe", "missing.toml"], "missing.toml"),
        (["--epochs", "0"], "epochs must be 1 or more"),
        (["--epochs", "5"], "penalty.epochs must be at most training.epochs, 5, got 10"),
        (["--method", "lasso"], "method must be one of"),
        (["--setting", "beta"], "--setting must be NAME=VALUE, got 'beta'"),
        (["--setting", "beta=1"], "its settings are lambda_w"),
        (["--penalty-from", "30"], "--penalty-from must be from 1 to 20"),
        (["--penalty-from", "3", "--penalty-epochs", "3"], "--penalty-from or --penalty-epochs, not both"),
        (["--data-set", "mnist"], "data must be one of"),
        (["--data-set", "cifar10"], "Get CIFAR-10"),
        (["--model", "lenet"], "model must be one of"),
        (["--cuda-graph", "--device", "cpu"], "cuda_graph needs an NVIDIA GPU"),
        (["--device", "gpu"], "device must be cpu, cuda or cuda:N"),
        (["--batch-size", "2000"], "2000 is more than the 1200 training images"),
        (["--model", "mobilenet_like", "--width", "4", "--batch-size", "1"], "more than 1 value per channel"),
    ],
)
DRY = pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])


@DRY
@MISTAKES
def test_a_mistake_is_reported_in_one_sentence(args, message, dry, tmp_path):
    output = refused(*args, *dry, "--out", tmp_path / "run")
    assert message in output
    assert "Traceback" not in output
    assert dry == [] or not (tmp_path / "run").exists()


@DRY
def test_a_folder_that_cannot_be_written(dry, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    output = refused(*QUICK, *dry, "--out", tmp_path / "file" / "run")
    assert f"{tmp_path / 'file'}: Not a directory" in output
    monkeypatch.setattr("os.access", lambda path, mode: False)  # to root every folder is open
    assert f"{tmp_path}: Permission denied" in refused(*QUICK, *dry, "--out", tmp_path / "run")


@DRY
@pytest.mark.parametrize("missing", ["safetensors", "matplotlib.figure", "jinja2"])
def test_a_missing_package_is_named_before_the_work(missing, dry, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert "pip install" in refused(*QUICK, *dry, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_that_could_run_says_so_by_its_exit_code_and_writes_nothing(tmp_path):
    result = gradl1("train", "--dry-run", *QUICK, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.iterdir())


@DRY
def test_images_that_do_not_fit_the_network_are_refused_before_the_work(dry, tmp_path, monkeypatch):
    net = gl.convert(nn.Sequential(nn.Conv2d(1, 2, 9), nn.Flatten(), nn.Linear(2, 10)))
    monkeypatch.setattr("gradl1_fast.training.runs.launch.network", lambda *args: net)
    output = refused(*QUICK, *dry, "--out", tmp_path / "run")
    assert "digits_net does not take images of shape (1, 8, 8): " in output
    assert "Kernel size" in output


class Distances(nn.Module):
    """What PyTorch differentiates once."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(10, 72))

    def forward(self, x):
        return torch.cdist(x, self.centres)


@DRY
@pytest.mark.parametrize("method", ["gradl1", "l2"])
def test_a_network_that_is_differentiable_only_once_is_refused_before_the_work(
    method, dry, tmp_path, monkeypatch
):
    net = gl.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), Distances(), nn.Linear(10, 10)))
    monkeypatch.setattr("gradl1_fast.training.runs.launch.network", lambda *args: net)
    output = refused(*QUICK, *dry, "--method", method, "--out", tmp_path / "run")
    assert f"digits_net cannot be differentiated twice, as {method} needs: " in output
    assert "cdist" in output
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_resumption_reads_the_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    result = gradl1("train", "--dry-run", "--resume", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    state = next((folder / "checkpoint").glob("step-*/state.json"))
    state.write_bytes(state.read_bytes()[:1000])
    assert "state.json: truncated or corrupt JSON file" in refused(
        "--dry-run", "--resume", folder, "--device", "cpu"
    )


def test_without_tensorboard_training_continues_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = gradl1("train", *QUICK, "--epochs", "1", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "no events for TensorBoard" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_torchrun_trains_with_two_processes(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "gradl1_fast", "train", *QUICK, "--epochs", "1", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Report:") == 1
    assert (tmp_path / "run" / "log.txt").read_text().count("epoch 1 of 1") == 1
    assert runs.load(tmp_path / "run").config.training.batch_size == 200
