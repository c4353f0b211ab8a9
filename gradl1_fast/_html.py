"""Reports: one HTML page that needs nothing beside it, from text, tables and SVG pictures."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from html import escape
from string import Template

__all__ = ["image", "items", "page", "table"]


def page(title: str, body: str) -> str:
    """Return a whole page; ``body`` is HTML that begins with its own heading."""
    return Template(_PAGE).substitute(title=escape(title), body=body)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    right: Collection[int] | None = None,
) -> str:
    """Return a table; cells are text, not HTML.

    Columns whose index is in ``right`` are aligned right and others left. None leaves that to the page;
    notebooks align everything right.
    """
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    head = _row("th", header, right)
    body = "".join(_row("td", row, right) for row in rows)
    return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Sequence[str], right: Collection[int] | None) -> str:
    shown = (f"<{tag}{_aligned(i, right)}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))
    return f"<tr>{''.join(shown)}</tr>"


def _aligned(column: int, right: Collection[int] | None) -> str:
    if right is None:
        return ""
    return f' style="text-align: {"right" if column in right else "left"}"'


def items(lines: Iterable[str]) -> str:
    """Return what was found, a framed list of sentences, which are text, not HTML."""
    return f'<ul class="found">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def image(svg: str, text: str, *, narrow: bool = True) -> str:
    """Return a picture, kept inside the page; ``text`` says to those who cannot see it what it shows."""
    data = base64.b64encode(svg.encode()).decode()
    kind = ' class="narrow"' if narrow else ""
    return f'<img{kind} alt="{escape(text)}" src="data:image/svg+xml;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
body {
  margin: 0; background: #f6f7f9; color: #1f2933; font: 16px/1.6 system-ui, "Segoe UI", Helvetica,
  Arial, sans-serif;
}
main {
  max-width: 62rem; margin: 2rem auto; padding: 2rem 3rem 3rem; background: #fff; border: 1px solid
  #e3e6ea; border-radius: 10px;
}
h1 { margin: 0; font-size: 1.9rem; line-height: 1.25; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
.lead { margin: .4rem 0 1.5rem; color: #52606d; font-size: 1.1rem; }
.found {
  margin: 0; padding: 1rem 1.2rem 1rem 2.2rem; background: #eef5fb; border-left: 4px solid #1b6ca8;
  border-radius: 4px;
}
img { display: block; width: 100%; height: auto; margin: 1rem auto; }
img.narrow { max-width: 46rem; }
table {
  width: 100%; margin: 1rem 0; border-collapse: collapse; font-size: .92rem; font-variant-numeric:
  tabular-nums;
}
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e6ea; }
th { color: #52606d; font-weight: 600; border-bottom: 2px solid #cbd2d9; }
p { max-width: 48rem; }
code { padding: .05rem .3rem; background: #f0f2f5; border-radius: 3px; font-size: .9em; }
footer { margin-top: 2.5rem; color: #7b8794; font-size: .85rem; }
@media (max-width: 50rem) { main { margin: 0; padding: 1.2rem; border: 0; border-radius: 0; } }
@media print {
  body { background: #fff; font-size: 11pt; } main { margin: 0; padding: 0; border: 0; max-width: none; }
  h2 { break-after: avoid; } img, table, .found { break-inside: avoid; }
}
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
"""
