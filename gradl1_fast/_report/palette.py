"""The colours of reports, benchmarks and documentation: Okabe and Ito's, distinct to colour-blind readers.

They are legible on white and on a dark page. Dashes and markers tell lines apart where colours repeat.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["EAGER", "FREE", "GREY", "OTHERS", "PALE", "PENALISED", "PLAIN", "QAT", "Style", "styles"]

PLAIN = "#d55e00"  # plain training
FREE = "#56b4e9"  # free steps: post-training, such as prepare() and calibration
PENALISED = "#0072b2"  # training with the penalty
QAT = "#009e73"  # quantization-aware training
EAGER = "#cc79a7"  # double backprop in eager PyTorch, and other exact libraries
OTHERS = ("#e69f00", "#999933", "#aa4499")  # other training methods
GREY, PALE = "#8a94a0", "#cbd2d9"  # a single seed, approximations; floors, background lines

_DASHES = ("", "5 2", "1.5 1.5", "7 2 1.5 2")
_MARKERS = "osD^vPX"
_ROLES = {"plain": PLAIN, "gradl1": PENALISED, "penalised": PENALISED, "qat": QAT, "eager": EAGER}


@dataclass(frozen=True)
class Style:
    """How a line is drawn.

    Attributes:
        colour: in hexadecimal notation.
        dash: lengths of line and gap as in SVG; empty for a solid line.
        marker: of matplotlib.
    """

    colour: str
    dash: str = ""
    marker: str = "o"


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return a style for each training method; a name begins with its role, as in ``qat-4``.

    Methods without a role are pale if they are too many to be told apart.
    """
    names = list(names)
    found: dict[str, Style] = {}
    uses: dict[str, int] = {}
    others = 0
    many = sum(_colour(name) is None for name in names) > len(OTHERS) * len(_DASHES)
    for place, name in enumerate(names):
        colour = _colour(name)
        if colour is None and many:
            found[name] = Style(PALE, marker="")
            continue
        if colour is None:
            colour, others = OTHERS[others % len(OTHERS)], others + 1
        dash = _DASHES[uses.get(colour, 0) % len(_DASHES)]
        uses[colour] = uses.get(colour, 0) + 1
        found[name] = Style(colour, dash, _MARKERS[place % len(_MARKERS)])
    return found


def _colour(name: str) -> str | None:
    """Return the colour of the role of a method, if it has one."""
    return _ROLES.get(re.split(r"[-+@]", name)[0])
