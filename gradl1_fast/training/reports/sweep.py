"""The report of ``gradl1 sweep``: one set of weights at every width, and what each tensor contributes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gradl1_fast import _environment
from gradl1_fast._report import charts, palette
from gradl1_fast._report.figures import width_name
from gradl1_fast._report.page import Chart, Key, Report, Section, Table
from gradl1_fast._report.palette import Style
from gradl1_fast.quantization import Plan
from gradl1_fast.training.reports.common import settings_and_versions
from gradl1_fast.training.reports.run import over_widths, series, tiles
from gradl1_fast.training.runs.sweep import Results

__all__ = ["found", "report"]

# Two kinds of tensors, which are not two kinds of training.
_WEIGHT, _ACTIVATION = palette.OTHERS[0], palette.OTHERS[2]
_KEYS = [Key("weight", Style(_WEIGHT)), Key("activation", Style(_ACTIVATION))]


def report(title: str, results: Results) -> Report:
    """Return the report; ``title`` says what was swept."""
    return Report(
        title=title,
        lead="One set of weights, simulated at every width.",
        tiles=tiles(results.table),
        charts=[_lines(results), *_heat(results)],
        sections=[
            Section("Results in words", items=found(results)),
            _accuracies(results),
            _single_tensors(results),
            _ranges(results),
            *([] if results.plan is None else [_plan(results.plan)]),
            settings_and_versions(_settings(results), _environment.describe()),
        ],
        footer="Written by gradl1 sweep.",
    )


def found(results: Results) -> list[str]:
    """Return the main findings, a sentence each."""
    table, alone = results.table, results.alone
    lines = []
    if _float(results) is not None:
        exact = table[None, None]
        lines.append(f"Float: {exact:.2f} % of {results.images:,} test images are classified correctly.")
        for width in results.settings.bits:
            if width is not None:
                value = table[width, width]
                lines.append(
                    f"{width} bits for weights and activations: {value:.2f} % ({value - exact:+.2f} points)."
                )
    if alone.rows:
        worst = max(alone.rows, key=lambda row: row.value)
        lines.append(
            f"The most sensitive tensor is {worst.tensor}: at {worst.bits} bits, it changes the loss by "
            f"{worst.value - alone.float_value:+.4f} (float: {alone.float_value:.4f})."
        )
    if results.folding is not None:
        folding = results.folding
        lines.append(
            f"{len(folding.folded)} batch norms were folded, {len(folding.refused)} were not; the largest "
            f"output difference is {folding.difference:.2g}."
        )
    if results.plan is not None:
        best = results.plan.best
        lines.append(
            f"Within {results.plan.budget:,.0f} bytes, weights of mixed widths take {best.cost:,.0f} bytes "
            f"and have a loss of {best.value:.4f} (float {results.plan.float_value:.4f})."
        )
    error = 100 * math.sqrt(0.25 / max(results.images, 1))
    lines.append(f"The standard error of an accuracy is at most {error:.1f} points.")
    return lines


def _float(results: Results) -> float | None:
    return next((row.value for row in results.table.rows if row.w is row.a is None), None)


def _lines(results: Results) -> Chart:
    bits, free = results.settings.bits, results.settings.prepare
    name, colour = ("with free steps", palette.FREE) if free else ("as trained", palette.PLAIN)
    return over_widths(
        series(name, colour, results.table, bits),
        bits,
        "Weights and activations at the same width. Below: difference from the same network in float. "
        "Quantization is simulated in floating point: it shows the accuracy at a width, and is slower than "
        "float, not faster.",
    )


def _heat(results: Results) -> list[Chart]:
    """Return the map of differences from float, or nothing if float was not evaluated."""
    exact = _float(results)
    if exact is None:
        return []
    names = list(map(width_name, results.settings.bits))
    lost = {(width_name(row.w), width_name(row.a)): row.value - exact for row in results.table.rows}
    figure = charts.differences(lost, names, names, ("weight bits", "activation bits"))
    caption = (
        "Blue: more accurate than in float; orange: less. Cells without a number differ by less than half a "
        "point."
    )
    return [Chart(figure, "Difference from float at every pair of widths, in points", caption, scrolls=True)]


def _accuracies(results: Results) -> Section:
    bits = results.settings.bits
    rows = [(width_name(w), *(f"{results.table[w, a]:.2f}" for a in bits)) for w in bits]
    header = ("weight bits", *(f"a {width_name(a)}" for a in bits))
    return Section(
        "Accuracy in numbers",
        text=["Test accuracy in percent; widths of activations across."],
        tables=[Table(header, rows)],
    )


def _single_tensors(results: Results) -> Section:
    bits, alone = results.settings.alone, results.alone
    added = {row.tensor: row.value - alone.float_value for row in alone.rows}
    colours = _colours(results, [*added, *results.norms])
    figures = [
        Chart(charts.bars(added, colours, "loss added"), "Loss added by each tensor alone"),
        Chart(
            charts.bars(results.norms, colours, "step × gradient l1 norm"),
            "Step times gradient norm of each tensor",
        ),
    ]
    text = [
        "First chart: the increase of the mean cross-entropy on the test images when only one tensor is "
        f"quantized to {bits} bits and all others are in float. Second chart: the quantization step at "
        f"{bits} bits of the full range of the tensor, whatever range was chosen, times the l1 norm of the "
        "gradient, on training images. Half of it is, to first order, the largest loss increase from "
        "quantizing only this tensor; the table compares it with the measured increase. The penalty with "
        'scale="step" reduces this quantity.'
    ]
    table = Table(("tensor", "half of step × norm", "loss added"), _norm_rows(results))
    return Section("Single tensors", text=text, charts=figures, tables=[table], keys=_KEYS)


def _colours(results: Results, names: Iterable[str]) -> dict[str, str]:
    sites = {row.tensor for row in results.alone.rows if row.kind == "a"}
    return {name: _WEIGHT if name.endswith("weight") and name not in sites else _ACTIVATION for name in names}


def _norm_rows(results: Results) -> list[tuple[str, str, str]]:
    added = {row.tensor: row.value - results.alone.float_value for row in results.alone.rows}
    ordered = sorted(results.norms.items(), key=lambda item: -item[1])
    return [
        (name, f"{norm / 2:.4g}", f"{added[name]:+.4g}" if name in added else "-") for name, norm in ordered
    ]


def _ranges(results: Results) -> Section:
    rows = [(name, f"{low:.4g}", f"{high:.4g}") for name, (low, high) in results.ends.items()]
    text = (
        f"At {results.settings.alone} bits. The grid of a weight is symmetric around zero and includes its "
        "larger end."
    )
    colours = _colours(results, results.ends)
    figure = charts.spans(results.ends, colours, "range (logarithmic beyond ±0.1)")
    chart, table = Chart(figure, "Range of each tensor"), Table(("tensor", "from", "to"), rows)
    return Section("Ranges", [text], charts=[chart], tables=[table], keys=_KEYS)


def _plan(plan: Plan) -> Section:
    text = (
        f"Weights within {plan.budget:,.0f} bytes, chosen step by step for the smallest loss per byte saved, "
        "then evaluated. The value is the mean cross-entropy."
    )
    rows = [(name, str(width)) for name, width in plan.best.w.items()]
    return Section(
        "A width for each layer",
        text=[text],
        charts=[Chart(plan.figure(), "Loss over bytes of weights")],
        tables=[Table(("layer", "bits"), rows)],
    )


def _settings(results: Results) -> list[tuple[str, str]]:
    values = vars(results.settings) | {"bits": ", ".join(map(width_name, results.settings.bits))}
    return [(name, str(value)) for name, value in values.items()]
