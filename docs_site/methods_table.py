"""The table of training methods in docs/methods.md, generated from their classes.

``python -m docs_site.methods_table`` rewrites it; a test compares it with the classes.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from gradl1_fast import convert
from gradl1_fast.training.experiment.methods import settings_of
from gradl1_fast.training.methods import METHODS, Method, Variant, make

__all__ = ["PAGE", "put_into", "row", "rows"]

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
_HEADER = (
    "| name | what it does | kind | passes | second order | widths in training | source |\n"
    + "|---" * 7
    + "|"
)
_BLOCK = re.compile(r"(?<=<!-- table of methods -->\n).*?(?=<!-- end of the table -->)", re.DOTALL)
_LINK = re.compile(r"arXiv (\d+\.\d+)")


def row(cls: type[Method], variant: Variant) -> str:
    """Return the line of one variant of a method, made for a small network to ask it what it needs."""
    recipe = {"lambda_w": 1.0, "lambda_a": 1.0}
    method = make(cls.name, _network(), **settings_of(variant.name, recipe))
    widths = ", ".join("({}, {})".format(*width) for width in method.widths) or "-"
    source = _LINK.sub(r"[\1](https://arxiv.org/abs/\1)", cls.source) or "-"
    note = "; reconstruction" if cls.reconstruction else ""
    second = "yes" if method.second_order else "no"
    cells = (
        *(f"`{variant.name}`", variant.text, cls.family.value, f"{method.passes}"),
        *(second, widths, source + note),
    )
    return "| " + " | ".join(cells) + " |"


def _network() -> nn.Module:
    layers = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)
    return convert(nn.Sequential(*layers))


def rows() -> list[str]:
    """Return the lines of all variants, in the order of the registry."""
    return [row(cls, variant) for cls in METHODS.values() for variant in cls.variants]


def put_into(page: str) -> str:
    """Return the text of the page with the present table."""
    table = "\n".join([_HEADER, *rows()]) + "\n"
    return _BLOCK.sub(lambda _: table, page)


if __name__ == "__main__":
    PAGE.write_text(put_into(PAGE.read_text()))
