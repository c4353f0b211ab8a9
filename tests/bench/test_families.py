"""Operations, growth, and the comparison of revisions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from bench import compare, ops, plots, results, scale, tables
from bench.__main__ import app
from bench.processes import HERE
from bench.step import Settings
from bench.workloads import Workload
from gradl1_fast import backends
from gradl1_fast.backends import reference


def test_every_operation_and_sweep_is_measured_by_every_backend() -> None:
    rows = ops.measure("cpu", smoke=True, rounds=2, compiler="aot_eager")
    assert {row["operation"] for row in rows} == set(backends.OPERATIONS)
    named = {(row["operation"], row["sweep"].partition(",")[0]) for row in rows}
    assert len(named) == 3 * len(backends.OPERATIONS) - 1  # a tap has no forward sweep
    assert {row["provider"] for row in rows} >= {*backends.available(), "plain PyTorch", "torch.compile"}
    assert {(row["dtype"], row["layout"]) for row in rows} == {
        (dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("channels_last", "NCHW")
    }
    assert not [row for row in rows if row.get("failed")]
    for row in rows:
        assert (row["median_ms"] is None) == ("unavailable" in row)
        assert row["gb_per_s"] is None or row["of_copy"] > 0
    assert plots.ops(rows)
    assert tables.ops(rows)[1]


def test_a_wrong_operation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.tap_double_backward

    def wrong(d_dx, d_l1, dy):
        result = right(d_dx, d_l1, dy)
        return result if dy.dtype.itemsize == 8 else result * 1.001

    monkeypatch.setattr(reference, "tap_double_backward", wrong)
    rows = ops.measure("cpu", smoke=True, rounds=2, compiler=None)
    found = [r for r in rows if r["sweep"] == "double backward" and r["operation"] == "tap"]
    failed = [r for r in found if r["provider"] == "reference" and r["dtype"] == "float32"]
    assert all("not timed" in r["failed"] and r["median_ms"] is None for r in failed)


def test_growth_is_measured_in_every_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "SMOKE", {"batch": (2, 4), "depth": (1, 2)})
    monkeypatch.setattr(scale, "RANKS", (2,))
    monkeypatch.setattr(scale, "PROVIDERS", ("plain", "gradl1_fast"))
    rows = scale.measure("cpu", smoke=True, rounds=2)
    found = {(row["sweep"], row["value"]) for row in rows}
    assert found == {("batch", 2), ("batch", 4), ("depth", 1), ("depth", 2), ("ranks", 2)}
    assert not [row for row in rows if row.get("failed")]
    under_ddp = {row["provider"]: row["gradient_error"] for row in rows if row["sweep"] == "ranks"}
    assert under_ddp.keys() == {"plain", "eager double backprop", "gradl1_fast"}
    assert max(under_ddp.values()) < 1e-5
    assert plots.scale(rows)
    assert tables.scale(rows)[1]


def test_a_revision_is_compared_with_the_working_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gradl1_fast").symlink_to(HERE / "gradl1_fast")

    @contextmanager
    def checkout(base: str) -> Iterator[Path]:
        yield tmp_path

    monkeypatch.setattr(compare, "checkout", checkout)
    monkeypatch.setattr(compare, "PROVIDERS", ("gradl1_fast",))
    rows = compare.compare("any", [Workload("stack", 2, 3, 6, 2)], Settings(rounds=3, threads=1))
    assert [row["provider"] for row in rows] == ["gradl1_fast"]
    assert all(row["base_ms"] > 0 and row["tree_ms"] > 0 for row in rows)
    assert len(tables.compared(rows)[1]) == 1


def test_an_unknown_revision_is_named() -> None:
    with pytest.raises(compare.NoRevisionError, match="'no-such-branch' is no revision"):
        compare.compare("no-such-branch", [], Settings())


def test_a_revision_is_checked_out_and_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "file").write_text("old")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "old"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "file").write_text("new")
    monkeypatch.setattr(compare, "HERE", tmp_path)
    with compare.checkout("HEAD") as folder:
        assert (folder / "file").read_text() == "old"
    assert not folder.exists()
    worktrees = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(worktrees.splitlines()) == 1


def test_the_command_writes_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import step

    monkeypatch.setattr(step, "SMOKE", [Workload("stack", 2, 3, 6, 2)])
    monkeypatch.setattr(step, "PROVIDERS", {n: step.PROVIDERS[n] for n in ("plain", "gradl1_fast")})
    monkeypatch.setattr(step, "FLOORS", {})
    result = CliRunner().invoke(app, ["step", "--smoke", "--json", str(tmp_path / "new" / "rows.json")])
    assert result.exit_code == 0, result.output
    assert "gradl1_fast" in result.output
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    keys = {"provider", "median_ms", "ratio_to_plain", "gradient_error", "peak_bytes"}
    assert all(keys <= row.keys() for row in rows)
    assert {"plain", "gradl1_fast"} <= {row["provider"] for row in rows}


@pytest.mark.parametrize("family", [ops, scale], ids=lambda module: module.__name__)
def test_what_was_measured_is_shown_and_kept(
    family: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = family.__name__.rpartition(".")[2]
    rows = results.read(next((HERE / "bench" / "results").glob(f"*/{name}")))
    monkeypatch.setattr(family, "measure", lambda device, **how: rows)
    shown = CliRunner(env={"COLUMNS": "160"}).invoke(app, [name, "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert ("Operations, float32" if name == "ops" else "Growth with batch") in shown.output
    assert results.read(tmp_path / name) == rows
    assert {path.suffix for path in (tmp_path / name).iterdir()} == {".json", ".csv", ".svg"}
    (tmp_path / "file").touch()
    refused = CliRunner().invoke(app, [name, "--out", str(tmp_path / "file")])
    assert refused.exit_code == 1
    assert "cannot write the results" in refused.output


def test_what_is_not_known_is_refused_before_the_work() -> None:
    for arguments, message in (
        (["compare", "no-such-branch", "--smoke"], "'no-such-branch' is no revision"),
        (["step", "--network", "lenet", "--smoke"], "--network: one of "),
    ):
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 1
        assert message in refused.output


def test_outside_a_checkout_one_sentence_says_so(tmp_path: Path) -> None:
    (tmp_path / "gradl1_fast").symlink_to(HERE / "gradl1_fast")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['gradl1', 'bench', 'step']\n"
    code += "from gradl1_fast.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 1
    assert result.stderr.startswith("gradl1: gradl1 bench runs in a checkout of the project")
    assert len(result.stderr.splitlines()) == 1


def test_the_command_runs_the_benchmarks_of_the_checkout_from_any_folder(tmp_path: Path) -> None:
    if sys.version_info >= (3, 11):  # earlier the folder comes first, whatever the environment says
        (tmp_path / "bench.py").write_text("raise SystemExit('another module of this name')")
    code = f"import sys; sys.path.append({str(HERE)!r}); from gradl1_fast.__main__ import main; main()"
    unset = ("PYTHONSAFEPATH", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    refused = subprocess.run(
        [sys.executable, "-c", code, "bench", "step", "--network", "lenet"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert refused.returncode == 1
    assert "--network: one of" in refused.stderr


def test_the_command_leaves_the_path_of_its_process_as_it_is() -> None:
    sources = (HERE / "gradl1_fast").rglob("*.py")
    assert not [str(path) for path in sources if "sys.path" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--device", "cuda"]])
def test_a_device_that_is_not_here_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(app, ["ops", *arguments])
    assert result.exit_code == 1
    assert "--device" in result.output
