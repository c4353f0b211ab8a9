"""Weights as bit planes: the first w bits of an 8-bit code are the w-bit code.

A weight is rounded once, to a code ``c`` from -127 to 127 on its 8-bit grid; ``c + 128`` is one byte. When
``k = 8 - w`` bits are dropped, a code represents a cell of ``2**k`` codes and is decoded as its midpoint,
``(floor(c / 2**k) * 2**k + (2**k - 1) / 2) * scale``. Without the half cell, every weight would be too low by
half a step on average, which ruins a network at 5 bits. At 8 bits nothing is dropped or added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradl1_fast.nn.codes import along

__all__ = ["WIDTH", "decode", "encode", "pack", "plane_bytes", "unpack"]

WIDTH = 8
_HALF = 2 ** (WIDTH - 1)


def encode(weight: Tensor, scale: Tensor, axis: int | None = 0) -> Tensor:
    """Return the bytes ``c + 128`` of a weight, uint8 in its shape.

    Args:
        weight: the weight, with finite values.
        scale: the scale of the 8-bit grid, a scalar or one value per channel.
        axis: the axis of the channels, if there are several scales.
    """
    codes = torch.round(weight.to(scale.dtype) / along(scale, weight, axis)).clamp(1 - _HALF, _HALF - 1)
    return (codes + _HALF).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, bits: int, axis: int | None = 0) -> Tensor:
    """Decode the first ``bits`` bits of each byte; return the weight in the type of ``scale``."""
    cut = WIDTH - bits
    kept = (codes >> cut) << cut
    middle = kept.to(scale.dtype) + ((2**cut - 1) / 2 - _HALF)
    return middle.mul_(along(scale, codes, axis))


def plane_bytes(numel: int) -> int:
    """Return the number of bytes of one plane of ``numel`` codes."""
    return -(-numel // 8)


def pack(codes: Tensor, plane: int) -> Tensor:
    """Return one bit of each byte, packed: plane 0 holds the most significant bits.

    The first bit of each byte is its most significant; the last byte is padded with zeros.
    """
    bits = (codes.flatten() >> (7 - plane)) & 1
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (padded << _shifts(padded)).sum(1, dtype=torch.uint8)


def unpack(planes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the bytes whose first bits are ``planes``; missing bits are 0."""
    numel = torch.Size(shape).numel()
    codes = torch.zeros(numel, dtype=torch.uint8)
    for number, plane in enumerate(planes):
        bits = (plane[:, None] >> _shifts(plane)) & 1
        codes |= bits.flatten()[:numel] << (7 - number)
    return codes.reshape(tuple(shape))


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)
