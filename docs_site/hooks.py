"""Hooks of MkDocs, named in mkdocs.yml.

Pages in docs/ are written so that they also read well where the repository is browsed: links to files outside
docs/ are ordinary relative links there. Those files become part of the site, and the links follow.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.docs_site")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path

from mkdocs.structure.files import File, Files  # noqa: E402

from docs_site import figures, formulas, method_figures, tables  # noqa: E402
from gradl1_fast._report.page import JOINED  # noqa: E402

# Files outside docs/ that the site shows, by their address there.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/tour.ipynb": "examples/tour.ipynb",
}
CHARTS = "bench/results"

FIGURES = {
    "widths": figures.widths,
    "method-gains": method_figures.gains,
    "method-costs": method_figures.costs,
}

_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[)#])")
_LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>")
_JOINED = re.compile(rf"(?P<code><(pre|code|svg)\b.*?</\2>)|{JOINED}", re.DOTALL)
_FIGURE = re.compile(r"<!-- figure: (?P<name>[a-z-]+) -->")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that pages link to."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    for chart in sorted((ROOT / CHARTS).glob("*/*/*.svg")):
        files.append(File.generated(config, chart.relative_to(ROOT).as_posix(), abs_src_path=str(chart)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to where files are on the site, and put figures in."""
    source = page.file.src_uri
    outside = {place: path for path, place in OUTSIDE.items()}
    folder = (ROOT / outside[source] if source in outside else ROOT / "docs" / source).parent
    up = "../" * source.count("/")
    moved = _LINK.sub(lambda link: _moved(link["path"], folder, up), markdown)
    return _FIGURE.sub(lambda found: FIGURES[found["name"]](), moved)


def on_page_content(html: str, **_: Any) -> str:
    """Draw formulas, so that they need neither scripts nor fonts, and prepare the text for narrow screens."""
    return tables.breakable(tables.readable(formulas.drawn(joined(html))))


def joined(html: str) -> str:
    """Return a page in which no line breaks between a number and its unit or deviation."""
    return _JOINED.sub(lambda found: found["code"] or "\N{NO-BREAK SPACE}", html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn of what a reader's browser would load from elsewhere; in strict mode that ends the build."""
    for found in from_elsewhere(output):
        log.warning("%s loads from elsewhere: %s", page.file.src_uri, found)
    return output


def from_elsewhere(page: str) -> list[str]:
    """Return the scripts, styles, fonts and pictures of a page that are on another server."""
    return [tag for tag in _LOADED.findall(page) if "canonical" not in tag]


def _moved(link: str, folder: Path, up: str) -> str:
    """Return a link in the repository, from a file in ``folder``, as the link on the site."""
    try:
        path = (folder / link).resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return link
    if path in OUTSIDE:
        return up + OUTSIDE[path]
    if path.startswith("docs/"):
        return up + path.removeprefix("docs/")
    return up + path if path.startswith(CHARTS) and path.endswith(".svg") else link
