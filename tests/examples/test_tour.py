"""The example notebook: it is stored without outputs, and runs from top to bottom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="reads the notebook")

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
CELLS = {"convert", "train", "sweep", "prepare", "sweep-prepared", "save", "export"}


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the notebook after a run in an empty folder, and the folder."""
    nbclient = pytest.importorskip("nbclient", reason="runs the notebook")
    for package in ("ipykernel", "sklearn", "onnx", "onnxruntime", "safetensors"):
        pytest.importorskip(package, reason="the notebook needs it")
    folder = tmp_path_factory.mktemp("tour")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return notebook, folder


def output(executed: Any, cell: str) -> dict[str, str]:
    """Return what a cell shows, by MIME type; printed text is text/plain."""
    (source,) = (c for c in executed[0].cells if c["id"] == cell)
    (shown,) = (o for o in source.outputs if o.output_type != "stream" or o.name == "stdout")
    return {"text/plain": shown.text} if shown.output_type == "stream" else shown.data


def test_it_is_valid_and_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert {cell["id"] for cell in code} >= CELLS
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@pytest.mark.parametrize(
    ("cell", "columns"),
    [
        ("convert", ("class", "penalised", "operation")),
        ("train", ("term", "step × norm", "share")),
        ("sweep", ("w", "a", "value")),
        ("prepare", ("step", "criterion")),
    ],
)
def test_results_are_shown_as_tables(executed: Any, cell: str, columns: tuple[str, ...]) -> None:
    shown = output(executed, cell)["text/html"]
    assert all(f">{column}</th>" in shown for column in columns)


def test_the_network_learns_and_preparing_it_helps(executed: Any) -> None:
    before, after = (table(output(executed, cell)["text/plain"]) for cell in ("sweep", "sweep-prepared"))
    assert before["float", "float"] > 85
    assert after["float", "float"] == pytest.approx(before["float", "float"], abs=0.5)
    assert after["3", "3"] > before["3", "3"] + 2


def table(text: str) -> dict[tuple[str, str], float]:
    rows = [line.split() for line in text.splitlines()[1:]]
    return {(w, a): float(value) for w, a, value in rows}


def test_files_are_written(executed: Any) -> None:
    assert {path.name for path in executed[1].iterdir()} == {"tour.safetensors", "tour.onnx"}
    assert "bytes read for 4 bits" in output(executed, "save")["text/plain"]
    assert float(output(executed, "export")["text/plain"].split()[-2]) > 80
