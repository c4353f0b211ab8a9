"""``gradl1 bench``: runs the benchmarks of the checkout in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from gradl1_fast.cli._console import fail
from gradl1_fast.cli.app import app

__all__ = ["bench"]

_ROOT = Path(__file__).parents[2]
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure operations and training steps, by this library and its peers (in a checkout)."""
    if not (_ROOT / "bench" / "__main__.py").is_file():
        fail("gradl1 bench runs in a checkout of the project, installed by pip install -e '.[cli,bench]'")
    command = [sys.executable, "-m", "bench", *context.args]
    raise typer.Exit(subprocess.run(command, env=_environment(), check=False).returncode)


def _environment() -> dict[str, str]:
    """Return the environment in which Python finds the benchmarks, and no other package of their name."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
