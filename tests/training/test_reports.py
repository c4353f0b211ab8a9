"""Reports: whole, self-contained, in one order, and as honest about losses as about gains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from gradl1_fast._report import charts, palette
from gradl1_fast._report.page import Report, render
from gradl1_fast.quantization.sensitivity import Sensitivity, SensitivityRow
from gradl1_fast.quantization.sweep import Row as WidthRow
from gradl1_fast.quantization.sweep import Table
from gradl1_fast.training.config import Config, Data
from gradl1_fast.training.demo.demo import PENALISED, PLAIN, Settings
from gradl1_fast.training.demo.demo import Results as DemoResults
from gradl1_fast.training.demo.speed import EAGER, OURS, OURS_STEP, Speed
from gradl1_fast.training.demo.speed import PLAIN as PLAIN_STEP
from gradl1_fast.training.experiment import Results, Row, Run
from gradl1_fast.training.experiment.measurements import Alone, Change, Norms
from gradl1_fast.training.experiment.session import Epoch
from gradl1_fast.training.reports import (
    demo,
    experiment,
    experiment_details,
    experiment_tables,
    experiment_text,
    run,
    sweep,
)
from gradl1_fast.training.runs.recorder import NORM
from gradl1_fast.training.runs.sweep import Results as SweepResults
from gradl1_fast.training.runs.sweep import Settings as SweepSettings

HOSTILE = 'a <small> "set"'
BITS = (None, 8, 6, 4, 3)
WIDTHS = ((None, None), (8, 8), (4, 4), (3, 3), (4, None))
REGIMES = ("per tensor", "calibrated")
SETTINGS = {
    "data": {"name": HOSTILE, "folder": None},
    "model": {"name": "net"},
    "optimizer": {"name": "sgd"},
    "training": {"epochs": 2, "seed": 0},
    "penalty": {"epochs": 1, "warmup_epochs": 0, "settings": {"lambda_w": 0.5}},
    "alone_bits": 3,
    "calibration": 100,
    "probed": 50,
}


def demo_results(gain: float = 5.0) -> DemoResults:
    def table(shift: float) -> Table:
        return Table(WidthRow(w, a, 90 + shift) for w in BITS for a in BITS)

    times = {PLAIN_STEP: [1.0], EAGER: [6.0], OURS: [3.0], OURS_STEP: [3.5]}
    return DemoResults(
        Settings(seeds=2, bits=BITS),
        {PLAIN: [table(0), table(1)], PENALISED: [table(gain), table(1)]},
        [Speed(HOSTILE, times, 1e-7), Speed("a large network", times, 1e-7)],
        {"all": 60.0},
        {"versions": {"torch": "2"}, "devices": {"cpu": "one"}, "variables": {}},
    )


def experiment_run(method: str, seed: int, top1: float) -> Run:
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


def experiment_results(*tops: float, seeds: tuple[int, ...] = (0, 2)) -> Results:
    pairs = list(zip(("plain", "gradl1", "qat-4"), tops, strict=False))
    return Results(experiment_run(method, seed, top + seed) for method, top in pairs for seed in seeds)


def run_report() -> Report:
    rows = [
        {
            "epoch": e,
            "loss": 1 / e,
            "penalty": 0.1,
            "test_accuracy": 80.0,
            "seconds": 1.0,
            f"{NORM}{HOSTILE}": 0.5,
        }
        for e in (1.0, 2.0)
    ]
    config = Config(data=Data(name=HOSTILE))
    return run.report(config, rows, Table(WidthRow(b, b, 80.0 - (8 - (b or 8))) for b in BITS))


def sweep_report() -> Report:
    rows = [SensitivityRow("w", "0", 4, 0.3), SensitivityRow("a", "0.input", 4, 0.2)]
    table = Table(WidthRow(w, a, 90.0) for w in BITS for a in BITS)
    ends, norms = {"0.weight": (-1.0, 1.0), "0.input": (0.0, 2.0)}, {"0.weight": 0.1, "0.input": 0.2}
    settings = SweepSettings(bits=BITS, prepare=True)
    return sweep.report(
        HOSTILE, SweepResults(settings, 100, table, Sensitivity(rows, 0.1), ends, norms, None, None)
    )


REPORTS: dict[str, Callable[[], Report]] = {
    "demo": lambda: demo.report(demo_results()),
    "experiment": lambda: experiment.report(experiment_results(80.0, 70.0, 60.0)),
    "run": run_report,
    "sweep": sweep_report,
}


class Page(HTMLParser):
    """The tags of a page in their order, what they link to, and its figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.order: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag != "meta":
            self.open.append(tag)
        self.order.append("tile" if values.get("class") in ("tile", "tile single") else tag)
        self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module", params=REPORTS)
def page(request: pytest.FixtureRequest) -> str:
    return render(REPORTS[request.param]())


def test_a_page_is_whole_and_needs_nothing_from_elsewhere(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert all(link.startswith("#") for link in parsed.links)
    assert "@import" not in page
    assert "url(http" not in page


def test_a_page_shows_tiles_then_charts_then_folded_details(page: str) -> None:
    order = [tag for tag in Page(page).order if tag in ("tile", "figure", "details")]
    first = order[: order.index("details") + 1]
    assert first in (["tile"] * 3 + ["figure"] * count + ["details"] for count in (1, 2))
    assert "<details>" in page


def test_texts_are_escaped(page: str) -> None:
    assert HOSTILE not in page
    assert "a &lt;small&gt;" in page


def test_no_line_breaks_between_a_number_and_its_unit_or_deviation(page: str) -> None:
    assert "0\N{NO-BREAK SPACE}%" in page
    assert not re.search(r"\d %|\d m?s\b|\d ± ", page)


def test_figures_are_drawn_in_the_colours_of_the_page_and_share_no_identifier(page: str) -> None:
    figures = [part.partition("</svg>")[0] + "</svg>" for part in page.split('role="img"')[1:]]
    figures = [figure[figure.index("<svg") :] for figure in figures]
    found: list[str] = []
    for figure in figures:
        found += [each.attrib["id"] for each in ElementTree.fromstring(figure).iter() if "id" in each.attrib]
        assert "#000000" not in figure
    assert len(found) == len(set(found))
    assert "stroke: currentColor" in page


def test_a_heat_map_has_no_number_where_the_change_is_under_half_a_point() -> None:
    values = {("a", "4"): 0.4, ("a", "3"): -0.5, ("b", "4"): 20.0}
    figure = charts.differences(values, ["a", "b"], ["4", "3"], ("", ""))
    texts = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert texts == {(0.5, 0.5): "", (1.5, 0.5): "-0.5", (0.5, 1.5): "+20"}


def test_a_sweep_names_a_tensor_as_every_other_report_does() -> None:
    report = sweep_report()
    assert any("most sensitive tensor is 0.weight: at 4 bits" in line for line in report.sections[0].items)
    labels = [label.get_text() for label in report.sections[2].charts[0].figure.axes[0].get_yticklabels()]
    assert labels == ["0.weight", "0.input"]
    assert [row[0] for row in report.sections[2].tables[0].rows] == ["0.input", "0.weight"]


def test_heat_maps_scroll_on_a_phone(page: str) -> None:
    maps = page.count("differ by less than half a point")
    assert page.count('class="scrolls"') == maps


def test_an_axis_over_many_powers_has_numbers_at_the_powers_alone() -> None:
    values = {"a": ([1.0, 2.0], [0.1, 0.2])}
    figure = charts.curves(values, palette.styles(["a"]), ("x", "y"), log="y", floor=1e-4)
    figure.draw_without_rendering()
    assert {label.get_text() for label in figure.axes[0].get_yticklabels(minor=True)} <= {""}
    assert figure.axes[0].get_ylim()[0] == 1e-4


def test_methods_of_one_role_share_its_colour_and_differ_in_dashes() -> None:
    styles = palette.styles(["plain", "gradl1", "gradl1-unscaled", "qat-4", "kure", "plain@he-normal"])
    colours = [style.colour for style in styles.values()]
    kure = palette.OTHERS[0]
    assert colours == [
        *(palette.PLAIN, palette.PENALISED, palette.PENALISED, palette.QAT, kure, palette.PLAIN)
    ]
    assert styles["gradl1"].dash != styles["gradl1-unscaled"].dash


def test_of_many_methods_those_without_a_role_are_pale_and_share_an_entry() -> None:
    others = [f"method-{number}" for number in range(13)]
    styles = palette.styles(["plain", *others, "qat-4"])
    assert {styles[name].colour for name in others} == {palette.PALE}
    assert [key.name for key in charts.legend(styles)] == ["plain", "qat-4", "other methods"]
    assert palette.PALE not in {style.colour for style in palette.styles(others[:12]).values()}


def test_the_numbers_of_a_scale_leave_room() -> None:
    figure = charts.differences({("a", "4"): -62.0}, ["a"], ["4"], ("", ""))
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert texts == ["-62", "-10", "-1", "0", "+1", "+10", "+62"]


@pytest.mark.parametrize(("gain", "shown", "ahead"), [(5.0, "+2.5", "1 of 2"), (-5.0, "-2.5", "0 of 2")])
def test_losses_are_shown_like_gains(gain: float, shown: str, ahead: str) -> None:
    rows = demo.accuracy_rows(demo_results(gain))
    assert rows[0][3:] == (shown, ahead)
    assert f"({shown} points; penalised ahead in {ahead} pairs)" in demo.verdict(demo_results(gain))[0]


def test_a_spread_names_its_ends() -> None:
    assert demo.accuracy_rows(demo_results())[0][1] == "90.5 (90.0 to 91.0)"


def test_numbers_of_the_demo_are_written_in_full(tmp_path) -> None:
    _, numbers = demo.write(demo_results(), tmp_path)
    found = json.loads(numbers.read_text())
    assert len(found["accuracy_percent"]) == 2 * 2 * len(BITS) ** 2
    assert found["accuracy_percent"][0] == {"network": PLAIN, "seed": 0, "w": None, "a": None, "value": 90}
    step = {"kind": EAGER, "median_ms": 6.0, "ratio": 6.0, "times_ms": [6.0]}
    assert found["step_time"][0]["steps"][1] == step


def test_the_table_has_every_regime_and_width_and_what_training_cost() -> None:
    header, rows = experiment_tables.accuracy_table(experiment_results(80.0, 70.0))
    widths = ("float", "(8, 8)", "(4, 4)", "(3, 3)", "(4, float)")
    assert header == ("regime", "method", *widths, "seeds", "time")
    assert [row[:2] for row in rows] == [(r, m) for r in REGIMES for m in ("plain", "gradl1")]
    assert (rows[0][2], rows[0][-2:]) == ("81.0 ± 1.4", ("2", "1.00x"))


@pytest.mark.parametrize(("tops", "best"), [((80.0, 70.0), "plain"), ((70.0, 80.0), "gradl1")])
def test_the_leader_is_named_whoever_it_is(tops: tuple[float, ...], best: str) -> None:
    other = "gradl1" if best == "plain" else "plain"
    line = experiment_tables.verdict(experiment_results(*tops))[0]
    assert line == f"per tensor, float: best is {best} (81.0 ± 1.4 %); {other} 71.0 ± 1.4 %."


def test_a_single_seed_is_grey_and_never_named_best() -> None:
    found = Results([*experiment_results(80.0).runs, experiment_run("gradl1", 0, 99.0)])
    report = experiment.report(found)
    assert report.tiles[0].note == "best: plain, calibrated"
    line = experiment_tables.verdict(found)[0]
    assert line == "per tensor, float: best is plain (81.0 ± 1.4 %); gradl1 99.0 % (one seed)."
    table = report.sections[1].tables[0]
    assert {table.rows[place][1] for place in table.single} == {"gradl1"}
    assert render(report).count('<tr class="single">') == len(REGIMES)


def test_with_single_seeds_alone_nothing_is_named_best() -> None:
    found = experiment_results(80.0, 70.0, seeds=(0,))
    assert "best" not in render(experiment.report(found))
    line = experiment_tables.verdict(found)[0]
    assert line == "per tensor, float, one seed: plain 80.0 %; gradl1 70.0 %."


def test_a_sentence_on_many_single_seeds_names_the_penalty_and_plain_training() -> None:
    methods = ["plain", "gradl1", "l2", "sam", "asam", "kure", "r2"]
    found = Results([experiment_run(method, 0, 80.0) for method in methods])
    assert experiment_tables.verdict(found)[0] == "per tensor, float, one seed: plain 80.0 %; gradl1 80.0 %."


def test_differences_pair_equal_seeds() -> None:
    runs = [experiment_run("plain", 0, 80.0), experiment_run("plain", 1, 70.0), experiment_run("l2", 1, 75.0)]
    found = Results(runs)
    assert found.gain("l2", "calibrated", 4, 4).values == (5.0,)
    assert found.gain("plain", "calibrated", 4, 4).values == ()


def test_times_are_those_of_the_epochs_in_which_the_method_is_at_work() -> None:
    assert experiment_tables.times(experiment_results(80.0)) == {"plain": 21.0}


def test_quick_runs_have_times_and_losses_that_are_not_zero() -> None:
    runs = [experiment_run("plain", 0, 80.0)]
    epochs = [Epoch(1, 2.0, 0.0, 10.0, 0.04), Epoch(2, 1.0, 0.1, 30.0, 0.16)]
    quick = replace(runs[0], method="l2", epochs=epochs)
    page = render(experiment.report(Results([*runs, quick])))
    assert "20\N{NO-BREAK SPACE}s, 1.0×" in page
    assert "0.16\N{NO-BREAK SPACE}s, 0.0×" in page
    small = replace(runs[0], alone=[Alone("0.weight", 3, -1e-5, 80.0)])
    assert experiment_details.alone(Results([small])).tables[0].rows == [("0.weight", "+0.000")]


def test_the_procedure_is_that_of_the_data_set_and_names_no_warmup_of_zero_epochs() -> None:
    text = " ".join(experiment_text.procedure(SETTINGS))
    assert "rises linearly" not in text
    assert "5,000 training images" in text
    penalty = {"epochs": 3, "warmup_epochs": 2}
    text = " ".join(experiment_text.procedure({**SETTINGS, "penalty": penalty, "data": {"name": "digits"}}))
    assert "rises linearly over the first 2 of these. QAT" in text
    assert "5,000" not in text


def test_widths_that_some_runs_lack_are_not_shown() -> None:
    whole, short = experiment_run("plain", 0, 80.0), experiment_run("gradl1", 0, 70.0)
    short = replace(short, rows=[r for r in short.rows if r.w != 3 and r.regime == "calibrated"])
    assert Results([whole, short]).regimes == ["calibrated"]
    assert (3, 3) not in Results([whole, short]).widths
    assert (4, 4) in Results([whole, short]).widths
