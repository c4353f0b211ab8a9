"""Calibrated networks that are traced once each, because tracing takes seconds."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.quantization.export import Exported, simulate
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.onnx_file import write_onnx
from gradl1_fast.quantization.export.onnx_graph import to_onnx
from gradl1_fast.quantization.export.program import Program, trace
from tests.networks import NO_NORM, BasicBlock, Network, conv_norm


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def calibrated(plain: nn.Module, x: Any, *, per_channel: bool = False) -> nn.Module:
    """Convert a network and give each site the range of what it sees."""
    model = gl.convert(plain.eval(), per_channel=per_channel)
    for quantizer in named_quantizers(model).values():
        quantizer.observer = _MinMax()
    with torch.no_grad():
        Arguments.of(x).call(model)
    for quantizer in named_quantizers(model).values():
        seen, quantizer.observer = quantizer.observer, None
        if seen.high > seen.low:  # type: ignore[union-attr]  # it was called
            quantizer.set_range(seen.low, seen.high)  # type: ignore[union-attr]
    return model


class _MinMax:
    def __init__(self) -> None:
        self.low = self.high = torch.zeros(())

    def update(self, x: Tensor) -> None:
        self.low, self.high = torch.minimum(self.low, x.min()), torch.maximum(self.high, x.max())


def residual() -> nn.Module:
    """A residual network with both kinds of shortcut."""
    stem = nn.Sequential(*conv_norm(3, 4), nn.ReLU())
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(stem, BasicBlock(4, 4, 1), BasicBlock(4, 8, 2), pool, nn.Flatten(), nn.Linear(8, 5))


RESIDUAL = Network(id="residual", build=residual, shape=(6, 3, 8, 8))


@functools.cache
def network(which: Network) -> tuple[nn.Module, Tensor]:
    x = inputs(37, *which.shape[1:])
    return calibrated(which.make(torch.float32), x, per_channel=which is not NO_NORM), x


@functools.cache
def _traced(which: Network, joints: bool) -> tuple[Program, Any]:
    model, x = network(which)
    program = trace(simulate(model, x), x, batch=True, sizes=False, joints=joints)
    return program, to_onnx(program)


def exported(which: Network, w: Any, a: Any, *, joints: bool = True, **options: Any) -> Exported:
    """Do what ``export_onnx`` does, on a trace that is shared."""
    model, x = network(which)
    prepared = simulate(model, x, w=w, a=a, **options)
    program, template = _traced(which, joints)
    program.find_ranges(Arguments.of(x), program.grids(prepared))
    return write_onnx(prepared, program, template, integers=joints)


class Attention(nn.Module):
    """Token embedding, a transformer block of functions, keyword arguments in and a dictionary out."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(20, size), nn.LayerNorm(size)
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))
        self.head = nn.Linear(size, 5)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        x = self.tokens(ids)
        n = self.norm(x)
        q, k, v = (layer(n).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(F.gelu(y))
        if weights is not None:
            x = x * weights[..., None]
        return {"logits": self.head(x.mean(1)), "hidden": x}


class TwoInTwoOut(nn.Module):
    """A tensor and a dictionary in, a concatenation, an average pool, padding and groups, two tensors out."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.other = nn.Conv2d(2, 4, 3, 2, 1)
        self.up = nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=2)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        other = self.up(F.hardswish(self.other(y["images"])))
        z = torch.cat([self.one(x).relu(), other * y["scale"]], 1)
        return self.last(F.avg_pool2d(z, 2).mean((2, 3))), z


class FixedBatch(nn.Module):
    """A reshape that allows batches of three alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(3, 4))


class OfDict(nn.Module):
    """One argument, a dictionary, and a layer whose weight is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)
        self.by_function = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = torch.sigmoid(self.a(batch["a"]) * self.b(batch["b"]))
        return self.last(x) + F.linear(x, self.by_function.weight)


class Pools(nn.Module):
    """Pools between layers, some with windows that reach beyond the padding."""

    def __init__(self, *pools: nn.Module) -> None:
        super().__init__()
        self.before = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in pools)
        self.pools, self.after = nn.ModuleList(pools), nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in pools)

    def forward(self, x: Tensor) -> list[Tensor]:
        layers = zip(self.before, self.pools, self.after, strict=True)
        return [after(pool(before(x))) for before, pool, after in layers]


class Special(nn.Module):
    """Functions that have no translation to ONNX, inside of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = _SpecialPart()

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(self.part(x))


class _SpecialPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.linear(x))


class Branching(nn.Module):
    """A branch on a value, inside of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = _Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(module, x: Tensor) -> Tensor:  # noqa: N805  # names and errors do not depend on "self"
        y = module.linear(x)
        return y + 1 if y.sum() > 0 else y


def with_dead_channels(bias: float, transposed: bool = False, groups: int = 1) -> nn.Module:
    """A batch norm of which four channels are dead: gamma 1e-8 and a bias."""
    torch.manual_seed(0)
    first = conv_norm(3, 16)
    if transposed:  # not first, where its input would be that of the network
        first = [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 16, 3, 1, 1, groups=groups), first[1]]
    layers = [*first, nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    norm = layers[len(first) - 1]
    with torch.no_grad():
        norm.weight[:4] = 1e-8  # type: ignore[index]
        norm.bias[:4] = torch.linspace(0.2, bias, 4)  # type: ignore[index]
    return nn.Sequential(*layers)


class AttentionOfOtherSizes(nn.Module):
    """Attention with queries of three and of five dimensions, masks of both kinds among them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q = q + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        q, k, v = (t.unflatten(0, (-1, 1)).unflatten(2, (2, 3)) for t in (q, k, v))
        mask = torch.ones(3, 3, dtype=torch.bool).triu()
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(
            (masked + F.scaled_dot_product_attention(q, k, v, mask.float(), scale=0.5)).flatten(1, 3)
        )
