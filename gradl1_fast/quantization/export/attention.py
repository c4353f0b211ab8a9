"""Attention of any number of dimensions in plain products: PyTorch's ONNX exporter supports four only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PlainAttention", "attention"]


class PlainAttention(TorchFunctionMode):
    """Computes ``scaled_dot_product_attention`` by :func:`attention` if the query has not four dimensions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of PyTorch."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (args[0] if args else kwargs["query"]).dim() != 4:
            return attention(*args, **kwargs)
        return func(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the result of ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: ``(..., L, E)``.
        key: ``(..., S, E)``.
        value: ``(..., S, V)``.
        attn_mask: broadcasts to ``(..., L, S)``; True where attention is paid, or added to the products.
        dropout_p: as there.
        is_causal: as there.
        scale: of the products; None for ``1 / sqrt(E)``.
        enable_gqa: repeat the heads of key and value, in the third dimension from the end.
    """
    if enable_gqa:
        heads = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(heads, -3) for x in (key, value))
    products = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        products = products.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        products = products + attn_mask
    weights = products.softmax(-1)
    return F.dropout(weights, dropout_p) @ value if dropout_p else weights @ value
