"""From the nodes of a segment to a program, for tensors in the state of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from gradl1_fast.conversion.regions.measuring import BatchNorm, Measured, Site
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
        inputs: the nodes that stand for what the region is given; a layer reads what has passed its site.
        parameters: the parameters of the region, by module and name, with their places.
        wanted: for each input and then each parameter, whether it requires a gradient.
        dtype: in which autocast computes products; None without.
        users: by node, the layers inside that read it, and whether anybody else does.

    Attributes:
        probes: quantizers of the measured sites, by the number of the site.
    """

    def __init__(
        self,
        inputs: Sequence[fx.Node],
        parameters: Mapping[tuple[int, str], int],
        wanted: Sequence[bool],
        dtype: torch.dtype | None,
        users: Mapping[fx.Node, tuple[list[QuantizedLayer], bool]],
    ) -> None:
        self.parameters, self.dtype, self.users = parameters, dtype, users
        self.probes: list[ActivationQuantizer] = []
        self._wanted, self._inputs = list(wanted), len(inputs)
        self._needs = self._wanted[: len(inputs)]
        self._operations: list[Operation] = []
        self._active: list[Operation] = []
        self._measured: list[Measured] = []
        self._slots = {node: i for i, node in enumerate(inputs)}
        self._sites: dict[tuple[fx.Node, int], int] = {}
        self._norms: dict[int, BatchNorm] = {}

    def argument(self, module: nn.Module, name: str) -> int | None:
        """Return the place of a parameter; None if the module has none."""
        return self.parameters.get((id(module), name))

    def needs(self, argument: int | None) -> bool:
        """Return whether a parameter requires a gradient."""
        return argument is not None and self._wanted[self._inputs + argument]

    def needs_slot(self, slot: int) -> bool:
        """Return whether what is in a slot depends on something that requires a gradient."""
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
        """Say which slot holds the result of a node."""
        self._slots[node] = slot

    def norm(self, node: fx.Node, operation: BatchNorm, active: bool) -> None:
        """Add a batch norm, with the site behind it if nobody but its layers reads the result."""
        layers, others = self.users[node]
        quantizer = layers[0].input_quantizer if layers and not others else None
        what = None if quantizer is None else self._measure(quantizer, len(self._needs), active)
        merged = what is not None and not (what.by_step and what.codes is not None)
        if what is not None and merged:
            operation.what = what
            active = active or what.number is not None
        slot = self.append(operation, active)
        self.give(node, slot)
        self._norms[slot] = operation
        if what is None:
            return
        if merged:
            self._sites[node, id(quantizer)] = slot
            operation.ends_slot = slot if what.by_step else None
        else:
            self._sites[node, id(quantizer)] = self._site(slot, what)

    def read(self, node: fx.Node, layer: QuantizedLayer) -> int:
        """Return the slot of what a layer is given: the result of a node behind the site."""
        if node.op == "placeholder":
            return self.slot(node)
        leader = self.users[node][0][0]
        if leader.input_quantizer is not layer.input_quantizer and leader.input_quantizer is not None:
            join(layer, leader.input_quantizer)
        quantizer, slot = layer.input_quantizer, self.slot(node)
        key = node, id(quantizer)
        if key not in self._sites:
            what = None if quantizer is None else self._measure(quantizer, slot, self._needs[slot])
            self._sites[key] = slot if what is None else self._site(slot, what)
        return self._sites[key]

    def _site(self, slot: int, what: Measured) -> int:
        operation = Site(slot, what)
        if what.by_step:
            norm = self._norms.get(slot)
            if norm is not None and norm.what is None:
                norm.ends_slot = slot
            else:
                operation.ends_slot = slot
        return self.append(operation, self._needs[slot] or what.number is not None)

    def _measure(self, quantizer: ActivationQuantizer, slot: int, depends: bool) -> Measured | None:
        """Return what a site does to the tensor in a slot; None if nothing."""
        quantizer.is_known = True
        if quantizer.is_input and depends:  # a tensor inside a region is not the network's input
            quantizer.is_input, quantizer.is_mixed = False, True
        if quantizer.is_idle:
            return None
        number = None
        if quantizer.is_measured:
            number = len(self.probes)
            self.probes.append(quantizer)
        what = Measured(quantizer, slot, number, number is not None and quantizer.step_bits is not None)
        if number is not None:
            self._measured.append(what)
        return what

    def program(self, outputs: Sequence[fx.Node]) -> Program:
        """Return the program."""
        return Program(
            self._operations,
            self._active,
            len(self._needs),
            self._inputs,
            [self.slot(node) for node in outputs],
            self._measured,
            self._wanted,
        )


def parameters_of(modules: Sequence[nn.Module]) -> list[Parameter]:
    """Return the parameters of layers and norms that a region takes, each once."""
    found: dict[tuple[int, str], Any] = {}
    for module in modules:
        for name in ("weight", "bias"):
            if module._parameters.get(name) is not None:
                found.setdefault((id(module), name), (module, name))
    return list(found.values())
