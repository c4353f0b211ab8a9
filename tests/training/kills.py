"""Trains in child processes that are killed, until one comes to the end; a script for test_resume."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from gradl1_fast.training import data, launch
from gradl1_fast.training.config import Config, Data, Model, Optimizer, Penalty, Training

CONFIG = Config(
    Data(flip=True, crop=1),
    Model(width=4),
    Optimizer("adamw", 0.01, weight_decay=1e-3, warmup_epochs=1),
    Training(epochs=3, batch_size=100, ema=0.9, label_smoothing=0.1, checkpoint_steps=5),
    Penalty("gradl1", 2, 1, {"lambda_w": 0.01, "lambda_a": 0.01, "scale": "step", "every": 2}),
)


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


def run(folder: Path, resume: bool, how: tuple[str, int] | None) -> None:
    """Train in this process, which dies as ``how`` says: in a step, or in the midst of writing."""
    steps = iter(range(10**9))

    def on_step(_: object) -> None:
        if how is not None and how[0] == "step" and next(steps) == how[1]:
            die()

    if how is not None and how[0] != "step":
        name, moment = how[0].split()
        die_at(moment, how[1], name, os)
    launch.launch(CONFIG, folder, resume=resume, device="cpu", on_step=on_step)


def child(folder: Path, resume: bool, how: tuple[str, int] | None, after: float | None) -> bool:
    """Run a child that dies by itself, or is killed from outside ``after`` seconds; say if it ended well."""
    process = os.fork()
    if not process:
        try:
            run(folder, resume, how)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed")
    return os.WIFEXITED(status)


def main() -> None:
    """Train once in peace and once with many deaths, at moments drawn by chance."""
    torch.set_num_threads(1)
    data.load("digits")
    for module in ("torch._dynamo", "matplotlib.backends.backend_svg", "safetensors.torch"):
        importlib.import_module(module)  # once, rather than in each child
    with contextlib.suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")
    whole, killed, chance = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    assert child(whole, False, None, None)
    kinds = ["step", "fsync before", "fsync after", "replace before", "replace after"]
    deaths = 0
    for kind in kinds * 2:
        how = kind, chance.randrange(3, 9) if kind == "step" else chance.randrange(1, 7)
        deaths += not child(killed, (killed / "config.toml").exists(), how, None)
    for _ in range(2):
        resume = (killed / "config.toml").exists()
        deaths += not child(killed, resume, None, chance.uniform(0.05, 0.4))
    assert child(killed, True, None, None)
    print(deaths)


if __name__ == "__main__":
    main()
