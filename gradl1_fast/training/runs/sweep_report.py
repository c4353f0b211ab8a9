"""The report of a sweep: one HTML page with a heat map, a bar for each tensor, ranges and norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from gradl1_fast import _environment, _files
from gradl1_fast._html import image, items, page, table
from gradl1_fast._plots import heat_map, new_figure, svg, tidy, width_name
from gradl1_fast.training.runs.sweep import Results

__all__ = ["html", "write"]

_WEIGHT, _ACTIVATION = "#1b6ca8", "#d95f02"


def write(path: Path, title: str, results: Results) -> None:
    """Write the page."""
    _files.write_text(path, html(title, results))


def html(title: str, results: Results) -> str:
    """Return the page; ``title`` says what was swept."""
    return page(f"gradl1_fast: {title} over widths", _body(title, results))


def found(results: Results) -> list[str]:
    """Return the main findings, a sentence each."""
    table, alone = results.table, results.alone
    lines = []
    if (None, None) in {(row.w, row.a) for row in table.rows}:
        exact = table[None, None]
        lines.append(f"Float: {exact:.2f} % of {results.images} test images are classified correctly.")
        for width in results.settings.bits:
            if width is not None:
                value = table[width, width]
                lines.append(
                    f"{width} bits for weights and activations: {value:.2f} % ({value - exact:+.2f} points)."
                )
    if alone.rows:
        worst = max(alone.rows, key=lambda row: row.value)
        lines.append(
            f"The most sensitive tensor is {worst.name} ({_kind(worst.kind)}): at {worst.bits} bits, it "
            f"changes the loss by {worst.value - alone.float_value:+.4f} (float: {alone.float_value:.4f})."
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


def _body(title: str, results: Results) -> str:
    bits = results.settings.alone
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="lead">One set of weights, simulated at every width.</p>',
        "<h2>Results</h2>",
        items(found(results)),
        "<h2>Accuracy over widths</h2>",
        "<p>In percent of the test images. Quantization is simulated in floating point: it shows the "
        "accuracy at a width, and is slower than float, not faster.</p>",
        image(_grid(results), "Test accuracy over bits of weights and activations"),
        "<h2>Single tensors</h2>",
        "<p>The increase of the mean cross-entropy on the test images when only one tensor is quantized "
        f"to {bits} bits and all others are in float.</p>",
        image(
            _bars(
                {_label(r.kind, r.name): r.value - results.alone.float_value for r in results.alone.rows},
                "loss added",
            ),
            "Loss added by each tensor alone",
        ),
        "<h2>Step times gradient norm</h2>",
        f"<p>The quantization step at {bits} bits of the full range of the tensor, whatever range was "
        "chosen, times the l1 norm of the gradient, on training images. "
        "Half of it is, to first order, the largest loss increase from quantizing only this tensor; the "
        "table compares it with the measured increase. The penalty with "
        '<code>scale="step"</code> reduces this quantity.</p>',
        image(
            _bars(
                {_label(_kind_of(n, results), n): v for n, v in results.norms.items()},
                "step × gradient l1 norm",
            ),
            "Step times gradient norm of each tensor",
        ),
        table(("tensor", "half of step × norm", "loss added"), _norm_rows(results)),
        "<h2>Ranges</h2>",
        f"<p>At {bits} bits. The grid of a weight is symmetric around zero and includes its larger end.</p>",
        image(_ranges(results.ends), "Range of each tensor"),
        table(
            ("tensor", "from", "to"), [(n, f"{lo:.4g}", f"{hi:.4g}") for n, (lo, hi) in results.ends.items()]
        ),
    ]
    if results.plan is not None:
        parts += [
            "<h2>A width for each layer</h2>",
            f"<p>Weights within {results.plan.budget:,.0f} bytes, chosen step by step for the smallest loss "
            "per byte saved, then evaluated. The value is the mean cross-entropy.</p>",
            image(svg(results.plan.figure()), "Loss over bytes of weights"),
            table(("layer", "bits"), [(name, str(width)) for name, width in results.plan.best.w.items()]),
        ]
    versions = [pair for group in _environment.describe().values() for pair in group.items()]
    return "\n".join(
        [
            *parts,
            "<h2>Settings and versions</h2>",
            table(("what", "value"), [*_settings(results), *versions]),
            "<footer>Written by <code>gradl1 sweep</code>. Method: Alizadeh et al., ICLR 2020, arXiv "
            "2002.07520.</footer>",
        ]
    )


def _settings(results: Results) -> list[tuple[str, str]]:
    values = vars(results.settings) | {"bits": ", ".join(map(width_name, results.settings.bits))}
    return [(name, str(value)) for name, value in values.items()]


def _norm_rows(results: Results) -> list[tuple[str, str, str]]:
    added = {
        (f"{row.name}.weight".removeprefix(".") if row.kind == "w" else row.name): row.value
        - results.alone.float_value
        for row in results.alone.rows
    }
    ordered = sorted(results.norms.items(), key=lambda item: -item[1])
    return [
        (name, f"{norm / 2:.4g}", f"{added[name]:+.4g}" if name in added else "-") for name, norm in ordered
    ]


def _grid(results: Results) -> str:
    count = len(results.settings.bits)
    figure = new_figure(2.6 + 0.72 * count, 1.3 + 0.5 * count)
    axes = figure.subplots()
    values = {(row.w, row.a): row.value for row in results.table.rows}
    picture = heat_map(axes, values, limits=(0, 100), form="{:.1f}")
    axes.set_ylabel("weight bits")
    figure.colorbar(picture, ax=axes, label="test accuracy in %")
    return svg(figure)


def _bars(values: Mapping[str, float], label: str) -> str:
    figure = new_figure(8.2, 0.9 + 0.24 * len(values))
    axes = figure.subplots()
    colours = [_WEIGHT if name.endswith("(weight)") else _ACTIVATION for name in values]
    axes.barh(range(len(values)), list(values.values()), color=colours)
    _name_rows(axes, list(values))
    axes.set_xlabel(label)
    return svg(figure)


def _ranges(ends: Mapping[str, tuple[float, float]]) -> str:
    figure = new_figure(8.2, 0.9 + 0.24 * len(ends))
    axes = figure.subplots()
    for place, (name, (low, high)) in enumerate(ends.items()):
        colour = _WEIGHT if name.endswith("weight") else _ACTIVATION
        axes.barh(place, high - low, left=low, color=colour, height=0.5)
    _name_rows(axes, list(ends))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("range (linear between -0.1 and 0.1, logarithmic beyond)")
    return svg(figure)


def _name_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color="#e3e6ea")
    axes.set_axisbelow(True)
    tidy(axes)


def _kind_of(name: str, results: Results) -> str:
    activations = {row.name for row in results.alone.rows if row.kind == "a"}
    return "a" if name in activations else "w"


def _kind(kind: str) -> str:
    return "weight" if kind == "w" else "activation"


def _label(kind: str, name: str) -> str:
    return f"{name.removesuffix('.weight') if kind == 'w' else name} ({_kind(kind)})"
