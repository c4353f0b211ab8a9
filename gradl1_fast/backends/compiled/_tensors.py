"""Converts tensors to arguments of the extension: dense memory, sizes, device and stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.backends.compiled._extension import engine

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

Span = tuple[int, int]
Layout = tuple[int, int, int]
Settings = dict[str, Any]


def engine_for(x: Tensor) -> Any:
    """Return the half of the extension that computes on the device of ``x``."""
    return engine("cuda" if x.is_cuda else "host")


def where(x: Tensor) -> tuple[int, int]:
    """Return the device and its current stream, or on a CPU torch's number of threads."""
    if x.is_cuda:
        index = x.get_device()
        # The raw handle, because creating a Stream object costs more than the call.
        return index, torch._C._cuda_getCurrentRawStream(index)
    return torch.get_num_threads(), 0


def dense(x: Tensor) -> Tensor:
    """Return ``x``, or a copy with the strides of ``torch.empty_like(x)`` if its memory has gaps."""
    if x.is_neg():
        x = x.resolve_neg()  # its memory holds the negated values
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    like = torch.empty_like(x)
    return x if like.stride() == x.stride() else like.copy_(x)


def beside(t: Tensor, x: Tensor) -> Tensor:
    """Return ``t`` in the type and memory order of the dense ``x``, copied if they differ."""
    if t.dtype == x.dtype and t.stride() == x.stride() and not t.is_neg():
        return t
    return torch.empty_like(x).copy_(t)


def vector(t: Tensor | None, x: Tensor) -> Tensor | None:
    """Return per-channel values or a scalar, contiguous and in the type of the sums of ``x``."""
    return None if t is None else t.to(sum_dtype(x.dtype)).resolve_neg().contiguous()


def new_vector(x: Tensor, *size: int) -> Tensor:
    """Return an uninitialized vector in the type of the sums of ``x``."""
    return torch.empty(size, dtype=sum_dtype(x.dtype), device=x.device)


def span(t: Tensor | None) -> Span | None:
    """Return the address and the number of bytes of a dense tensor."""
    return None if t is None else (t.data_ptr(), t.numel() * t.element_size())


def layout(x: Tensor, axis: int | None) -> Layout:
    """Return the number of elements before, along and after ``axis`` in the memory of the dense ``x``."""
    channels = 1 if axis is None else x.shape[axis]
    if axis is None or channels == 1:
        return 1, 1, x.numel()
    inner = x.stride(axis)
    return x.numel() // (channels * inner), channels, inner


def settings_of(x: Tensor, axis: int | None, **options: object) -> Settings:
    """Return the settings of a pass over the dense ``x``: its type, its layout from ``axis``, its options."""
    return {"dtype": DTYPES[x.dtype], "layout": layout(x, axis), **options}


def scratch(x: Tensor, settings: Settings) -> Tensor | None:
    """Return memory for the partial sums of a pass over ``x``; None on the host, which has its own."""
    engine = engine_for(x)
    if engine.in_host_memory:
        return None
    return torch.empty((engine.scratch_bytes(settings["layout"]) // 8,), dtype=torch.float64, device=x.device)


def run(name: str, like: Tensor, settings: Settings, /, **memory: Tensor | None) -> None:
    """Run a pass of ``csrc/passes.h`` where ``like`` is.

    Args:
        name: of the pass.
        like: a tensor on the device that computes.
        settings: of the pass, by name.
        memory: the fields of the pass, by name; dense, and None where absent.

    Raises:
        ValueError: a setting or a field is missing, too small, not aligned or not accepted.
    """
    spans = {field: span(t) for field, t in memory.items()}
    getattr(engine_for(like), name)(where(like), settings, **spans)
