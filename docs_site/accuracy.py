"""Accuracy in the pages and in README, made from the committed results of ``gradl1 experiment``.

    python -m docs_site.accuracy FOLDER NAME         # keep the runs of a folder first
    python -m docs_site.accuracy time FOLDER NAME    # keep what the trainings of a folder cost, no more
    python -m docs_site.accuracy                     # rewrite the tables, README's figures and its picture

Nothing is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.pages import between
from gradl1_fast import _json
from gradl1_fast.training.experiment import Results, Run
from gradl1_fast.training.experiment.results import Spread
from gradl1_fast.training.reports.common import pair_name

__all__ = [
    "DOCS",
    "PAGES",
    "cell",
    "cost",
    "exists",
    "keep",
    "keep_time",
    "marks",
    "read",
    "rewritten",
    "section",
    "seeds",
]

DOCS = Path(__file__).parent.parent / "docs"
PAGES = (DOCS / "before-training.md", DOCS / "results" / "fashion-mnist.md")
PLAIN = "plain"
SEARCH = "fashion-mnist-depthwise-search"  # for a better recipe
AT_ASAM = "fashion-mnist-depthwise-at-asam"  # the most promising of them
NAMES = ("fashion-mnist", "fashion-mnist-depthwise", "fashion-mnist-resnet", SEARCH, AT_ASAM)

Row = dict[str, Any]
Kept = dict[str, Any]


def keep(folder: Path, name: str) -> None:
    """Write the accuracies of finished runs, what training cost, and where they were made.

    Runs that are kept already stay. Seeds that a method lacks are left out, so that all means are over the
    same seeds.

    Raises:
        ValueError: the runs that are kept had other settings or another version of torch.
    """
    _file(name).write_text(_written(_common(_joined(_kept(_runs(folder)), name))))


def keep_time(folder: Path, name: str) -> None:
    """Replace the computing time that is kept by that of other runs, such as those of another backend."""
    timed = _kept(_runs(folder))
    kept = {**read(name), "cpu_seconds": timed["cpu_seconds"], "timed": timed["environments"]}
    _file(name).write_text(_written(kept))


def _runs(folder: Path) -> list[Run]:
    return [run for path in sorted(folder.glob("*-seed-*.json")) for run in Results.read_runs(path).runs]


def _kept(runs: list[Run]) -> Kept:
    """Return what is kept of runs."""
    first = runs[0]
    seconds = {_key(run.method, run.seed): sum(epoch.cpu_seconds for epoch in run.epochs) for run in runs}
    return {
        "settings": {key: first.settings[key] for key in ("model", "training", "images", "calibration")},
        "penalty": {run.method: run.settings["penalty"] for run in runs},
        "environments": [first.environment],
        "cpu_seconds": {key: round(value, 1) for key, value in seconds.items()},
        "rows": [vars(row) for run in runs for row in run.rows],
    }


def _joined(new: Kept, name: str) -> Kept:
    """Return new runs together with those that are kept."""
    if not exists(name):
        return new
    old = read(name)
    for key in ("model", "images", "calibration"):
        if old["settings"][key] != new["settings"][key]:
            raise ValueError(f"{_file(name)}: was made with another {key}")
    versions = [env["versions"]["torch"] for kept in (old, new) for env in kept["environments"]]
    if len(set(versions)) > 1:
        raise ValueError(f"{_file(name)}: was made with torch {versions[0]}, not {versions[-1]}")
    environments = old["environments"] + [e for e in new["environments"] if e not in old["environments"]]
    rows = [row for row in old["rows"] if _key(row["method"], row["seed"]) not in new["cpu_seconds"]]
    joined = {key: old[key] | new[key] for key in ("penalty", "cpu_seconds")}
    if "timed" in old:  # by other runs, whose time is not comparable
        joined |= {"timed": old["timed"], "cpu_seconds": old["cpu_seconds"]}
    return {**new, **joined, "environments": environments, "rows": rows + new["rows"]}


def _common(kept: Kept) -> Kept:
    """Return the runs of the seeds that all methods have."""
    of_method: dict[str, set[int]] = {}
    for row in kept["rows"]:
        of_method.setdefault(row["method"], set()).add(row["seed"])
    seeds = set.intersection(*of_method.values())
    rows = sorted((row for row in kept["rows"] if row["seed"] in seeds), key=_order)
    present = {_key(row["method"], row["seed"]) for row in rows}
    seconds = {k: v for k, v in sorted(kept["cpu_seconds"].items()) if k in present or "timed" in kept}
    return {**kept, "cpu_seconds": seconds, "rows": rows}


def _order(row: Row) -> tuple[str, int]:
    return row["method"], row["seed"]


def _key(method: str, seed: int) -> str:
    return f"{method} {seed}"


def _written(kept: Kept) -> str:
    return _json.dumps(kept).replace('{"method": ', '\n{"method": ') + "\n"


def rewritten(text: str) -> str:
    """Return a page with its tables made anew: of all methods, or of plain training alone."""
    for name in filter(exists, NAMES):
        for subject, methods in (("accuracy", None), ("free steps", [PLAIN])):
            around = marks(subject, name)
            if around[0] in text:
                text = between(text, around, section(name, methods), "the page")
    return text


def _file(name: str) -> Path:
    return DOCS / "results" / f"accuracy-{name}.json"


def exists(name: str) -> bool:
    """Return whether results of a network are kept."""
    return _file(name).exists()


def read(name: str) -> dict[str, Any]:
    """Return what is kept of a network."""
    kept: dict[str, Any] = json.loads(_file(name).read_text())
    return kept


def marks(subject: str, name: str) -> tuple[str, str]:
    """Return the comments around what is written into a page."""
    return f"<!-- {subject} of {name}: written by python -m docs_site.accuracy -->", f"<!-- end of {name} -->"


def section(name: str, methods: list[str] | None = None) -> str:
    """Return the table of a network: for each regime a line for each method, plain training first.

    Args:
        name: of the experiment.
        methods: None for all.
    """
    kept = read(name)
    rows = [row for row in kept["rows"] if methods is None or row["method"] in methods]
    widths = list(dict.fromkeys((row["w"], row["a"]) for row in rows))
    methods = _methods(rows)
    header = ["regime", "training", *(pair_name(w, a) for w, a in widths), "time"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for regime in dict.fromkeys(row["regime"] for row in rows):
        for method in methods:
            cells = [cell(rows, method, regime, width) for width in widths]
            if any(cells):
                lines.append("| " + " | ".join([regime, method, *cells, cost(kept, method)]) + " |")
    return "\n".join([*lines, "", seeds(rows)])


def _methods(rows: list[Row]) -> list[str]:
    """Return the methods, plain training first."""
    return sorted(dict.fromkeys(row["method"] for row in rows), key=lambda method: method != PLAIN)


def seeds(rows: list[Row]) -> str:
    """Return a sentence on the number of networks of each method, which is the same for all."""
    count = len({row["seed"] for row in rows})
    if count == 1:
        return "One seed: read nothing into tenths of a point."
    return f"Mean ± standard deviation of the sample over {count} seeds."


def cell(rows: list[Row], method: str, regime: str, width: tuple[int | None, int | None]) -> str:
    """Return mean and deviation of the accuracy of a method in a regime at a width, if it was measured."""
    values = [
        row["top1"]
        for row in rows
        if (row["method"], row["regime"], (row["w"], row["a"])) == (method, regime, width)
    ]
    return str(Spread(tuple(values))) if values else ""


def cost(kept: dict[str, Any], method: str) -> str:
    """Return the computing time of a training over that of plain training with the same seeds."""
    seconds = kept["cpu_seconds"]
    seeds = [key.split()[1] for key in seconds if key.split()[0] == method]
    pairs = [(seconds[f"{method} {s}"], seconds.get(f"plain {s}")) for s in seeds]
    ratios = [own / plain for own, plain in pairs if plain]
    return f"{statistics.fmean(ratios):.2f}" if ratios else "-"


def main() -> None:
    """Do what the arguments ask for."""
    from docs_site import headline

    match sys.argv[1:]:
        case ["time", folder, name]:
            keep_time(Path(folder), name)
        case [folder, name]:
            keep(Path(folder), name)
    for page in PAGES:
        page.write_text(rewritten(page.read_text()))
    headline.write()


if __name__ == "__main__":
    main()
