"""The report of ``gradl1 train``: accuracies, losses and norms of one run, with its settings and versions."""

from __future__ import annotations

from collections.abc import Sequence

from gradl1_fast import _environment
from gradl1_fast._report import charts, palette
from gradl1_fast._report.figures import width_name
from gradl1_fast._report.page import Chart, Key, Report, Section, Table, Tile
from gradl1_fast._report.palette import Style
from gradl1_fast.quantization import Table as Widths
from gradl1_fast.training import toml
from gradl1_fast.training.config import Config
from gradl1_fast.training.reports.common import TILES, flat, pair_name, settings_and_versions
from gradl1_fast.training.runs.recorder import NORM

__all__ = ["over_widths", "report", "series", "tiles"]

Rows = list[dict[str, float]]
_NAMED = 3  # tensors that the chart of norms names


def report(config: Config, rows: Rows, widths: Widths) -> Report:
    """Return the report of a run.

    Args:
        config: of the run.
        rows: the metrics, a dictionary an epoch.
        widths: test accuracy in percent at equal bits for weights and activations.
    """
    return Report(
        title=f"{config.model.name} on {config.data.name}",
        lead=f"One training run (seed {config.training.seed}), and its weights at every bit width.",
        tiles=tiles(widths),
        charts=[_lines(config, widths)],
        sections=[
            Section("Results in words", items=_found(config, rows, widths)),
            _accuracies(widths),
            _losses(config, rows),
            _norms(rows),
            settings_and_versions(flat(toml.to_dict(config)), _environment.describe()),
        ],
        footer="Written by gradl1 train. All numbers are in metrics.csv, the settings in config.toml.",
    )


def tiles(widths: Widths) -> list[Tile]:
    """Return the accuracies of one network, and what it loses from float."""
    known = {(row.w, row.a): row.value for row in widths.rows}
    exact = known.get((None, None))
    found = []
    for bits in TILES:
        value = known.get((bits, bits))
        if value is not None:
            lost = "" if bits is None or exact is None else f"{value - exact:+.1f} points from float, "
            name = f"Accuracy, {pair_name(bits, bits)}"
            found.append(Tile(name, f"{value:.1f} %", f"{lost}one seed", single=True))
    return found


def series(name: str, colour: str, widths: Widths, bits: Sequence[int | None]) -> charts.Series:
    """Return the accuracies of one network at equal bits, with differences from float if known."""
    known = {(row.w, row.a): row.value for row in widths.rows}
    values = [(known[b, b],) for b in bits]
    exact = known.get((None, None))
    gains = [] if exact is None else [(value - exact,) for (value,) in values]
    return charts.Series(name, Style(colour), values, gains)


def over_widths(line: charts.Series, bits: Sequence[int | None], caption: str) -> Chart:
    """Return the chart of one network's accuracies at equal bits."""
    drawn = charts.lines([line], list(map(width_name, bits)), "float")
    return Chart(drawn, "Accuracy over bit widths", caption, charts.keys([line]))


def _lines(config: Config, widths: Widths) -> Chart:
    bits = [row.w for row in widths.rows]
    name = _method(config)
    return over_widths(
        series(name, _colour(config), widths, bits),
        bits,
        "Weights and activations at the same width, on the test images. Below: difference from the same "
        "network in float. Ranges of activations come from training images; nothing was trained after "
        "quantization.",
    )


def _method(config: Config) -> str:
    return config.penalty.method if config.penalty.epochs else "plain"


def _colour(config: Config) -> str:
    return palette.styles([_method(config)])[_method(config)].colour


def _found(config: Config, rows: Rows, widths: Widths) -> list[str]:
    highest = max(rows, key=lambda row: row["test_accuracy"])
    lines = [
        f"Float: {widths[None, None]:.2f} % of the test images are classified correctly; the highest "
        f"accuracy after an epoch was {highest['test_accuracy']:.2f} %, in epoch {highest['epoch']:.0f}."
    ]
    for bits in (8, 6, 4, 3):
        lost = widths[bits, bits] - widths[None, None]
        lines.append(
            f"{bits} bits for weights and activations: {widths[bits, bits]:.2f} % ({lost:+.2f} points)."
        )
    on = config.penalty.epochs
    lines.append(
        f"Method {config.penalty.method}, in the last {on} of {config.training.epochs} epochs."
        if on
        else f"Trained plainly for {config.training.epochs} epochs, without a penalty."
    )
    plain, penalised = _seconds(config, rows)
    if plain and penalised:
        lines.append(
            f"The steps of an epoch took {plain:.1f} s without the penalty and {penalised:.1f} s with it "
            f"({penalised / plain:.1f} times as long)."
        )
    return lines


def _seconds(config: Config, rows: Rows) -> tuple[float, float]:
    """Return the mean time of an epoch without and with the penalty, 0 where there is none."""
    begin = config.training.epochs - config.penalty.epochs
    groups = ([r["seconds"] for r in rows[:begin]], [r["seconds"] for r in rows[begin:]])
    plain, penalised = (sum(group) / len(group) if group else 0.0 for group in groups)
    return plain, penalised


def _accuracies(widths: Widths) -> Section:
    rows = [(width_name(row.w), f"{row.value:.2f}") for row in widths.rows]
    return Section("Accuracy in numbers", tables=[Table(("bits", "test accuracy, %"), rows)])


def _losses(config: Config, rows: Rows) -> Section:
    epochs = [row["epoch"] for row in rows]
    begin = config.training.epochs - config.penalty.epochs
    text = ["Means over the steps of each epoch."]
    if config.penalty.epochs:
        text.append(f"The penalty is applied from epoch {begin + 1} on.")
    figures = [
        Chart(
            charts.curves(
                {key: (epochs, [row[key] for row in rows])}, {key: Style(_colour(config))}, ("epoch", label)
            ),
            title,
        )
        for key, title, label in (
            ("loss", "Loss without penalty", "loss"),
            ("penalty", "Penalty", "penalty"),
            ("test_accuracy", "Test accuracy", "test accuracy in %"),
        )
    ]
    return Section("Loss and penalty", text=[" ".join(text)], charts=figures)


def _norms(rows: Rows) -> Section:
    first, last = rows[0], rows[-1]
    names = sorted((name for name in last if name.startswith(NORM)), key=lambda name: -last[name])
    styles = {name: Style(palette.PALE, marker="") for name in reversed(names)}
    for name, colour in zip(names[:_NAMED], palette.OTHERS, strict=False):
        styles[name] = Style(colour)
    epochs = [row["epoch"] for row in rows]
    lines = {name: (epochs, [row[name] for row in rows]) for name in styles}
    figure = charts.curves(
        lines, styles, ("epoch", "step × gradient l1 norm"), log="y", size=(charts.WIDTH, 4.0)
    )
    keys = [Key(name.removeprefix(NORM), styles[name]) for name in names[:_NAMED]]
    cells = [
        (
            *(name.removeprefix(NORM), f"{first[name]:.3g}", f"{last[name]:.3g}"),
            f"{last[name] / first[name]:.2f}" if first[name] else "-",
        )
        for name in names
    ]
    return Section(
        "Where the gradients are large",
        text=[_NORMS],
        charts=[Chart(figure, "Step times gradient norm of each tensor", keys=keys)],
        tables=[Table(("tensor", "first epoch", "last epoch", "ratio"), cells)],
    )


_NORMS = (
    "The l1 norm of the gradient of each weight and activation times its quantization step at 4 bits: "
    "half of it is the largest first-order change of the loss when only this tensor is quantized. "
    "Measured at the end of each epoch on the same training images. Each line is one tensor; the highest "
    "at the end are named."
)
