"""A residual network of two blocks, small enough for many steps."""

from __future__ import annotations

from torch import nn

from tests.networks import BasicBlock, Network, ResNet18, conv_norm


class TwoBlocks(ResNet18):
    """The forward pass of a ResNet-18 with one plain block, and one with a shortcut of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.stem = nn.Sequential(*conv_norm(3, 4), nn.ReLU())
        self.blocks = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 6, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)


TWO_BLOCKS = Network("two blocks", TwoBlocks, (5, 3, 6, 6))
