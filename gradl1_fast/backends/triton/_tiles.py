"""How the batch norm kernels walk over a tensor of ``(N, C, *size)``, in both layouts.

A program works on one *strip* of channels: in NCHW one channel, in channels_last up to 32 of them.
The strip is cut into tiles of ROWS x COLS elements; each program takes ``tiles`` of them, one after the
other. A row lies ``pitch`` elements behind the one before and holds ``width`` elements side by side:

=============  =================  =========  =========  ==========================
layout         rows               width      pitch      columns of a tile
=============  =================  =========  =========  ==========================
NCHW           N                  H * W      C * H * W  pixels of the one channel
channels_last  N * H * W          C          C          channels of the strip
=============  =================  =========  =========  ==========================

Tiles depend only on the shape, not on the device, so sums are the same everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._device import widen

PROGRAMS = 4096  # as many as fill a large GPU once or twice, if there are that many tiles
CHANNELS_IN_A_STRIP = 32


class Plan(NamedTuple):
    """The tiles of a tensor; `arguments` are those of every kernel here."""

    grid: tuple[int]
    splits: int
    channels: int
    size_of_channel: int
    arguments: dict[str, Any]


def walkable(x: Tensor) -> Tensor:
    """Return ``x`` if it is NCHW or channels_last without gaps, else a contiguous copy."""
    if x.is_neg():
        x = x.resolve_neg()  # its memory holds the opposite of its values
    return x if x.is_contiguous() or _channels_last(x) else x.contiguous()


def plan(x: Tensor) -> Plan:
    """Divide the walkable, non-empty tensor ``x`` into tiles."""
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    last = pixels == 1 or not x.is_contiguous()
    rows, width = (batch * pixels, channels) if last else (batch, pixels)
    cols = min(triton.next_power_of_2(width), CHANNELS_IN_A_STRIP if last else _launch.BLOCK)
    tile_rows = _launch.BLOCK // cols
    strips = triton.cdiv(channels, cols) if last else channels
    in_a_strip = triton.cdiv(rows, tile_rows) * (1 if last else triton.cdiv(width, cols))
    tiles = triton.cdiv(in_a_strip, min(in_a_strip, triton.cdiv(PROGRAMS, strips)))
    splits = triton.cdiv(in_a_strip, tiles)
    arguments = {
        "rows": rows,
        "width": width,
        "pitch": channels if last else channels * pixels,
        "channels": channels,
        "strips": strips,
        "splits": splits,
        "tiles": tiles,
        "LAST": last,
        "ROWS": tile_rows,
        "COLS": cols,
        "ACC": _launch.acc(x.dtype),
        **_launch.OPTIONS,
    }
    return Plan((strips * splits,), splits, channels, batch * pixels, arguments)


def _channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


@triton.jit
def place(strips):
    """Return the strip and the share that this program processes."""
    program = tl.program_id(0).to(tl.int64)
    return program % strips, program // strips


@triton.jit
def tile(strip, k, rows, width, pitch, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the offsets of the elements of tile ``k`` of a strip, and a mask of those that exist."""
    if LAST:
        row = k * ROWS
        col = strip * COLS
        start = strip * 0
    else:
        across = (width + COLS - 1) // COLS
        row = k // across * ROWS
        col = k % across * COLS
        start = strip * width
    row = row + tl.arange(0, ROWS)
    col = col + tl.arange(0, COLS)
    return start + row[:, None] * pitch + col[None, :], (row < rows)[:, None] & (col < width)[None, :]


@triton.jit
def load(values, at, in_bounds, ACC: tl.constexpr):
    """Return a tile of ``values`` in the type of its sums, 0 outside the mask."""
    return widen(tl.load(values + at, mask=in_bounds, other=0), ACC)


@triton.jit
def channel_of(strip, LAST: tl.constexpr, COLS: tl.constexpr):
    """Return the channels of a strip in a shape that broadcasts to a tile."""
    return (strip * COLS + tl.arange(0, COLS))[None, :] if LAST else strip + tl.zeros((1, 1), tl.int64)


@triton.jit
def of_channel(
    values, strip, channels, ABSENT: tl.constexpr, LAST: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):
    """Return each channel's entry of ``values`` in the shape of `channel_of`."""
    if values is None:
        entry = tl.full((1, 1), ABSENT, ACC)
    else:
        channel = channel_of(strip, LAST, COLS)
        entry = load(values, channel, channel < channels, ACC)
    return entry


@triton.jit
def sum_of_channel(values, LAST: tl.constexpr):
    """Return the sum of a tile over the elements of each channel, in the shape of `channel_of`."""
    # At once where the whole tile is one channel: Triton 3.6 fails on the sum of a sum.
    return tl.sum(values, axis=0)[None, :] if LAST else tl.sum(values) + tl.zeros((1, 1), values.dtype)


@triton.jit
def store_of_channel(values, entry, strip, channels, LAST: tl.constexpr, COLS: tl.constexpr):
    """Store each channel's entry in ``values``."""
    channel = channel_of(strip, LAST, COLS)
    tl.store(values + channel, entry, mask=channel < channels)


@triton.jit
def store_partial(partials, k, entry, strip, share, channels, splits, LAST: tl.constexpr, COLS: tl.constexpr):
    """Store each channel's partial number ``k`` in the slot of this program."""
    slot = partials + (k * splits + share) * channels
    store_of_channel(slot, entry, strip, channels, LAST, COLS)


@triton.jit
def store_sum(partials, k, values, strip, share, channels, splits, LAST: tl.constexpr, COLS: tl.constexpr):
    """Store the sum of a tile of accumulators as partial number ``k``."""
    total = sum_of_channel(values, LAST)
    store_partial(partials, k, total, strip, share, channels, splits, LAST, COLS)
