"""A whole run: data, network, training, calibration, report, all in one folder; and taking it up again."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gradl1_fast._report import page
from gradl1_fast.quantization import Table, calibrate, sweep
from gradl1_fast.training import data
from gradl1_fast.training.config import Config
from gradl1_fast.training.data import Dataset
from gradl1_fast.training.loop.norms import step_norms
from gradl1_fast.training.loop.ranks import Ranks, is_first, ranks
from gradl1_fast.training.loop.simple import accuracy
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.reports.run import report
from gradl1_fast.training.runs import checkpoints, rehearsal
from gradl1_fast.training.runs.folder import Folder, RunError, network
from gradl1_fast.training.runs.interruption import interruption
from gradl1_fast.training.runs.recorder import Recorder
from gradl1_fast.training.runs.weights_file import require_safetensors
from gradl1_fast.training.toml import SettingsError

__all__ = ["BITS", "CALIBRATION_IMAGES", "launch", "rehearse"]

BITS: tuple[int | None, ...] = (None, 8, 7, 6, 5, 4, 3, 2)
CALIBRATION_IMAGES = 2048

Progress = Callable[[Trainer], None]


@dataclass(frozen=True)
class _Prepared:
    """A run before its first step; ``rows`` and ``place`` say where one that is resumed stands."""

    run: Folder
    group: Ranks
    images: Dataset
    trainer: Trainer
    rows: list[dict[str, float]]
    place: str


def launch(
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    device: str | None = None,
    on_step: Progress = lambda trainer: None,
    say: Callable[[str], None] = lambda line: None,
) -> Table | None:
    """Train, quantize and report; write everything into one folder.

    Started by torchrun it trains with all its processes, of which the first one writes. After a kill
    at any moment ``resume`` goes on from the last checkpoint, on a CPU to the same weights bit for bit.
    Ctrl-C in a process of its own (not under torchrun) ends the step and writes a checkpoint; a second Ctrl-C
    stops at once.

    Args:
        config: of the run; to resume, that of the folder.
        folder: is made if it is not there.
        resume: go on with what is in the folder.
        device: as for :func:`gradl1_fast.training.loop.ranks.ranks`.
        on_step: called after each step, for a progress bar.
        say: called with each line of the log.

    Returns:
        The test accuracy in percent at equal bits for weights and activations; None on other ranks
        than the first.

    Raises:
        RunError: the folder holds a run already, or none to resume.
        ValueError: settings do not go together, the data are missing, the network does not take such
            images or cannot be differentiated twice where the penalty needs it, or a checkpoint is damaged.
        TrainingError: the loss became NaN or infinite.
        ImportError: a package is not installed; the message says which.
        OSError: the folder cannot be written to.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    with _prepared(config, folder, resume, device) as made:
        run, group, images, trainer = made.run, made.group, made.images, made.trainer
        if group.first and not resume:
            run.path.mkdir(parents=True, exist_ok=True)
            run.write_config(config)
        purge_from = trainer.epoch * trainer.steps if resume else None
        recorder = Recorder(run, made.rows, purge_from, say) if group.first else None
        with contextlib.closing(recorder) if recorder else contextlib.nullcontext():
            if recorder and made.place:
                recorder.log(made.place)
            _train(run, trainer, images, recorder, on_step)
            return _finish(run, trainer, images, recorder) if recorder else None


def rehearse(config: Config, folder: Path, *, resume: bool = False, device: str | None = None) -> None:
    """Raise what :func:`launch` would raise before its first step, and pass one batch through; write nothing.

    It reads the data, builds the network and loads the checkpoint. Problems that only training can show (too
    little memory, a loss that becomes NaN) are not found.

    Args:
        config: as for :func:`launch`.
        folder: as for :func:`launch`.
        resume: as for :func:`launch`.
        device: as for :func:`launch`.

    Raises:
        ValueError: as :func:`launch`.
        ImportError: as :func:`launch`.
        OSError: as :func:`launch`.
    """
    with _prepared(config, folder, resume, device) as made, torch.no_grad():
        x, y = made.trainer.batch(0)
        parts = config.training.accumulate
        made.trainer.loss_of((x.chunk(parts)[0], y.chunk(parts)[0]))


@contextlib.contextmanager
def _prepared(config: Config, folder: Path, resume: bool, device: str | None) -> Iterator[_Prepared]:
    """Do all that comes before the first step and writes nothing."""
    require_safetensors()
    page.check_packages()
    run = Folder(folder)
    if is_first():  # another rank may come when the first one has begun to write
        _check_folder(run, resume)
    with ranks(device) as group:
        images = data.load(config.data.name, config.data.folder, size=config.data.size)
        torch.manual_seed(config.training.seed)
        model = network(config, images.classes, images.channels).to(group.device)
        rehearsal.check(model, images.train[0][:1].to(group.device), config)
        if group.rank:
            torch.manual_seed(config.training.seed + group.rank)  # each draws its own dropout
        trainer = _trainer(model, images, config, group)
        rows, place = _take_up(run, trainer) if resume else ([], "")
        yield _Prepared(run, group, images, trainer, rows, place)


def _check_folder(run: Folder, resume: bool) -> None:
    if resume and not run.config.is_file():
        raise RunError(f"{run.path}: no run to resume: config.toml is missing")
    if not resume and run.config.exists():
        raise RunError(
            f"{run.path}: already holds a run; continue it with --resume, or choose another folder with --out"
        )
    there = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def _trainer(model: nn.Module, images: Dataset, config: Config, group: Ranks) -> Trainer:
    try:
        return Trainer(model, images.train, config, group)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def _take_up(run: Folder, trainer: Trainer) -> tuple[list[dict[str, float]], str]:
    path = checkpoints.latest(run.checkpoints)
    if path is None:
        return [], "resumed before the first checkpoint: starting over"
    rows = checkpoints.load(path, trainer)
    return rows, f"resumed {_position(trainer)}"


def _position(trainer: Trainer) -> str:
    epochs = trainer.config.training.epochs
    where = "at the end of the training" if trainer.done else f"in epoch {trainer.epoch + 1} of {epochs}"
    return f"after {trainer.steps_done} steps, {where}"


def _train(
    run: Folder, trainer: Trainer, images: Dataset, recorder: Recorder | None, on_step: Progress
) -> None:
    every = trainer.config.training.checkpoint_steps

    def keep() -> None:
        state = trainer.state_dict()  # on every rank: they tell each other their random states
        if recorder:
            checkpoints.save(run.checkpoints, trainer, state, recorder.rows)

    def stop_if(interrupted: bool) -> None:
        if interrupted:
            keep()
            if recorder:
                recorder.log(f"stopped {_position(trainer)}; the checkpoint is written")
            raise KeyboardInterrupt

    def after_step(trainer: Trainer) -> None:
        on_step(trainer)
        stop_if(interrupted())
        if every and trainer.step < trainer.steps and trainer.steps_done % every == 0:
            keep()

    # Ranks receive the signal at different steps, and a checkpoint needs all of them.
    with interruption(deferred=trainer.ranks.count == 1) as interrupted:
        while not trainer.done:
            trainer.run_epoch(after_step)
            trainer.average_over_ranks()
            if recorder:
                recorder.epoch(trainer, *_measured(trainer, images))
            trainer.next_epoch()
            keep()
            stop_if(interrupted())


def _measured(trainer: Trainer, images: Dataset) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the test accuracy of what would be kept now, and the norms on some training images."""
    with trainer.to_be_kept() as model:
        found = accuracy(model, images.test)
    settings, device = trainer.config.training, trainer.ranks.device
    some = _drawn(images, settings.seed)[: settings.batch_size // settings.accumulate]
    batch = images.train[0][some].to(device), images.train[1][some].to(device)
    return found, step_norms(trainer.model, lambda: trainer.loss_of(batch))


def _finish(run: Folder, trainer: Trainer, images: Dataset, recorder: Recorder) -> Table:
    """Calibrate on some training images, keep weights and ranges, evaluate every width, report."""
    model = trainer.finish()
    some = images.train[0][_drawn(images, trainer.config.training.seed)[:CALIBRATION_IMAGES]]
    calibrate(model, some.split(256))
    run.write_model(model, images)
    table = sweep(
        model, lambda quantized: accuracy(quantized, images.test), [(b, b) for b in BITS], progress=False
    )
    page.write(run.report, report(trainer.config, recorder.rows, table))
    recorder.log(f"finished: {run.weights.name}, {run.ranges.name}, {run.report.name}")
    return table


def _drawn(images: Dataset, seed: int) -> torch.Tensor:
    """Return an order of the training images in which classes are mixed: folders come class by class."""
    return torch.randperm(len(images.train[1]), generator=torch.Generator().manual_seed(seed))
