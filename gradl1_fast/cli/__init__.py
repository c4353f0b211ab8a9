"""The ``gradl1`` command. Needs typer and rich: ``pip install '.[cli]'``.

Each subcommand has a module of its own; importing it here adds it to the command, in this order.
"""

from gradl1_fast.cli import bench, demo, experiment, export, info, sweep, train
from gradl1_fast.cli.app import app

__all__ = ["app", "bench", "demo", "experiment", "export", "info", "sweep", "train"]
