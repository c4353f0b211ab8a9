"""Accuracy tables in the pages equal the committed results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from docs_site import accuracy, figures, headline
from gradl1_fast.training.experiment import Results, Row, Run
from gradl1_fast.training.experiment.session import Epoch


def test_the_pages_readme_and_its_picture_are_up_to_date() -> None:
    for page in accuracy.PAGES:
        text = page.read_text()
        assert accuracy.rewritten(text) == text, "run python -m docs_site.accuracy"
    readme = headline.README.read_text()
    assert headline.rewritten(readme) == readme, "run python -m docs_site.accuracy"
    assert headline.PICTURE.read_text() == figures.standalone(), "run python -m docs_site.accuracy"


def run(method: str, seed: int, top1: float, seconds: float) -> Run:
    settings = {"model": {}, "training": {}, "images": 1, "calibration": 2, "penalty": {"epochs": 1}}
    rows = [Row(method, seed, "calibrated", w, a, top1 + seed) for w, a in ((None, None), (3, 4), (2, None))]
    epochs = [Epoch(1, 1.0, 0.0, 9.0, seconds), Epoch(2, 1.0, 0.0, 9.0, seconds)]
    return Run(method, seed, settings, rows, epochs, [], [], [], environment())


def environment(processor: str = "a", version: str = "2") -> dict[str, dict[str, str]]:
    return {"devices": {"cpu": processor}, "versions": {"torch": version}}


def test_a_table_has_means_deviations_and_what_training_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(accuracy, "DOCS", tmp_path)
    for method, top1, seconds in (("plain", 80.0, 10.0), ("gradl1", 90.0, 15.0)):
        for seed in (0, 2):
            Results([run(method, seed, top1, seconds)]).write_runs(tmp_path / f"{method}-seed-{seed}.json")
    Results([run("plain", 1, 50.0, 10.0)]).write_runs(tmp_path / "plain-seed-1.json")  # has no counterpart
    accuracy.keep(tmp_path, "fashion-mnist-resnet")
    assert accuracy.section("fashion-mnist-resnet").splitlines() == [
        "| regime | training | float | (3, 4) | (2, float) | time |",
        "|---|---|---|---|---|---|",
        "| calibrated | plain | 81.0 ± 1.4 | 81.0 ± 1.4 | 81.0 ± 1.4 | 1.00 |",
        "| calibrated | gradl1 | 91.0 ± 1.4 | 91.0 ± 1.4 | 91.0 ± 1.4 | 1.50 |",
        "",
        "Mean ± standard deviation of the sample over 2 seeds.",
    ]
    for subject, methods in (("accuracy", None), ("free steps", ["plain"])):
        begin, end = accuracy.marks(subject, "fashion-mnist-resnet")
        page = accuracy.rewritten(f"a\n{begin}\nold\n{end}\nb")
        assert page == f"a\n{begin}\n{accuracy.section('fashion-mnist-resnet', methods)}\n{end}\nb"
        assert ("gradl1" in page) == (methods is None)
    kept = json.loads((tmp_path / "results" / "accuracy-fashion-mnist-resnet.json").read_text())
    assert kept["cpu_seconds"] == {"gradl1 0": 30.0, "gradl1 2": 30.0, "plain 0": 20.0, "plain 2": 20.0}


def test_runs_join_those_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(accuracy, "DOCS", tmp_path)
    for seed, place in ((0, "first"), (1, "second")):
        (tmp_path / place).mkdir()
        for method in ("plain", "gradl1"):
            written = run(method, seed, 80.0, 10.0)
            Results([written]).write_runs(tmp_path / place / f"{method}-seed-{seed}.json")
        accuracy.keep(tmp_path / place, "fashion-mnist-resnet")
    kept = accuracy.read("fashion-mnist-resnet")
    assert {(row["method"], row["seed"]) for row in kept["rows"]} == {
        (method, seed) for method in ("plain", "gradl1") for seed in (0, 1)
    }
    assert len(kept["rows"]) == 12
    assert list(kept["cpu_seconds"]) == [
        "gradl1 0",
        "gradl1 1",
        "plain 0",
        "plain 1",
    ]
    accuracy.keep(tmp_path / "second", "fashion-mnist-resnet")
    assert accuracy.read("fashion-mnist-resnet") == kept  # kept again, nothing is doubled
    for place, changed in (("third", environment("b")), ("fourth", environment(version="3"))):
        (tmp_path / place).mkdir()
        elsewhere = replace(run("plain", 1, 80.0, 10.0), environment=changed)
        Results([elsewhere]).write_runs(tmp_path / place / "plain-seed-1.json")
    accuracy.keep(tmp_path / "third", "fashion-mnist-resnet")
    assert accuracy.read("fashion-mnist-resnet")["environments"] == [environment(), environment("b")]
    before = accuracy.read("fashion-mnist-resnet")["rows"]
    (tmp_path / "time").mkdir()
    for method, seconds in (("plain", 10.0), ("gradl1", 13.0)):
        Results([run(method, 0, 1.0, seconds)]).write_runs(tmp_path / "time" / f"{method}-seed-0.json")
    accuracy.keep_time(tmp_path / "time", "fashion-mnist-resnet")
    accuracy.keep(tmp_path / "third", "fashion-mnist-resnet")  # a later seed leaves the time alone
    now = accuracy.read("fashion-mnist-resnet")
    assert (now["rows"], accuracy.cost(now, "gradl1")) == (before, "1.30")
    with pytest.raises(ValueError, match="was made with torch 2, not 3"):
        accuracy.keep(tmp_path / "fourth", "fashion-mnist-resnet")
