"""Networks of depthwise-separable convolutions, which suffer most from quantization."""

from __future__ import annotations

from torch import Tensor, nn

from gradl1_fast.training.models._parts import check_stem, classifier, conv_bn, conv_bn_relu

__all__ = ["InvertedResidual", "digits_net", "mobilenet_like", "mobilenet_v2"]

# (expansion, channels, blocks, stride of the first block); table 2 of arXiv 1801.04381
_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
_V2_WIDTH = 32


def mobilenet_like(width: int = 32, classes: int = 10, channels: int = 3) -> nn.Sequential:
    """Return a network of depthwise-separable convolutions, after Howard et al. 2017, arXiv 1704.04861.

    Args:
        width: channels of the first layer; the last has 16 times as many.
        classes: number of outputs.
        channels: of the images.
    """
    blocks = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), (16, 1))
    return _separable(width, [(factor * width, stride) for factor, stride in blocks], classes, channels)


def digits_net(width: int = 16, classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Return the demo's network for images of 8x8: like :func:`mobilenet_like`, with four blocks.

    Args:
        width: channels of the first layer; the last has 4 times as many.
        classes: number of outputs.
        channels: of the images.
    """
    blocks = ((2, 1), (4, 2), (4, 1), (4, 2))
    return _separable(width, [(factor * width, stride) for factor, stride in blocks], classes, channels)


def _separable(width: int, blocks: list[tuple[int, int]], classes: int, channels: int) -> nn.Sequential:
    """Return a convolution, depthwise-separable blocks ``(channels, stride)`` and a linear classifier."""
    layers = conv_bn_relu(channels, width)
    inputs = width
    for outputs, stride in blocks:
        layers += conv_bn_relu(inputs, inputs, stride=stride, groups=inputs)
        layers += conv_bn_relu(inputs, outputs, kernel=1)
        inputs = outputs
    return nn.Sequential(*layers, *classifier(inputs, classes))


class InvertedResidual(nn.Module):
    """A 1x1 convolution that widens, a depthwise 3x3 one, and a 1x1 one that narrows, without activation.

    Args:
        inputs: channels that come in.
        outputs: channels that go out; if as many and of stride 1, the input is added.
        stride: of the depthwise convolution.
        expansion: how many times wider it is inside; at 1 the first convolution is left out.

    Source: Sandler et al. 2018, arXiv 1801.04381, table 1.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * inputs
        widen = _conv_bn_relu6(inputs, wide, kernel=1) if expansion > 1 else []
        depthwise = _conv_bn_relu6(wide, wide, stride=stride, groups=wide)
        self.layers = nn.Sequential(*widen, *depthwise, *conv_bn(wide, outputs, kernel=1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for ``x`` of shape ``(N, inputs, H, W)``."""
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet_v2(
    width: int = _V2_WIDTH, classes: int = 10, stem: str = "cifar", channels: int = 3
) -> nn.Module:
    """Return a MobileNetV2, without the dropout before its classifier.

    Args:
        width: channels of the first layer, 32 in the paper; all others change in proportion.
        classes: number of outputs.
        stem: ``"imagenet"`` halves the image's sides five times, as the paper does; ``"cifar"`` leaves
            out the first two times.
        channels: of the images.

    Raises:
        ValueError: the stem is neither.

    Source: Sandler et al. 2018, arXiv 1801.04381, table 2.
    """
    check_stem(stem)
    layers = _conv_bn_relu6(channels, width, stride=1 if stem == "cifar" else 2)
    inputs = width
    for expansion, size, count, stride in _V2:
        outputs = _in_proportion(size, width)
        for place in range(count):
            first = stride if not (place or (stem == "cifar" and size == 24)) else 1
            layers.append(InvertedResidual(inputs, outputs, first, expansion))
            inputs = outputs
    features = _in_proportion(1280, width)
    return nn.Sequential(*layers, *_conv_bn_relu6(inputs, features, kernel=1), *classifier(features, classes))


def _in_proportion(size: int, width: int) -> int:
    return max(1, round(size * width / _V2_WIDTH))


def _conv_bn_relu6(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [*conv_bn(inputs, outputs, kernel=kernel, stride=stride, groups=groups), nn.ReLU6()]
