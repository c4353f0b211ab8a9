"""The figures and the picture at the top of README, made from the committed results."""

from __future__ import annotations

from itertools import product

from bench.pages import between
from docs_site import accuracy, figures

__all__ = ["PICTURE", "README", "rewritten", "section", "write"]

README = accuracy.DOCS.parent / "README.md"
PICTURE = accuracy.DOCS / "results" / "accuracy.svg"
NETWORK = "fashion-mnist-depthwise"
WIDTHS = ((None, None), (4, 4), (3, 3), (2, 4))
REGIMES = {
    "per channel": "no data: ranges alone",
    "calibrated": "free steps, rounded to nearest",
    "calibrated, gptq": "free steps, rounded by GPTQ",
}
TRAINED = {"plain": "plainly", "gradl1": "with the penalty"}
MARKS = "<!-- accuracy: written by python -m docs_site.accuracy -->", "<!-- end of accuracy -->"


def write() -> None:
    """Rewrite the picture and README."""
    PICTURE.write_text(figures.standalone())
    README.write_text(rewritten(README.read_text()))


def rewritten(text: str) -> str:
    """Return README with its marked section made anew."""
    return between(text, MARKS, section(), README.name)


def section() -> str:
    """Return the picture, and accuracy, loss in float and cost, without data and after the free steps."""
    kept = accuracy.read(NETWORK)
    rows = kept["rows"]
    lines = [
        f"![Test accuracy over bit width]({_relative(PICTURE)})",
        "",
        "*Fashion-MNIST, a network of depthwise-separable convolutions: test accuracy in percent at "
        f"(weight bits, activation bits). {accuracy.seeds(rows)}*",
        "",
        "| quantized | trained | float | (4, 4) | (3, 3) | (2, 4) | training time |",
        "|---|---|---|---|---|---|---|",
    ]
    for (regime, words), method in product(REGIMES.items(), TRAINED):
        values = [accuracy.cell(rows, method, regime, width) for width in WIDTHS]
        lines.append("| " + " | ".join([words, TRAINED[method], *values, accuracy.cost(kept, method)]) + " |")
    return "\n".join([*lines, "", f"[All networks, regimes and widths]({_relative(accuracy.PAGES[-1])})."])


def _relative(path: object) -> str:
    return str(path).removeprefix(f"{README.parent}/")
