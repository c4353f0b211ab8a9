"""``python -m tests.zoo``: convert models that others wrote, and compare with what they computed before."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.zoo import page, summary
from tests.zoo.models import MODELS
from tests.zoo.progress import Progress
from tests.zoo.runner import Limits, Task, run_all

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def main() -> int:
    """Run what the arguments ask for; fail if a model does."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    names = _chosen(arguments)
    if arguments.list:
        print("\n".join(f"{MODELS[name].family:20} {name}" for name in names))
        return 0
    results = _read(arguments.json) if arguments.resume else {}
    _run([name for name in names if name not in results], results, arguments)
    shown = {name: results[name] for name in MODELS if name in results}
    print(summary.text(shown))
    if arguments.write:
        PAGE.write_text(page.text(shown))
        print(f"written: {PAGE.name}")
    return 0 if all(summary.passed(result) for result in shown.values()) else 1


def _terminate(*_: Any) -> None:
    """End as after Ctrl-C, and with it the processes that were started."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("terminated")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make zoo ARGS=...", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", default="", help="models whose name contains it")
    parser.add_argument("--family", metavar="REGEX", default="", help="models whose family contains it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write results, after each model")
    parser.add_argument("--resume", action="store_true", help="run only what the JSON file does not hold")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md")
    parser.add_argument("--list", action="store_true", help="list the models and their families")
    parser.add_argument("--checks", metavar="REGEX", default="", help="checks whose name contains it")
    parser.add_argument(
        "--exports",
        choices=["family", "all"],
        default="family",
        help="how many models to export",
    )
    parser.add_argument("--jobs", type=int, default=Limits.jobs, help="models side by side")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=Limits.memory / 2**30, help="limit for one model")
    return parser


def _chosen(arguments: argparse.Namespace) -> list[str]:
    return [
        name
        for name, entry in MODELS.items()
        if re.search(arguments.only, name) and re.search(arguments.family, entry.family)
    ]


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        sys.exit("--resume needs --json FILE")
    return json.loads(path.read_text()) if path.exists() else {}


def _run(names: list[str], results: dict[str, Any], arguments: argparse.Namespace) -> None:
    memory = int(arguments.gigabytes * 2**30)
    limits = Limits(arguments.seconds, memory, arguments.jobs, arguments.checks, arguments.exports)
    with Progress(len(names)) as progress:
        for task in run_all(names, limits):
            results[task.name] = _result(task)
            progress.advance(task.name, summary.shortest_reason(results[task.name]) or "ok", task.seconds)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _result(task: Task) -> dict[str, Any]:
    return {
        "family": MODELS[task.name].family,
        "seconds": round(sum(record.get("seconds", 0) for record in task.records), 1),
        "date": time.strftime("%Y-%m-%d"),
        "records": task.records,
    }


if __name__ == "__main__":
    sys.exit(main())
