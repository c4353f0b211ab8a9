"""Thousands of penalised steps with kills, interruptions and resumes; ``make soak`` runs it.

The same training goes once in peace and once through many deaths. Weights, ranges, metrics and events must be
the same to the last bit, and memory must not grow.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from gradl1_fast.training.config import Config
from gradl1_fast.training.trainer import Trainer
from tests.test_faults_training import resident_bytes, tensors
from tests.training import kills

STEPS_AN_EPOCH = 12  # 1,200 digits in batches of 100
SETTLED = 0.2  # of the run: by then allocators and caches have what they need
GROWTH = 8e6  # bytes; a leaked activation would be 2,000 times 25 kB


def configuration(steps: int) -> Config:
    """Return a run with at least so many penalised steps, behind one epoch without penalty."""
    epochs = -(-steps // STEPS_AN_EPOCH)
    training = replace(kills.CONFIG.training, epochs=epochs + 1, checkpoint_steps=7)
    penalty = replace(kills.CONFIG.penalty, epochs=epochs)
    return replace(kills.CONFIG, training=training, penalty=penalty)


class Memory:
    """Notes at the beginning of each epoch how much memory there is in use, and how many tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, trainer: Trainer) -> None:
        """Take note, in a file: the process may die."""
        if trainer.step == 1:
            gc.collect()
            with self.path.open("a") as file:
                file.write(f"{trainer.steps_done},{tensors()},{resident_bytes()}\n")

    def rows(self) -> list[list[int]]:
        """Return steps, tensors and bytes."""
        return [[int(cell) for cell in row] for row in csv.reader(self.path.open())]


def torment(folder: Path, config: Config, deaths: int, chance: random.Random) -> dict[str, int]:
    """Train through so many deaths, then to the end; return how many there were of each kind."""
    counts = dict.fromkeys((*kills.KINDS, "SIGKILL", "SIGINT"), 0)
    steps_a_life = config.training.epochs * STEPS_AN_EPOCH / (deaths + 1)
    while sum(counts.values()) < deaths:
        kind = chance.choice(list(counts))
        how, after = None, None
        if kind.startswith("SIG"):
            after = signal.Signals[kind], chance.uniform(0.05, 0.2 + steps_a_life / 25)
        elif kind == "step":
            how = kind, chance.randrange(int(2 * steps_a_life))
        else:  # a checkpoint of 7 steps calls fsync four times and replace three times
            how = kind, chance.randrange(1, max(2, int(steps_a_life)))
        if kills.child(partial(kills.run, folder, how, config), after):
            return counts
        counts[kind] += 1
    assert kills.child(partial(kills.run, folder, None, config))
    return counts


def differences(one: Path, two: Path) -> list[str]:
    """Return what is not the same in the folders of two runs, entry by entry."""
    found = []
    for name in ("weights.safetensors", "ranges.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        found += [f"{name}: {key}" for key in a.keys() | b.keys() if not _equal(a.get(key), b.get(key))]
    tables = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (one, two)]
    if len(tables[0]) != len(tables[1]):
        found.append(f"metrics.csv: {len(tables[0])} and {len(tables[1])} rows")
    for a, b in zip(*tables, strict=False):
        found += [
            f"metrics.csv: {key} of epoch {a['epoch']}"
            for key in a
            if key != "seconds" and a[key] != b.get(key)
        ]
    return found


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def growth(rows: list[list[int]]) -> tuple[int, int]:
    """Return by how many tensors and bytes a run has grown since it settled."""
    settled = rows[max(3, int(SETTLED * len(rows))) :]  # epochs 1 and 2 have yet to meet every kind of step
    return max(row[1] for row in settled) - min(row[1] for row in settled), settled[-1][2] - settled[0][2]


@dataclass(frozen=True)
class Soaked:
    """What a soak found.

    Attributes:
        steps: penalised ones, in each run.
        deaths: of the second run, by kind; fewer than asked for if it came to its end before.
        resumes: of the second run, as its log counts them.
        differences: between the runs.
        tensors: by how many there were more at the end than when the first run had settled.
        growth: of its memory, in bytes, over the same time.
        memory: that it used at the end, in bytes.
        seconds: that each run took.
    """

    steps: int
    deaths: dict[str, int]
    resumes: int
    differences: list[str]
    tensors: int
    growth: int
    memory: int
    seconds: tuple[float, float]

    def faults(self) -> list[str]:
        """Return what is not as it should be, a sentence each."""
        found = [f"not the same: {difference}" for difference in self.differences]
        if not any(self.deaths.values()):
            found.append("the second run came to its end without a death")
        if self.tensors:
            found.append(f"{self.tensors} tensors more at the end")
        if self.growth > GROWTH:
            found.append(f"{self.growth} bytes more at the end")
        return found


def soak(folder: Path, steps: int, deaths: int, seed: int) -> Soaked:
    """Run both trainings and return what was found."""
    kills.prepare()
    config, memory = configuration(steps), Memory(folder / "memory.csv")
    start = time.perf_counter()
    assert kills.child(lambda: kills.run(folder / "whole", None, config, memory))
    middle = time.perf_counter()
    counts = torment(folder / "killed", config, deaths, random.Random(seed))
    tensors_more, bytes_more = growth(memory.rows())
    return Soaked(
        config.penalty.epochs * STEPS_AN_EPOCH,
        counts,
        (folder / "killed" / "log.txt").read_text().count("resumed"),
        differences(folder / "whole", folder / "killed"),
        tensors_more,
        bytes_more,
        memory.rows()[-1][2],
        (round(middle - start, 1), round(time.perf_counter() - middle, 1)),
    )


def main() -> None:
    """Soak as the arguments say; exit with 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new; keeps both runs")
    parser.add_argument("--steps", type=int, default=2000, help="penalised steps at least (default: 2000)")
    parser.add_argument("--deaths", type=int, default=60, help="kills and interruptions (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death (default: 0)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    found = soak(arguments.folder, arguments.steps, arguments.deaths, arguments.seed)
    print(json.dumps(vars(found), indent=1))
    sys.exit("\n".join(found.faults()) or None)


if __name__ == "__main__":
    main()
