"""What a training leaves in its folder while it goes on: metrics, events for TensorBoard, a log."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradl1_fast import _files
from gradl1_fast._extras import install
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.runs.folder import Folder

__all__ = ["NORM", "PART", "Recorder"]

NORM, PART = "step_norm/", "penalty_term/"  # what the names of columns begin with


class Recorder:
    """Writes the numbers of a training.

    Args:
        folder: of the run.
        rows: of the epochs completed before the training was resumed.
        purge_from: the first step of the epoch in which it was resumed: TensorBoard drops the events of the
            killed run from there on; None for a new run.
        say: called with each line of the log.

    Attributes:
        rows: one dictionary an epoch.
    """

    def __init__(
        self,
        folder: Folder,
        rows: list[dict[str, float]] | None = None,
        purge_from: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.rows, self._say = folder, list(rows or []), say
        self._events = self._open_events(purge_from)

    def log(self, line: str) -> None:
        """Add a line to the log, with the time."""
        self._say(line)
        with open(self.folder.log, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def epoch(self, trainer: Trainer, accuracy: float, norms: dict[str, Tensor]) -> None:
        """Write the numbers of the epoch whose steps have been taken.

        Args:
            trainer: at the end of the epoch.
            accuracy: on the test images, in percent.
            norms: step times gradient norm by name.
        """
        seen = trainer.seen
        parts = {PART + name: value for name, value in seen.mean_parts().items()}
        row = {
            "epoch": trainer.epoch + 1,
            "steps": trainer.steps_done,
            "learning_rate": trainer.rate,
            "loss": _mean(seen.losses),
            "penalty": _mean(seen.penalties),
            "test_accuracy": accuracy,
            "seconds": round(seen.seconds, 3),
            **parts,
            **{NORM + name: float(value) for name, value in norms.items()},
        }
        self.rows.append(row)
        self._write_metrics()
        self._write_events(trainer, row)
        penalty = f", penalty {row['penalty']:.4g}" if trainer.penalised else ""
        self.log(
            f"epoch {trainer.epoch + 1} of {trainer.config.training.epochs}: "
            f"loss {row['loss']:.4f}{penalty}, test accuracy {accuracy:.2f} %, {seen.seconds:.1f} s"
        )

    def close(self) -> None:
        """Write what is still to be written."""
        if self._events is not None:
            self._events.close()

    def _write_metrics(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        _files.write_text(self.folder.metrics, text.getvalue())

    def _open_events(self, purge_from: int | None) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.log(f"no events for TensorBoard: it is not installed; {install('train')}")
            return None
        return SummaryWriter(self.folder.tensorboard, purge_step=purge_from)

    def _write_events(self, trainer: Trainer, row: dict[str, float]) -> None:
        if self._events is None:
            return
        first = trainer.epoch * trainer.steps
        for name, values in (("loss", trainer.seen.losses), ("penalty", trainer.seen.penalties)):
            for place, value in enumerate(torch.stack(values).tolist()):
                self._events.add_scalar(name, value, first + place)
        last = first + trainer.steps - 1
        for name, value in row.items():
            if name not in ("epoch", "steps", "loss", "penalty"):
                self._events.add_scalar(name, value, last)
        self._events.flush()


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())
