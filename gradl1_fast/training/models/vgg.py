"""A VGG-like network: plain 3x3 convolutions and max pooling."""

from __future__ import annotations

from torch import nn

from gradl1_fast.training.models._parts import classifier, conv_bn_relu

__all__ = ["vgg_like"]


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


def _conv_relu(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
