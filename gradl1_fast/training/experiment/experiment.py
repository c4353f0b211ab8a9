"""Experiments by name: twin networks by every method, over seeds, at the same widths in the same regimes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from gradl1_fast import _environment
from gradl1_fast.backends import backend
from gradl1_fast.quantization import calibrate
from gradl1_fast.training.config import Config, recipe
from gradl1_fast.training.data import Dataset, load
from gradl1_fast.training.experiment import measurements
from gradl1_fast.training.experiment.distributions import distributions
from gradl1_fast.training.experiment.methods import at, check_methods, initialiser_of, method_of, settings_of
from gradl1_fast.training.experiment.regimes import OWN, REGIMES, Width, evaluate
from gradl1_fast.training.experiment.results import ResultError, Results, Row, Run
from gradl1_fast.training.experiment.session import Session
from gradl1_fast.training.loop.simple import accuracy
from gradl1_fast.training.loop.threads import one_thread

__all__ = ["EXPERIMENTS", "Experiment", "run"]

Stage = Callable[[str, int], Callable[[], None]]

WIDTHS: tuple[Width, ...] = (
    *((None, None), (8, 8), (6, 6), (4, 4), (3, 3), (2, 2), (3, 4), (2, 4)),
    *((4, None), (3, None), (2, None)),
)
QUICK_WIDTHS: tuple[Width, ...] = (None, None), (8, 8), (3, 3), (3, None)
DEFAULT_REGIMES = ("per tensor", "per channel", "calibrated")
EVALUATION_BATCH = 200


@dataclass(frozen=True)
class Experiment:
    """What is compared, and on what.

    Attributes:
        config: of every network; ``training.seed`` and the penalty's method and settings are replaced.
        widths: bits of weights and of activations, None for float.
        regimes: keys of :data:`gradl1_fast.training.experiment.REGIMES`.
        calibration: number of training images to calibrate with, from the first on.
        probed: number of training images for the measurements.
        marks: measurements of norms in an epoch.
        alone_bits: width at which one tensor alone is quantized.
        images: number of training images and of test images to use; None for all.
    """

    config: Config
    widths: tuple[Width, ...] = WIDTHS
    regimes: tuple[str, ...] = DEFAULT_REGIMES
    calibration: int = 2000
    probed: int = 500
    marks: int = 4
    alone_bits: int = 3
    images: int | None = None

    @property
    def shared_epochs(self) -> int:
        """The first epochs, which no method changes."""
        return self.config.training.epochs - self.config.penalty.epochs

    def config_of(self, method: str, seed: int) -> Config:
        """Return the configuration of one run."""
        penalty = replace(
            self.config.penalty,
            method=method_of(method),
            settings=settings_of(method, self.config.penalty.settings),
        )
        model = self.config.model
        start = initialiser_of(method)
        if start is not None:
            model = replace(model, initialiser=start)
        training = replace(self.config.training, seed=seed)
        return replace(self.config, model=model, penalty=penalty, training=training)

    def settings_of(self, method: str, seed: int) -> dict[str, Any]:
        """Return everything that decides the result of one run, as it comes back from JSON."""
        others = asdict(replace(self, config=Config()))
        others.pop("config")
        config = asdict(self.config_of(method, seed))
        config["data"].pop("folder")  # where files lie decides nothing
        if config["model"]["initialiser"] is None:
            config["model"].pop("initialiser")  # runs of earlier versions have none
        widths = [list(width) for width in self.widths]
        return {**config, **others, "widths": widths, "regimes": list(self.regimes)}

    def quick(self) -> Experiment:
        """Return tiny settings that show that everything runs, no more."""
        config = replace(
            self.config,
            model=replace(self.config.model, width=4),
            training=replace(self.config.training, epochs=2, batch_size=50),
            penalty=replace(self.config.penalty, epochs=1, warmup_epochs=0),
            optimizer=replace(self.config.optimizer, warmup_epochs=0),
        )
        widths = QUICK_WIDTHS if self.widths == WIDTHS else self.widths
        return replace(self, config=config, widths=widths, calibration=100, probed=50, marks=1, images=200)


# By name, how many of the training images are used; None for all.
EXPERIMENTS: dict[str, int | None] = {
    "fashion-mnist": 20000,
    "fashion-mnist-depthwise": 20000,
    "fashion-mnist-resnet": 20000,
    "digits": None,
}


def named(
    name: str,
    folder: str | None = None,
    regimes: Sequence[str] = DEFAULT_REGIMES,
    widths: Sequence[Width] = WIDTHS,
) -> Experiment:
    """Return an experiment, made of the recipe of the same name.

    Args:
        name: a key of :data:`EXPERIMENTS`.
        folder: of the data; None for where they are usually found.
        regimes: keys of :data:`gradl1_fast.training.experiment.REGIMES`.
        widths: pairs ``(w, a)`` to evaluate at, None for float.

    Raises:
        ValueError: there is no such experiment, no such regime, or no width.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    unknown = [regime for regime in regimes if regime not in REGIMES]
    if unknown or not regimes:
        raise ValueError(f"regimes must be among {'; '.join(REGIMES)}; got {'; '.join(unknown) or 'none'}")
    if not widths:
        raise ValueError("widths must hold at least one pair of bits")
    config = Config.read(recipe(name))
    config = replace(config, data=replace(config.data, folder=folder))
    return Experiment(config, tuple(widths), tuple(regimes), images=EXPERIMENTS[name])


def run(
    experiment: Experiment,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    stage: Stage = lambda what, total: lambda: None,
    on_run: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Run what is not yet in the folder; return all that was asked for.

    It computes with one thread and the reference backend, so that results depend neither on the number
    of cores nor on what is built here.

    Args:
        experiment: see :class:`Experiment`.
        methods: keys of :data:`VARIANTS`, or several with ``+`` between them.
        seeds: one network each.
        folder: each finished run is written into it, and taken from it by the next call.
        stage: called with the name of a stage and its number of parts; returns what is called after
            each part. A progress bar fits.
        on_run: called with the results so far when a run is finished.

    Raises:
        ValueError: a method is unknown.
        ResultError: the folder holds a run with other settings.
    """
    check_methods(list(methods))
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        (method, seed): known
        for method in methods
        for seed in seeds
        if (known := _known(experiment, method, seed, folder)) is not None
    }
    data: Dataset | None = None
    for seed in seeds:
        missing = [method for method in methods if (method, seed) not in found]
        if not missing:
            continue
        data = data or _data(experiment)
        with backend("reference"), one_thread():
            for finished in _runs_of(experiment, missing, seed, data, stage):
                Results([finished]).write_runs(_path(folder, finished.method, seed))
                found[finished.method, seed] = finished
                on_run(_ordered(found, methods, seeds))
    return _ordered(found, methods, seeds)


def _ordered(found: dict[tuple[str, int], Run], methods: Sequence[str], seeds: Sequence[int]) -> Results:
    return Results(found[m, s] for m in methods for s in seeds if (m, s) in found)


def _path(folder: Path, method: str, seed: int) -> Path:
    return folder / f"{method}-seed-{seed}.json"


def _known(experiment: Experiment, method: str, seed: int, folder: Path) -> Run | None:
    path = _path(folder, method, seed)
    if not path.exists():
        return None
    runs = Results.read_runs(path).runs
    if len(runs) != 1 or (runs[0].method, runs[0].seed) != (method, seed):
        raise ResultError(f"{path}: must hold the one run of {method} with seed {seed}")
    if runs[0].settings != experiment.settings_of(method, seed):
        raise ResultError(
            f"{path}: was created with other settings; choose another folder, or remove the file"
        )
    return runs[0]


def _data(experiment: Experiment) -> Dataset:
    source = experiment.config.data
    data, count = load(source.name, source.folder), experiment.images
    train, test = ((x[:count], y[:count]) for x, y in (data.train, data.test))
    return replace(data, train=train, test=test)


def _runs_of(
    experiment: Experiment, methods: Sequence[str], seed: int, data: Dataset, stage: Stage
) -> Iterator[Run]:
    """Run methods in groups that share an initialiser."""
    for initialiser in dict.fromkeys(map(initialiser_of, methods)):
        same = [method for method in methods if initialiser_of(method) == initialiser]
        yield from _runs(experiment, same, seed, data, stage)


def _runs(
    experiment: Experiment, methods: Sequence[str], seed: int, data: Dataset, stage: Stage
) -> Iterator[Run]:
    """Train what methods of one initialiser share, then branch for each of them."""
    plain = experiment.config_of(at("plain", initialiser_of(methods[0])), seed)
    trunk = Session(plain, data, experiment.probed, experiment.marks)
    start = distributions(trunk.trainer.model, "start")
    _train(trunk, experiment.shared_epochs, stage(f"seed {seed}: shared epochs", experiment.shared_epochs))
    for method in methods:
        config = experiment.config_of(method, seed)
        branch = trunk.branch(config)
        _train(branch, config.penalty.epochs, stage(f"seed {seed}: {method}", config.penalty.epochs))
        own = _own_rows(method, seed, branch, data)
        branch.trainer.finish()
        finished = _finished(experiment, method, seed, branch, data, stage, own)
        yield replace(finished, weights=start + distributions(branch.trainer.model, "end"))


def _train(session: Session, epochs: int, after_epoch: Callable[[], None]) -> None:
    for _ in range(epochs):
        session.run_epoch()
        after_epoch()


def _own_rows(method: str, seed: int, branch: Session, data: Dataset) -> list[Row]:
    """Evaluate the widths that the method trained for with its own quantizer, if it has one."""
    objective, rows = branch.trainer.objective, []
    for w, a in objective.widths:
        with branch.trainer.to_be_kept() as model, objective.quantized(w, a):
            top1 = round(accuracy(model, data.test, EVALUATION_BATCH), 4)
        rows.append(Row(method, seed, OWN, w, a, top1))
    return rows


def _finished(
    experiment: Experiment,
    method: str,
    seed: int,
    branch: Session,
    data: Dataset,
    stage: Stage,
    own: list[Row],
) -> Run:
    """Measure, calibrate and evaluate a trained network."""
    model = branch.trainer.model.eval()
    changes = measurements.changes(model, branch.probed)
    calibrate(model, data.train[0][: experiment.calibration].split(EVALUATION_BATCH))
    alone = measurements.alone(model, branch.probed, experiment.alone_bits)
    rows = _rows(experiment, method, seed, model, data, stage) + own
    settings = experiment.settings_of(method, seed)
    return Run(
        method, seed, settings, rows, branch.epochs, branch.norms, changes, alone, _environment.describe()
    )


def _rows(
    experiment: Experiment, method: str, seed: int, model: nn.Module, data: Dataset, stage: Stage
) -> list[Row]:
    widths = experiment.widths
    after_width = stage(f"seed {seed}: {method}, quantized", len(widths) * len(experiment.regimes))

    def top1(quantized: nn.Module) -> float:
        found = accuracy(quantized, data.test, EVALUATION_BATCH)
        after_width()
        return round(found, 4)

    images = data.train[0][: experiment.calibration]
    rows = []
    for name in experiment.regimes:
        values = evaluate(REGIMES[name], model, images, widths, top1, EVALUATION_BATCH)
        rows += [Row(method, seed, name, w, a, v) for (w, a), v in zip(widths, values, strict=True)]
    return rows
