"""The sections of an experiment's report on gradients, single tensors, weights and cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from gradl1_fast._report import charts, palette
from gradl1_fast._report.page import Chart, Key, Section, Table
from gradl1_fast._report.palette import Style
from gradl1_fast.training.experiment.measurements import Change, Norms
from gradl1_fast.training.experiment.results import Results
from gradl1_fast.training.reports import experiment_text as text
from gradl1_fast.training.reports.experiment_tables import times

__all__ = ["alone", "changes", "cost", "norms", "weights"]

_NORMS: dict[str, Callable[[Norms], float]] = {
    "l1, weights": lambda n: n.l1_w,
    "l2, weights": lambda n: n.l2_w,
    "step × l1, weights": lambda n: n.step_l1_w,
    "l1, activations": lambda n: n.l1_a,
    "l2, activations": lambda n: n.l2_a,
    "step × l1, activations": lambda n: n.step_l1_a,
}
_MOVES = {
    "first order": Style(palette.GREY, "5 2", ""),
    "along the sign": Style(palette.OTHERS[0]),
    "quantized": Style(palette.OTHERS[2], "1.5 1.5", "X"),
}


def norms(results: Results) -> Section:
    """Return the norms of the gradient over training, means over the seeds; steps are those at 4 bits."""
    styles = palette.styles(results.methods)
    figures = [
        Chart(charts.curves(_over_epochs(results, value), styles, ("epoch", "norm"), log="y"), title)
        for title, value in _NORMS.items()
    ]
    paragraph = text.NORMS.format(probed=results.runs[0].settings["probed"])
    keys = charts.legend(styles)
    return Section("Gradients over training", text=[paragraph], charts=figures, keys=keys)


def _over_epochs(
    results: Results, value: Callable[[Norms], float]
) -> dict[str, tuple[list[float], list[float]]]:
    found = {}
    for method in results.methods:
        runs = [run.norms for run in results.of(method)]
        means = [statistics.fmean(map(value, marks)) for marks in zip(*runs, strict=True)]
        found[method] = [mark.epoch for mark in runs[0]], means
    return found


def changes(results: Results) -> Section:
    """Return the change of the loss over the size of the move: predicted, measured, and by quantization."""
    figures = [Chart(_moves(results, method), method) for method in results.methods]
    keys = [Key(name, style) for name, style in _MOVES.items()]
    title = "Validity of the first-order estimate"
    return Section(title, text=[text.CHANGES], charts=figures, keys=keys)


def _moves(results: Results, method: str) -> object:
    moved, quantized = (_means(results, method, kind) for kind in ("sign", "quantized"))
    sizes = [c.size for c in moved]
    lines = {
        "first order": (sizes, [c.predicted for c in moved]),
        "along the sign": (sizes, [c.measured for c in moved]),
        "quantized": ([c.size for c in quantized], [c.measured for c in quantized]),
    }
    labels = ("largest move, half steps at 4 bits", "change of the loss")
    return charts.curves(lines, _MOVES, labels, log="xy", floor=1e-4)


def _means(results: Results, method: str, kind: str) -> list[Change]:
    """Return the changes of one kind, averaged over the seeds."""
    runs = [[c for c in run.changes if c.kind == kind] for run in results.of(method)]
    return [
        Change(
            kind,
            same[0].size,
            statistics.fmean(c.predicted for c in same),
            statistics.fmean(c.measured for c in same),
        )
        for same in zip(*runs, strict=True)
    ]


def alone(results: Results) -> Section:
    """Return by tensor and method the rise of the loss, averaged over the seeds."""
    rows = []
    for place, entry in enumerate(results.runs[0].alone):
        rises = [statistics.fmean(run.alone[place].rise for run in results.of(m)) for m in results.methods]
        rows.append((entry.tensor, *(f"{round(rise, 3) + 0.0:+.3f}" for rise in rises)))  # not -0.000
    paragraph = text.ALONE.format_map(results.runs[0].settings)
    table = Table(("tensor", *results.methods), rows)
    return Section("Sensitivity of single tensors", text=[paragraph], tables=[table])


def weights(results: Results) -> list[Section]:
    """Return the distributions of the weights of the first seed, or nothing where they were not measured."""
    rows = [
        (
            *(run.method, d.tensor, d.when, f"{d.low:.3f}", f"{d.high:.3f}", f"{d.deviation:.3f}"),
            *(f"{d.kurtosis:.2f}", f"{d.precision:.2f}", f"{d.error:.1e}"),
        )
        for run in results.runs
        for d in run.weights
        if run.seed == results.runs[0].seed
    ]
    head = ("method", "tensor", "at", "smallest", "largest", "deviation", "kurtosis", "precision", "error")
    table = Table(head, rows)
    return [Section("Distribution of the weights", text=[text.WEIGHTS], tables=[table])] if rows else []


def cost(results: Results) -> Section:
    """Return bars of the time of an epoch with each method, with their ratio to plain training."""
    seconds = times(results)
    colours = {method: style.colour for method, style in palette.styles(results.methods).items()}
    plain = seconds.get("plain")
    texts = {m: f"{s:.{0 if s >= 10 else 2}f} s" for m, s in seconds.items()}
    if plain:
        texts = {m: f"{texts[m]}, {s / plain:.1f}×" for m, s in seconds.items()}
    figures = [Chart(charts.bars(seconds, colours, texts=texts), "Time of an epoch")] if seconds else []
    return Section("Cost", text=[text.COST], charts=figures)
