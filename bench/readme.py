"""README's speed table and chart, made from the committed results.

    python -m bench.readme

rewrites the text between the two marks in README.md, and the chart beside the results. Nothing is measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plots, results
from bench.processes import HERE
from bench.tables import number
from bench.workloads import TITLES

__all__ = ["BEGIN", "END", "main", "rewritten", "section"]

Row = dict[str, Any]
BEGIN, END = "<!-- speed: written by python -m bench.readme -->", "<!-- end of speed -->"
RESULTS = HERE / "bench" / "results"
# Rows of the table where the results have them, in this order, and how it calls them.
PROVIDERS = {
    "plain": "plain training step",
    "gradl1_fast": "**gradl1_fast**",
    "gradl1_fast, reference": "gradl1_fast without its compiled loops",
    "gradl1_fast, every=4": "gradl1_fast, every fourth step",
    "finite difference": "finite difference (approximate)",
    "eager double backprop": "double backprop in eager PyTorch",
    "eager double backprop, NCHW": "the same, NCHW",
    "double backprop, torch.compile": "the same, torch.compile",
    "torch.func, jvp of grad": "torch.func, jvp of grad",
    "torch.func, jvp of grad, torch.compile": "the same, torch.compile",
    "JAX, grad of grad": "JAX, jitted grad of grad",
    "JAX, jvp of grad": "JAX, jitted jvp of grad",
}


def main() -> None:
    """Rewrite README.md and each device's chart."""
    readme = HERE / "README.md"
    for folder in _measured():
        chart = plots.step(_small_images(results.read(folder)))
        plots.save(chart, folder, "chart")
    readme.write_text(rewritten(readme.read_text()))


def rewritten(text: str) -> str:
    """Return a text with its marked section made anew.

    Raises:
        ValueError: the marks are not there.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md has no section between {BEGIN!r} and {END!r}")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{section()}\n{END}", text)


def section() -> str:
    """Return the section: for each device a table, a chart, and where the numbers come from."""
    return "\n\n".join(_device(folder) for folder in _measured())


def _measured() -> list[Path]:
    return sorted(path.parent for path in RESULTS.glob("*/step/rows.json"))


def _device(folder: Path) -> str:
    rows = _small_images(results.read(folder))
    place = folder.relative_to(HERE).as_posix()
    sizes = dict.fromkeys(f"{TITLES[row['operation']]} of {row['size']}" for row in rows)
    name = results.device_of(results.read_environment(folder), rows)
    return "\n".join(
        [
            *_table(rows, f"time of a step, plain = 1 ({name})"),
            "",
            f"![Time of a step by every provider]({place}/chart.svg)",
            "",
            f"{'; '.join(sizes)}. A peer that is not in the table has not been measured here.",
            "",
            f"Measured by `make bench`; each row, its spread, memory and gradient error: [{place}]({place}).",
        ]
    )


def _table(rows: Sequence[Row], title: str) -> list[str]:
    """Return a table in Markdown: a line for each provider, a column for each network."""
    networks = list(dict.fromkeys(row["operation"] for row in rows))
    found = {(row["provider"], row["operation"]): row for row in rows}
    lines = [
        "| " + " | ".join([title, *(f"{TITLES[n]}" for n in networks)]) + " |",
        "|---" * (len(networks) + 1) + "|",
    ]
    for provider, words in PROVIDERS.items():
        ratios = [found.get((provider, n), {}).get("ratio_to_plain") for n in networks]
        if any(ratio is not None for ratio in ratios):
            mark = "**" if provider == "gradl1_fast" else ""
            cells = [f"{mark}{number(r, '.2f')}{mark}" if r is not None else "-" for r in ratios]
            lines.append("| " + " | ".join([words, *cells]) + " |")
    return lines


def _small_images(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of each network's first size, in one type, with the floors."""
    sizes: dict[str, str] = {}
    for row in rows:
        sizes.setdefault(row["operation"], row["size"])
    return [r for r in rows if r["size"] == sizes[r["operation"]] and r["dtype"] != "tf32"]


if __name__ == "__main__":
    main()
