"""BiTAT: binary weights, layer by layer, with errors weighted by the correlation of the inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.training.methods.direct import nearest, weighted_levels
from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.quantizing import Quantizing, WeightGrid, straight_through
from gradl1_fast.training.methods.weights import leaf_of, name_of

__all__ = ["BinaryGrid", "BinaryTransform", "correlation", "groups_of", "rows_of", "transformed_error"]


def rows_of(weight: Tensor, axis: int) -> Tensor:
    """Return a weight as a matrix with a row per output channel, given the axis of output channels."""
    return weight.movedim(axis, 0).flatten(1)


def correlation(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Return ``X^T X / m`` of the inputs of a layer's product, of shape ``(d, d)``.

    A row of X is the input of one output value: a sample for a linear layer, a patch for a 2D convolution
    without groups. None for other layers.

    Args:
        layer: the layer.
        x: its input.
    """
    if isinstance(layer, nn.Linear):
        rows = x.flatten(0, -2)
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str):
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = patches.transpose(1, 2).flatten(0, 1)
    else:
        return None
    return rows.T @ rows / len(rows)


def transformed_error(error: Tensor, vectors: Tensor, importance: Tensor) -> Tensor:
    """Return ``sum_i importance_i ||(E V)_i||^2``.

    For the eigenvectors and eigenvalues of ``X^T X / m`` this is ``||X E^T||^2 / m``.

    Args:
        error: E, of shape ``(out, d)``.
        vectors: V, orthonormal columns, of shape ``(d, d)``.
        importance: eigenvalues, of shape ``(d,)``.
    """
    return (importance * (error @ vectors).square().sum(0)).sum()


def groups_of(importance: Tensor, count: int) -> Tensor:
    """Return the group of each entry, by 1D k-means with evenly spaced initial centres.

    Args:
        importance: ``(d,)``.
        count: maximum number of groups; equal entries are in the same group.
    """
    low, high = importance.aminmax()
    centres = low + (high - low) * torch.linspace(0, 1, count, dtype=importance.dtype)
    centres = weighted_levels(importance[None], centres, importance.new_ones(1), rounds=10)
    return nearest(importance, centres)


class BinaryGrid(WeightGrid):
    """A parametrization ``alpha_g sign(W)`` with a scale per group of inputs and output channel.

    ``alpha_g`` is the mean magnitude in the group, the least-squares scale. The gradient passes where
    ``|W| <= 1``.

    Args:
        weight: of any shape.
        axis: of the output channels.

    Attributes:
        groups: the group of each input, of shape ``(d,)``; one group at first.
    """

    groups: Tensor

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        size = rows_of(weight, axis).shape[1]
        self.register_buffer("groups", torch.zeros(size, dtype=torch.long, device=weight.device))

    def quantize(self, weight: Tensor, bits: int) -> Tensor:
        """See :meth:`WeightGrid.quantize`; ``bits`` is 1."""
        rows = rows_of(weight.detach(), self.axis)
        magnitudes, size = rows.abs(), int(self.groups.max()) + 1
        sums = rows.new_zeros(len(rows), size).index_add(1, self.groups, magnitudes)
        counts = torch.bincount(self.groups, minlength=size).clamp(min=1)
        scales = (sums / counts)[:, self.groups]
        binary = scales * torch.where(rows < 0, -1.0, 1.0).to(rows.dtype)
        shape = weight.movedim(self.axis, 0).shape
        return straight_through(binary.reshape(shape).movedim(0, self.axis), weight.clamp(-1, 1))


class BinaryTransform(Quantizing):
    """The loss with binary weights, plus ``gamma`` times the error of each layer's output.

    The error is measured in the eigenvectors of the inputs' correlation, weighted by the eigenvalues, and
    pulls the latent weight towards its binary form. Inputs are grouped by their mean square, with one scale
    per group. With ``stage_steps`` the layers become binary one after another, from first to last: layers
    before the current one are frozen, and later layers are in float. Reconstruction: transform, importance
    and scales were derived here from the abstract; in the paper, both the transform and the importance are
    trained.

    Args:
        model: a converted model.
        a: bits of the activations, None for float.
        gamma: coefficient of the layers' errors.
        groups: maximum number of groups of inputs per layer.
        stage_steps: number of steps per layer; 0 makes all layers binary at once.
        refresh: number of steps between estimates of the correlation.

    Raises:
        ValueError: a setting is out of range, or the model is not converted.

    Source: Park et al. 2022, arXiv 2207.01394.
    """

    name = "bitat"
    text = "binary weights, errors weighted by the inputs' correlation"
    source = "Park et al. 2022, arXiv 2207.01394"
    reconstruction = True
    family = Family.ONE_WIDTH
    variants = (
        Variant("bitat", "BiTAT: binary weights, layer by layer", {"a": 4, "stage_steps": 100}),
        Variant("bitat-at-once", "BiTAT: binary weights, all layers at once", {"a": 4}),
    )

    grids: dict[str, BinaryGrid]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        *,
        a: int | None,
        gamma: float = 0.1,
        groups: int = 4,
        stage_steps: int = 0,
        refresh: int = 200,
    ) -> None:
        self.gamma = check.coefficient("BinaryTransform: gamma", gamma)
        self.group_count = check.count("BinaryTransform: groups", groups)
        self.stage_steps = check.count("BinaryTransform: stage_steps", stage_steps, 0)
        self.refresh = check.count("BinaryTransform: refresh", refresh)
        super().__init__(model, [(1, a)])
        self._steps = 0
        self._correlations: dict[str, Tensor] = {}
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}

    def grid_for(self, name: str, layer: QuantizedLayer) -> BinaryGrid:
        """See :meth:`Quantizing.grid_for`."""
        return BinaryGrid(layer.weight, layer.out_axis)

    @property
    def stage(self) -> int:
        """The index of the current layer; it and all earlier layers are binary."""
        last = len(self.layers) - 1
        return min(self._steps // self.stage_steps, last) if self.stage_steps else last

    @contextlib.contextmanager
    def during_step(self) -> Iterator[None]:
        """Quantize the layers up to the current one; earlier layers get no gradient."""
        names, stage = list(self.grids), self.stage
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().during_step())
            for name in names[stage + 1 :]:
                self.grids[name].bits = None
            if self._steps % self.refresh == 0 or not self._correlations:
                for name, layer in self.layers.items():
                    stack.callback(layer.register_forward_pre_hook(partial(self._look, name)).remove)
            yield
        for name in names[:stage] if self.stage_steps else ():
            leaf_of(self.layers[name]).grad = None

    @torch.no_grad()
    def _look(self, name: str, layer: nn.Module, args: Any) -> None:
        moments = correlation(layer, args[0].detach())
        if moments is not None:
            self._set(name, moments)
            self.grids[name].groups.copy_(groups_of(moments.diagonal(), self.group_count))

    def _set(self, name: str, value: Tensor) -> None:
        self._correlations[name] = value
        importance, vectors = torch.linalg.eigh(value)
        self._bases[name] = vectors, importance.clamp(min=0)

    def added(self, loss: Tensor) -> Tensor:
        """Return gamma times the errors of the binary layers."""
        total, self.parts = loss.new_zeros(()), {}
        for name, (vectors, importance) in self._bases.items():
            grid, layer = self.grids[name], self.layers[name]
            if grid.bits is not None:
                leaf = leaf_of(layer)
                error = rows_of(leaf - grid(leaf.detach()), layer.out_axis)
                part = transformed_error(error, vectors, importance)
                self.parts = {**self.parts, name_of(name): part.detach()}
                total = total + part
        return self.strength * self.gamma * total

    def after_step(self) -> None:
        """Count the steps, which determine the current layer."""
        self._steps += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return ranges, correlations and the number of steps."""
        kept = {f"correlation.{name}": value for name, value in self._correlations.items()}
        return {**super().state_dict(), **kept, "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._steps = int(state["steps"])
        for key, value in state.items():
            if key.startswith("correlation."):
                self._set(key.removeprefix("correlation."), value)
