"""Small image classifiers in plain PyTorch; :func:`gradl1_fast.convert` takes each of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "ResNet", "digits_net", "mobilenet_like", "resnet18", "vgg_like"]


def _conv_bn_relu(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _classifier(features: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        stride: of the first convolution and the shortcut.

    Source: He et al. 2015, arXiv 1512.03385, figure 5 left.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` of shape ``(N, inputs, H, W)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, four stages of two basic blocks each, average pooling and a linear classifier.

    Args:
        stem: the layers before the first block; gives ``width`` channels.
        width: channels of the first stage; each further stage has twice as many.
        classes: number of outputs.
    """

    def __init__(self, stem: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        blocks, inputs = [], width
        for stage, outputs in enumerate(width * 2**i for i in range(4)):
            blocks += [BasicBlock(inputs, outputs, stride=2 if stage else 1), BasicBlock(outputs, outputs)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_classifier(inputs, classes))

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
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
    if stem == "cifar":
        layers = _conv_bn_relu(channels, width)
    else:
        layers = [*_conv_bn_relu(channels, width, kernel=7, stride=2), nn.MaxPool2d(3, 2, padding=1)]
    return ResNet(nn.Sequential(*layers), width, classes)


def vgg_like(
    width: int = 64, classes: int = 10, channels: int = 3, *, batch_norm: bool = True
) -> nn.Sequential:
    """Return three pairs of 3x3 convolutions with max pooling after each pair, and a linear classifier.

    Args:
        width: channels of the first pair; the others have twice and four times as many.
        classes: number of outputs.
        channels: of the images.
        batch_norm: follow each convolution by batch norm; otherwise it has a bias.
    """
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += _conv_bn_relu(inputs, outputs) if batch_norm else _conv_relu(inputs, outputs)
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_classifier(inputs, classes))


def _conv_relu(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]


def mobilenet_like(width: int = 32, classes: int = 10, channels: int = 3) -> nn.Sequential:
    """Return a network of depthwise-separable convolutions, after Howard et al. 2017, arXiv 1704.04861.

    Args:
        width: channels of the first layer; the last has 16 times as many.
        classes: number of outputs.
        channels: of the images.
    """
    layers = _conv_bn_relu(channels, width)
    inputs = width
    for outputs, stride in ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1)):
        layers += _conv_bn_relu(inputs, inputs, stride=stride, groups=inputs)
        layers += _conv_bn_relu(inputs, outputs * width, kernel=1)
        inputs = outputs * width
    return nn.Sequential(*layers, *_classifier(inputs, classes))


def digits_net(width: int = 16, classes: int = 10) -> nn.Sequential:
    """Return the demo's network for 8x8 images of one channel: four convolutions with batch norm.

    Args:
        width: channels of the first convolution; the others have 2, 2 and 4 times as many.
        classes: number of outputs.
    """
    return nn.Sequential(
        *_conv_bn_relu(1, width),
        *_conv_bn_relu(width, 2 * width),
        *_conv_bn_relu(2 * width, 2 * width, stride=2),
        *_conv_bn_relu(2 * width, 4 * width, stride=2),
        *_classifier(4 * width, classes),
    )
