"""The run itself: rows, the gate before any time, processes that fail, files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from bench import plots, results, step
from bench.floors import FLOORS, layers
from bench.measure import quantiles
from bench.processes import LostError, Process, interleaved
from bench.step import Settings, gate
from bench.workloads import Workload

TINY = Workload("stack", 2, 3, 6, 2)
NAMES = ["eager double backprop", "gradl1_fast", "gradl1_fast, CUDA graph"]


@pytest.fixture(scope="module")
def rows() -> list[step.Row]:
    settings = Settings(rounds=3, warm_up=1, providers=NAMES, threads=1)
    return step.measure([TINY], settings, lambda workload, rows: None)


def test_each_row_has_its_measurements_or_the_reason_why_not(rows: list[step.Row]) -> None:
    named = {row["provider"]: row for row in rows}
    assert list(named) == ["plain", *NAMES, *FLOORS]
    assert "CUDA device" in named["gradl1_fast, CUDA graph"]["unavailable"]
    for name in ("plain", "eager double backprop", "gradl1_fast"):
        row = named[name]
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gradient_error"] < 1e-5
        assert row["peak_bytes"] > 0
        assert row["operator_calls"] > 10
        assert row["ratio_to_plain"] == pytest.approx(
            row["median_ms"] / named["plain"]["median_ms"], rel=2e-3
        )
    assert all(named[name]["median_ms"] > 0 for name in FLOORS)


def test_a_wrong_gradient_is_not_timed() -> None:
    rows = {
        "eager double backprop": {"gradient_error": 1e-6},
        "gradl1_fast": {"gradient_error": 2e-4},
        "finite difference": {"gradient_error": 0.3},
    }
    assert "not timed" in gate(rows, "gradl1_fast", 1e-4)["failed"]
    assert not gate(rows, "finite difference", 1e-4)  # its error is a result
    rows["eager double backprop"]["gradient_error"] = 1.5e-4
    assert not gate(rows, "gradl1_fast", 1e-4)
    rows["gradl1_fast"]["gradient_error"] = float("nan")
    assert "not timed" in gate(rows, "gradl1_fast", 1e-4)["failed"]


def test_a_process_that_dies_or_is_late_is_named() -> None:
    with Process("plain", threads=1) as process:
        assert "failed" in process.ask("prepare", workload={"network": "none"}, truth=None, compiler="")
        with pytest.raises(LostError, match="no answer within 0 s"):
            process.ask("prepare", limit=0, workload=TINY.asdict(), truth=None, compiler="")
        with pytest.raises(LostError, match="ended with code -9"):
            process.ask("time")
        process.restart()
        assert process.ask("prepare", workload=TINY.asdict(), truth=None, compiler="")["prepare_s"] > 0


def test_steps_are_taken_in_turns_in_changing_order() -> None:
    taken = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, what: str) -> dict[str, float]:
            taken.append(self.name)
            return {"ms": float(len(taken))}

    times = interleaved({name: Fake(name) for name in "abc"}, range(-1, 2))
    assert taken == ["c", "a", "b", "a", "b", "c", "b", "c", "a"]
    assert times == {"a": [4.0, 9.0], "b": [5.0, 7.0], "c": [6.0, 8.0]}


def test_quantiles() -> None:
    assert quantiles([float(n) for n in range(11)]) == (2.0, 5.0, 8.0)


def test_results_are_written_with_their_environment(rows: list[step.Row], tmp_path: Path) -> None:
    results.write(tmp_path, rows, rounds=3)
    assert results.read(tmp_path) == json.loads(json.dumps(rows))
    assert results.read_environment(tmp_path)["settings"] == {"rounds": 3}
    assert results.read_environment(tmp_path)["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results.read_environment(tmp_path)["measured"]["date"])
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {"operation", "provider", "sweep", "metric", "size", "dtype", "layout", "device"} <= set(lines[0])
    found = [x for x in lines if x["provider"] == "plain" and x["metric"] == "median_ms"]
    assert float(found[0]["value"]) == rows[0]["median_ms"]
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    plots.save(plots.step(rows), tmp_path)
    assert "gradl1_fast" in (tmp_path / "plot.svg").read_text()


def test_floors_count_what_the_algebra_asks_for() -> None:
    task = TINY.task()
    found = layers(task)
    assert [layer.is_first for layer in found if layer.multiplies] == [True, False, False]
    counts = {name: make(task).counts() for name, make in FLOORS.items()}
    # Two convolutions and a linear layer: 3 times (2 + 3 + 3) products in the plain step, 4 + 9 + 9 in ours.
    assert counts["floor: 3 × plain convolutions"] == {"operator_calls": 24}
    assert counts["floor: operator calls"] == {"operator_calls": 22 + 2 * 4 + 4 + 7}
    image, inside, pooled, logits = 3 * 3 * 36, 3 * 2 * 36, 3 * 2, 3 * 10
    values = 4 * (image + inside + 2 * 3 * 9) + 9 * (2 * inside + 2 * 2 * 9)  # convolutions
    values += 9 * (pooled + logits + 2 * 10) + 2 * 21 * inside + 4 * (inside + pooled)
    assert counts["floor: minimal bytes"] == {"bytes_moved": 4 * values}


def test_a_plot_bears_quantiles_that_are_the_median() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), 4.567)
    found = [{"operation": "stack", "size": "2", "provider": "gradl1_fast", "exact": True, **times}]
    for ratio in (0.11, 0.22, 0.44):  # times 4.567 / 4.567 not quite themselves
        assert plots.step([{**found[0], "ratio_to_plain": ratio}]).axes
