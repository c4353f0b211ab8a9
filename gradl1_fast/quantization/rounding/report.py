"""What :func:`gradl1_fast.round_weights` did, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Rounding", "RoundingRow"]


@dataclass(frozen=True)
class RoundingRow:
    """What rounding one weight does to the output of its layer.

    Attributes:
        name: of the layer; of the first one of those that share the weight.
        bits: of the weight.
        nearest: mean squared error of the output with the nearest codes, over the mean square of the output.
        chosen: the same with the codes that were stored.
    """

    name: str
    bits: int
    nearest: float
    chosen: float


@dataclass
class Rounding:
    """What :func:`gradl1_fast.round_weights` did.

    Attributes:
        rows: one for each weight that has codes now, in the order in which the model calls its layers.
        nearest: why a weight stays rounded to nearest, by the layer's name.
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
        """Return a line for each weight."""
        width = max([len(row.name) for row in self.rows] + [5])
        lines = [f"{'layer':<{width}}  bits  error, nearest   chosen"]
        lines += [f"{r.name:<{width}}  {r.bits:>4}  {r.nearest:>14.3g}  {r.chosen:>7.3g}" for r in self.rows]
        return "\n".join([*lines, *(f"{name}: to nearest: {why}" for name, why in self.nearest.items())])
