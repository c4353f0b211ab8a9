"""The tables and sentences of an experiment, for its report and for the command that prints them."""

from __future__ import annotations

import statistics

from gradl1_fast.training.experiment.regimes import OWN
from gradl1_fast.training.experiment.results import Results
from gradl1_fast.training.reports.common import pair_name

__all__ = ["accuracy_table", "best", "own_table", "single_rows", "singles", "times", "verdict"]

Rows = list[tuple[str, ...]]
FEW = 6  # methods that a sentence names: of more, only the penalty and plain training


def accuracy_table(results: Results) -> tuple[tuple[str, ...], Rows]:
    """Return header and rows of accuracies: by regime a row for each method, with the seconds it took.

    The seconds are those of computing in the whole training, over those of plain training.
    """
    header = ("regime", "method", *(pair_name(w, a) for w, a in results.widths), "seeds", "time")
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


def own_table(results: Results) -> tuple[tuple[str, ...], Rows]:
    """Return the accuracies with the quantizers of the methods themselves, at the widths they trained for."""
    rows: Rows = [
        (m, pair_name(w, a), str(results.spread(m, OWN, w, a)))
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


def singles(results: Results) -> set[str]:
    """Return the methods that have a single seed: they are shown in grey and never named best."""
    return {method for method in results.methods if len(results.of(method)) == 1}


def single_rows(results: Results, rows: Rows, column: int) -> frozenset[int]:
    """Return the indices of the rows whose method, in ``column``, has a single seed."""
    single = singles(results)
    return frozenset(place for place, row in enumerate(rows) if row[column] in single)


def best(results: Results, regime: str, w: int | None, a: int | None) -> str | None:
    """Return the method with the highest mean among those with several seeds; None if there are none."""
    single = singles(results)
    compared = [method for method in results.methods if method not in single]
    return max(compared, key=lambda m: results.spread(m, regime, w, a).mean, default=None)


def verdict(results: Results) -> list[str]:
    """Return the results in sentences: the best method at each width, beside gradl1 and plain training."""
    return [_leader(results, regime, w, a) for regime in results.regimes for w, a in results.widths]


def _leader(results: Results, regime: str, w: int | None, a: int | None) -> str:
    leader = best(results, regime, w, a)
    single, spread = singles(results), {m: results.spread(m, regime, w, a) for m in results.methods}
    if leader is None:
        shown = [m for m in results.methods if len(results.methods) <= FEW or m in ("gradl1", "plain")]
        values = "; ".join(f"{method} {spread[method]} %" for method in shown or results.methods)
        return f"{regime}, {pair_name(w, a)}, one seed: {values}."
    line = f"{regime}, {pair_name(w, a)}: best is {leader} ({spread[leader]} %)"
    others = [m for m in ("gradl1", "plain") if m in spread and m != leader]
    marked = [f"{m} {spread[m]} %{' (one seed)' if m in single else ''}" for m in others]
    return "; ".join([line, *marked]) + "."
