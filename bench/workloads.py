"""What a step is measured on: a network with its size, and the batch that goes through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LAUNCH_BOUND", "NETWORKS", "TITLES", "Task", "Workload", "stack"]

CLASSES = 10


def stack(width: int, depth: int) -> nn.Module:
    """Return ``depth`` convolutions of one width with batch norm and ReLU, and a linear classifier."""
    layers: list[nn.Module] = []
    for place in range(depth):
        convolution = nn.Conv2d(width if place else 3, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def _library(name: str) -> Callable[[Workload], nn.Module]:
    def build(workload: Workload) -> nn.Module:
        from gradl1_fast.training import models

        make = getattr(models, name)
        stem = {} if name == "vgg_like" else {"stem": "imagenet" if workload.size > 64 else "cifar"}
        return make(width=workload.width, classes=CLASSES, **stem)

    return build


def _damped(model: nn.Module) -> nn.Module:
    """Let each bottleneck begin near the identity, which leaves the time of a step as it is.

    At its usual start a ResNet-50 on a small batch magnifies rounding so much that eager PyTorch's own
    gradient in float32 is percents off; nothing could be said about anyone's correctness.
    """
    for block in model.modules():
        if isinstance(last := getattr(block, "bn3", None), nn.BatchNorm2d):
            nn.init.constant_(last.weight, 0.1)
    return model


TITLES = {
    "vgg_like": "VGG-like",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "stack": "stack of convolutions",
}
NETWORKS: dict[str, Callable[[Workload], nn.Module]] = {
    name: _library(name) for name in TITLES if name != "stack"
} | {"stack": lambda workload: stack(workload.width, workload.depth)}


@dataclass(frozen=True)
class Workload:
    """A network and a batch, as numbers that another process can be given.

    Attributes:
        network: one of :data:`NETWORKS`.
        width: what the network calls its width.
        batch: images.
        size: height and width of an image; above 64 networks get their stem for ImageNet.
        depth: of the stack; the other networks have their own.
        device: ``"cpu"`` or ``"cuda"``.
        tf32: whether convolutions and matrix products may use TF32 on a GPU.
    """

    network: str
    width: int
    batch: int
    size: int
    depth: int = 0
    device: str = "cpu"
    tf32: bool = False

    def title(self) -> str:
        """Return how tables call it."""
        return f"{TITLES[self.network]}, {self.numbers()}"

    def numbers(self) -> str:
        """Return its sizes in words."""
        depth = f", depth {self.depth}" if self.depth else ""
        return f"width {self.width}{depth}, batch {self.batch}, {self.size} × {self.size}"

    def asdict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    def task(self, layout: torch.memory_format = torch.channels_last, amp: bool = False) -> Task:
        """Return the network's maker and the batch, equal in every process."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        y = torch.randint(0, CLASSES, (self.batch,), generator=generator)

        def make() -> nn.Module:
            torch.manual_seed(0)
            return _damped(NETWORKS[self.network](self))

        x = x.to(self.device).to(memory_format=layout)
        return Task(make, x, y.to(self.device), layout, torch.bfloat16 if amp else None)


@dataclass(frozen=True)
class Task:
    """What a provider is given.

    Attributes:
        make: returns the float network on the CPU; equal at each call.
        x: images.
        y: labels.
        layout: memory format of network and images.
        autocast: type of autocast, or None.
    """

    make: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    layout: torch.memory_format = torch.channels_last
    autocast: torch.dtype | None = None

    def network(self) -> nn.Module:
        """Return the network on the device and in the layout of the images."""
        model = self.make().to(self.x.device)
        return model.to(memory_format=self.layout)  # type: ignore[call-overload]

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the loss of the batch."""
        on = self.autocast is not None
        with torch.autocast(self.x.device.type, dtype=self.autocast or torch.bfloat16, enabled=on):
            return F.cross_entropy(model(self.x), self.y)


# So small that only issuing operations counts, as for a small network on a GPU.
LAUNCH_BOUND = [
    Workload("resnet18", 2, 2, 8),
    Workload("resnet50", 2, 2, 8),
    # At 8 x 8 its last batch norms see two values: no gradient in float32 has a digit that is right.
    Workload("mobilenet_v2", 4, 2, 16),
]
