"""The weights of a region, for a penalty that multiplies their norms by their steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradl1_fast.conversion.regions.passes import Deferred, Saved
from gradl1_fast.conversion.regions.program import Program

__all__ = ["WeightsOfRegion"]


class WeightsOfRegion:
    """Lets a penalty measure the weights of a region, and adds the gradients of their ends in its last pass.

    The first backward pass of a region carries it as ``weights_of_region``. The node of the penalty must come
    before that pass in the graph of the gradients, so that it runs before the last backward pass.

    Args:
        program: the program of the region.
        saved: what its forward pass saved.
        args: the parameters of the region.
    """

    def __init__(self, program: Program, saved: Saved, args: Sequence[Tensor]) -> None:
        self._program, self._saved, self._args = program, saved, args

    def index(self, weight: Tensor, output: int) -> int | None:
        """Return the index of a weight among the parameters; None if the region has another tensor there.

        Args:
            weight: a weight.
            output: which output of the first backward pass its gradient is.
        """
        index = output - self._program.inputs
        return index if 0 <= index < len(self._args) and self._args[index] is weight else None

    def ends(self, indices: Sequence[int]) -> Tensor:
        """Return the ends of some parameters, ``(n, 4)``."""
        weights = [self._args[index] for index in indices]
        return self._program.taps(indices, self._args).ends(weights)

    def defer(self, indices: Sequence[int], ends: Tensor, d_ends: Tensor) -> None:
        """Let the last backward pass of the running graph task add the gradients of ends.

        Args:
            indices: the indices of the parameters.
            ends: ``(n, 4)``, the ends of each.
            d_ends: ``(n, 2)``, the gradients of the smallest and the largest value of each.
        """
        of_weights = [(indices, ends, d_ends)]
        self._saved.defer(Deferred([None] * self._program.slots, of_weights=of_weights))
