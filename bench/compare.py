"""``gradl1 bench compare BASE``: the working tree's step against another revision's, in turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import step
from bench.measure import quantiles
from bench.processes import HERE, Process, interleaved
from bench.providers import PLAIN
from bench.step import Settings
from bench.workloads import Workload
from gradl1_fast._progress import track

__all__ = ["NoRevisionError", "compare"]

Row = dict[str, Any]
# What a revision can change; the plain step, by PyTorch alone, shows how far noise goes.
PROVIDERS = (PLAIN, "finite difference", "gradl1_fast", "gradl1_fast, reference", "gradl1_fast, every=4")


class NoRevisionError(ValueError):
    """What was named is no revision of this repository."""


def compare(base: str, workloads: list[Workload], settings: Settings) -> list[Row]:
    """Return a row for each workload and provider: times of the revision and of the working tree.

    Both are measured by the working tree's benchmarks, each provider in two processes that take their
    steps in turn. A gradient that is wrong in either is an error of that row.

    Args:
        base: a revision as git understands it.
        workloads: what to run on.
        settings: how to measure.

    Raises:
        NoRevisionError: git does not know it.
    """
    rows: list[Row] = []
    with checkout(base) as folder, ExitStack() as stack, tempfile.TemporaryDirectory() as truths:
        pairs = {
            (name, side): stack.enter_context(Process(name, library))
            for name in PROVIDERS
            for side, library in (("base", folder), ("tree", HERE))
        }
        for workload in workloads:
            paths = step.truths(workload, PROVIDERS, Path(truths))
            rows += _compare(workload, pairs, paths, settings)
    return rows


def _compare(
    workload: Workload, pairs: dict[tuple[str, str], Process], truths: Any, settings: Settings
) -> list[Row]:
    named = {f"{name} {side}": process for (name, side), process in pairs.items()}
    ready = {}
    for (name, side), process in track(list(pairs.items()), f"{workload.title()}: gradients"):
        ready[name, side] = step.prepare(process, workload, truths, settings)
    plain = [row for (name, _), row in ready.items() if name == PLAIN]
    rounding = max((row.get("gradient_error") or 0.0 for row in plain), default=0.0)
    for (name, _), row in ready.items():
        row |= _gate(name, row, settings.tolerance, rounding)
    good = {key: process for key, process in named.items() if not _problem(ready, key)}
    times = interleaved(good, track(range(-settings.warm_up, settings.rounds), f"{workload.title()}: steps"))
    return [_row(workload, name, times, ready) for name in PROVIDERS]


def _gate(name: str, row: Row, tolerance: float, rounding: float) -> Row:
    """Refuse a wrong gradient; the error of the plain step says what rounding explains, without eager."""
    rows = {step.EAGER[0]: {"gradient_error": rounding}, name: {"gradient_error": None, **row}}
    return step.gate(rows, name, tolerance)


def _problem(ready: dict[tuple[str, str], Row], key: str) -> str | None:
    name, _, side = key.rpartition(" ")
    return ready[name, side].get("failed") or ready[name, side].get("unavailable")


def _row(
    workload: Workload, name: str, times: dict[str, list[float]], ready: dict[tuple[str, str], Row]
) -> Row:
    row: Row = {"operation": workload.network, "size": workload.numbers(), "provider": name}
    for side in ("base", "tree"):
        problem = _problem(ready, f"{name} {side}")
        if problem:
            row["failed"] = f"{side}: {problem}"
            continue
        low, median, high = quantiles(times[f"{name} {side}"])
        row |= {f"{side}_ms": median, f"{side}_p20_ms": low, f"{side}_p80_ms": high}
    if "failed" not in row:
        row["ratio"] = row["tree_ms"] / row["base_ms"]
    return row


@contextmanager
def checkout(base: str) -> Iterator[Path]:
    """Put a revision into a folder of its own, compiled extension included, and take it away again."""
    if _git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}", check=False).returncode:
        raise NoRevisionError(f"{base!r} is no revision of {HERE}")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "base"
        _git("worktree", "add", "--quiet", "--detach", str(folder), base)
        try:
            _extension(base, folder)
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def _extension(base: str, folder: Path) -> None:
    """Give the revision its compiled extension if the working tree has one: copied, or built anew."""
    place = Path("gradl1_fast/backends/compiled")
    built = list((HERE / place).glob("_gradl1*.so"))
    if not built:
        return
    if not _git("diff", "--quiet", base, "--", "csrc", "setup.py", check=False).returncode:
        for file in built:
            shutil.copy(file, folder / place)
        return
    print(f"building the compiled extension of {base} ...", file=sys.stderr)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    # Kernels take minutes to compile and are of no use without a GPU.
    variables = os.environ if torch.cuda.is_available() else {**os.environ, "GRADL1_CUDA": "0"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"it cannot be built, and is measured without: {done.stderr.strip()[-300:]}", file=sys.stderr)


def _git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=HERE, check=check, capture_output=True, text=True)
