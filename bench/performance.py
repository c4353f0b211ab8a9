"""The documentation's page on speed, and the table of its first page, made from the committed results.

    python -m bench.performance

rewrites docs/performance.md, and the text between the two marks in docs/index.md. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import plots, results
from bench.pages import between, of_first_sizes, ratios
from bench.processes import HERE
from bench.readme import PROVIDERS, RECOMMENDED
from bench.tables import number
from bench.workloads import TITLES

__all__ = ["BEGIN", "END", "INDEX", "PAGE", "main", "page", "rewritten"]

Row = dict[str, Any]
PAGE, INDEX = HERE / "docs" / "performance.md", HERE / "docs" / "index.md"
BEGIN, END = "<!-- costs: written by python -m bench.performance -->", "<!-- end of costs -->"
RESULTS = HERE / "bench" / "results"
# What the page on speed shows of each network without unfolding: the first five of these that were measured.
FIRST = (
    *("plain", RECOMMENDED, "gradl1_fast", "eager double backprop", "eager double backprop, NCHW"),
    *("finite difference", "torch.func, jvp of grad"),
)
# What the first page shows, in this order, and how it calls it.
SHORT = {
    "plain": "plain training step",
    RECOMMENDED: '**gradl1_fast, as recommended** (`scale="step"`), exact',
    "gradl1_fast": 'gradl1_fast, `scale="none"`, exact',
    "gradl1_fast, every=4": "gradl1_fast, every fourth step",
    "eager double backprop": "double backprop in eager PyTorch",
    "eager double backprop, NCHW": "the same, NCHW",
}

HEAD = """# Speed

<!-- Written by `python -m bench.performance` from bench/results; edit that instead. -->

This page compares a training step with the penalty to a plain step, and to other ways to compute the same
gradient. An exact provider is timed only if its gradient on the same batch agrees with float64 double
backprop; see [How speed is measured](benchmarks.md).
"""
CPU_ONLY = """!!! warning "CPU only"
    All measurements are from CPUs. There are no GPU results.
"""


def main() -> None:
    """Rewrite the page with its charts, and the table."""
    for folder in _folders():
        rows = of_first_sizes(results.read(folder / "step"))
        first = _first(rows)
        chart = plots.step([row for row in rows if row["provider"] in first], columns=1, width=5.2)
        plots.save(chart, folder / "step", "first")
    PAGE.write_text(page())
    INDEX.write_text(rewritten(INDEX.read_text()))


def page() -> str:
    """Return the page on speed."""
    folders = _folders()
    on_gpu = any(row["device"] == "cuda" for folder in folders for row in results.read(folder / "step"))
    return "\n".join([HEAD, *([] if on_gpu else [CPU_ONLY]), *(_device(folder) for folder in folders)])


def rewritten(text: str) -> str:
    """Return the text of the first page with its table made anew.

    Raises:
        ValueError: the marks are not there.
    """
    return between(text, (BEGIN, END), _costs(), "docs/index.md")


def _folders() -> list[Path]:
    """Return the folder of each device that steps were measured on."""
    return sorted(path.parent for path in RESULTS.glob("*/step"))


def _device(folder: Path) -> str:
    place = f"../{folder.relative_to(HERE).as_posix()}"
    environment, rows = results.read_environment(folder / "step"), results.read(folder / "step")
    parts = [f"## {results.device_of(environment, rows)}\n", _origin(environment), _step(rows, place)]
    if (folder / "scale").is_dir():
        parts.append(_scale(results.read(folder / "scale"), place))
    if (folder / "ops").is_dir():
        parts.append(_operations(place))
    return "\n".join(parts)


def _origin(environment: dict[str, Any]) -> str:
    """Return a sentence on what a device's steps were measured with, and when."""
    versions, measured = environment["versions"], environment.get("measured")
    origin = "Date and revision were not recorded."
    if measured:
        origin = f"Measured on {measured['date']}, revision {measured.get('revision', 'not recorded')}."
    return f"PyTorch {versions['torch']}, Python {versions['python']}. {origin}"


def _step(rows: Sequence[Row], place: str) -> str:
    tables = [
        (
            "Time of a step, plain = 1",
            "Median over rounds in which all providers take turns.",
            lambda row, plain: number(row["ratio_to_plain"], ".2f"),
        ),
        (
            "Peak memory of a step, plain = 1",
            "Live bytes above what is live before the step.",
            lambda row, plain: _share(row["peak_bytes"], plain["peak_bytes"]),
        ),
        (
            "Error of the gradient",
            "Distance from float64 double backprop, relative to its norm; *plain*: of its own gradient.",
            lambda row, plain: number(row["gradient_error"], ".0e"),
        ),
    ]
    parts = []
    first = _first(rows)
    for title, words, cell in tables:
        parts += [f"\n### {title}\n", words, "A dash means not measured.\n"]
        parts += _table(rows, cell, [name for name in PROVIDERS if name in first])
        folded = _table(rows, cell, [name for name in PROVIDERS if name not in first])
        if "Time" in title:
            parts.append("\n" + _chart("Time of a step by five providers", f"{place}/step/first.svg"))
            folded += ["", _chart("Time of a step by every provider", f"{place}/step/chart.svg")]
        parts += _folded("All other providers", folded)
    return "\n".join(parts)


def _first(rows: Sequence[Row]) -> list[str]:
    """Return the providers that are shown without unfolding."""
    measured = {row["provider"] for row in rows if row["ratio_to_plain"] is not None}
    return [name for name in FIRST if name in measured][:5]


def _folded(summary: str, lines: Sequence[str]) -> list[str]:
    """Return lines of Markdown that a reader unfolds."""
    opening = f'\n<details markdown="1"><summary>{summary}</summary>\n'
    return [opening, *lines, "\n</details>"]


def _table(rows: Sequence[Row], cell: Callable[[Row, Row], str], providers: Sequence[str]) -> list[str]:
    """Return a table with a line for each provider and a column for each workload."""
    workloads = list(dict.fromkeys((row["operation"], row["size"]) for row in rows))
    found = {(row["provider"], row["operation"], row["size"]): row for row in rows if row["dtype"] != "tf32"}
    names = [f"{TITLES[operation]}<br><small>{_lines(size)}</small>" for operation, size in workloads]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(workloads) + 1) + "|"]
    for provider in providers:
        cells = []
        for workload in workloads:
            row, plain = found.get((provider, *workload)), found[("plain", *workload)]
            cells.append(cell(row, plain) if row and row["median_ms"] is not None else "-")
        if any(value != "-" for value in cells):
            lines.append("| " + " | ".join([PROVIDERS[provider], *cells]) + " |")
    return lines


def _lines(size: str) -> str:
    """Return a size in a line for each of its parts."""
    return ",<br>".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in size.split(", "))


def _scale(rows: Sequence[Row], place: str) -> str:
    factors = ", ".join(dict.fromkeys(row["sweep"] for row in rows))
    return "\n".join(
        [
            "\n### How it grows\n",
            f"A stack of convolutions, one factor at a time ({factors}); every row is in the results.",
            "",
            _chart("Time and memory over batch, width, depth and ranks", f"{place}/scale/plot.svg"),
            "",
        ]
    )


def _operations(place: str) -> str:
    return "\n".join(
        [
            "\n### Operation by operation\n",
            "Every pass of every operation, by every backend and by plain PyTorch, against a copy.",
            "",
            _chart("Bandwidth of each operation, and convolution's double backward", f"{place}/ops/plot.svg"),
            "",
        ]
    )


def _chart(words: str, path: str) -> str:
    """Return a picture that leads to itself, alone and large."""
    return f"[![{words}]({path})]({path})"


def _share(value: float | None, of: float | None) -> str:
    return "-" if value is None or not of else f"{value / of:.2f}"


def _costs() -> str:
    """Return the table of the first page: of the first device, each network's first size."""
    folder = results.newest(folder / "step" for folder in _folders())
    rows = results.read(folder)
    lines = ratios(of_first_sizes(rows), "time of a step, plain = 1", SHORT)
    name = results.device_of(results.read_environment(folder), rows).partition(", torch")[0]
    return "\n".join([_eager(rows), "", *lines, "", f"*{name}. [All rows, memory, errors](performance.md).*"])


def _eager(rows: Sequence[Row]) -> str:
    """Return the sentence on what plain PyTorch takes: the range over networks, sizes and layouts."""
    eager = ("eager double backprop", "eager double backprop, NCHW")
    kept = [r["ratio_to_plain"] for r in rows if r["provider"] in eager and r["dtype"] == "float32"]
    ratios = [ratio for ratio in kept if ratio is not None]
    span = f"{min(ratios):.1f} to {max(ratios):.1f}"
    return f"Double backprop in plain PyTorch costs {span} plain steps, by network, size and layout."


if __name__ == "__main__":
    main()
