"""Chance variation of training images: mirrored and shifted, the same for the same seed, epoch and step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augment", "generator_of"]

_PRIME = 1_000_003


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator that depends on the numbers and their order alone, and on nothing drawn before."""
    seed = 0
    for number in numbers:
        seed = (seed * _PRIME + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def augment(images: Tensor, generator: torch.Generator, *, flip: bool, crop: int) -> Tensor:
    """Return the images, each randomly flipped and shifted.

    Args:
        images: ``(N, channels, H, W)``; they stay as they are.
        generator: of random numbers, on the CPU; the same numbers are drawn on every device.
        flip: mirror about half of the images left to right.
        crop: maximum shift in pixels in each direction, zero-padded.
    """
    if crop:
        images = _shifted(images, torch.randint(0, 2 * crop + 1, (2, len(images)), generator=generator), crop)
    if flip:
        mirrored = torch.randint(0, 2, (len(images),), generator=generator).bool().to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


def _shifted(images: Tensor, starts: Tensor, crop: int) -> Tensor:
    """Cut images of the old size out of padded ones, from the given rows and columns on."""
    count, _, height, width = images.shape
    top, left = starts.to(images.device)
    rows = (top[:, None] + torch.arange(height, device=images.device))[:, :, None]
    columns = (left[:, None] + torch.arange(width, device=images.device))[:, None, :]
    which = torch.arange(count, device=images.device)[:, None, None]
    padded = F.pad(images, (crop, crop, crop, crop))
    return padded[which, :, rows, columns].permute(0, 3, 1, 2).contiguous()
