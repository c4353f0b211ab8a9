"""Builds the program of a segment for the shapes, types and modes of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from gradl1_fast.conversion.regions.measuring import BatchNorm, Measurement, Site
from gradl1_fast.conversion.regions.operations import Operation
from gradl1_fast.conversion.regions.program import Program
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sharing import join

__all__ = ["Builder"]

Parameter = tuple[nn.Module, str]


class Builder:
    """Collects the operations of a region.

    Args:
        inputs: the placeholders of the region's inputs, each already quantized by the site of its layer.
        parameters: the index of each parameter, by module identity and name.
        requires_grad: whether each input, then each parameter, requires a gradient.
        dtype: the type in which autocast computes products; None without autocast.
        users: for each node, the layers of the region that read it, and whether anything else reads it.

    Attributes:
        probes: the quantizers of the measured sites, in order.
    """

    def __init__(
        self,
        inputs: Sequence[fx.Node],
        parameters: Mapping[tuple[int, str], int],
        requires_grad: Sequence[bool],
        dtype: torch.dtype | None,
        users: Mapping[fx.Node, tuple[list[QuantizedLayer], bool]],
    ) -> None:
        self.parameters, self.dtype, self.users = parameters, dtype, users
        self.probes: list[ActivationQuantizer] = []
        self._requires_grad, self._inputs = list(requires_grad), len(inputs)
        self._needs = self._requires_grad[: len(inputs)]
        self._operations: list[Operation] = []
        self._active: list[Operation] = []
        self._measured: list[Measurement] = []
        self._slots = {node: i for i, node in enumerate(inputs)}
        self._sites: dict[tuple[fx.Node, int], int] = {}
        self._norms: dict[int, BatchNorm] = {}

    def argument(self, module: nn.Module, name: str) -> int | None:
        """Return the index of a parameter; None if the module has no such parameter."""
        return self.parameters.get((id(module), name))

    def needs(self, argument: int | None) -> bool:
        """Return whether a parameter requires a gradient."""
        return argument is not None and self._requires_grad[self._inputs + argument]

    def needs_slot(self, slot: int) -> bool:
        """Return whether the tensor in a slot depends on a tensor that requires a gradient."""
        return self._needs[slot]

    def slot(self, node: fx.Node) -> int:
        """Return the slot of the result of a node."""
        return self._slots[node]

    def append(self, operation: Operation, active: bool) -> int:
        """Add an operation; return the slot of its result."""
        operation.index, operation.out = len(self._operations), len(self._needs)
        self._operations.append(operation)
        self._needs.append(active)
        if active:
            self._active.append(operation)
        return operation.out

    def give(self, node: fx.Node, slot: int) -> None:
        """Record the slot that holds the result of a node."""
        self._slots[node] = slot

    def norm(self, node: fx.Node, operation: BatchNorm, active: bool) -> None:
        """Add a batch norm, fused with a site if only layers of that site read its result."""
        layers, others = self.users[node]
        quantizer = layers[0].input_quantizer if layers and not others else None
        measurement = None if quantizer is None else self._measure(quantizer, len(self._needs), active)
        merged = measurement is not None and not (measurement.by_step and measurement.codes is not None)
        if measurement is not None and merged:
            operation.measurement = measurement
            active = active or measurement.number is not None
        slot = self.append(operation, active)
        self.give(node, slot)
        self._norms[slot] = operation
        if measurement is None:
            return
        if merged:
            self._sites[node, id(quantizer)] = slot
            operation.ends_slot = slot if measurement.by_step else None
        else:
            self._sites[node, id(quantizer)] = self._site(slot, measurement)

    def read(self, node: fx.Node, layer: QuantizedLayer) -> int:
        """Return the slot of a layer's input: the result of a node after the layer's site."""
        if node.op == "placeholder":
            return self.slot(node)
        leader = self.users[node][0][0]
        if leader.input_quantizer is not layer.input_quantizer and leader.input_quantizer is not None:
            join(layer, leader.input_quantizer)
        quantizer, slot = layer.input_quantizer, self.slot(node)
        key = node, id(quantizer)
        if key not in self._sites:
            measurement = None if quantizer is None else self._measure(quantizer, slot, self._needs[slot])
            self._sites[key] = slot if measurement is None else self._site(slot, measurement)
        return self._sites[key]

    def _site(self, slot: int, measurement: Measurement) -> int:
        operation = Site(slot, measurement)
        if measurement.by_step:
            norm = self._norms.get(slot)
            if norm is not None and norm.measurement is None:
                norm.ends_slot = slot
            else:
                operation.ends_slot = slot
        return self.append(operation, self._needs[slot] or measurement.number is not None)

    def _measure(self, quantizer: ActivationQuantizer, slot: int, depends: bool) -> Measurement | None:
        """Return how a site treats the tensor in a slot; None if it neither quantizes nor measures it."""
        quantizer.is_known = True
        if quantizer.is_input and depends:  # a tensor inside a region is not the network's input
            quantizer.is_input, quantizer.is_mixed = False, True
        if quantizer.is_idle:
            return None
        number = None
        if quantizer.is_measured:
            number = len(self.probes)
            self.probes.append(quantizer)
        measurement = Measurement(
            quantizer, slot, number, number is not None and quantizer.step_bits is not None
        )
        if number is not None:
            self._measured.append(measurement)
        return measurement

    def program(self, outputs: Sequence[fx.Node]) -> Program:
        """Return the program."""
        return Program(
            self._operations,
            self._active,
            len(self._needs),
            self._inputs,
            [self.slot(node) for node in outputs],
            self._measured,
            self._requires_grad,
        )


def parameters_of(modules: Sequence[nn.Module]) -> list[Parameter]:
    """Return the distinct parameters of the layers and norms of a region."""
    parameters: dict[tuple[int, str], Any] = {}
    for module in modules:
        for name in ("weight", "bias"):
            if module._parameters.get(name) is not None:
                parameters.setdefault((id(module), name), (module, name))
    return list(parameters.values())
