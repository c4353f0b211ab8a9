"""``python -m bench.runtimes``: the tables of docs/runtimes.md, from the results of :mod:`bench.exported`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.pages import between
from bench.processes import HERE
from bench.tables import number

__all__ = ["BEGIN", "END", "PAGE", "main", "rewritten"]

Row = dict[str, Any]
PAGE = HERE / "docs" / "runtimes.md"
RESULTS = HERE / "bench" / "results"
BEGIN, END = "<!-- latencies: written by python -m bench.runtimes -->", "<!-- end of latencies -->"
NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "vgg_like": "VGG-like, six convolutions",
}
RUNTIMES = {"onnxruntime": "onnxruntime", "openvino": "OpenVINO"}
HEADER = ("network", "file", "ms", "over float", "over quantize_static", "layers in integers", "MB")


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(rewritten(PAGE.read_text()))


def rewritten(text: str) -> str:
    """Return the text of the page with its tables made anew."""
    folders = sorted(path.parent for path in RESULTS.glob("*/export/rows.json"))
    return between(text, (BEGIN, END), "\n\n".join(map(_device, folders)), PAGE.name)


def _device(folder: Path) -> str:
    environment, rows = results.read_environment(folder), results.read(folder)
    settings, measured = environment["settings"], environment["measured"]
    device = results.device_of(environment, rows).partition(", torch")[0]
    size = rows[0]["size"].replace("x", "×")
    parts = [f"{device}; {size}; medians of {settings['repeats']} runs in turn; {measured['date']}."]
    for runtime, name in RUNTIMES.items():
        chosen = [row for row in rows if row["sweep"] == runtime]
        if chosen:
            parts += [f"### {name} {settings[runtime].partition('-')[0]}", _table(chosen)]
    return "\n\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    before = ""
    for row in sorted(rows, key=lambda row: list(NETWORKS).index(row["operation"])):
        network = NETWORKS[row["operation"]]
        cells = [network if network != before else "", row["provider"], *_cells(row)]
        lines.append("| " + " | ".join(cells) + " |")
        before = network
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    if "unavailable" in row:
        return ["does not read the file", "", "", "", ""]
    layers = f"{row['integer_layers']} of {row['layers']}" if "layers" in row else "-"
    return [
        number(row["median_ms"], ".1f"),
        number(row["ratio_to_float"], ".2f"),
        number(row["ratio_to_static"], ".2f"),
        layers,
        number(row["bytes"], ".1f", 1e-6),
    ]


if __name__ == "__main__":
    main()
