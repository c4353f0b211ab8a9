"""The report of :func:`gradl1_fast.round_weights`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from gradl1_fast._shown import Grid, Shown

__all__ = ["Rounding", "RoundingRow"]


@dataclass(frozen=True)
class RoundingRow:
    """The effect of rounding a weight on the output of its layer.

    Attributes:
        name: name of the layer; of the first layer if the weight is shared.
        bits: bits of the weight.
        nearest: mean squared error of the output with the nearest codes, divided by the output's mean square.
        chosen: the same ratio with the stored codes.
    """

    name: str
    bits: int
    nearest: float
    chosen: float


@dataclass(repr=False)
class Rounding(Shown):
    """The result of :func:`gradl1_fast.round_weights`; ``print``, or a notebook, shows it as a table.

    Attributes:
        rows: one row per weight with codes, in the order in which the model calls its layers.
        nearest: why a weight is rounded to nearest, by the name of its layer.
    """

    rows: list[RoundingRow] = field(default_factory=list)
    nearest: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> RoundingRow:
        """Return the row of a layer; KeyError if its weight was not rounded."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row for {name!r}; the rows are {[row.name for row in self.rows]}")

    def _parts(self) -> Iterator[Grid | str]:
        rows = [(r.name, str(r.bits), f"{r.nearest:.3g}", f"{r.chosen:.3g}") for r in self.rows]
        yield Grid(("layer", "bits", "error, nearest", "chosen"), rows, right=(1, 2, 3))
        yield from (f"{name}: to nearest: {why}" for name, why in self.nearest.items())
