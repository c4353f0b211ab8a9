"""Small plain networks: no in-place operation, and every producer of a quantized activation is a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Network:
    """A network as data.

    Attributes:
        id: its name.
        build: makes the plain network.
        shape: of a batch.
    """

    id: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """Return the network with statistics and affine parameters that are not the neutral ones."""
        torch.manual_seed(1)
        model = self.build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.weight, module.running_var):
                    nn.init.uniform_(value, 0.5, 2)
                for value in (module.bias, module.running_mean):
                    nn.init.uniform_(value, -0.5, 0.5)
        return model.to(dtype)

    def batch(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return inputs and classes."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.shape, generator=generator)
        return x.to(dtype), torch.arange(self.shape[0]) % 5

    def loss(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
        x, y = self.batch(dtype)
        return F.cross_entropy(model(x), y)


def layers(model: nn.Module) -> list[str]:
    """Return the names of the convolutions and linear layers, in the order of the tree."""
    return [name for name, module in model.named_modules() if isinstance(module, LAYERS)]


def conv_norm(c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


def vgg(pooling: type[nn.Module] = nn.MaxPool2d) -> nn.Module:
    return nn.Sequential(
        *conv_norm(3, 4),
        nn.ReLU(),
        *conv_norm(4, 6),
        nn.ReLU(),
        pooling(2),
        *conv_norm(6, 8),
        nn.ReLU(),
        pooling(2),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


class BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(c_in, c_out, 3, stride)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = conv_norm(c_out, c_out)
        plain = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if plain else nn.Sequential(*conv_norm(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, width), nn.ReLU())
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(
            *[
                BasicBlock(sizes[stage] if first else sizes[stage + 1], sizes[stage + 1], stride)
                for stage in range(4)
                for first, stride in ((True, 2 if stage else 1), (False, 1))
            ]
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(sizes[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class Separable(nn.Module):
    """An inverted residual: pointwise, depthwise, and a pointwise convolution without activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(*conv_norm(channels, 2 * channels, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(
            *conv_norm(2 * channels, 2 * channels, groups=2 * channels), nn.ReLU6()
        )
        self.project = nn.Sequential(*conv_norm(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 4 * x


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 4, stride=2), nn.ReLU6())
        self.scale = Scale()  # so that ReLU6 reaches its upper end behind it
        self.blocks = nn.Sequential(Separable(4), Separable(4))
        self.head = nn.Sequential(*conv_norm(4, 8, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.scale(self.stem(x)))
        return self.fc(self.pool(self.head(y)).flatten(1))


def no_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )


VGG = Network("vgg", vgg, (6, 3, 8, 8))
RESNET = Network("resnet18", ResNet18, (8, 3, 16, 16))
MOBILENET = Network("mobilenet", MobileNet, (6, 3, 8, 8))
NO_NORM = Network("no norm", no_norm, (6, 3, 8, 8))
NETWORKS = [VGG, RESNET, MOBILENET, NO_NORM]

# Between values of a coarse grid ties are exact, and the last bit of a sum, which depends on the processor,
# decides which of the tied values a max pooling takes: gradients of quantized networks are compared without
# any.
AVERAGING = Network("vgg, averaging", lambda: vgg(nn.AvgPool2d), (6, 3, 8, 8))
WITHOUT_TIES = [AVERAGING, RESNET, MOBILENET, NO_NORM]


def refuse_ties(model: nn.Module) -> None:
    """Fail where gradients of a quantized network would depend on which of several tied values is largest."""
    kinks = [name for name, m in model.named_modules() if isinstance(m, _MAXIMA)]
    assert not kinks, f"which of tied values is largest has no single answer: {', '.join(kinks)}"


_MAXIMA = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
