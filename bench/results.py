"""Results as files: rows in JSON and CSV, and the environment beside them."""

from __future__ import annotations

import csv
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.processes import HERE
from gradl1_fast import _environment, _json

__all__ = ["KEYS", "device_name", "device_of", "newest", "read", "read_environment", "write", "write_json"]

Row = dict[str, Any]
# What a row is about; everything else in it is a measurement.
KEYS = ("family", "operation", "sweep", "provider", "size", "dtype", "layout", "device")
_WORDS = ("unavailable", "failed", "note")


def device_name(device: str = "cpu") -> str:
    """Return the name of the folder for results of this machine's device."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = _environment.devices()["cpu"].partition(", torch")[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or platform.machine()


def write(folder: Path, rows: Sequence[Row], **settings: Any) -> None:
    """Write ``rows.json``, ``rows.csv`` (a line for each metric) and ``environment.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "rows.json", rows)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*KEYS, "metric", "value"])
        writer.writerows(_lines(rows))
    environment = {**_environment.describe(), "measured": _measured(), "settings": settings}
    (folder / "environment.json").write_text(_json.dumps(environment, indent=1) + "\n")


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write the list of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(" " + _json.dumps(row) for row in rows)
    path.write_text(f"[\n{text}\n]\n")


def read(folder: Path) -> list[Row]:
    """Return the rows of a folder that :func:`write` wrote."""
    return json.loads((folder / "rows.json").read_text())


def read_environment(folder: Path) -> dict[str, Any]:
    """Return the environment that the rows of a folder were measured in."""
    return json.loads((folder / "environment.json").read_text())


def newest(folders: Iterable[Path]) -> Path:
    """Return the folder whose results are the latest; those without a date, then a time, come first."""
    return max(folders, key=_when)


def _when(folder: Path) -> tuple[str, str]:
    measured = read_environment(folder).get("measured", {})
    return measured.get("date", ""), measured.get("time", "")


def device_of(environment: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the description of the device that the rows were measured on."""
    return environment["devices"]["cuda:0" if rows[0]["device"] == "cuda" else "cpu"]


def _measured() -> dict[str, str]:
    """Return day and time, and the revision where git knows it; ``-dirty`` if changes were not committed."""
    now = datetime.now(timezone.utc)
    found = {"date": now.date().isoformat(), "time": f"{now:%H:%M} UTC"}
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        # The results themselves change while they are written.
        changed = _git("status", "--porcelain", "--untracked-files=no", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without history
        return found
    return {**found, "revision": f"{revision}-dirty" if changed else revision}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(HERE), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _lines(rows: Sequence[Row]) -> Iterable[list[Any]]:
    for row in rows:
        about = [row.get(key, "") for key in KEYS]
        for metric, value in row.items():
            if metric not in KEYS and (value is not None or metric in _WORDS):
                yield [*about, metric, value]
