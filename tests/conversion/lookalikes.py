"""Small models, each with a construct of a well-known package."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm with an activation inside that counts its batches itself, as timm's does."""

    def __init__(self, features: int, act: type[nn.Module] = nn.ReLU, inplace: bool = True) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), act(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        average = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, average, self.eps)
        return self.act(self.drop(x))


class StdConv2d(nn.Conv2d):
    """Standardises its weight by a batch norm of it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledStdConv2d(nn.Conv2d):
    """Standardises its weight and has a gain."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.2))

    def get_weight(self) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return self.gain * (self.weight - mean) / (std + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.get_weight(), self.bias)


class Conv2dSame(nn.Conv2d):
    """Pads as the sizes of the input ask for."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, k, s in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            pad = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads = [pad // 2, pad - pad // 2, *pads]
        return F.conv2d(
            F.pad(x, pads), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups
        )


class Conv1D(nn.Module):
    """The transposed linear layer of GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


Conv1D.__module__ = "transformers.pytorch_utils"


class FrozenBatchNorm2d(nn.Module):
    """A batch norm whose parameters are buffers."""

    def __init__(self, features: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.1, "bias": 0.1, "running_mean": 0.2, "running_var": 1.3}.items():
            self.register_buffer(name, torch.full((features,), value))

    def forward(self, x: Tensor) -> Tensor:
        w, b, rm, rv = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


class DropPath(nn.Module):
    """Drops the residual branch of some samples."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.6)
        return x * mask.div_(0.6)


def conv(c_in: int, c_out: int, size: int = 3, cls: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return cls(c_in, c_out, size, padding=size // 2)


class Head(nn.Module):
    """Means over the image, and a classifier."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, features: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(features, 2, 1), nn.Conv2d(2, features, 1)
        self.act, self.gate = nn.ReLU(inplace=True), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """A residual block with squeeze and excitation and stochastic depth."""

    def __init__(self, gate: Callable[[Tensor], Tensor] = F.hardsigmoid) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = conv(4, 4), BatchNormAct2d(4), conv(4, 4)
        self.bn2, self.se, self.drop_path = nn.BatchNorm2d(4), SqueezeExcite(4, gate), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        return F.relu(self.drop_path(y) + x)


class Standardised(nn.Module):
    def __init__(self, cls: type[nn.Conv2d]) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = conv(4, 4, cls=cls), nn.GroupNorm(2, 4), cls(4, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.conv1(x)).relu())


class DenseLayer(nn.Module):
    """Takes a tensor or a list of them, as torchvision's does."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(features), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(features, 2, 3, padding=1)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        previous = [x] if isinstance(x, Tensor) else x
        return self.conv(self.relu(self.norm(torch.cat(previous, 1))))


class DenseBlock(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({f"layer{i}": DenseLayer(4 + 2 * i) for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class HighResolution(nn.Module):
    """Branches that exchange lists of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.branches = nn.ModuleList(
            [nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(2)]
        )
        self.fuse = nn.ModuleList([nn.ModuleList([nn.Identity(), conv(4, 4, 1)]) for _ in range(1)])

    def exchange(self, xs: list[Tensor]) -> list[Tensor]:
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        return [row[0](xs[0]) + F.interpolate(row[1](xs[1]), size=xs[0].shape[2:]) for row in self.fuse]

    def forward(self, x: Tensor) -> Tensor:
        return self.exchange([x, self.down(x)])[0]


class LayerDrop(nn.Module):
    """Skips layers at random while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(conv(4, 4), nn.ReLU()) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < 0.4:
                continue
            x = layer(x)
        return x


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            conv(4, 4),
            FrozenBatchNorm2d(4),
            conv(4, 4),
            FrozenBatchNorm2d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x))))) + x)


class Autoencoder(nn.Module):
    """A transposed convolution that is told its output's size, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up2(self.up1(self.down(x).relu(), output_size=x.shape[2:]).relu())


@dataclass
class ModelOutput(OrderedDict):
    """A dictionary that is a dataclass, as transformers return."""

    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class GPT(nn.Module):
    """Embeddings tied to the head, fused queries, keys and values, and an output that is a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.ln, self.c_attn, self.c_proj = nn.LayerNorm(8), Conv1D(24, 8), Conv1D(8, 8)
        self.c_fc, self.c_out = Conv1D(16, 8), Conv1D(8, 16)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, *, return_hidden: bool = True) -> ModelOutput:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        q, k, v = self.c_attn(self.ln(x)).split(8, 2)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.c_out(F.gelu(self.c_fc(x), approximate="tanh"))
        return ModelOutput(self.lm_head(x), (x,) if return_hidden else None)


class Encoder(nn.Module):
    """Queries, keys and values of one tensor, heads, and attention by function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        y = self.norm(x)
        q, k, v = (m(y).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc((x + self.proj(y)).mean(1))


def with_head(body: nn.Module, features: int = 4) -> nn.Module:
    return nn.Sequential(conv(4, 4), body, Head(features))


# Of images (4, 4, 5, 5).
OF_IMAGES: dict[str, Callable[[], nn.Module]] = {
    "norm with activation inside": lambda: with_head(nn.Sequential(BatchNormAct2d(4), conv(4, 4))),
    "norm with SiLU inside": lambda: with_head(nn.Sequential(BatchNormAct2d(4, nn.SiLU), conv(4, 4))),
    "residual, excitation, stochastic depth": lambda: with_head(Residual()),
    "hardswish": lambda: with_head(nn.Sequential(nn.Hardswish(), conv(4, 4), nn.Hardsigmoid())),
    "standardised": lambda: with_head(Standardised(StdConv2d)),
    "scaled and standardised": lambda: with_head(Standardised(ScaledStdConv2d)),
    "same padding": lambda: with_head(
        nn.Sequential(Conv2dSame(4, 4, 3, stride=2), nn.ReLU(), Conv2dSame(4, 4, 2))
    ),
    "dense block": lambda: with_head(DenseBlock(), 10),
    "high resolution": lambda: with_head(HighResolution()),
    "layer drop": lambda: with_head(LayerDrop()),
    "frozen norms": lambda: with_head(Frozen()),
    "autoencoder": lambda: with_head(Autoencoder()),
    "encoder": Encoder,
}
