"""docs/compatibility.md, from the results of a run."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from tests.zoo.models import MODELS
from tests.zoo.summary import Result, record_of, shortest_reason

INTRODUCTION = """\
# Models of other libraries

Every model below was written elsewhere. Each is converted by `gl.convert`, with random weights and small
inputs, and compared in float64 with what it computed before. This page is written by `make zoo ARGS=--write`,
in an environment of its own; `make zoo ARGS="--only resnet"` runs some of the models.

- *identical*: the class, names, parameters and buffers are the same, and state dicts load both ways; outputs,
  gradients and statistics, in evaluation and in training, differ by at most 1e-10 of the largest.
- *penalty*: penalty and penalised gradients differ by at most 1e-8 from double backprop through the original
  with plain PyTorch, in training, and once more with dropout and drop path where the factory has them.
- *quantized*: share of the convolutions and linear layers whose weight is quantized on demand.
- *planned*: share of the quantized layers that a plan runs while a penalty is on; the second number is with
  dropout and drop path.
- *folded*: share of the batch norms that fold into a convolution; outputs then differ by at most 1e-8.
- *widths*: calibrates, evaluates at several widths, and uses no weight in float that counts as quantized.
- *export*: to ONNX at (8, 8) and (4, 8) bits; codes and outputs of a plain onnxruntime session are those of
  the simulation, within the [bounds](export.md#the-comparison). A dash: `torch.export` refuses the model.
- *any-bit*: a file, read at 4 bits, gives the outputs of the weights that its rule names.

A dot stands for a check that was not made in this run, a dash for one that has no meaning for the model.

"""
LINES = {
    "identical": ("convert", "identity", "outputs", "outputs with recipe"),
    "penalty": ("penalty", "penalty with recipe"),
    "widths": ("widths",),
    "any-bit": ("any_bit",),
}
REMARKS = {
    "quantized": "not quantized",
    "plans": "not planned",
    "plans with recipe": "not planned with dropout",
    "fold": "not folded",
}
HEADER = ("identical", "penalty", "quantized", "planned", "folded", "widths", "export", "any-bit")
NOTE = 160  # characters of a note at most
NOT_APPLICABLE, NOT_MADE = "-", "·"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "onnxruntime")


def text(results: dict[str, Result]) -> str:
    """Return the page."""
    families = dict.fromkeys(MODELS[name].family for name in results)
    parts = [INTRODUCTION, _environment(results), "## By family\n\n", _by_family(results, families)]
    for family in families:
        members = {name: r for name, r in results.items() if MODELS[name].family == family}
        parts += [f"\n## {family}\n\n", _table(("model", *HEADER, "note"), map(_row, members.items()))]
    return "".join(parts)


def _environment(results: dict[str, Result]) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    dates = sorted({result["date"] for result in results.values()})
    when = f"on {dates[0]}" if len(dates) == 1 else f"in several runs from {dates[0]} to {dates[-1]}"
    return f"{len(results)} models {when}: Python {platform.python_version()}, {versions}.\n\n"


def _by_family(results: dict[str, Result], families: Iterable[str]) -> str:
    rows = []
    for family in [*families, "all"]:
        members = [r for name, r in results.items() if family in (MODELS[name].family, "all")]
        cells = [_count(column, members) for column in HEADER]
        rows.append((family, str(len(members)), *cells))
    return _table(("family", "models", *HEADER), rows)


def _count(column: str, members: list[Result]) -> str:
    """Count ticks, or average a share."""
    cells = [cell for result in members if (cell := _cell(column, result)) != NOT_MADE]
    if not cells:
        return NOT_MADE
    if column in LINES:
        made = "" if len(cells) == len(members) else f" of {len(cells)}"
        return f"{cells.count('✓')}{made}"
    firsts = [int(cell.split()[0].rstrip("%")) for cell in cells if "%" in cell.split()[0]]
    return f"{sum(firsts) / len(firsts):.0f}%" if firsts else NOT_APPLICABLE


def _row(item: tuple[str, Result]) -> tuple[str, ...]:
    name, result = item
    note = shortest_reason(result) or _remark(result)
    short = textwrap.shorten(note, NOTE, placeholder=" ...").replace("|", "\\|")
    return f"`{name}`", *(_cell(column, result) for column in HEADER), short


def _remark(result: Result) -> str:
    """Return why something is not whole, where nothing failed."""
    for check in REMARKS:
        record = record_of(result, check)
        if record is not None and not record["ok"]:
            return f"{REMARKS[check]}: {record['reason']}"
    return ""


def _cell(column: str, result: Result) -> str:
    if column in LINES:
        made = [record for check in LINES[column] if (record := record_of(result, check))]
        return "✗" if not all(record["ok"] for record in made) else "✓" if made else NOT_MADE
    checks = {"planned": ("plans", "plans with recipe"), "folded": ("fold",)}.get(column, (column,))
    return " / ".join(_share(record) for check in checks if (record := record_of(result, check))) or NOT_MADE


def _share(record: dict[str, Any]) -> str:
    if record["ok"] and record["value"] is None:
        return NOT_APPLICABLE
    return "✗" if record["value"] is None else f"{100 * record['value']:.0f}%"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
