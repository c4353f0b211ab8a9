"""Weights as bit planes: 8-bit codes of which the first w bits are the w-bit codes.

A weight is rounded once, to a code ``c`` from -127 to 127 on its 8-bit grid; ``c + 128`` is one byte. With
``k = 8 - w`` bits cut off, a code stands for a cell of ``2**k`` codes, and is read as the middle of it:
``(floor(c / 2**k) * 2**k + (2**k - 1) / 2) * scale``. Without the half cell every weight would be too low by
half a step on average, which ruins a network at 5 bits. At 8 bits nothing is cut and nothing added.
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
        weight: of finite values.
        scale: a step of the 8-bit grid: a scalar, or one value for each channel.
        axis: of the channels, where there are several steps.
    """
    codes = torch.round(weight.to(scale.dtype) / along(scale, weight, axis)).clamp(1 - _HALF, _HALF - 1)
    return (codes + _HALF).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, bits: int, axis: int | None = 0) -> Tensor:
    """Return the weight that the first ``bits`` bits of each byte stand for, in the type of ``scale``."""
    cut = WIDTH - bits
    kept = (codes >> cut) << cut
    middle = kept.to(scale.dtype) + ((2**cut - 1) / 2 - _HALF)
    return middle.mul_(along(scale, codes, axis))


def plane_bytes(numel: int) -> int:
    """Return the size of one plane of ``numel`` codes."""
    return -(-numel // 8)


def pack(codes: Tensor, plane: int) -> Tensor:
    """Return one bit of each byte, packed: plane 0 holds the most significant bits.

    Eight bits go into a byte, the first of them as its most significant; the last byte ends with zeros.
    """
    bits = (codes.flatten() >> (7 - plane)) & 1
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (padded << _shifts(padded)).sum(1, dtype=torch.uint8)


def unpack(planes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the bytes of which ``planes`` are the first bits; bits without a plane are 0."""
    numel = torch.Size(shape).numel()
    codes = torch.zeros(numel, dtype=torch.uint8)
    for number, plane in enumerate(planes):
        bits = (plane[:, None] >> _shifts(plane)) & 1
        codes |= bits.flatten()[:numel] << (7 - number)
    return codes.reshape(tuple(shape))


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)
