"""The l1 norms of many tensors: two launches for all tensors of one type, whatever their number.

The addresses and sizes travel as kernel arguments, by value: no table is copied to the device, and a
captured graph keeps what it was launched with. Arguments have about 4 KB, so a very long list
(forward: beyond 240 tensors) is cut into several launches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._device import narrow, sign, widen

BLOCKS = 8  # worked on by one program, one after the other
ARGUMENT_BYTES = 3900
_MARK = 2**60
_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def _argument(value: int) -> int:
    """Return ``value`` encoded as an odd number above 2^32; `_value` decodes it.

    Triton compiles a kernel again for arguments that are 1, multiples of 16, or wider than 32 bits.
    Addresses and sizes would give another combination in every call; these are all of one kind.
    """
    return 2 * value + _MARK + 1


@triton.jit
def _value(argument):
    return (argument - 1152921504606846976) >> 1


@triton.jit
def _pick(arguments, index):
    """Return the value of an argument whose index is known only at run time."""
    value = tl.full((), 0, tl.int64)
    for i in tl.static_range(len(arguments)):
        value = tl.where(index == i, _value(arguments[i]), value)
    return value


@triton.jit
def _chunks_before(sizes, index, CHUNK: tl.constexpr):
    """Return how many chunks the tensors before number ``index`` have together."""
    before = tl.full((), 0, tl.int64)
    for i in tl.static_range(len(sizes)):
        before += tl.where(index > i, (_value(sizes[i]) + CHUNK - 1) // CHUNK, 0)
    return before


@triton.jit
def _locate(program, sizes, CHUNK: tl.constexpr):
    """Return the number of the tensor that this program works on, and the first place of its chunk."""
    index = tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int64)
    before = tl.full((), 0, tl.int64)
    for i in tl.static_range(len(sizes)):
        here = program >= before
        index = tl.where(here, i, index)
        first = tl.where(here, before, first)
        before += (_value(sizes[i]) + CHUNK - 1) // CHUNK
    return index, (program - first) * CHUNK


@triton.jit
def _pointer(addresses, index, T: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = _pick(addresses, index).to(tl.pointer_type(T))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _load(pointer, at, size, WHOLE: tl.constexpr, ACC: tl.constexpr):
    """Return a block; a block that is known to be whole is loaded without a mask, in wide words."""
    return widen(tl.load(pointer + at) if WHOLE else tl.load(pointer + at, mask=at < size, other=0), ACC)


@triton.jit
def _l1_norm_forward_kernel(
    partials, tensors, sizes, T: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    index, first = _locate(program, sizes, BLOCK * BLOCKS)
    size, t = _pick(sizes, index), _pointer(tensors, index, T, ALIGNED)
    total = tl.zeros((BLOCK,), ACC)
    if first + BLOCK * BLOCKS <= size:
        for i in range(BLOCKS):
            total += tl.abs(_load(t, first + i * BLOCK + tl.arange(0, BLOCK), size, True, ACC))
    else:
        for i in range(BLOCKS):
            total += tl.abs(_load(t, first + i * BLOCK + tl.arange(0, BLOCK), size, False, ACC))
    tl.store(partials + program, tl.sum(total))


@triton.jit
def _l1_norm_double_backward_kernel(
    partials, d_dx, tensors, sizes, T: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    index, first = _locate(program, sizes, BLOCK * BLOCKS)
    size, t = _pick(sizes, index), _pointer(tensors, index, T, ALIGNED)
    v = _pointer(d_dx, index, T, ALIGNED)
    total = tl.zeros((BLOCK,), ACC)
    for i in range(BLOCKS):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        total += _load(v, at, size, False, ACC) * sign(_load(t, at, size, False, ACC))
    tl.store(partials + program, tl.sum(total))


@triton.jit
def _l1_norm_backward_kernel(
    dy, dx, tensors, sizes, slots, T: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    index, first = _locate(tl.program_id(0).to(tl.int64), sizes, BLOCK * BLOCKS)
    size, t = _pick(sizes, index), _pointer(tensors, index, T, ALIGNED)
    out = _pointer(dx, index, T, ALIGNED)
    dy_i = tl.load(dy + _pick(slots, index)).to(ACC)  # one for each tensor
    for i in range(BLOCKS):
        at = first + i * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, narrow(dy_i * sign(_load(t, at, size, False, ACC)), T), mask=at < size)


@triton.jit
def _l1_norm_finish_kernel(
    partials, out, sizes, slots, ACC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the partials of tensor ``program_id`` in a fixed order."""
    index = tl.program_id(0)
    first = _chunks_before(sizes, index, CHUNK)
    chunks = (_pick(sizes, index) + CHUNK - 1) // CHUNK
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partials + first + at, mask=at < chunks, other=0)
    tl.store(out + _pick(slots, index), tl.sum(total))


def l1_norm_forward(tensors: list[Tensor]) -> Tensor:
    """Return the vector of ``sum |t|``, one entry for each tensor, in the widest type of their sums."""
    out = _vector(tensors)
    with _launch.on_device_of(tensors[0]):
        for slots in _groups(tensors, bytes_each=16):
            _reduce(_l1_norm_forward_kernel, out, slots, [_launch.dense(tensors[i]) for i in slots])
    return out


def l1_norm_backward(dy: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return ``dx_i = dy_i * sign(t_i)`` for each tensor."""
    dxs = [torch.empty_like(t) for t in tensors]
    dy = dy.contiguous()
    with _launch.on_device_of(dy):
        for slots in _groups(tensors, bytes_each=32):
            dx = [dxs[i] for i in slots]
            group = [_launch.in_layout_of(tensors[i], dxs[i]) for i in slots]
            programs = sum(_chunks(t) for t in group)
            if programs:
                _l1_norm_backward_kernel[(programs,)](
                    dy, _addresses(dx), _addresses(group), _sizes(group), _numbers(slots), **_shape(group, dx)
                )
    return dxs


def l1_norm_double_backward(d_dx: list[Tensor], tensors: list[Tensor]) -> Tensor:
    """Return ``d_dy_i = sum d_dx_i * sign(t_i)``."""
    out = _vector(tensors)
    with _launch.on_device_of(tensors[0]):
        for slots in _groups(tensors, bytes_each=24):
            group = [_launch.dense(tensors[i]) for i in slots]
            v = [_launch.in_layout_of(d_dx[i], t) for i, t in zip(slots, group, strict=True)]
            _reduce(_l1_norm_double_backward_kernel, out, slots, v, group)
    return out


def _reduce(kernel: object, out: Tensor, slots: list[int], *groups: list[Tensor]) -> None:
    """Sum over each tensor of the groups by ``kernel``, into the slots of ``out``."""
    tensors = groups[-1]
    programs = sum(_chunks(t) for t in tensors)
    partials, shape = _launch.partials(tensors[0], programs), _shape(*groups)
    if programs:
        kernel[(programs,)](partials, *map(_addresses, groups), _sizes(tensors), **shape)  # type: ignore[index]
    _l1_norm_finish_kernel[(len(slots),)](
        partials,
        out,
        _sizes(tensors),
        _numbers(slots),
        ACC=shape["ACC"],
        CHUNK=_launch.BLOCK * BLOCKS,
        BLOCK=_launch.BLOCK,
        **_launch.OPTIONS,
    )


def _groups(tensors: list[Tensor], bytes_each: int) -> Iterator[list[int]]:
    """Yield the numbers of tensors of one type that fit into the arguments of one launch."""
    most = ARGUMENT_BYTES // bytes_each
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        slots = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        yield from (slots[i : i + most] for i in range(0, len(slots), most))


def _vector(tensors: list[Tensor]) -> Tensor:
    wide = any(t.dtype == torch.float64 for t in tensors)
    return tensors[0].new_empty((len(tensors),), dtype=torch.float64 if wide else torch.float32)


def _chunks(t: Tensor) -> int:
    return triton.cdiv(t.numel(), _launch.BLOCK * BLOCKS)


def _numbers(values: list[int]) -> tuple[int, ...]:
    return tuple(_argument(v) for v in values)


def _addresses(tensors: list[Tensor]) -> tuple[int, ...]:
    return _numbers([t.data_ptr() for t in tensors])


def _sizes(tensors: list[Tensor]) -> tuple[int, ...]:
    return _numbers([t.numel() for t in tensors])


def _shape(*groups: list[Tensor]) -> dict[str, object]:
    dtype = groups[0][0].dtype
    return {
        "T": _TYPES[dtype],
        "ALIGNED": all(t.data_ptr() % 16 == 0 for group in groups for t in group),
        "ACC": _launch.acc(dtype),
        "BLOCK": _launch.BLOCK,
        "BLOCKS": BLOCKS,
        **_launch.OPTIONS,
    }
