"""Builds ``nn.Module`` from data; parameters, statistics and batches are drawn from the network's seed."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.properties.grammar import Act, Concat, Conv, Network, Norm, Part, Pool, Same, Sum, Twice

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {
    ("max", 1): nn.MaxPool1d, ("max", 2): nn.MaxPool2d, ("max", 3): nn.MaxPool3d,
    ("avg", 1): nn.AvgPool1d, ("avg", 2): nn.AvgPool2d, ("avg", 3): nn.AvgPool3d,
}  # fmt: skip
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
MODULES = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "tanh": nn.Tanh}
FUNCTIONS = {"relu": F.relu, "relu6": F.relu6, "silu": F.silu, "tanh": torch.tanh}


class Called(nn.Module):
    """An activation that is a function or a method."""

    def __init__(self, kind: str, form: str) -> None:
        super().__init__()
        self.kind, self.form = kind, form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "method" and self.kind in ("relu", "tanh"):
            return getattr(x, self.kind)()
        if self.form == "in place function":
            return torch.tanh_(x) if self.kind == "tanh" else FUNCTIONS[self.kind](x, inplace=True)
        return FUNCTIONS[self.kind](x)


class Branches(nn.Module):
    """The sum of two branches, or their channels side by side."""

    def __init__(self, left: nn.Module, right: nn.Module, form: str) -> None:
        super().__init__()
        self.left, self.right, self.form = left, right, form

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        if self.form == "+=":
            left += right
            return left
        if self.form == "cat":
            return torch.cat([left, right], 1)
        return torch.add(left, right) if self.form == "torch.add" else left + right


class Repeated(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Top(nn.Module):
    """The head of a network."""

    def __init__(self, network: Network, channels: int, places: int) -> None:
        super().__init__()
        self.form, self.dims = network.head.form, network.dims
        if self.form == "pool":
            self.pool = ADAPTIVE[network.dims](1)
        if self.form == "flatten":
            self.flatten = nn.Flatten()
        flat = self.form in ("flatten", "torch.flatten", "reshape")
        widths = [channels * places if flat else channels, *network.head.widths]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, network.head.bias), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "tokens":
            return self.layers(x.flatten(2).transpose(1, 2)).mean(1)
        if self.form == "flatten":
            x = self.flatten(x)
        elif self.form == "torch.flatten":
            x = torch.flatten(x, 1)
        elif self.form == "reshape":
            x = x.reshape(x.shape[0], -1)
        elif self.form == "pool":
            x = self.pool(x).flatten(1)
        else:
            x = x.mean(list(range(2, 2 + self.dims)))
        return self.layers(x)


class Model(nn.Module):
    def __init__(self, body: nn.Module, top: nn.Module) -> None:
        super().__init__()
        self.body, self.top = body, top

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.body(x))


def make(network: Network, dtype: torch.dtype = torch.float64, *, seed: int | None = None) -> nn.Module:
    """Return the network in training mode, all parameters and statistics drawn from its seed.

    Args:
        network: as data.
        dtype: of parameters and buffers; rounded from the same float64 values.
        seed: another one than the network's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(network.seed if seed is None else seed)
        body = _chain(network.parts, network.dims, network.shape[1])
        with torch.no_grad():
            shape = body.eval()(torch.zeros(network.shape)).shape
        model = Model(body, Top(network, shape[1], shape[2:].numel())).double()
        for module in model.modules():
            _vary(module)
    return model.train().to(dtype)


def batch(
    network: Network, dtype: torch.dtype = torch.float64, layout: str = "contiguous"
) -> tuple[Tensor, Tensor]:
    """Return inputs and classes; the values are the same in every layout of memory."""
    generator = torch.Generator().manual_seed(network.seed + 1)
    x = 2 * torch.randn(network.shape, generator=generator, dtype=torch.float64).to(dtype)
    classes = torch.randint(network.classes, (network.shape[0],), generator=generator)
    return LAYOUTS[layout](x), classes


def channels_last(x: Tensor) -> Tensor:
    """Return a tensor of 4 or 5 dimensions with the channels last in memory; others as they are."""
    kinds = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=kinds[x.dim()]) if x.dim() in kinds else x


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.stack([x, -x], -1)[..., 0],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return a loss of a batch: cross-entropy, and a square.

    Gradients of cross-entropy alone add up to zero over the classes. Behind quantized weights, of which two
    are often the same, that makes gradients which are zero but for rounding, and their signs are chance.
    """
    y = model(data[0])
    return F.cross_entropy(y, data[1]) + 0.3 * (y - 0.7).square().mean()


def _vary(module: nn.Module) -> None:
    """Give a batch norm parameters and statistics that are not neutral, and that reach both ends of ReLU6."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return
    for values, low, high in (
        (module.weight, 0.5, 5.0),
        (module.running_var, 0.5, 2.0),
        (module.bias, -0.5, 0.5),
        (module.running_mean, -0.5, 0.5),
    ):
        if values is not None:
            nn.init.uniform_(values, low, high)


def _chain(parts: tuple[Part, ...], dims: int, channels: int) -> nn.Sequential:
    made = []
    for part in parts:
        module, channels = _MAKERS[type(part)](part, dims, channels)
        made.append(module)
    return nn.Sequential(*made)


def _out(parts: tuple[Part, ...], channels: int) -> int:
    for part in parts:
        if isinstance(part, Conv):
            channels = part.out
        elif isinstance(part, Concat):
            channels = _out(part.left, channels) + _out(part.right, channels)
        elif isinstance(part, Sum):
            channels = _out(part.left, channels)
    return channels


def _conv(part: Conv, dims: int, channels: int) -> tuple[nn.Module, int]:
    made = CONV[dims](
        channels,
        part.out,
        part.kernel,
        part.stride,
        part.padding,
        part.dilation,
        part.groups,
        part.bias,
        part.mode,
    )
    return made, part.out


def _norm(part: Norm, dims: int, channels: int) -> tuple[nn.Module, int]:
    options = {"affine": part.affine, "track_running_stats": part.tracked}
    return NORM[dims](channels, momentum=part.momentum, **options), channels


def _act(part: Act, dims: int, channels: int) -> tuple[nn.Module, int]:
    if part.form == "module" or (part.form == "in place" and part.kind == "tanh"):
        return MODULES[part.kind](), channels
    if part.form == "in place":
        return MODULES[part.kind](inplace=True), channels
    return Called(part.kind, part.form), channels


def _pool(part: Pool, dims: int, channels: int) -> tuple[nn.Module, int]:
    return POOL[part.kind, dims](part.kernel, part.stride, part.padding), channels


def _branches(part: Sum | Concat, dims: int, channels: int) -> tuple[nn.Module, int]:
    left, right = (_chain(branch, dims, channels) for branch in (part.left, part.right))
    form = part.form if isinstance(part, Sum) else "cat"
    return Branches(left, right, form), _out((part,), channels)


def _twice(part: Twice, dims: int, channels: int) -> tuple[nn.Module, int]:
    return Repeated(_chain(part.parts, dims, channels)), channels


_MAKERS = {
    Conv: _conv,
    Norm: _norm,
    Act: _act,
    Pool: _pool,
    Same: lambda part, dims, channels: (nn.Identity(), channels),
    Sum: _branches,
    Concat: _branches,
    Twice: _twice,
}
