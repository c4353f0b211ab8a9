"""``gradl1 train``: trains from a recipe into a folder, or resumes the training in one."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gradl1_fast._progress import bars
from gradl1_fast._report.figures import width_name
from gradl1_fast.cli._console import fail, table
from gradl1_fast.cli.app import app
from gradl1_fast.quantization import Table
from gradl1_fast.training import config as configs
from gradl1_fast.training.config import Config
from gradl1_fast.training.loop.ranks import is_first
from gradl1_fast.training.loop.trainer import Trainer, TrainingError
from gradl1_fast.training.methods import METHODS
from gradl1_fast.training.runs import launch as launches
from gradl1_fast.training.runs.folder import Folder
from gradl1_fast.training.toml import parse_value

__all__ = ["train"]

_EPILOG = """[bold]Examples[/bold]

gradl1 train --out runs/digits

gradl1 train --recipe fashion-mnist --out runs/fashion

gradl1 train --resume runs/fashion

torchrun --nproc-per-node 2 -m gradl1_fast train --out runs/two
"""
INTERRUPTED = 130  # the exit status of shells for a command stopped by Ctrl-C
_RECIPE, _OUT = "digits", Path("gradl1-run")
_DATA, _LOOP, _PENALTY, _HOW = "Data and network", "Training", "Penalty", "How it computes"

# Options that stand for one field of the configuration each; the others have another name there.
_FIELDS = {
    "data": {"data_set": "name", "data": "folder", "size": "size", "flip": "flip", "crop": "crop"},
    "model": {"model": "name", "width": "width", "stem": "stem", "per_channel": "per_channel"},
    "optimizer": {
        "optimizer": "name",
        "learning_rate": "learning_rate",
        "momentum": "momentum",
        "weight_decay": "weight_decay",
        "warmup_epochs": "warmup_epochs",
    },
    "training": {
        name: name
        for name in (
            *("epochs", "batch_size", "accumulate", "label_smoothing", "ema", "seed", "precision"),
            *("checkpointing", "compile", "cuda_graph", "checkpoint_steps"),
        )
    },
    "penalty": {"method": "method", "penalty_epochs": "epochs", "penalty_warmup": "warmup_epochs"},
}


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


@app.command(epilog=_EPILOG)
def train(
    recipe: Annotated[
        str, typer.Option(help=f"One of {', '.join(configs.recipes())}, or a .toml file.")
    ] = _RECIPE,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = _OUT,
    resume: Annotated[
        Path | None, typer.Option(help="Resume the run in this folder with its own configuration.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the full configuration, check that it can run, and exit."),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")
    ] = None,
    data_set: Annotated[
        str | None, _option(_DATA, "digits, fashion-mnist, cifar10, or images (a folder of images).")
    ] = None,
    data: Annotated[str | None, _option(_DATA, "Folder of the data set.")] = None,
    model: Annotated[str | None, _option(_DATA, "Name of the network, or timm:NAME.")] = None,
    width: Annotated[int | None, _option(_DATA, "Channels of the first layer.")] = None,
    stem: Annotated[str | None, _option(_DATA, "cifar (small images) or imagenet.")] = None,
    per_channel: Annotated[bool | None, _option(_DATA, "One weight range per output channel.")] = None,
    size: Annotated[
        int | None, _option(_DATA, "Height and width of the images of a folder, in pixels.")
    ] = None,
    flip: Annotated[bool | None, _option(_DATA, "Random horizontal flip.")] = None,
    crop: Annotated[int | None, _option(_DATA, "Maximum random shift in pixels (0 disables it).")] = None,
    epochs: Annotated[int | None, _option(_LOOP, "Number of epochs.")] = None,
    batch_size: Annotated[int | None, _option(_LOOP, "Images per training step.")] = None,
    seed: Annotated[int | None, _option(_LOOP, "Random seed.")] = None,
    optimizer: Annotated[str | None, _option(_LOOP, "sgd, adam or adamw.")] = None,
    learning_rate: Annotated[
        float | None, _option(_LOOP, "Peak learning rate; a cosine schedule lowers it to 0.")
    ] = None,
    momentum: Annotated[float | None, _option(_LOOP, "Momentum of sgd.")] = None,
    weight_decay: Annotated[
        float | None, _option(_LOOP, "Weight decay of all parameters, biases and norms included.")
    ] = None,
    warmup_epochs: Annotated[
        int | None, _option(_LOOP, "Number of linear warm-up epochs of the learning rate.")
    ] = None,
    label_smoothing: Annotated[float | None, _option(_LOOP, "Label smoothing of the cross-entropy.")] = None,
    ema: Annotated[
        float | None, _option(_LOOP, "Decay of the moving average of the weights, such as 0.999.")
    ] = None,
    checkpoint_steps: Annotated[int | None, _option(_LOOP, "Also write a checkpoint every N steps.")] = None,
    method: Annotated[
        str | None, _option(_PENALTY, f"{', '.join(METHODS)}; or several, as gradl1+kure.")
    ] = None,
    penalty_epochs: Annotated[
        int | None, _option(_PENALTY, "Apply the penalty in the last N epochs (0 = off).")
    ] = None,
    penalty_from: Annotated[
        int | None, _option(_PENALTY, "First epoch with the penalty, instead of --penalty-epochs.")
    ] = None,
    penalty_warmup: Annotated[
        int | None, _option(_PENALTY, "Raise the coefficients linearly over N epochs.")
    ] = None,
    coefficient: Annotated[
        float | None, _option(_PENALTY, "lambda_w and lambda_a of gradl1 and l2.", "--lambda")
    ] = None,
    scale: Annotated[
        str | None, _option(_PENALTY, "none, or step: multiply each norm by its quantization step.")
    ] = None,
    every: Annotated[
        int | None, _option(_PENALTY, "Apply the penalty every N steps, multiplied by N.")
    ] = None,
    setting: Annotated[
        list[str] | None, _option(_PENALTY, "Another setting of the method, such as beta=0.002.")
    ] = None,
    precision: Annotated[str | None, _option(_HOW, "float32, bfloat16 or float16.")] = None,
    accumulate: Annotated[
        int | None, _option(_HOW, "Split each batch into N parts (gradient accumulation).")
    ] = None,
    checkpointing: Annotated[bool | None, _option(_HOW, "Recompute activations to save memory.")] = None,
    compile: Annotated[bool | None, _option(_HOW, "Compile the whole step.")] = None,
    cuda_graph: Annotated[bool | None, _option(_HOW, "Capture the whole step in a CUDA graph.")] = None,
) -> None:
    """Train a network with the gradient-l1 penalty, quantize it and report.

    Without options it trains on handwritten digits, in half a minute on one CPU
    core. A recipe sets all values; options override single values.

    The folder of the run holds config.toml, metrics.csv, log.txt, the weights,
    the activation ranges and report.html. To watch the run, use
    tensorboard --logdir FOLDER. Ctrl-C writes a checkpoint and exits with
    status 130; --resume FOLDER continues from there.
    """  # fmt: skip
    given = dict(locals())
    console = Console()
    try:
        config = _resumed(resume, given) if resume else _configured(given)
        folder = resume or out
        if dry_run:
            if is_first():
                print(config.to_toml(), end="")
            launches.rehearse(config, folder, resume=resume is not None, device=device)
            return
        with _bar(config) as (on_step, say):
            found = launches.launch(
                config, folder, resume=resume is not None, device=device, on_step=on_step, say=say
            )
    except KeyboardInterrupt:
        begun = Folder(resume or out).config.is_file()
        how = f"; resume with: gradl1 train --resume {shlex.quote(str(resume or out))}" if begun else ""
        fail(f"stopped{how}", INTERRUPTED)
    except OSError as error:
        fail(f"{error.filename or resume or out}: {error.strerror or error}")
    except (ValueError, TypeError, ImportError, TrainingError) as error:
        fail(str(error))
    if found is not None:
        _print_results(console, config, Folder(folder), found)


def _resumed(folder: Path, given: dict[str, Any]) -> Config:
    allowed = ("resume", "dry_run", "device")
    unset = {"recipe": _RECIPE, "out": _OUT}
    changed = [name for name, value in given.items() if value != unset.get(name) and name not in allowed]
    if changed:
        flags = ["lambda" if name == "coefficient" else name.replace("_", "-") for name in changed]
        names = ", ".join(f"--{flag}" for flag in flags)
        raise ValueError(f"--resume uses the configuration of the run; leave out {names}")
    file = Folder(folder).config
    if not file.is_file():
        raise ValueError(f"{folder}: no run to resume: config.toml is missing")
    return Config.read(file)


def _configured(given: dict[str, Any]) -> Config:
    """Return the recipe with the values that were given."""
    name = given["recipe"]
    config = Config() if name == _RECIPE else Config.read(configs.recipe(name))
    changes: dict[str, dict[str, Any]] = {
        section: {field: given[option] for option, field in names.items() if given[option] is not None}
        for section, names in _FIELDS.items()
    }
    changes["penalty"] |= _penalty(config, given)
    sections = {section: replace(getattr(config, section), **values) for section, values in changes.items()}
    return replace(config, **sections)


def _penalty(config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the method, and when it begins."""
    changed = given["method"] not in (None, config.penalty.method)
    settings = {} if changed else dict(config.penalty.settings)
    if given["coefficient"] is not None:
        settings |= {"lambda_w": given["coefficient"], "lambda_a": given["coefficient"]}
    settings |= {name: given[name] for name in ("scale", "every") if given[name] is not None}
    for text in given["setting"] or []:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--setting must be NAME=VALUE, got {text!r}")
        settings[name.strip()] = parse_value(value.strip())
    values: dict[str, Any] = {"settings": settings}
    if given["penalty_from"] is not None:
        if given["penalty_epochs"] is not None:
            raise ValueError("give --penalty-from or --penalty-epochs, not both")
        epochs = config.training.epochs if given["epochs"] is None else given["epochs"]
        if not 1 <= given["penalty_from"] <= epochs:
            raise ValueError(f"--penalty-from must be from 1 to {epochs}, got {given['penalty_from']}")
        values["epochs"] = epochs - given["penalty_from"] + 1
    return values


@contextmanager
def _bar(config: Config) -> Iterator[tuple[Callable[[Trainer], None], Callable[[str], None]]]:
    """Yield what is called after each step, and with each line of the log; other ranks are silent."""
    with bars(transient=True) if is_first() else nullcontext() as progress:
        if progress is None:
            yield lambda trainer: None, _print_line if is_first() else lambda line: None
            return
        task = progress.add_task("reading data", total=None)

        def on_step(trainer: Trainer) -> None:
            what = f"epoch {trainer.epoch + 1} of {config.training.epochs}"
            total = config.training.epochs * trainer.steps
            progress.update(task, description=what, total=total, completed=trainer.steps_done)

        yield on_step, partial(progress.console.print, highlight=False, markup=False)


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_results(console: Console, config: Config, folder: Folder, found: Table) -> None:
    console.print(f"{config.model.name} on {config.data.name}, equal bits for weights and activations:")
    rows = [(width_name(row.w), f"{row.value:.2f}") for row in found.rows]
    console.print(table("", ("bits", "test accuracy in %"), rows))
    console.print(f"Report: [bold]{folder.report}[/bold]  (open it in a browser)", soft_wrap=True)
