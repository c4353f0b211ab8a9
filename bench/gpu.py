"""All steps and operations on a GPU, with the Python at hand: nothing but PyTorch is needed.

    python -m bench.gpu --out results

Writes ``<out>/<device>/step`` and ``<out>/<device>/ops``; the same as ``gradl1 bench --device cuda``, with
TF32 besides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import ops, results, step, tables
from bench.workloads import Workload


def main() -> int:
    """Measure; return 1 if there is no device, or a provider failed that should have run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the results")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each provider (default 10)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device here", file=sys.stderr)
        return 1
    folder = args.out / results.device_name("cuda")
    todo = step.workloads("cuda")
    todo += [replace(workload, tf32=True) for workload in todo]
    rows = step.measure(todo, step.Settings(rounds=args.rounds), _print)
    results.write(folder / "step", rows, rounds=args.rounds)
    of_ops = ops.measure("cuda")
    results.write(folder / "ops", of_ops)
    print(_text(tables.ops(of_ops)))
    failed = [row for row in rows + of_ops if row.get("failed")]
    for row in failed:
        print(f"{row['operation']}, {row['provider']}: {row['failed']}", file=sys.stderr)
    print(f"\nwritten to {folder}")
    return 1 if failed else 0


def _print(workload: Workload, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{workload.title()}{', TF32' if workload.tf32 else ''}\n{_text(tables.steps(rows))}")
    for reason in tables.reasons(rows):
        print(f"  not {reason}")


def _text(content: tables.Table) -> str:
    """Return a table in columns."""
    header, rows = content
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
