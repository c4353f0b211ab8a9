"""Whether onnxruntime computes what the simulation says: codes, outputs and decisions on real inputs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.quantization.export.integers import session
from gradl1_fast.quantization.export.packages import onnx

if TYPE_CHECKING:
    from gradl1_fast.quantization.export.onnx_file import Exported
    from gradl1_fast.quantization.export.prepared import Prepared

__all__ = ["CODES", "OUTPUTS", "TOP_1", "Agreement", "compare", "compare_torch"]

CODES = 1  # a value on the edge between two codes may fall to either side
OUTPUTS = 1e-3  # of the largest output
TOP_1 = 0.99


@dataclass(frozen=True)
class Agreement:
    """How far onnxruntime and the simulation are apart.

    Codes and outputs are compared step by step: the simulation computes each quantized activation from the
    codes that onnxruntime had before it. So an edge case shows up once, and not in all that follows. The
    decisions are compared end to end.

    Attributes:
        inputs: how many were compared.
        codes: largest difference of two codes, 0 in float.
        where: name of the quantizer with that difference.
        differing: share of the codes that differ.
        outputs: largest difference of two outputs, relative to the largest output.
        top_1: share of the inputs for which the largest output is the same.
    """

    inputs: int
    codes: int
    where: str
    differing: float
    outputs: float
    top_1: float

    def faults(self) -> list[str]:
        """Return what is beyond the bounds, a sentence each."""
        found = []
        if self.codes > CODES:
            found.append(f"codes at {self.where} are {self.codes} apart, allowed is {CODES}")
        if not self.outputs <= OUTPUTS:
            found.append(f"outputs are {self.outputs:.2g} of the largest apart, allowed is {OUTPUTS:g}")
        if not self.top_1 >= TOP_1:
            found.append(f"top-1 agreement is {100 * self.top_1:.2f} %, needed is {100 * TOP_1:g} %")
        return found


def compare(exported: Exported, inputs: Tensor, *, fused: bool = False, batch_size: int = 100) -> Agreement:
    """Run the file in onnxruntime, on the CPU, and compare with the simulation.

    Args:
        exported: of :func:`export_onnx`.
        inputs: real ones, ``(N, ...)``.
        fused: with onnxruntime's default options, by which it replaces quantized operations by its own in
            integer arithmetic. These round biases to multiples of the product of two steps, which is
            coarse at low widths, and overflow at 16 bits. Otherwise each node is computed as it stands
            (session option ``session.disable_quant_qdq=1``): what the file says.
        batch_size: how many are run at once.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: there are no inputs.
    """
    if not len(inputs):
        raise ValueError("compare: there are no inputs")
    file = session(exported.data, fused=fused)
    watched = session(_with_outputs(exported), fused=fused)
    tally = _Tally()
    with torch.no_grad():
        for x in inputs.split(batch_size):
            _compare_batch(exported, file, watched, x, tally)
    return tally.result()


def compare_torch(data: bytes, prepared: Prepared, inputs: Tensor, *, batch_size: int = 100) -> Agreement:
    """Run a ``.pt2`` file and compare its outputs with the simulation.

    Args:
        data: of :func:`export_torch`.
        prepared: the simulation.
        inputs: real ones, ``(N, ...)``.
        batch_size: how many are run at once.

    Raises:
        ValueError: there are no inputs.
    """
    if not len(inputs):
        raise ValueError("compare_torch: there are no inputs")
    program = torch.export.load(io.BytesIO(data)).module()
    tally = _Tally()
    with torch.no_grad():
        for x in inputs.split(batch_size):
            ours, theirs = program(x), prepared.model(x)
            tally.decide(ours, theirs)
            tally.output(ours, theirs)
    return tally.result()


def _compare_batch(exported: Exported, file: Any, watched: Any, x: Tensor, tally: _Tally) -> None:
    feed = {"input": x.contiguous().numpy()}
    (end,) = file.run(["output"], feed)
    tally.decide(torch.from_numpy(end), exported.prepared.model(x))
    names = list(exported.quantized)
    found = watched.run(["output", *(exported.quantized[name] for name in names)], feed)
    output, *values = (torch.from_numpy(value) for value in found)
    with _forced(exported.prepared.model, dict(zip(names, values, strict=True)), tally):
        tally.output(output, exported.prepared.model(x))


class _Tally:
    """Adds up over batches."""

    def __init__(self) -> None:
        self.inputs = self.same = self.codes = self.differing = self.count = 0
        self.where, self.apart, self.largest = "", 0.0, 0.0

    def decide(self, ours: Tensor, theirs: Tensor) -> None:
        """Count equal decisions."""
        self.inputs += len(ours)
        self.same += int((ours.flatten(1).argmax(1) == theirs.flatten(1).argmax(1)).sum())

    def output(self, ours: Tensor, theirs: Tensor) -> None:
        """Note how far outputs are apart; NaN counts as infinitely far."""
        self.apart = max(self.apart, float((ours - theirs).abs().nan_to_num(nan=torch.inf).max()))
        self.largest = max(self.largest, float(theirs.abs().max()))

    def code(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        """Note how far codes are apart."""
        apart = (ours - theirs).abs()
        self.count += apart.numel()
        self.differing += int((apart > 0).sum())
        if int(apart.max()) > self.codes or not self.where:
            self.codes, self.where = int(apart.max()), name

    def result(self) -> Agreement:
        """Return the sums."""
        return Agreement(
            inputs=self.inputs,
            codes=self.codes,
            where=self.where,
            differing=self.differing / max(self.count, 1),
            outputs=self.apart / self.largest if self.largest else self.apart,
            top_1=self.same / self.inputs,
        )


@contextlib.contextmanager
def _forced(model: nn.Module, values: dict[str, Tensor], tally: _Tally) -> Iterator[None]:
    """Compare the output of each quantizer with ``values``, and go on with these."""
    quantizers = named_quantizers(model)
    handles = [quantizers[name].register_forward_hook(_hook(name, v, tally)) for name, v in values.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, value: Tensor, tally: _Tally) -> Callable[..., Tensor]:
    def compare_and_replace(quantizer: ActivationQuantizer, _: object, output: Tensor) -> Tensor:
        scale = quantizer.grid(torch.float32, int(quantizer.bits or 0))[0]
        tally.code(name, (value / scale).round().long(), (output / scale).round().long())
        return value

    return compare_and_replace


def _with_outputs(exported: Exported) -> bytes:
    """Return the file with the quantized activations as further outputs."""
    proto = onnx().load_from_string(exported.data)
    for name in exported.quantized.values():
        proto.graph.output.append(onnx().ValueInfoProto(name=name))
    return bytes(proto.SerializeToString())
