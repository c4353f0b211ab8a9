"""Trains in child processes that are killed, until one comes to the end; a script for test_resume."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gradl1_fast.training import data
from gradl1_fast.training.config import Config, Data, Model, Optimizer, Penalty, Training
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.runs import launch

CONFIG = Config(
    Data(flip=True, crop=1),
    Model(width=4),
    Optimizer("adamw", 0.01, weight_decay=1e-3, warmup_epochs=1),
    Training(epochs=3, batch_size=100, ema=0.9, label_smoothing=0.1, checkpoint_steps=5),
    Penalty("gradl1", 2, 1, {"lambda_w": 0.01, "lambda_a": 0.01, "scale": "step", "every": 2}),
)
KINDS = ("step", "fsync before", "fsync after", "replace before", "replace after")
INTERRUPTED = 130  # as a shell says it


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str, count: int, name: str, module: object) -> None:
    """Kill this process before (or after) the ``count``-th call of a function."""
    function, calls = getattr(module, name), iter(range(count))

    def counted(*args: object) -> object:
        last = next(calls) == count - 1
        if last and moment == "before":
            die()
        result = function(*args)
        if last:
            die()
        return result

    setattr(module, name, counted)


def run(
    folder: Path,
    how: tuple[str, int] | None,
    config: Config = CONFIG,
    watch: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    """Train in this process, which dies as ``how`` says: in a step, or in the midst of writing."""
    steps = iter(range(10**9))

    def on_step(trainer: Trainer) -> None:
        watch(trainer)
        if how is not None and how[0] == "step" and next(steps) == how[1]:
            die()

    if how is not None and how[0] != "step":
        name, moment = how[0].split()
        die_at(moment, how[1], name, os)
    resume = (folder / "config.toml").exists()
    launch.launch(config, folder, resume=resume, device="cpu", on_step=on_step)


def child(train: Callable[[], None], after: tuple[signal.Signals, float] | None = None) -> bool:
    """Run a child that dies by itself, or by a signal after some seconds; say whether it came to the end."""
    process = os.fork()
    if not process:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            train()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    if after is not None:
        time.sleep(after[1])
        os.kill(process, after[0])
    status = os.waitpid(process, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, INTERRUPTED):
        raise SystemExit("a child failed")
    return status == 0


def prepare() -> None:
    """Import and read once what each child needs."""
    torch.set_num_threads(1)
    data.load("digits")
    for module in ("torch._dynamo", "matplotlib.backends.backend_svg", "safetensors.torch"):
        importlib.import_module(module)
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")


def main() -> None:
    """Train once in peace and once with many deaths, at moments drawn by chance."""
    prepare()
    whole, killed, chance = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    assert child(lambda: run(whole, None))
    deaths = 0
    for kind in KINDS * 2:
        how = kind, chance.randrange(3, 9) if kind == "step" else chance.randrange(1, 7)
        deaths += not child(partial(run, killed, how))
    for _ in range(2):
        deaths += not child(lambda: run(killed, None), (signal.SIGKILL, chance.uniform(0.05, 0.4)))
    assert child(lambda: run(killed, None))
    print(deaths)


if __name__ == "__main__":
    main()
