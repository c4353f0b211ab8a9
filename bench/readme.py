"""README's speed table and chart, made from the committed results.

    python -m bench.readme

rewrites the text between the two marks in README.md, and the chart beside the results. Nothing is measured.
"""

from __future__ import annotations

from pathlib import Path

from bench import plots, results
from bench.pages import between, of_first_sizes, of_launches, ratios
from bench.processes import HERE
from bench.workloads import TITLES

__all__ = ["BEGIN", "END", "main", "rewritten", "section"]

BEGIN, END = "<!-- speed: written by python -m bench.readme -->", "<!-- end of speed -->"
RESULTS = HERE / "bench" / "results"
RECOMMENDED = 'gradl1_fast, scale="step"'
# Rows of the table where the results have them, in this order, and how it calls them.
ROWS = {
    "plain": "plain training step",
    RECOMMENDED: '**gradl1_fast, as recommended** (`scale="step"`)',
    "gradl1_fast": 'gradl1_fast, `scale="none"`',
    "gradl1_fast, every=4": 'gradl1_fast, `scale="none"`, every fourth step',
    "finite difference": "finite difference (approximate)",
    "eager double backprop": "double backprop in eager PyTorch",
}
LAUNCHES = (
    "*Launches alone*: a network so small that issuing its operations is all that takes time, as on a GPU. "
)
# The same of the page on speed.
PROVIDERS = {
    "plain": "plain training step",
    RECOMMENDED: 'gradl1_fast, `scale="step"`, as recommended',
    "gradl1_fast": "**gradl1_fast**",
    "gradl1_fast, reference": "gradl1_fast without its compiled loops",
    "gradl1_fast, every=4": "gradl1_fast, every fourth step",
    "finite difference": "finite difference (approximate)",
    "eager double backprop": "double backprop in eager PyTorch",
    "eager double backprop, NCHW": "double backprop in eager PyTorch, NCHW",
    "double backprop, torch.compile": "double backprop, torch.compile",
    "torch.func, jvp of grad": "torch.func, jvp of grad",
    "torch.func, jvp of grad, torch.compile": "torch.func, jvp of grad, torch.compile",
    "JAX, grad of grad": "JAX, jitted grad of grad",
    "JAX, jvp of grad": "JAX, jitted jvp of grad",
}


def main() -> None:
    """Rewrite README.md and each device's chart."""
    readme = HERE / "README.md"
    for folder in _measured():
        chart = plots.step(of_first_sizes(results.read(folder)))
        plots.save(chart, folder, "chart")
    readme.write_text(rewritten(readme.read_text()))


def rewritten(text: str) -> str:
    """Return a text with its marked section made anew.

    Raises:
        ValueError: the marks are not there.
    """
    return between(text, (BEGIN, END), section(), "README.md")


def section() -> str:
    """Return the section: of the newest results a table, a chart, and where the numbers come from."""
    return _device(results.newest(_measured()))


def _measured() -> list[Path]:
    return sorted(path.parent for path in RESULTS.glob("*/step/rows.json"))


def _device(folder: Path) -> str:
    everything = results.read(folder)
    alone = of_launches(everything)
    rows = [*of_first_sizes(everything), *alone]
    launches = LAUNCHES if alone else ""
    place = folder.relative_to(HERE).as_posix()
    sizes = dict.fromkeys(f"{TITLES[row['operation']]} of {row['size']}" for row in rows)
    name = results.device_of(results.read_environment(folder), rows)
    return "\n".join(
        [
            *ratios(rows, f"time of a step, plain = 1 ({name})", ROWS),
            "",
            f"![Time of a step by every provider]({place}/chart.svg)",
            "",
            f"{'; '.join(sizes)}. The penalty is on weights and activations. {launches}"
            "[All rows, sizes and peers](docs/performance.md).",
            "",
            f"Measured by `make bench`; each row, its spread, memory and gradient error: [{place}]({place}).",
        ]
    )


if __name__ == "__main__":
    main()
