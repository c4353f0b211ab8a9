"""Formulas of a page as drawings, in the colour and size of the text around them."""

from __future__ import annotations

import functools
import html
import re
from xml.etree import ElementTree

import ziamath
from latex2mathml import converter

__all__ = ["drawn"]

ziamath.config.svg2 = False  # no symbols with identities, which would clash between formulas
_SIZE = 24.0  # in which ziamath draws; one em of the page
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>',
    re.DOTALL,
)


def drawn(page: str) -> str:
    """Return a page, its formulas (as pymdownx.arithmatex marks them) drawn."""
    return _FORMULA.sub(_one, page)


def _one(found: re.Match[str]) -> str:
    block = found["block"] is not None
    source = " ".join(html.unescape(found["block"] if block else found["inline"]).split())
    tag, kind = ("div", "formula-block") if block else ("span", "formula")
    return f'<{tag} class="{kind}">{_svg(source, not block)}</{tag}>'


@functools.cache
def _svg(source: str, inline: bool) -> str:
    try:
        known = "\\" not in converter.convert(source)  # what it does not know it takes for a name
        formula = ziamath.Latex(source, size=_SIZE, color="currentColor", inline=inline)
    except Exception as error:  # its errors have no class in common, and some no message
        raise ValueError(f"cannot draw the formula {source!r}") from error
    if not known:
        raise ValueError(f"the formula {source!r} has a command that is not known")
    svg = formula.svgxml()
    width, height = (float(svg.attrib.pop(side)) / _SIZE for side in ("width", "height"))
    place = formula.getyofst() / _SIZE
    svg.set("style", f"width:{width:.3f}em;height:{height:.3f}em;vertical-align:{place:.3f}em")
    svg.set("role", "img")
    svg.set("aria-label", source)
    return ElementTree.tostring(svg, encoding="unicode")
