"""What the networks are put together from."""

from __future__ import annotations

from torch import nn

__all__ = ["STEMS", "check_stem", "classifier", "conv_bn", "conv_bn_relu"]

STEMS = ("cifar", "imagenet")


def conv_bn(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution that keeps the size (divided by the stride), and batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def conv_bn_relu(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return :func:`conv_bn` and a ReLU."""
    return [*conv_bn(inputs, outputs, kernel=kernel, stride=stride, groups=groups), nn.ReLU()]


def classifier(features: int, classes: int) -> list[nn.Module]:
    """Return average pooling over the image and a linear layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def check_stem(stem: str) -> None:
    """Check the name of a stem."""
    if stem not in STEMS:
        raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
