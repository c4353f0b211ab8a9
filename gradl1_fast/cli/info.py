"""``gradl1 info``: versions, devices, and the backend of each operation."""

from __future__ import annotations

import torch
from rich.console import Console

from gradl1_fast import _environment, backends
from gradl1_fast.backends import compiled
from gradl1_fast.cli._console import fail, pairs, table
from gradl1_fast.cli.app import app

__all__ = ["info"]


@app.command(epilog="Example: GRADL1_BACKEND=reference gradl1 info")
def info() -> None:
    """Print versions, devices, the compiled extension, and the backend of each operation with the reason.

    Takes a few seconds. Check this first if something is slower than expected.
    """
    console = Console()
    console.print(pairs("Versions", _environment.versions()))
    console.print(pairs("Devices", _environment.devices()))
    console.print(pairs("Compiled extension", compiled.describe()))
    for device in _environment.devices():
        try:
            _print_backends(console, device)
        except (ValueError, backends.UnavailableError) as error:
            fail(str(error))
    variables = _environment.variables()
    if variables:
        console.print(pairs("Environment variables in force", variables))
    else:
        console.print("No environment variable is set; GRADL1_BACKEND chooses a backend by name.")


def _print_backends(console: Console, device: str) -> None:
    rows: list[tuple[str, str]] = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for op in backends.OPERATIONS:
        chosen, others = _choice(op, device)
        rows.append((op, chosen))
        for name, reason in others.items():
            reasons.setdefault((name, reason), []).append(op)
    console.print(table(f"Backends on {device}", ("operation", "computed by"), rows, numbers=False))
    for (name, reason), ops in reasons.items():
        which = "" if len(ops) == len(backends.OPERATIONS) else f" for {', '.join(ops)}"
        console.print(f"  not {name}{which}: {reason}", highlight=False, markup=False)


def _choice(op: str, device: str) -> tuple[str, dict[str, str]]:
    """Return the name of the backend for an operation, and the reason against every other one."""
    tensor = torch.empty(0, device=device)
    chosen = backends.resolve(op, tensor)
    name, others = chosen.__name__, {}
    for candidate in backends.available():
        try:
            with backends.backend(candidate):
                found = backends.resolve(op, tensor)
        except backends.UnavailableError as reason:
            others[candidate] = str(reason)
            continue
        if found is chosen:
            name = candidate
        else:
            others[candidate] = "can, but does not come first; ask for it with GRADL1_BACKEND=" + candidate
    return name, others
