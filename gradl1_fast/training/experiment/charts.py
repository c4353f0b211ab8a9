"""The charts of an experiment, as SVG. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from gradl1_fast._plots import new_figure, svg, tidy, width_name
from gradl1_fast.training.experiment.measurements import Change, Norms
from gradl1_fast.training.experiment.results import Results

__all__ = ["bits_chart", "changes_chart", "norms_chart", "time_chart"]

_FIRST = {"plain": "#d95f02", "gradl1": "#1b6ca8"}
_OTHERS = ("#7b3294", "#1b9e77", "#e7298a", "#66a61e", "#a6761d", "#666666", "#c7b200", "#e31a1c", "#33a0c8")


def _colours(methods: Sequence[str]) -> dict[str, str]:
    others = iter(_OTHERS * len(methods))
    return {method: _FIRST.get(method) or next(others) for method in methods}


def _panels(count: int, across: int, width: float, height: float) -> list[Any]:
    """Return ``count`` axes of one figure, in rows; unused axes are hidden."""
    rows = -(-count // across)
    figure = new_figure(width * across, height * rows)
    axes = list(figure.subplots(rows, across, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return axes[:count]


def bits_chart(results: Results) -> str:
    """Return accuracy over bits, of weights and activations alike, a panel for each regime."""
    bits = [w for w, a in results.widths if w == a]
    panels = _panels(len(results.regimes), 2, 5.6, 4.6)
    for axes, regime in zip(panels, results.regimes, strict=True):
        for method, colour in _colours(results.methods).items():
            spreads = [results.spread(method, regime, b, b) for b in bits]
            lead = method in _FIRST
            axes.errorbar(
                range(len(bits)),
                [spread.mean for spread in spreads],
                [spread.deviation or 0 for spread in spreads],
                color=colour,
                marker="o",
                markersize=4,
                linewidth=2.4 if lead else 1.2,
                zorder=3 if lead else 2,
                capsize=2,
                label=method,
            )
        axes.set_xticks(range(len(bits)), map(width_name, bits))
        axes.set_xlabel("bits")
        axes.set_title(regime, fontsize=11)
        axes.set_ylim(0, 101)
        axes.grid(axis="y", color="#e3e6ea")
        tidy(axes)
    panels[0].set_ylabel("test accuracy in %")
    panels[0].legend(frameon=False, loc="lower left", fontsize=8)
    return svg(panels[0].figure)


_NORMS: dict[str, Callable[[Norms], float]] = {
    "l1, weights": lambda n: n.l1_w,
    "l2, weights": lambda n: n.l2_w,
    "step × l1, weights": lambda n: n.step_l1_w,
    "l1, activations": lambda n: n.l1_a,
    "l2, activations": lambda n: n.l2_a,
    "step × l1, activations": lambda n: n.step_l1_a,
}


def norms_chart(results: Results) -> str:
    """Return norms of the gradient over training, means over the seeds; steps are those at 4 bits."""
    panels = _panels(len(_NORMS), 3, 4.0, 3.2)
    for axes, (title, value) in zip(panels, _NORMS.items(), strict=True):
        for method, colour in _colours(results.methods).items():
            runs = [run.norms for run in results.of(method)]
            means = [statistics.fmean(map(value, marks)) for marks in zip(*runs, strict=True)]
            epochs = [mark.epoch for mark in runs[0]]
            lead = method in _FIRST
            axes.plot(
                epochs,
                means,
                color=colour,
                linewidth=2.2 if lead else 1.1,
                zorder=3 if lead else 2,
                label=method,
            )
        axes.set_yscale("log")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epoch")
        tidy(axes)
    panels[0].legend(frameon=False, fontsize=7)
    return svg(panels[0].figure)


def changes_chart(results: Results) -> str:
    """Return the change of the loss over the size of the move: foretold, measured, and by quantization."""
    panels = _panels(len(results.methods), 3, 4.0, 3.2)
    for axes, method in zip(panels, results.methods, strict=True):
        moved, quantized = (_means(results, method, kind) for kind in ("sign", "quantized"))
        sizes = [c.size for c in moved]
        axes.plot(sizes, [c.predicted for c in moved], color="#666666", ls="--", label="first order")
        axes.plot(
            sizes,
            [c.measured for c in moved],
            color="#d95f02",
            marker="o",
            markersize=3,
            label="moved by the sign",
        )
        axes.plot(
            [c.size for c in quantized],
            [c.measured for c in quantized],
            "x",
            color="#1b6ca8",
            label="quantized, 8 to 3 bits",
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(bottom=1e-4)
        axes.set_title(method, fontsize=11)
        axes.set_xlabel("largest move, half steps at 4 bits")
        axes.grid(color="#e3e6ea")
        tidy(axes)
    for axes in panels[::3]:
        axes.set_ylabel("change of the loss")
    panels[0].legend(frameon=False, fontsize=7)
    return svg(panels[0].figure)


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


def time_chart(results: Results, times: dict[str, float]) -> str:
    """Return bars of the time of an epoch with each method, with their ratio to plain training."""
    figure = new_figure(8.2, 0.6 + 0.34 * len(times))
    axes = figure.subplots()
    colours = _colours(results.methods)
    axes.barh(list(times), list(times.values()), color=[colours[m] for m in times], height=0.65)
    for place, seconds in enumerate(times.values()):
        ratio = f"   {seconds / times['plain']:.1f}×" if "plain" in times else ""
        axes.text(seconds, place, f" {seconds:.0f} s{ratio} ", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(times.values()))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    tidy(axes)
    return svg(figure)
