"""The page of results of all training methods, made from the committed rows of ``gradl1 experiment``.

    python -m docs_site.accuracy FOLDER methods-fashion-mnist    # keep the runs of a folder first
    python -m docs_site.methods_results                          # rewrite the tables and the paragraphs

Nothing is measured.
"""

from __future__ import annotations

import re
from typing import Any

from bench.pages import between
from docs_site import accuracy
from gradl1_fast.training import methods
from gradl1_fast.training.experiment import VARIANTS
from gradl1_fast.training.experiment.methods import method_of
from gradl1_fast.training.experiment.regimes import OWN
from gradl1_fast.training.reports.common import pair_name

__all__ = ["NETWORKS", "PAGE", "SEVERAL_SEEDS", "WORDS", "paragraphs", "rewritten", "table", "value"]

PAGE = accuracy.DOCS / "results" / "methods.md"
NETWORKS = ("methods-fashion-mnist", "methods-fashion-mnist-depthwise")
SEVERAL_SEEDS = "methods-fashion-mnist-seeds"  # some of the methods
PLAIN, WITHOUT_DATA, FREE_STEPS = "plain", "per tensor", "calibrated"
FLOAT = None, None
SHOWN = [(WITHOUT_DATA, width) for width in (FLOAT, (8, 8), (4, 4), (3, 3))] + [
    (FREE_STEPS, width) for width in ((8, 8), (4, 4), (3, 3), (2, 4))
]
WORDS = {WITHOUT_DATA: "no data", FREE_STEPS: "free steps"}

Kept = dict[str, Any]
Width = tuple[int | None, int | None]


def names(kept: Kept) -> list[str]:
    """Return the methods of a network in the order of the registry, combinations last."""
    present = dict.fromkeys(row["method"] for row in kept["rows"])
    return [name for name in VARIANTS if name in present] + [name for name in present if name not in VARIANTS]


def value(kept: Kept, method: str, regime: str, width: Width) -> float | None:
    """Return the mean accuracy of a method, or None if it was not measured."""
    key = method, regime, width
    found = [r["top1"] for r in kept["rows"] if (r["method"], r["regime"], (r["w"], r["a"])) == key]
    return sum(found) / len(found) if found else None


def table(name: str) -> str:
    """Return the table of a network, a line for each method."""
    kept = accuracy.read(name)
    header = ["method", *(_head(regime, width) for regime, width in SHOWN), "own quantizer", "time"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method in names(kept):
        cells = [accuracy.cell(kept["rows"], method, regime, width) for regime, width in SHOWN]
        lines.append(
            "| " + " | ".join([f"`{method}`", *cells, _own(kept, method), accuracy.cost(kept, method)]) + " |"
        )
    return "\n".join([*lines, "", accuracy.seeds(kept["rows"])])


def _head(regime: str, width: Width) -> str:
    return "float" if width == FLOAT else f"{WORDS[regime]} {pair_name(*width)}"


def _own(kept: Kept, method: str) -> str:
    rows = [row for row in kept["rows"] if (row["method"], row["regime"]) == (method, OWN)]
    widths = list(dict.fromkeys((row["w"], row["a"]) for row in rows))
    return ", ".join(f"{pair_name(*w)} {accuracy.cell(rows, method, OWN, w)}" for w in widths)


def paragraphs() -> str:
    """Return a paragraph for each method: what it is, what was reconstructed, what was seen."""
    networks = {name: accuracy.read(name) for name in NETWORKS if accuracy.exists(name)}
    measured = dict.fromkeys(method for kept in networks.values() for method in names(kept))
    parts = []
    for method in measured:
        if method in VARIANTS and method != PLAIN:
            seen = " ".join(
                _seen(kept, method, name) for name, kept in networks.items() if method in names(kept)
            )
            parts.append(f"**`{method}`**: {VARIANTS[method].text}. {_origin(method)} {seen}")
    return "\n\n".join(parts)


def _origin(method: str) -> str:
    """Return where the method is from, and what of it was derived here."""
    cls = methods.METHODS[method_of(method)]
    text = re.sub(r"\s+", " ", (cls.__doc__ or "").split("Args:")[0])
    told = re.search(r"Reconstruction: (.*)$", text.strip())
    if told is None:
        return f"{cls.source}; its formulas are published." if cls.source else ""
    return f"{cls.source}. Reconstruction: {told[1].replace('``', '`')}"


def _seen(kept: Kept, method: str, name: str) -> str:
    """Return the accuracies beside those of plain training, as a sentence."""
    pairs = [(WITHOUT_DATA, (4, 4)), (FREE_STEPS, (3, 3)), (FREE_STEPS, (2, 4))]
    words = [
        f"{WORDS[regime]} {pair_name(*width)} {_beside(kept, method, regime, width)}"
        for regime, width in pairs
    ]
    lost = _beside(kept, method, WITHOUT_DATA, FLOAT)
    network = kept["settings"]["model"]["name"]
    return f"On `{network}`, in points over plain training: float {lost}, {', '.join(words)}."


def _beside(kept: Kept, method: str, regime: str, width: Width) -> str:
    own, plain = (value(kept, each, regime, width) for each in (method, PLAIN))
    return "not measured" if own is None or plain is None else f"{round(own - plain, 1) + 0.0:+.1f}"


def rewritten(text: str) -> str:
    """Return the page with its tables and paragraphs made again."""
    for name in (*NETWORKS, SEVERAL_SEEDS):
        if accuracy.exists(name) and accuracy.marks("accuracy", name)[0] in text:
            text = between(text, accuracy.marks("accuracy", name), table(name), PAGE.name)
    marks = (
        "<!-- paragraphs: written by python -m docs_site.methods_results -->",
        "<!-- end of paragraphs -->",
    )
    return between(text, marks, paragraphs(), PAGE.name)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
