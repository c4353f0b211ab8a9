"""Experiments: repeatable, resumable, and branches equal whole trainings."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from gradl1_fast.training.data import digits
from gradl1_fast.training.experiment import ResultError, Results, named, run
from gradl1_fast.training.experiment.session import Session

QUICK = named("digits").quick()
WIDTHS = QUICK.widths
NAMES = ["plain", "gradl1", "gradl1-finite-difference", "qat-4", "gradl1+kure"]
REGIMES = QUICK.regimes


def ran(folder, methods=("plain", "gradl1"), seeds=(0,), experiment=QUICK, **kwargs):
    return run(experiment, methods, seeds, folder, **kwargs)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("runs"), NAMES)


def test_every_method_is_evaluated_at_every_width(results):
    assert results.methods == NAMES
    for method in NAMES:
        rows = [row for row in results.rows if row.method == method and row.regime != "own quantizer"]
        assert [(row.regime, (row.w, row.a)) for row in rows] == [(r, w) for r in REGIMES for w in WIDTHS]
        assert all(0 <= row.top1 <= 100 and row.seed == 0 for row in rows)


def test_a_method_is_evaluated_with_its_own_quantizer(results):
    own = [row for row in results.rows if row.regime == "own quantizer"]
    assert [(row.method, row.w, row.a) for row in own] == [("qat-4", 4, 4)]
    assert results.own_widths("qat-4") == [(4, 4)]
    assert results.own_widths("plain") == []
    assert "own quantizer" not in results.regimes


def test_methods_share_the_first_epochs_and_part_then(results):
    first = {method: results.of(method)[0].epochs[0] for method in NAMES}
    assert len(set(first.values())) == 1
    last = [results.of(method)[0].norms[-1] for method in NAMES if method != "gradl1-finite-difference"]
    assert len({mark.l1_w for mark in last}) == len(last)
    assert [mark.epoch for mark in results.of("plain")[0].norms] == [0.0, 1.0, 2.0]


def test_the_penalty_is_at_work_in_the_last_epochs_alone(results):
    for method in NAMES:
        penalties = [epoch.penalty for epoch in results.of(method)[0].epochs]
        assert penalties[0] == 0
        assert (penalties[1] > 0) == (method not in ("plain", "qat-4"))


def test_the_same_seed_gives_the_same_rows_and_another_one_others(results, tmp_path):
    again = ran(tmp_path, ["gradl1"], [0, 1])
    same, other = again.of("gradl1")
    whole = results.of("gradl1")[0]
    assert same.rows == whole.rows
    assert same.norms == whole.norms
    assert other.norms[0] != whole.norms[0]


@pytest.mark.parametrize("method", ["gradl1", "qat-4", "sam", "symreg+satnl"])
def test_a_branch_equals_a_whole_training(method):
    data = digits(0)
    data = replace(data, train=tuple(part[:200] for part in data.train))
    trunk = Session(QUICK.config_of("plain", 0), data, 50, 1)
    trunk.run_epoch()
    trunk.branch(QUICK.config_of("gradl1-unscaled", 0)).run_epoch()  # another branch changes nothing
    branch = trunk.branch(QUICK.config_of(method, 0))
    whole = Session(QUICK.config_of(method, 0), data, 50, 1)
    whole.run_epoch()
    for session in (branch, whole):
        session.run_epoch()
    one, other = branch.trainer.model.state_dict(), whole.trainer.model.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_finished_runs_are_kept_and_not_run_again(tmp_path):
    seen = []
    first = ran(tmp_path, on_run=seen.append)
    assert [len(so_far.runs) for so_far in seen] == [1, 2]
    (tmp_path / "gradl1-seed-0.json").unlink()
    stages = []
    again = ran(tmp_path, stage=lambda what, total: stages.append(what) or (lambda: None))
    assert not any("plain" in what for what in stages)
    assert again.rows == first.rows


def test_runs_with_other_settings_are_refused(tmp_path):
    ran(tmp_path, ["plain"])
    with pytest.raises(ResultError, match=r"plain-seed-0\.json: was created with other settings; choose"):
        ran(tmp_path, ["plain"], experiment=replace(QUICK, calibration=50))


HEAD = (
    '"method": "plain", "seed": 0, "settings": {}, "environment": {}, "epochs": [], "norms": [], '
    '"changes": [], "alone": []'
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"method": 1}', "must hold a list of runs"),
        ("[]", "must hold the one run of plain with seed 0"),
        ('[{"method": "plain", "seed": 0}]', "not a result of gradl1 experiment"),
        ("[" * 100000, "not valid JSON"),
        (
            f'[{{{HEAD}, "rows": [{{"method": 1}}]}}]',
            r"not a result of .*\[rows\]: method: Expected `str`, got `int`",
        ),
        (f'[{{{HEAD}, "rows": [3]}}]', "not a result of .*: its entries must be objects"),
        (f'[{{{HEAD}, "rows": [{{"method": "a"}}]}}]', "not a result of .*missing"),
        ('[{"rows": [{"x": 1}], "epochs": [], "norms": [], "changes": [], "alone": []}]', "not a result"),
    ],
)
def test_a_damaged_run_is_named(text, message, tmp_path):
    (tmp_path / "plain-seed-0.json").write_text(text)
    with pytest.raises(ResultError, match=f"plain-seed-0.json: {message}"):
        ran(tmp_path, ["plain"])


@pytest.mark.parametrize(("methods", "found"), [(["plain", "magic"], "magic"), ([], "none")])
def test_an_unknown_method_is_named_before_the_work(methods, found, tmp_path):
    with pytest.raises(ValueError, match=f"methods must be among plain, .*; got {found}"):
        ran(tmp_path / "new", methods)
    assert not (tmp_path / "new").exists()


def test_an_unknown_experiment_is_named():
    with pytest.raises(ValueError, match=r"experiment must be one of fashion-mnist, .*, got 'imagenet'"):
        named("imagenet")
    with pytest.raises(ValueError, match=r"regimes must be among per tensor; .*; got magic"):
        named("digits", regimes=["per tensor", "magic"])


def test_rows_are_written_one_a_line_with_null_for_float(results, tmp_path):
    path = tmp_path / "rows.json"
    results.write_rows(path)
    rows = json.loads(path.read_text())
    assert len(rows) == len(path.read_text().splitlines()) - 2 == len(NAMES) * len(REGIMES) * len(WIDTHS) + 1
    assert list(rows[0]) == ["method", "seed", "regime", "w", "a", "top1"]
    assert rows[0]["method"] == "plain"
    assert rows[0]["w"] is rows[0]["a"] is None


def test_runs_come_back_from_their_file(results, tmp_path):
    results.write_runs(tmp_path / "runs.json")
    back = Results.read_runs(tmp_path / "runs.json")
    assert back.runs == results.runs


def test_a_run_whose_numbers_are_not_finite_comes_back_with_nan(results, tmp_path):
    run = results.runs[0]
    broken = replace(run, changes=[replace(run.changes[0], measured=math.inf), *run.changes[1:]])
    Results([broken]).write_runs(tmp_path / "runs.json")
    json.loads((tmp_path / "runs.json").read_text(), parse_constant=pytest.fail)
    back = Results.read_runs(tmp_path / "runs.json").runs[0]
    assert math.isnan(back.changes[0].measured)
    assert (back.changes[1:], back.rows) == (run.changes[1:], run.rows)


def test_it_computes_with_one_thread_and_names_the_backend(tmp_path, monkeypatch):
    before, inside = torch.get_num_threads(), []
    torch.set_num_threads(2)
    monkeypatch.setenv("GRADL1_BACKEND", "reference")
    try:
        results = ran(tmp_path, ["plain"], on_run=lambda _: inside.append(torch.get_num_threads()))
        assert inside == [1]
        assert results.runs[0].environment["backends"] == {"batch_norm_act": "reference"}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_fashion_mnist_recipe_is_what_the_experiment_runs():
    config = named("fashion-mnist", "somewhere").config_of("gradl1", 7)
    assert (config.data.folder, config.training.seed, config.penalty.method) == ("somewhere", 7, "gradl1")
    assert config.penalty.settings["scale"] == "step"
    unscaled = named("fashion-mnist").config_of("gradl1-unscaled", 0)
    assert unscaled.penalty.settings["scale"] == "none"
