"""The report of ``gradl1 experiment``: training methods compared over seeds, widths and regimes."""

from __future__ import annotations

from typing import Any

from gradl1_fast._report import charts, palette
from gradl1_fast._report.figures import width_name
from gradl1_fast._report.page import Chart, Report, Section, Table, Tile
from gradl1_fast.training.experiment.methods import text_of
from gradl1_fast.training.experiment.regimes import REGIMES
from gradl1_fast.training.experiment.results import Results, Width
from gradl1_fast.training.reports import experiment_text as text
from gradl1_fast.training.reports.common import TILES, flat, pair_name, settings_and_versions
from gradl1_fast.training.reports.experiment_details import alone, changes, cost, norms, weights
from gradl1_fast.training.reports.experiment_tables import (
    accuracy_table,
    best,
    own_table,
    single_rows,
    singles,
    verdict,
)

__all__ = ["report"]


def report(results: Results) -> Report:
    """Return the report."""
    settings: dict[str, Any] = results.runs[0].settings
    regime = results.regimes[-1]
    seeds = ", ".join(map(str, sorted({run.seed for run in results.runs})))
    return Report(
        title=f"Training methods compared: {settings['data']['name']}",
        lead="Each method trains a network from the same start. After training, each network is quantized to "
        f"every width with the same quantizer. Test accuracy in percent; seeds: {seeds}.",
        tiles=[_tile(results, regime, bits) for bits in TILES if (bits, bits) in results.widths],
        charts=[_lines(results, regime), *_heat(results, regime)],
        sections=[
            Section("Results in words", items=verdict(results)),
            _accuracy(results),
            *_other_regimes(results, regime),
            _procedure(results),
            norms(results),
            changes(results),
            alone(results),
            *weights(results),
            cost(results),
            settings_and_versions(_settings(settings), results.runs[0].environment),
        ],
        footer="Written by gradl1 experiment. All rows are in results.json or the file named by --json.",
    )


def _tile(results: Results, regime: str, bits: int | None) -> Tile:
    """Return the best method that has several seeds; without one, the first method, in grey."""
    leader = best(results, regime, bits, bits)
    method = leader or results.methods[0]
    gain = results.gain(method, regime, bits, bits)
    note = [f"{method}, {regime}" if leader is None else f"best: {method}, {regime}"]
    if gain.values:
        note.append(f"{gain.mean:+.1f} points from plain")
    if leader is None:
        note.append("one seed")
    value = results.spread(method, regime, bits, bits)
    return Tile(f"Accuracy, {pair_name(bits, bits)}", f"{value} %", "; ".join(note), leader is None)


def _lines(results: Results, regime: str) -> Chart:
    bits = [w for w, a in results.widths if w == a]
    series = []
    for method, style in palette.styles(results.methods).items():
        values = [results.spread(method, regime, b, b).values for b in bits]
        gains = [results.gain(method, regime, b, b).values for b in bits]
        series.append(charts.Series(_shown(results, method), style, values, gains if all(gains) else ()))
    return Chart(
        charts.lines(series, list(map(width_name, bits)), "plain"),
        f"Accuracy over bit widths, {regime}",
        "Lines are means over the seeds. Below: difference from plain training with the same seed; dots are "
        "seeds. Chance is 10 %.",
        charts.keys(series),
    )


def _heat(results: Results, regime: str) -> list[Chart]:
    """Return the map of differences from plain training, or nothing if plain has no run."""
    names = {method: _shown(results, method) for method in results.methods if results.baseline(method)}
    single = {names[method] for method in singles(results) if method in names}
    gains = {
        (shown, _short(width)): gain.mean
        for method, shown in names.items()
        for width in results.widths
        if (gain := results.gain(method, regime, *width)).values
    }
    if not gains:
        return []
    columns = list(map(_short, results.widths))
    labels = ("", "weight bits / activation bits")
    figure = charts.differences(gains, list(names.values()), columns, labels, single)
    caption = (
        "Means over the seeds of the difference from plain training with the same seed; f: float. Blue: more "
        "accurate; orange: less. Cells without a number differ by less than half a point."
    )
    return [Chart(figure, f"Difference from plain at each width, {regime}, in points", caption, scrolls=True)]


def _shown(results: Results, method: str) -> str:
    return f"{method} (one seed)" if method in singles(results) else method


def _short(width: Width) -> str:
    return "/".join("f" if bits is None else str(bits) for bits in width)


def _other_regimes(results: Results, regime: str) -> list[Section]:
    others = [name for name in results.regimes if name != regime]
    shown = [chart for name in others for chart in (_lines(results, name), *_heat(results, name))]
    return [Section("Other regimes", charts=shown)] if others else []


def _accuracy(results: Results) -> Section:
    header, rows = accuracy_table(results)
    tables = [Table(header, rows, single_rows(results, rows, 1))]
    paragraphs = [text.ACCURACY]
    own_header, own_rows = own_table(results)
    if own_rows:
        tables.append(Table(own_header, own_rows, single_rows(results, own_rows, 0)))
        paragraphs.append("Second table: with the quantizer that the method trained, at its own widths.")
    return Section("Accuracy in numbers", text=paragraphs, tables=tables)


def _procedure(results: Results) -> Section:
    regimes = [f"{name}: {REGIMES[name].text}" for name in results.regimes if name in REGIMES]
    rows = []
    for method in results.methods:
        settings = results.of(method)[0].settings["penalty"]["settings"]
        chosen = ", ".join(f"{key} = {value}" for key, value in settings.items())
        rows.append((method, text_of(method), chosen or "none"))
    return Section(
        "Procedure",
        text=[*text.procedure(results.runs[0].settings), text.REGIMES],
        items=regimes,
        tables=[Table(("method", "what is minimised", "settings"), rows)],
    )


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the settings that all runs share, one a line."""
    rows = flat({section: settings[section] for section in ("data", "model", "optimizer", "training")})
    return [(name, value) for name, value in rows if value != "None" and name != "training.seed"]
