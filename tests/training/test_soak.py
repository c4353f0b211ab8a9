"""A short soak, and that a soak sees what is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.soak import GROWTH, Soaked, differences, excess, growth, newest, resumed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def soaked(tmp_path_factory):
    """The folder of 48 penalised steps with two deaths, and what was found."""
    folder = tmp_path_factory.mktemp("soak") / "runs"
    command = [sys.executable, "-m", "tests.training.soak", str(folder)]
    options = ["--steps", "40", "--deaths", "2", "--seed", "2"]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout)


def test_kills_and_interruptions_change_nothing(soaked):
    _, found = soaked
    assert found["steps"] == 48
    assert sum(found["deaths"].values()) == 2
    assert found["differences"] == []
    assert any(place > 0 for _, place in found["resumes"])
    assert found["regions"] > 0


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


def test_the_killed_run_may_need_no_more_than_the_other_one():
    whole, killed = [[1, 90, 10**8], [13, 100, 2 * 10**8]], [[1, 80, 10**8], [13, 103, 2 * 10**8 + 7]]
    assert excess(whole, killed) == (3, 7)
    assert excess(killed, whole) == (-3, -7)


def test_the_log_says_after_how_many_steps_a_run_went_on(tmp_path):
    assert (resumed(tmp_path), newest(tmp_path)) == ([], 0)
    lines = ["start", "resumed before the first checkpoint: starting over", "resumed after 21 steps, in"]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    for name in ("step-000000000021", "step-000000000007", ".partial"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    assert (resumed(tmp_path), newest(tmp_path)) == ([0, 21], 21)


GOOD = Soaked(2004, 3, {"step": 3}, [(0, 0), (7, 7)], [], 0, 0, 10**8, -1, -1, 3, (1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"differences": ["weights: a"]}, ["not the same: weights: a"]),
        ({"deaths": {"step": 2}}, ["only 2 of 3 deaths: the second run came to its end before"]),
        ({"resumes": []}, ["not once resumed after a step"]),
        ({"resumes": [(0, 0), (0, 0)]}, ["not once resumed after a step"]),
        ({"resumes": [(7, 7), (14, 0)]}, ["resumed after 0 steps, with a checkpoint of 14"]),
        ({"tensors": 2}, ["2 tensors more at the end"]),
        ({"growth": int(GROWTH) + 1}, ["8000001 bytes more at the end"]),
        ({"killed_tensors": 1}, ["1 tensors more when killed"]),
        ({"killed_growth": int(GROWTH) + 1}, ["8000001 bytes more when killed"]),
        ({"regions": 0}, ["no regions ran"]),
    ],
)
def test_each_fault_is_a_sentence(change, expected):
    assert replace(GOOD, **change).faults() == expected
