"""Thousands of penalised steps with kills, interruptions and resumes; ``make soak`` runs it.

The same training goes once in peace and once through many deaths. Weights, ranges, metrics and events must be
the same to the last bit, each resume must go on from the newest checkpoint, memory must not grow, and regions
must have run.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from gradl1_fast.training.config import Config
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.runs.folder import Folder
from tests.conversion.region_checks import regions_of
from tests.test_faults_training import resident_bytes, tensors
from tests.training import kills

STEPS_AN_EPOCH = 12  # 1,200 digits in batches of 100
SETTLED = 0.2  # of the run: by then allocators and caches have what they need
SIGNALS = ("SIGKILL", "SIGINT")
GROWTH = 8e6  # bytes; a leaked activation would be 2,000 times 25 kB

How = tuple[str, int] | None
After = tuple[signal.Signals, float] | None


def configuration(steps: int) -> Config:
    """Return a run with at least so many penalised steps, behind one epoch without penalty."""
    epochs = -(-steps // STEPS_AN_EPOCH)
    training = replace(kills.CONFIG.training, epochs=epochs + 1, checkpoint_steps=7)
    penalty = replace(kills.CONFIG.penalty, epochs=epochs)
    return replace(kills.CONFIG, training=training, penalty=penalty)


class Memory:
    """Notes at the beginning of each epoch how many tensors there are, bytes in use, and regions that run."""

    def __init__(self, path: Path) -> None:
        self.path, self.regions = path, 0

    def __call__(self, trainer: Trainer) -> None:
        """Take note, in a file: the process may die. The first step of an epoch has hooks, and no regions."""
        self.regions = max(self.regions, running_regions(trainer.model))
        if trainer.step == 1:
            gc.collect()
            with self.path.open("a") as file:
                counts = trainer.steps_done, tensors(), resident_bytes(), self.regions
                file.write(",".join(map(str, counts)) + "\n")

    def rows(self) -> list[list[int]]:
        """Return steps, tensors, bytes and regions."""
        return [[int(cell) for cell in row] for row in csv.reader(self.path.open())]


def running_regions(model: torch.nn.Module) -> int:
    """Return how many regions of a model ran as such in its last penalised step."""
    return sum(not region.reason for region in regions_of(model))


def newest(folder: Path) -> int:
    """Return after how many steps the newest checkpoint of a run was written; 0 where there is none."""
    return max((int(path.name[5:]) for path in Folder(folder).checkpoints.glob("step-*")), default=0)


def resumed(folder: Path) -> list[int]:
    """Return after how many steps a run went on each time, as its log says."""
    log = Folder(folder).log
    lines = log.read_text().splitlines() if log.exists() else []
    found = [re.search(r"resumed (?:after (\d+) steps|before the first)", line) for line in lines]
    return [int(match[1] or 0) for match in found if match]


@dataclass
class Torment:
    """A run that is killed time after time, then left to come to its end.

    Attributes:
        folder: of the run.
        config: of the run.
        pace: seconds that a step takes.
        watch: called after each step.
        deaths: how many there were of each kind.
        resumes: for each one, the steps of the newest checkpoint and those after which the run went on.
    """

    folder: Path
    config: Config
    pace: float
    watch: Callable[[Trainer], None]
    deaths: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*kills.KINDS, *SIGNALS), 0))
    resumes: list[tuple[int, int]] = field(default_factory=list)

    def run(self, deaths: int, chance: random.Random) -> None:
        """Train through so many deaths, then to the end; it may come before, by bad luck."""
        steps = self.config.training.epochs * STEPS_AN_EPOCH
        for more in range(deaths, 0, -1):
            kind = chance.choice(list(self.deaths))
            life = (steps - newest(self.folder)) / (more + 1)  # on the average
            if self._live(*self._death(kind, life, chance)):
                return
            self.deaths[kind] += 1
            _say(f"death {deaths - more + 1} of {deaths}: {kind}, checkpoint of step {newest(self.folder)}")
        assert self._live(None, None)

    def _death(self, kind: str, life: float, chance: random.Random) -> tuple[How, After]:
        """Draw a moment in so many steps, or about."""
        if kind in SIGNALS:
            return None, (signal.Signals[kind], 0.05 + chance.uniform(0, life * self.pace))
        if kind == "step":
            return (kind, chance.randrange(max(1, int(2 * life)))), None
        # a checkpoint, every 7 steps, calls fsync seven times and replace four times
        return (kind, chance.randrange(1, max(2, int(life * 6 / 7)))), None

    def _live(self, how: How, after: After) -> bool:
        held, before = newest(self.folder), len(resumed(self.folder))
        ended = kills.child(partial(kills.run, self.folder, how, self.config, self.watch), after)
        self.resumes += [(held, place) for place in resumed(self.folder)[before:]]
        return ended


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


def excess(whole: list[list[int]], killed: list[list[int]]) -> tuple[int, int]:
    """Return by how many tensors and bytes the one run has more, at any time, than the other ever."""
    tensors_more, bytes_more = (max(row[i] for row in killed) - max(row[i] for row in whole) for i in (1, 2))
    return tensors_more, bytes_more


@dataclass(frozen=True)
class Soaked:
    """What a soak found.

    Attributes:
        steps: penalised ones, in each run.
        asked: how many deaths were asked for.
        deaths: of the second run, by kind.
        resumes: of the second run: the steps of the newest checkpoint, and those after which it went on.
        differences: between the runs.
        tensors: by how many there were more at the end than when the first run had settled.
        growth: of its memory, in bytes, over the same time.
        memory: that it used at the end, in bytes.
        killed_tensors: by how many the second run had more, at any time, than the first one ever.
        killed_growth: the same of its memory, in bytes.
        regions: that ran as such in the first run.
        seconds: that each run took.
    """

    steps: int
    asked: int
    deaths: dict[str, int]
    resumes: list[tuple[int, int]]
    differences: list[str]
    tensors: int
    growth: int
    memory: int
    killed_tensors: int
    killed_growth: int
    regions: int
    seconds: tuple[float, float]

    def faults(self) -> list[str]:
        """Return what is not as it should be, a sentence each."""
        found = [f"not the same: {difference}" for difference in self.differences]
        died = sum(self.deaths.values())
        if died < self.asked:
            found.append(f"only {died} of {self.asked} deaths: the second run came to its end before")
        found += [
            f"resumed after {place} steps, with a checkpoint of {held}"
            for held, place in self.resumes
            if place != held
        ]
        if self.asked and not any(place for _, place in self.resumes):
            found.append("not once resumed after a step")
        for name, count in (("at the end", self.tensors), ("when killed", self.killed_tensors)):
            if count > 0:
                found.append(f"{count} tensors more {name}")
        for name, size in (("at the end", self.growth), ("when killed", self.killed_growth)):
            if size > GROWTH:
                found.append(f"{size} bytes more {name}")
        if not self.regions:
            found.append("no regions ran")
        return found


def soak(folder: Path, steps: int, deaths: int, seed: int) -> Soaked:
    """Run both trainings and return what was found."""
    kills.prepare()
    config = configuration(steps)
    whole, killed = (Memory(folder / f"memory-{name}.csv") for name in ("whole", "killed"))
    start = time.perf_counter()
    _say(f"{config.penalty.epochs * STEPS_AN_EPOCH} penalised steps in peace ...")
    assert kills.child(partial(kills.run, folder / "whole", None, config, whole))
    middle = time.perf_counter()
    pace = (middle - start) / (config.training.epochs * STEPS_AN_EPOCH)
    _say(f"{middle - start:.0f} s. The same through {deaths} deaths ...")
    torment = Torment(folder / "killed", config, pace, killed)
    torment.run(deaths, random.Random(seed))
    end = time.perf_counter()
    return Soaked(
        config.penalty.epochs * STEPS_AN_EPOCH,
        deaths,
        torment.deaths,
        torment.resumes,
        differences(folder / "whole", folder / "killed"),
        *growth(whole.rows()),
        whole.rows()[-1][2],
        *excess(whole.rows(), killed.rows()),
        whole.rows()[-1][3],
        (round(middle - start, 1), round(end - middle, 1)),
    )


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


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
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in vars(found).items()]
    print("{" + ",\n ".join(lines) + "}")
    sys.exit("\n".join(found.faults()) or None)


if __name__ == "__main__":
    main()
