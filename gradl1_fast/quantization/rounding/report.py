"""The report of :func:`gradl1_fast.round_weights`."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class Rounding:
    """The result of :func:`gradl1_fast.round_weights`.

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

    def __str__(self) -> str:
        """Return a line per weight."""
        width = max([len(row.name) for row in self.rows] + [5])
        lines = [f"{'layer':<{width}}  bits  error, nearest   chosen"]
        lines += [f"{r.name:<{width}}  {r.bits:>4}  {r.nearest:>14.3g}  {r.chosen:>7.3g}" for r in self.rows]
        return "\n".join([*lines, *(f"{name}: to nearest: {why}" for name, why in self.nearest.items())])
