"""Two processes that train together over gloo; a script for test_ranks, which compares what they write."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.training.config import Config, Penalty, Training
from gradl1_fast.training.loop.ranks import ALONE, Ranks, ranks
from gradl1_fast.training.loop.trainer import Trainer, TrainingError
from gradl1_fast.training.methods import make

METHODS: dict[str, dict[str, object]] = {
    "gradl1": {"lambda_w": 0.05, "lambda_a": 0.03, "scale": "step"},
    "plain": {},
    "l2": {"lambda_w": 0.1, "lambda_a": 0.1},
    "kure": {"coefficient": 0.1},
    "defensive": {"beta": 0.01},
}
CASES = [("gradl1", 3), *((method, 1) for method in METHODS)]
DATA = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(5)), torch.arange(24) % 3


def network() -> nn.Module:
    """Return a network without batch norm, whose gradients are the means over any parts of a batch."""
    torch.manual_seed(7)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 3)
    return gl.convert(nn.Sequential(*layers))


def config(method: str = "gradl1", **training: object) -> Config:
    whole = {"epochs": 1, "batch_size": 12, **training}
    penalty = Penalty(method, 1, 0, METHODS[method])
    return Config(training=Training(**whole), penalty=penalty)  # type: ignore[arg-type]


def gradients(trainer: Trainer) -> list[Tensor]:
    """Return the gradients of the next step, without taking it."""
    x, y = trainer.batch(0)
    count = trainer.config.training.accumulate
    parts = list(zip(x.chunk(count), y.chunk(count), strict=True))
    trainer.optimizer.zero_grad()
    trainer.gradients(trainer.objective, parts, trainer.scaler)
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def one_rank(rank: int, folder: str, store: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store}
    with ranks("cpu") as group:
        found: dict[str, object] = {}
        for method, accumulate in CASES:
            trainer = Trainer(network(), DATA, config(method, accumulate=accumulate), group)
            calls = count_exchanges(trainer)
            found[f"gradients {method} {accumulate}"] = gradients(trainer)
            found[f"exchanges {method} {accumulate}"] = len(calls)
        trainer = Trainer(network(), DATA, config(), group)
        trainer.run_epoch()
        trainer.average_over_ranks()
        found["weights"] = [p.detach().clone() for p in trainer.model.parameters()]
        found["losses"] = torch.stack(trainer.seen.losses)
        found["state"] = trainer.state_dict()
        found["refused"] = refusals(group)
        found["stopped"] = stopped(group)
        torch.save(found, f"{folder}/{rank}.pt")


def count_exchanges(trainer: Trainer) -> list[None]:
    """Count the buckets that are averaged: one for so small a network, once a step."""
    calls: list[None] = []

    def hook(_, bucket):  # torch checks the annotations, and cannot read those of this file
        calls.append(None)
        work = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return work.then(lambda done: done.value()[0])

    trainer.gradients.model.register_comm_hook(None, hook)  # type: ignore[attr-defined]
    return calls


def refusals(group: Ranks) -> dict[str, str]:
    said = {}
    for name, method, settings, batch in (
        ("sam", "sam", {"epsilon": 0.01}, 12),
        ("qat", "qat", {"w": 4, "a": 4}, 12),
        ("finite difference", "gradl1", {"lambda_w": 0.1, "method": "finite_difference"}, 12),
        ("odd", "plain", {}, 9),
    ):
        wrong = Config(training=Training(1, batch), penalty=Penalty(method, 1, 0, settings))
        try:
            Trainer(network(), DATA, wrong, group)
        except ValueError as error:
            said[name] = str(error)
    return said


def stopped(group: Ranks) -> str:
    """Return what ends a training in which the first rank alone meets an image that is no number."""
    trainer = Trainer(network(), DATA, config(), group)
    x, y = trainer.batch(0)
    trainer.batch = lambda step: (x / group.rank, y)  # type: ignore[method-assign]
    try:
        trainer.run_epoch()
    except TrainingError as error:
        return str(error)
    return ""


def alone(rank: int, method: str, accumulate: int) -> list[Tensor]:
    """Return the gradients of a rank's share of the batch, computed by one process."""
    trainer = Trainer(network(), DATA, config(), ALONE)
    x, y = trainer.batch(0)
    objective = make(method, trainer.model, **METHODS[method])
    trainer.optimizer.zero_grad()
    for part in zip(x[rank::2].chunk(accumulate), y[rank::2].chunk(accumulate), strict=True):
        objective.backward(lambda part=part: trainer.loss_of(part), lambda loss: loss / accumulate)  # type: ignore[misc]
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(one_rank, (folder, sys.argv[2]), nprocs=2)
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    expected = {f"{case[0]} {case[1]}": [alone(rank, *case) for rank in range(2)] for case in CASES}
    torch.save({"found": found, "expected": expected}, sys.argv[1])


if __name__ == "__main__":
    main()
