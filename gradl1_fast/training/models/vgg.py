"""VGG-like networks: plain 3x3 convolutions and max pooling."""

from __future__ import annotations

from torch import nn

from gradl1_fast.training.models._parts import classifier, conv_bn_relu

__all__ = ["vgg_like", "vgg_small"]


def vgg_like(
    width: int = 64, classes: int = 10, channels: int = 3, *, batch_norm: bool = True
) -> nn.Sequential:
    """Return three pairs of 3x3 convolutions with max pooling after each pair, and a linear classifier.

    Args:
        width: channels of the first pair; the others have twice and four times as many.
        classes: number of outputs.
        channels: of the images, whose sides have 8 pixels at least.
        batch_norm: follow each convolution by batch norm; otherwise it has a bias.
    """
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += conv_bn_relu(inputs, outputs) if batch_norm else _conv_relu(inputs, outputs)
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *classifier(inputs, classes))


def vgg_small(width: int = 16, classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Return a network for images of 28x28 that a CPU trains in minutes: four 3x3 convolutions.

    One convolution with max pooling behind it, another one, then two, and a linear classifier.

    Args:
        width: channels of the first convolution; the second has twice, the others have four times as many.
        classes: number of outputs.
        channels: of the images, whose sides have 4 pixels at least.
    """
    layers = [*conv_bn_relu(channels, width), nn.MaxPool2d(2)]
    layers += [*conv_bn_relu(width, 2 * width), nn.MaxPool2d(2)]
    layers += [*conv_bn_relu(2 * width, 4 * width), *conv_bn_relu(4 * width, 4 * width)]
    return nn.Sequential(*layers, *classifier(4 * width, classes))


def _conv_relu(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
