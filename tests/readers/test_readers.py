"""Truncated, corrupted and malicious files are refused by name, or read."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("safetensors", reason="weights and ranges are kept by safetensors")
pytest.importorskip("PIL", reason="images are read by Pillow")

from tests.properties.examples import VARIABLE
from tests.readers.table import READERS

ROOT = Path(__file__).parents[2]
MOST_GROWTH = 48 * 2**20  # bytes: a few times the largest of the small files
LONGEST = 1000  # characters of a message

# Of all hostile contents exactly these are read, because nothing in them is wrong for the reader.
_HEADER = {"duplicate entry", "fact in other digits"}  # of two entries JSON takes the last, which is checked
_FACTS = _HEADER | {"large fact", "long fact"}  # of no meaning but for a run
HARMLESS: dict[str, set[str]] = {
    "run weights": _HEADER,
    **dict.fromkeys(("checkpoint weights", "weights file", "batch norms file"), _FACTS),
    # These are empty at the beginning of an epoch; what changes is a random state behind them.
    "checkpoint tensors": _FACTS | {"NaN in seen.0.penalties", "infinity in seen.0.penalties"},
    **dict.fromkeys(("ranges file", "codes in a ranges file"), _FACTS),
    **dict.fromkeys(("any-bit file at 8 bits", "any-bit file at 3 bits"), _FACTS),
    "recipe": {  # nothing is made of it yet, no network either
        *("empty", f"training.epochs = {2**63}", "model.width = 1000000000000", "model.width = 100000"),
        *(f"model.name = {name}" for name in ("'timm:../../x'", "'os.system'", "''", "'\\u0000'")),
        *("penalty.settings = {lambda_w = nan}", "penalty.settings = {'' = 1}"),
    },
    "results": {
        *(
            "method = a",
            "seed = 1",
            "settings = {'a': 1}",
            "row.method = a",
            "row.regime = a",
            "row.top1 = inf",
        ),
        *(f"row.{key} = -1" for key in ("seed", "w", "a", "top1")),
        *("row.w = None", "row.a = None"),
    },
    "image picture.png": {"wide", "high", "endless rows", "huge chunk"},  # no more is taken than is there
    "image picture.tiff": {"many entries"},
}
# Readers that do not need the whole file, and how many bytes of its end they can do without.
CUT = {
    "run configuration": math.inf,  # a setting that is absent has its default
    "recipe": math.inf,
    "results": 1,  # the end of the line
    "any-bit file at 3 bits": math.inf,  # further bits come behind
    "image picture.png": 12,  # the chunk that says that there are no more
}

GROUPS: dict[str, list[str]] = {}
for _name, _reader in READERS.items():
    _kind = "safetensors" if _reader.kind == "safetensors" else "others"
    GROUPS.setdefault(_kind, []).append(_name)  # what a group imports and makes, it does once


def is_cut(row: dict[str, Any]) -> bool:
    """Return whether the end of the file was cut off."""
    return row["damage"].startswith("cut ")


def fault(row: dict[str, Any]) -> str | None:
    """Return what is wrong with the answer to one damaged file."""
    error, kinds = row["error"], row["error"].split(":")[0].split("/")
    if row["executed"]:
        return "code was executed"
    if row["damage"] == "whole" and error:
        return "a whole file is refused"
    if row["hostile"] and not error and row["damage"] not in HARMLESS.get(row["reader"], ()):
        return "it is read"
    if is_cut(row) and not error and row["missing"] > CUT.get(row["reader"], 0):
        return "it is read, though cut"
    if error and not {"ValueError", "ImportError"} & set(kinds):
        return "no error of ours"
    if "ValueError" in kinds and "FILE" not in error and "FOLDER" not in error:
        return "the error names no file"
    if any(word in error.lower() for word in ("memory", "alloc")):
        return "memory was asked for"
    if row["grown"] > MOST_GROWTH:
        return f"it took {row['grown']} bytes"
    return "the message is too long" if len(error) > LONGEST else None


def answers(names: list[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Return the rows of the script for some readers."""
    command = [sys.executable, "-m", "tests.readers.child", str(count), str(seed), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    last = rows[-1] if rows else None
    assert run.returncode == 0, f"{run.stderr[-2000:]}\nafter {last}"
    return rows


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel tells no peak of memory")
@pytest.mark.parametrize("group", GROUPS)
def test_damaged_files_are_refused_by_name_or_read(group: str, request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--hypothesis-seed", default=None)
    rows = answers(GROUPS[group], int(os.environ.get(VARIABLE, 15)), int(seed or 0))
    assert {row["reader"] for row in rows if row["damage"] == "whole"} == set(GROUPS[group])
    faults = [
        f"{row['reader']}, {row['damage']}: {found}: {row['error']:.300}"
        for row in rows
        if (found := fault(row))
    ]
    assert not faults, "\n".join(faults)
    read = [row for row in rows if not row["error"]]
    harmless = {(row["reader"], row["damage"]) for row in read if row["hostile"]}
    assert harmless == {(name, damage) for name in GROUPS[group] for damage in HARMLESS.get(name, ())}
    assert {row["reader"] for row in read if is_cut(row)} == set(GROUPS[group]) & CUT.keys()


GOOD = {
    **{"reader": "ranges file", "damage": "flip 3", "hostile": False, "error": "ValueError: FILE: no"},
    **{"missing": 0, "grown": 0, "executed": False},
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"error": ""}, None),
        ({"executed": True}, "code was executed"),
        ({"damage": "whole"}, "a whole file is refused"),
        ({"hostile": True, "error": ""}, "it is read"),
        ({"hostile": True, "error": "", "damage": "wide"}, "it is read"),
        ({"hostile": True, "error": "", "damage": "long fact"}, None),
        ({"damage": "cut 3", "missing": 1, "error": ""}, "it is read, though cut"),
        ({"damage": "cut 3", "missing": 12, "error": "", "reader": "image picture.png"}, None),
        (
            {"damage": "cut 3", "missing": 13, "error": "", "reader": "image picture.png"},
            "it is read, though cut",
        ),
        ({"error": "KeyError/LookupError: 'FILE'"}, "no error of ours"),
        ({"error": "DataError/ValueError: bad"}, "the error names no file"),
        ({"error": "ValueError: FILE: MemoryError"}, "memory was asked for"),
        ({"grown": 10**9}, "it took 1000000000 bytes"),
        ({"error": "ValueError: FILE" + "a" * 1000}, "the message is too long"),
    ],
)
def test_each_fault_is_detected(change: dict[str, Any], expected: str | None) -> None:
    assert fault({**GOOD, **change}) == expected
