"""Distributions of weights, and experiments over initialisers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.experiment import Results, named, run
from gradl1_fast.training.experiment.distributions import channel_precision, distributions
from gradl1_fast.training.experiment.methods import at, check_methods, initialiser_of, settings_of, text_of
from gradl1_fast.training.reports import experiment_details, experiment_tables

QUICK = replace(
    named("digits", regimes=["per tensor"]).quick(), widths=((None, None), (8, 8)), images=100, calibration=50
)
NAMES = ["plain@he-normal", "qat-4@he-normal", "plain@uniform-0.2"]


def test_the_numbers_are_those_of_the_definitions():
    model = gl.convert(nn.Sequential(nn.Linear(2, 2, bias=False)))
    model[0].weight.data = torch.tensor([[-1.0, 1.0], [0.1, 0.35]])
    (found,) = distributions(model, "end")
    assert (found.tensor, found.when, found.low, found.high) == ("0.weight", "end", -1, 1)
    assert found.precision == pytest.approx((2 + 0.25) / 2 / 2)
    w = model[0].weight.detach().double()
    centred = w - w.mean()
    assert found.deviation == pytest.approx(float(centred.square().mean().sqrt()))
    assert found.kurtosis == pytest.approx(float((centred**4).mean() / centred.square().mean() ** 2))
    error = [v - round(v * 127) / 127 for v in w.flatten().tolist()]
    assert found.error == pytest.approx(sum(e**2 for e in error) / 4)


def test_channels_of_one_range_have_a_precision_of_1():
    assert channel_precision(torch.tensor([[-1.0, 1.0], [1.0, -1.0]])) == 1


def test_names_have_an_initialiser_behind_the_method():
    assert at("gradl1+kure", "he-normal") == "gradl1+kure@he-normal"
    assert initialiser_of("gradl1+kure@he-normal") == "he-normal"
    assert initialiser_of("plain") is None
    assert settings_of("kure@he-normal", {}) == settings_of("kure", {})
    assert text_of("kure@he-normal").endswith("initial weights he-normal")
    with pytest.raises(ValueError, match="got plain@zero"):
        check_methods(["plain@he-normal", "plain@zero"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(QUICK, NAMES, [0], tmp_path_factory.mktemp("runs"))


def test_methods_of_one_initialiser_share_their_first_epochs(results):
    one, other, third = results.runs
    assert [each.method for each in results.runs] == NAMES
    assert one.epochs[0] == other.epochs[0] != third.epochs[0]
    starts = [[d for d in each.weights if d.when == "start"] for each in results.runs]
    assert starts[0] == starts[1] != starts[2]
    assert starts[2][0].high <= 0.2


def test_distributions_come_back_and_are_reported(results, tmp_path):
    results.write_runs(tmp_path / "runs.json")
    assert Results.read_runs(tmp_path / "runs.json").runs == results.runs
    (section,) = experiment_details.weights(results)
    rows = section.tables[0].rows
    assert sum(row[0] == "plain@uniform-0.2" for row in rows) == len(results.runs[2].weights)
    assert list(experiment_tables.own_table(results)[1]) == [("qat-4@he-normal", "(4, 4)", str(own(results)))]


def own(results):
    return results.spread("qat-4@he-normal", "own quantizer", 4, 4)
