"""The report of an experiment: one HTML page, and the tables that the command prints."""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from gradl1_fast import _files
from gradl1_fast._html import image, items, page, table
from gradl1_fast._plots import width_name
from gradl1_fast.training.experiment import charts
from gradl1_fast.training.experiment.methods import text_of
from gradl1_fast.training.experiment.page import BODY
from gradl1_fast.training.experiment.regimes import OWN, REGIMES
from gradl1_fast.training.experiment.results import Results

__all__ = ["accuracy_table", "html", "own_table", "times", "verdict", "write"]

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def write(results: Results, path: Path) -> None:
    """Write the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    _files.write_text(path, html(results))


def accuracy_table(results: Results) -> Table:
    """Return header and rows of accuracies: by regime a row for each method, with the seconds it took.

    The seconds are those of computing in the whole training, over those of plain training.
    """
    header = ("regime", "method", *(_name(w, a) for w, a in results.widths), "seeds", "time")
    cost = _costs(results)
    rows = [
        (
            regime,
            m,
            *(str(results.spread(m, regime, w, a)) for w, a in results.widths),
            str(len(results.of(m))),
            cost[m],
        )
        for regime in results.regimes
        for m in results.methods
    ]
    return header, rows


def own_table(results: Results) -> Table:
    """Return the accuracies with the quantizers of the methods themselves, at the widths they trained for."""
    rows: list[tuple[str, ...]] = [
        (m, _name(w, a), str(results.spread(m, OWN, w, a)))
        for m in results.methods
        for w, a in results.own_widths(m)
    ]
    return ("method", "(w, a)", "accuracy"), rows


def _costs(results: Results) -> dict[str, str]:
    """Return by method the computing time of a training over that of plain training, where there is one."""
    seconds = {
        m: statistics.fmean(sum(e.cpu_seconds for e in run.epochs) for run in results.of(m))
        for m in results.methods
    }
    plain = seconds.get("plain")
    return {m: f"{s / plain:.2f}x" if plain else f"{s:.0f} s" for m, s in seconds.items()}


def _name(w: int | None, a: int | None) -> str:
    return "float" if w is a is None else f"({width_name(w)}, {width_name(a)})"


def times(results: Results) -> dict[str, float]:
    """Return by method the median computing time of the epochs in which the method is at work."""
    found = {}
    for method in results.methods:
        runs = results.of(method)
        last = runs[0].settings["penalty"]["epochs"]
        seconds = [e.cpu_seconds for run in runs for e in run.epochs[-last:]] if last else []
        if seconds:
            found[method] = statistics.median(seconds)
    return found


def verdict(results: Results) -> list[str]:
    """Return the results in sentences: the best method at each width, and the place of gradl1."""
    return [_leader(results, regime, w, a) for regime in results.regimes for w, a in results.widths]


def _leader(results: Results, regime: str, w: int | None, a: int | None) -> str:
    means = {method: results.spread(method, regime, w, a) for method in results.methods}
    best = max(means, key=lambda method: means[method].mean)
    line = f"{regime}, {_name(w, a)}: best is {best} ({means[best]} %)"
    others = [f"{m} {means[m]} %" for m in ("gradl1", "plain") if m in means and m != best]
    return "; ".join([line, *others]) + "."


def html(results: Results) -> str:
    """Return the page."""
    settings: dict[str, Any] = results.runs[0].settings
    seeds = sorted({run.seed for run in results.runs})
    body = Template(BODY).substitute(
        data=escape(settings["data"]["name"]),
        seeds=", ".join(map(str, seeds)),
        verdict=items(verdict(results)),
        accuracy=table(*accuracy_table(results)),
        own=_own(results),
        weights=_weights(results),
        regimes=items([f"{name}: {REGIMES[name].text}" for name in results.regimes if name in REGIMES]),
        methods=table(("method", "what is minimised", "settings"), _methods(results)),
        bits=image(charts.bits_chart(results), "Accuracy over bits for each method", narrow=False),
        norms=image(charts.norms_chart(results), "Norms of the gradient over training", narrow=False),
        changes=image(
            charts.changes_chart(results), "Change of the loss over the size of the move", narrow=False
        ),
        alone=table(*_alone(results)),
        alone_bits=settings["alone_bits"],
        time=image(charts.time_chart(results, times(results)), "Time of an epoch for each method"),
        settings=table(("setting", "value"), _settings(settings)),
        environment=table(
            ("what", "value"),
            [pair for group in results.runs[0].environment.values() for pair in group.items()],
        ),
        epochs=settings["training"]["epochs"],
        last=settings["penalty"]["epochs"],
        warmup=settings["penalty"]["warmup_epochs"],
        calibration=settings["calibration"],
        probed=settings["probed"],
    )
    return page(f"gradl1_fast: methods compared on {settings['data']['name']}", body)


def _own(results: Results) -> str:
    header, rows = own_table(results)
    text = "<p>With the quantizer that the method trained, at the widths it trained for:</p>"
    return f"{text}\n{table(header, rows)}" if rows else ""


def _methods(results: Results) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for method in results.methods:
        settings = results.of(method)[0].settings["penalty"]["settings"]
        text = ", ".join(f"{key} = {value}" for key, value in settings.items())
        found.append((method, text_of(method), text or "none"))
    return found


def _weights(results: Results) -> str:
    """Return the distributions of the weights of the first seed, or nothing where they were not measured."""
    rows: list[tuple[str, ...]] = [
        (
            *(run.method, d.tensor, d.when, f"{d.low:.3f}", f"{d.high:.3f}", f"{d.deviation:.3f}"),
            *(f"{d.kurtosis:.2f}", f"{d.precision:.2f}", f"{d.error:.1e}"),
        )
        for run in results.runs
        for d in run.weights
        if run.seed == results.runs[0].seed
    ]
    head = ("method", "tensor", "at", "smallest", "largest", "deviation", "kurtosis", "precision", "error")
    text = (
        "<h2>Distribution of the weights</h2>\n<p>Of the first seed. Precision: mean range of a channel over "
        "that of the tensor. Error: mean squared error at 8 bits with one range.</p>"
    )
    return f"{text}\n{table(head, rows)}" if rows else ""


def _alone(results: Results) -> Table:
    """Return by tensor and method the rise of the loss, averaged over the seeds."""
    rows: list[tuple[str, ...]] = []
    for place, entry in enumerate(results.runs[0].alone):
        rises = [statistics.fmean(run.alone[place].rise for run in results.of(m)) for m in results.methods]
        rows.append((entry.tensor, *(f"{rise:+.3f}" for rise in rises)))
    return ("tensor", *results.methods), rows


def _settings(settings: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the settings that all runs share, one a line."""
    rows: list[tuple[str, ...]] = []
    for section in ("data", "model", "optimizer", "training"):
        rows += [
            (f"{section}.{key}", str(value))
            for key, value in settings[section].items()
            if value is not None and key != "seed"
        ]
    return rows
