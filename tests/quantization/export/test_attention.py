"""Attention in plain products is that of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gradl1_fast.quantization.export.attention import PlainAttention, attention


@pytest.mark.parametrize("sizes", [(4,), (2, 4), (2, 3, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.arange(15).reshape(3, 5) % 4 > 0},
        {"attn_mask": torch.arange(15).reshape(3, 5).double() / 9},
        {"enable_gqa": True},
    ],
    ids=",".join,
)
def test_it_computes_what_pytorch_does(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = (*sizes[:-1], 2) if "enable_gqa" in options else sizes
    query = torch.randn(*sizes, 3, 4, dtype=torch.float64)
    key, value = (torch.randn(*heads, 5, size, dtype=torch.float64) for size in (4, 6))
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attention(query, key, value, **options), expected)


def test_it_replaces_what_has_not_four_dimensions() -> None:
    x = torch.randn(2, 3, 4)
    with PlainAttention():
        graph = torch.fx.experimental.proxy_tensor.make_fx(F.scaled_dot_product_attention)(x, x, x).graph
    assert "softmax" in str(graph)
    assert "scaled_dot" not in str(graph)
