"""ResNet-18 and ResNet-50 for small and for large images, and ResNet-20 for small ones.

Source: He et al. 2015, arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from gradl1_fast.training.models._parts import check_stem, classifier, conv_bn, conv_bn_relu

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "resnet18", "resnet20", "resnet50"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution and the shortcut.

    Source: figure 5 left of the paper.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, stride=stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` of shape ``(N, inputs, H, W)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones that narrow and widen, around a shortcut.

    Args:
        inputs: channels that come in.
        outputs: channels that go out, a multiple of 4; inside there are a quarter as many.
        stride: of the 3x3 convolution and the shortcut.

    Source: figure 5 right of the paper, with the stride in the 3x3 convolution, as is usual today.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        narrow = outputs // self.expansion
        self.conv1, self.bn1 = conv_bn(inputs, narrow, kernel=1)
        self.conv2, self.bn2 = conv_bn(narrow, narrow, stride=stride)
        self.conv3, self.bn3 = conv_bn(narrow, outputs, kernel=1)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` of shape ``(N, inputs, H, W)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, four stages of blocks, average pooling and a linear classifier.

    Args:
        stem: the layers before the first block; gives ``width`` channels.
        width: channels of the first stage, before a block's expansion; each further stage has twice as many.
        classes: number of outputs.
        block: what the stages are made of.
        depths: blocks in each stage.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        width: int,
        classes: int,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        depths: Sequence[int] = (2, 2, 2, 2),
    ) -> None:
        super().__init__()
        self.stem = stem
        blocks: list[nn.Module] = []
        inputs = width
        for stage, depth in enumerate(depths):
            outputs = width * 2**stage * block.expansion
            for place in range(depth):
                blocks.append(block(inputs, outputs, stride=2 if stage and not place else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*classifier(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, classes)`` of images ``(N, channels, H, W)``."""
        return self.head(self.blocks(self.stem(x)))


def resnet18(width: int = 64, classes: int = 10, stem: str = "cifar", channels: int = 3) -> nn.Module:
    """Return a ResNet-18.

    Args:
        width: channels of the first stage; 64 in the paper.
        classes: number of outputs.
        stem: ``"cifar"`` (one 3x3 convolution) or ``"imagenet"`` (7x7 of stride 2, then max pooling).
        channels: of the images.

    Raises:
        ValueError: the stem is neither.
    """
    return ResNet(_stem(stem, channels, width), width, classes)


def resnet20(width: int = 16, classes: int = 10, channels: int = 3) -> nn.Module:
    """Return a ResNet-20 for small images: three stages of three blocks.

    Args:
        width: channels of the first stage; 16 in the paper.
        classes: number of outputs.
        channels: of the images.

    Source: section 4.2 of the paper, with convolutions in the shortcuts.
    """
    return ResNet(_stem("cifar", channels, width), width, classes, depths=(3, 3, 3))


def resnet50(width: int = 64, classes: int = 10, stem: str = "cifar", channels: int = 3) -> nn.Module:
    """Return a ResNet-50; the arguments are those of :func:`resnet18`."""
    return ResNet(_stem(stem, channels, width), width, classes, Bottleneck, (3, 4, 6, 3))


def _stem(stem: str, channels: int, width: int) -> nn.Sequential:
    check_stem(stem)
    if stem == "cifar":
        return nn.Sequential(*conv_bn_relu(channels, width))
    layers = conv_bn_relu(channels, width, kernel=7, stride=2)
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2, padding=1))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(*conv_bn(inputs, outputs, kernel=1, stride=stride))
