"""What a penalty measures in a model: weights, and the tensors behind activation quantizers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer

__all__ = ["Site", "activation_sites", "named_layers", "named_quantizers"]


@dataclass(frozen=True)
class Site:
    """A penalised activation tensor.

    Attributes:
        name: path of its quantizer in the model.
        quantizer: owner of the probe.
        producer: the module whose output is the tensor.
    """

    name: str
    quantizer: ActivationQuantizer
    producer: nn.Module

    @property
    def probe(self) -> Tensor:
        """The leaf that receives the l1 norm."""
        if self.quantizer.probe is None:
            raise RuntimeError(f"the quantizer {self.name!r} has lost its probe")
        return self.quantizer.probe


def named_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the convolutions and linear layers of this library by name, shared ones once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def named_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the activation quantizers by name, shared ones once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


def activation_sites(model: nn.Module) -> list[Site]:
    """Return the penalised activation tensors of a model."""
    owners = {id(m.quantizer): m for m in model.modules() if isinstance(m, BatchNormAct2d) and m.quantizer}
    return [
        Site(name, quantizer, owners.get(id(quantizer), quantizer))
        for name, quantizer in named_quantizers(model).items()
        if quantizer.probe is not None
    ]
