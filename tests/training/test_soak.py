"""A short soak, and that a soak sees what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.soak import GROWTH, Soaked, differences, growth

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """The folder of 48 penalised steps with two deaths, and what was found."""
    folder = tmp_path_factory.mktemp("soak") / "runs"
    command = [sys.executable, "-m", "tests.training.soak", str(folder)]
    options = ["--steps", "40", "--deaths", "2", "--seed", "0"]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout)


def test_kills_and_interruptions_change_nothing(soaked):
    _, found = soaked
    assert found["steps"] == 48
    assert sum(found["deaths"].values()) == 2
    assert found["differences"] == []


def test_a_weight_or_a_number_that_differs_is_named(soaked):
    folder, _ = soaked
    one, two = folder / "whole", folder / "killed"
    assert differences(one, two) == []
    weights = load_file(two / "weights.safetensors")
    weights["0.weight"] = torch.nextafter(weights["0.weight"], torch.tensor(1.0))
    save_file(weights, two / "weights.safetensors")
    metrics = (two / "metrics.csv").read_text().splitlines()
    (two / "metrics.csv").write_text(
        "\n".join([metrics[0], metrics[1].replace("1,12,", "1,13,"), *metrics[2:]])
    )
    assert differences(one, two) == ["weights.safetensors: 0.weight", "metrics.csv: steps of epoch 1"]


def test_growth_is_measured_when_the_run_has_settled():
    flat = [[step, 100 + 50 * (step > 2), 10**8 + 10**7 * (step > 2)] for step in range(100)]
    assert growth(flat) == (0, 0)
    leaking = [[step, tensors + step, size + 10**6 * step] for step, tensors, size in flat]
    assert growth(leaking) == (79, 79 * 10**6)


def test_each_fault_is_a_sentence():
    good = Soaked(2004, {"step": 3}, 3, [], 0, 0, 10**8, (1.0, 1.0))
    assert good.faults() == []
    bad = Soaked(2004, {"step": 0}, 0, ["weights: a"], 2, int(GROWTH) + 1, 10**8, (1.0, 1.0))
    assert [fault.split()[0] for fault in bad.faults()] == ["not", "the", "2", "8000001"]
