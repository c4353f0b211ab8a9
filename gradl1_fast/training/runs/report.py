"""The report of a run: one HTML page with its losses, norms, accuracies, settings and versions."""

from __future__ import annotations

from typing import Any

from gradl1_fast import _environment, _files
from gradl1_fast._html import image, items, page, table
from gradl1_fast._plots import new_figure, svg, tidy, width_name
from gradl1_fast.quantization import Table
from gradl1_fast.training import toml
from gradl1_fast.training.config import Config
from gradl1_fast.training.runs.folder import Folder
from gradl1_fast.training.runs.recorder import NORM

__all__ = ["html", "require_matplotlib", "write"]

Rows = list[dict[str, float]]

_LOSS, _PENALTY, _ACCURACY = "#d95f02", "#1b6ca8", "#2a7f62"


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install where there is no matplotlib."""
    new_figure(1, 1)


def write(run: Folder, config: Config, rows: Rows, widths: Table) -> None:
    """Write ``report.html``."""
    _files.write_text(run.report, html(config, rows, widths))


def html(config: Config, rows: Rows, widths: Table) -> str:
    """Return the page.

    Args:
        config: of the run.
        rows: the metrics, a dictionary an epoch.
        widths: test accuracy in percent at equal bits for weights and activations.
    """
    return page(f"gradl1_fast: {config.model.name} on {config.data.name}", _body(config, rows, widths))


def _body(config: Config, rows: Rows, widths: Table) -> str:
    accuracies = [(width_name(row.w), f"{row.value:.2f}") for row in widths.rows]
    return "\n".join(
        [
            f"<h1>{config.model.name} on {config.data.name}</h1>",
            '<p class="lead">One training run, and its weights at every bit width.</p>',
            "<h2>Results</h2>",
            items(_found(config, rows, widths)),
            "<h2>Accuracy over widths</h2>",
            "<p>Weights and activations at the same width, on the test images. Ranges of activations come "
            "from training images; nothing was trained after quantization.</p>",
            image(_width_chart(widths), "Test accuracy over bits"),
            table(("bits", "test accuracy, %"), accuracies),
            "<h2>Loss and penalty</h2>",
            "<p>Means over the steps of each epoch. The penalty starts at the dashed line.</p>",
            image(_loss_chart(config, rows), "Loss, penalty and test accuracy over epochs"),
            "<h2>Where the gradients are large</h2>",
            "<p>The l1 norm of the gradient of each weight and activation times its quantization step at "
            "4 bits: half of it is the largest first-order change of the loss when only this tensor is "
            "quantized. Measured at the end of each epoch on the same training images. Each line is one "
            "tensor; the five highest at the end are named.</p>",
            image(_norm_chart(rows), "Step times gradient norm of each tensor over epochs"),
            table(("tensor", "first epoch", "last epoch", "ratio"), _norm_rows(rows)),
            "<h2>Settings</h2>",
            table(("setting", "value"), _settings("", toml.to_dict(config))),
            "<h2>Versions</h2>",
            table(
                ("what", "value"),
                [pair for group in _environment.describe().values() for pair in group.items()],
            ),
            "<footer>Written by <code>gradl1 train</code>. All numbers are in <code>metrics.csv</code>, the "
            "settings in <code>config.toml</code>. Method: Alizadeh et al., ICLR 2020, arXiv 2002.07520."
            "</footer>",
        ]
    )


def _found(config: Config, rows: Rows, widths: Table) -> list[str]:
    best = max(rows, key=lambda row: row["test_accuracy"])
    lines = [
        f"Float: {widths[None, None]:.2f} % of the test images are classified correctly; the best epoch was "
        f"{best['epoch']:.0f} with {best['test_accuracy']:.2f} %."
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


def _width_chart(widths: Table) -> str:
    figure = new_figure(8.2, 3.6)
    axes = figure.subplots()
    places = range(len(widths.rows))
    axes.plot(places, [row.value for row in widths.rows], color=_ACCURACY, marker="o", linewidth=2)
    for place, row in zip(places, widths.rows, strict=True):
        axes.annotate(f"{row.value:.1f}", (place, row.value), (0, 8), textcoords="offset points", ha="center")
    axes.set_xticks(places, [width_name(row.w) for row in widths.rows])
    axes.set_xlabel("bits of weights and of activations")
    axes.set_ylabel("test accuracy in %")
    axes.set_ylim(0, 108)
    axes.grid(axis="y", color="#e3e6ea")
    tidy(axes)
    return svg(figure)


def _loss_chart(config: Config, rows: Rows) -> str:
    figure = new_figure(8.2, 6.4)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    epochs = [row["epoch"] for row in rows]
    for axes, key, colour, label in (
        (top, "loss", _LOSS, "loss without penalty"),
        (middle, "penalty", _PENALTY, "penalty"),
        (bottom, "test_accuracy", _ACCURACY, "test accuracy in %"),
    ):
        axes.plot(epochs, [row[key] for row in rows], color=colour, marker="o", markersize=3)
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#e3e6ea")
        _mark_penalty(axes, config)
        tidy(axes)
    bottom.set_xlabel("epoch")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    return svg(figure)


def _norm_chart(rows: Rows) -> str:
    figure = new_figure(8.2, 4.6)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in rows]
    names = _norm_names(rows)
    highest = sorted(names, key=lambda name: -rows[-1][name])[:5]
    for name in names:
        named = name in highest
        axes.plot(
            epochs,
            [row[name] for row in rows],
            color=None if named else "#cbd2d9",
            linewidth=1.8 if named else 0.9,
            zorder=2 if named else 1,
            label=name.removeprefix(NORM) if named else None,
        )
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("step × gradient l1 norm")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    tidy(axes)
    return svg(figure)


def _mark_penalty(axes: Any, config: Config) -> None:
    if 0 < config.penalty.epochs < config.training.epochs:
        axes.axvline(config.training.epochs - config.penalty.epochs + 0.5, color="#9aa5b1", linestyle="--")


def _norm_names(rows: Rows) -> list[str]:
    return [name for name in rows[-1] if name.startswith(NORM)]


def _norm_rows(rows: Rows) -> list[tuple[str, ...]]:
    first, last = rows[0], rows[-1]
    return [
        (name.removeprefix(NORM), f"{first[name]:.3g}", f"{last[name]:.3g}", _ratio(last[name], first[name]))
        for name in sorted(_norm_names(rows), key=lambda name: -last[name])
    ]


def _ratio(last: float, first: float) -> str:
    return f"{last / first:.2f}" if first else "-"


def _settings(where: str, values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _settings(f"{where}{key}.", value)
        else:
            rows.append((where + key, str(value)))
    return rows
