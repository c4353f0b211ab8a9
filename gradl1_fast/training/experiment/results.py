"""What an experiment finds: one file for each finished run, and the rows of all of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from gradl1_fast import _files, _json
from gradl1_fast.training.experiment.distributions import Distribution
from gradl1_fast.training.experiment.measurements import Alone, Change, Norms
from gradl1_fast.training.experiment.methods import at, initialiser_of
from gradl1_fast.training.experiment.regimes import OWN
from gradl1_fast.training.experiment.session import Epoch
from gradl1_fast.training.toml import SettingsError, from_dict

__all__ = ["ResultError", "Results", "Row", "Run", "Spread"]

Width = tuple[int | None, int | None]


class ResultError(ValueError):
    """A file is not a result of an experiment, or of another one; the message names it."""


@dataclass(frozen=True)
class Row:
    """The accuracy of one network in one regime at one width.

    Attributes:
        method: key of :data:`gradl1_fast.training.experiment.VARIANTS`.
        seed: of initialisation, order and augmentation.
        regime: key of :data:`gradl1_fast.training.experiment.REGIMES`, or ``"own quantizer"``.
        w: bits of the weights, None for float.
        a: bits of the activations, None for float.
        top1: test accuracy in percent.
    """

    method: str
    seed: int
    regime: str
    w: int | None
    a: int | None
    top1: float


@dataclass(frozen=True)
class Run:
    """One network: how it was trained, and what was found.

    Attributes:
        method: as in :class:`Row`.
        seed: as in :class:`Row`.
        settings: everything that decides the result, as plain values.
        rows: accuracies.
        epochs: one entry for each epoch, those shared with other methods included.
        norms: of gradients, over training.
        changes: of the loss, when weights move.
        alone: the loss when one tensor alone is quantized.
        environment: versions and devices.
        weights: distributions of the weights, at the start and at the end.
    """

    method: str
    seed: int
    settings: dict[str, Any]
    rows: list[Row]
    epochs: list[Epoch]
    norms: list[Norms]
    changes: list[Change]
    alone: list[Alone]
    environment: dict[str, dict[str, str]]
    weights: list[Distribution] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; :meth:`from_dict` gives the run back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Run:
        """Return the run of :meth:`to_dict`.

        Raises:
            ResultError: the values are those of something else; names ``where``.
        """
        values = {"weights": [], **values}  # runs of earlier versions have none
        _check_kinds(values, where)
        try:
            lists: dict[str, Any] = {
                key: [from_dict(kind, _with_nan(kind, entry), f"[{key}]") for entry in values[key]]
                for key, kind in _LISTS.items()
            }
            return cls(**{**values, **lists})
        except (SettingsError, TypeError) as error:
            raise ResultError(f"{where}: not a result of gradl1 experiment: {error!s:.300}") from error


_LISTS: dict[str, type] = {
    **{"rows": Row, "epochs": Epoch, "norms": Norms, "changes": Change, "alone": Alone},
    "weights": Distribution,
}
_KINDS = {"method": str, "seed": int, "settings": dict, "environment": dict} | dict.fromkeys(_LISTS, list)


def _with_nan(kind: type, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry with NaN where a number was not finite: JSON has null there. An accuracy is finite."""
    numbers = {each.name for each in fields(kind) if each.type == "float" and kind is not Row}
    return {name: math.nan if value is None and name in numbers else value for name, value in entry.items()}


def _check_kinds(values: dict[str, Any], where: str) -> None:
    for key, kind in _KINDS.items():
        if type(values.get(key)) is not kind:
            raise ResultError(f"{where}: not a result of gradl1 experiment: {key} must be a {kind.__name__}")
    tables = [entry for key in _LISTS for entry in values[key]] + list(values["environment"].values())
    if not all(isinstance(table, dict) for table in tables):
        raise ResultError(f"{where}: not a result of gradl1 experiment: its entries must be objects")


@dataclass(frozen=True)
class Spread:
    """Values over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the sample, None for a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """Return the mean and, of several values, their standard deviation."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:.1f}{spread}"


T = TypeVar("T")


def _in_all(found: list[list[T]]) -> list[T]:
    """Return what is in every list, in the order of the first, each once."""
    first = dict.fromkeys(found[0]) if found else {}
    return [entry for entry in first if all(entry in other for other in found)]


class Results:
    """All runs of one experiment.

    Args:
        runs: in the order in which methods are to be shown.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)

    @property
    def methods(self) -> list[str]:
        """The methods that have a run."""
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def widths(self) -> list[Width]:
        """The widths at which every run was evaluated in the regimes."""
        return _in_all([[(row.w, row.a) for row in run.rows if row.regime != OWN] for run in self.runs])

    @property
    def regimes(self) -> list[str]:
        """The regimes in which every run was evaluated; a method's own quantizer is not one of them."""
        return _in_all([[row.regime for row in run.rows if row.regime != OWN] for run in self.runs])

    def own_widths(self, method: str) -> list[Width]:
        """Return the widths at which a method was evaluated with its own quantizer."""
        return _in_all([[(row.w, row.a) for row in run.rows if row.regime == OWN] for run in self.of(method)])

    def of(self, method: str) -> list[Run]:
        """Return the runs of a method."""
        return [run for run in self.runs if run.method == method]

    def spread(self, method: str, regime: str, w: int | None, a: int | None) -> Spread:
        """Return the accuracies of a method in one regime at one width."""
        rows = [row for run in self.of(method) for row in run.rows if row.regime == regime]
        return Spread(tuple(row.top1 for row in rows if (row.w, row.a) == (w, a)))

    def baseline(self, method: str) -> str | None:
        """Return plain training with the initialiser of a method; None if it has no run, or for itself."""
        plain = at("plain", initialiser_of(method))
        return plain if plain in self.methods and plain != method else None

    def gain(self, method: str, regime: str, w: int | None, a: int | None) -> Spread:
        """Return the difference to plain training with the same seed, for the seeds that both have."""
        first, second = (self._by_seed(name, regime, w, a) for name in (method, self.baseline(method)))
        return Spread(tuple(first[seed] - second[seed] for seed in first if seed in second))

    def _by_seed(self, method: str | None, regime: str, w: int | None, a: int | None) -> dict[int, float]:
        rows = [row for run in self.runs if run.method == method for row in run.rows]
        return {row.seed: row.top1 for row in rows if (row.regime, row.w, row.a) == (regime, w, a)}

    @property
    def rows(self) -> list[Row]:
        """The rows of all runs."""
        return [row for run in self.runs for row in run.rows]

    def write_rows(self, path: Path) -> None:
        """Write a list of objects with the keys method, seed, regime, w, a, top1, one a line."""
        lines = ",\n".join(_json.dumps(asdict(row)) for row in self.rows)
        _files.write_text(path, f"[\n{lines}\n]\n")

    def write_runs(self, path: Path) -> None:
        """Write everything."""
        _files.write_text(path, _json.dumps([run.to_dict() for run in self.runs], indent=1) + "\n")

    @classmethod
    def read_runs(cls, path: Path) -> Results:
        """Return what :meth:`write_runs` wrote.

        Raises:
            ResultError: the file holds something else.
            OSError: it cannot be read.
        """
        try:
            found = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:  # nested without end
            raise ResultError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise ResultError(f"{path}: must hold a list of runs")
        return cls(Run.from_dict(entry, str(path)) for entry in found)
