"""Runs an experiment: networks by every method, over seeds, at the same widths in the same regimes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from gradl1_fast import _environment
from gradl1_fast.backends import resolve
from gradl1_fast.quantization import calibrate
from gradl1_fast.training.data import Dataset, load
from gradl1_fast.training.experiment import measurements
from gradl1_fast.training.experiment.distributions import distributions
from gradl1_fast.training.experiment.experiment import Experiment
from gradl1_fast.training.experiment.methods import at, check_methods, initialiser_of
from gradl1_fast.training.experiment.regimes import OWN, REGIMES, evaluate
from gradl1_fast.training.experiment.results import ResultError, Results, Row, Run
from gradl1_fast.training.experiment.session import Session
from gradl1_fast.training.loop.simple import accuracy
from gradl1_fast.training.loop.threads import one_thread

__all__ = ["run"]

Stage = Callable[[str, int], Callable[[], None]]
EVALUATION_BATCH = 200


def run(
    experiment: Experiment,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    stage: Stage = lambda what, total: lambda: None,
    on_run: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Run what is not yet in the folder; return all that was asked for.

    It computes with one thread, so that results do not depend on the number of cores. The environment of
    each run names the backend, whose speed and rounding they depend on.

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
        with one_thread():
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
        method, seed, settings, rows, branch.epochs, branch.norms, changes, alone, _environment_of(model)
    )


def _environment_of(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the environment, with the backend that computes the model."""
    chosen = resolve("batch_norm_act", next(model.parameters()))
    return {**_environment.describe(), "backends": {"batch_norm_act": chosen.__name__.rpartition(".")[2]}}


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
