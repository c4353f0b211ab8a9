"""The report of an experiment: whole, self-contained, and it names who leads, whoever that is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradl1_fast.training.experiment import Results, Row, Run, report
from gradl1_fast.training.experiment.measurements import Alone, Change, Norms
from gradl1_fast.training.experiment.session import Epoch
from tests.training.test_report import Page

WIDTHS = ((None, None), (8, 8), (4, 4), (3, 3), (4, None))
REGIMES = ("per tensor", "calibrated")
SETTINGS = {
    "data": {"name": "a <small> set", "folder": None},
    "model": {"name": "net"},
    "optimizer": {"name": "sgd"},
    "training": {"epochs": 2, "seed": 0},
    "penalty": {"epochs": 1, "warmup_epochs": 0, "settings": {"lambda_w": 0.5}},
    "alone_bits": 3,
    "calibration": 100,
    "probed": 50,
}


def run(method, seed, top1):
    return Run(
        method,
        seed,
        SETTINGS,
        [Row(method, seed, regime, w, a, top1) for regime in REGIMES for w, a in WIDTHS],
        [Epoch(1, 2.0, 0.0, 10.0, 10.0), Epoch(2, 1.0, 0.1, 30.0, 20.0 + seed)],
        [Norms(float(epoch), 1.0, 3.0, 2.0, 3.0, 2.0, 0.5, 0.5) for epoch in range(3)],
        [Change(kind, size, 0.1, 0.2) for kind in ("sign", "quantized") for size in (0.5, 1.0)],
        [Alone("0.weight", 3, 0.125, 80.0), Alone("1", 3, -0.25, 90.0)],
        {"versions": {"torch": "2"}, "devices": {"cpu": "one"}},
    )


def results(*tops):
    return Results(
        run(m, s, top + s) for m, top in zip(("plain", "gradl1", "l2"), tops, strict=False) for s in (0, 2)
    )


def test_the_page_is_whole_and_needs_nothing_from_elsewhere():
    page = Page(report.html(results(80.0, 70.0, 60.0)))
    assert page.open == []
    assert len(page.images) == 4
    assert all(image["alt"] for image in page.images)
    assert all(link.startswith("data:") for link in page.links)


def test_texts_are_escaped():
    page = report.html(results(80.0))
    assert "a &lt;small&gt; set" in page
    assert "a <small> set" not in page


def test_the_table_has_every_regime_and_width_and_what_training_cost():
    header, rows = report.accuracy_table(results(80.0, 70.0))
    widths = ("float", "(8, 8)", "(4, 4)", "(3, 3)", "(4, float)")
    assert header == ("regime", "method", *widths, "seeds", "time")
    assert [row[:2] for row in rows] == [(r, m) for r in REGIMES for m in ("plain", "gradl1")]
    assert (rows[0][2], rows[0][-2:]) == ("81.0 ± 1.4", ("2", "1.00x"))


@pytest.mark.parametrize(("tops", "best"), [((80.0, 70.0), "plain"), ((70.0, 80.0), "gradl1")])
def test_the_leader_is_named_whoever_it_is(tops, best):
    other = "gradl1" if best == "plain" else "plain"
    line = report.verdict(results(*tops))[0]
    assert line == f"per tensor, float: best is {best} (81.0 ± 1.4 %); {other} 71.0 ± 1.4 %."


def test_times_are_those_of_the_epochs_in_which_the_method_is_at_work():
    assert report.times(results(80.0)) == {"plain": 21.0}


def test_widths_that_some_runs_lack_are_not_shown():
    whole, short = run("plain", 0, 80.0), run("gradl1", 0, 70.0)
    short = replace(short, rows=[r for r in short.rows if r.w != 3 and r.regime == "calibrated"])
    assert Results([whole, short]).regimes == ["calibrated"]
    assert (3, 3) not in Results([whole, short]).widths
    assert (4, 4) in Results([whole, short]).widths
