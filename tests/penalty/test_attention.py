"""Models with attention and hard activations, whose gradients PyTorch's kernels differentiate only once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradl1_fast as gl
from tests.penalty.small import assert_same, ours, truth

WIDTH = 8


class Attention(nn.Module):
    """Self-attention whose query, key and value layers are given one tensor."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        q, k, v = (
            layer(x).unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).flatten(2))


class MultiHead(nn.Module):
    """``nn.MultiheadAttention`` between two layers; it reads its own weights by function."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + self.attention(x, x, x, need_weights=self.need_weights)[0])


def hard() -> nn.Module:
    """A squeeze of the kind that MobileNetV3 has; one value in three lies beyond the ends."""
    return nn.Sequential(
        nn.Linear(3, 6),
        nn.Hardswish(),
        nn.Linear(6, 6),
        nn.Hardsigmoid(),
        nn.Linear(6, 4),
        nn.Hardtanh(),
        nn.Linear(4, 2),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "attention": (Attention, ["stem", "q", "k", "v", "out"], ["q", "k", "v", "out"]),
    "causal attention": (
        lambda: Attention(causal=True),
        ["stem", "q", "k", "v", "out"],
        ["q", "k", "v", "out"],
    ),
    "multi-head attention": (lambda: MultiHead(False), ["stem", "head"], ["head"]),
    "multi-head attention with weights": (lambda: MultiHead(True), ["stem", "head"], ["head"]),
    "hard activations": (hard, ["0", "2", "4", "6"], ["2", "4", "6"]),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return make().double()


def loss(model: nn.Module) -> Tensor:
    x = 3 * torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(6)).double()
    return model(x).square().mean()


@pytest.mark.filterwarnings("ignore:gradl1_fast.convert. .* of the weights stay in float")
@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_double_backprop_through_the_unfused_form(case: str, scale: str) -> None:
    make, layers, inputs_of = CASES[case]
    model = gl.convert(made(make))
    found = ours(model, gl.GradL1(model, 0.3, 0.2, scale), loss)
    with sdpa_kernel(SDPBackend.MATH):
        options = {"lambda_w": 0.3, "lambda_a": 0.2, "scale": scale}
        expected = truth(made(make), [f"{n}.weight" for n in layers], inputs_of, loss=loss, **options)
    sites = {f"{n}.input" for n in expected.terms if n in inputs_of}  # q, k and v share one
    assert set(found.terms) == {f"{n}.weight" for n in layers} | sites
    assert_same(found, expected, 1e-9)


def test_layers_with_the_same_input_share_a_term() -> None:
    model = gl.convert(made(Attention))
    assert model.q.input_quantizer is model.k.input_quantizer is model.v.input_quantizer
    assert model.q.input_quantizer is not model.out.input_quantizer


def test_at_4_bits_query_key_and_value_see_one_quantized_tensor() -> None:
    model = gl.convert(made(Attention))
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(6)).double()
    gl.calibrate(model, [x])
    seen = []
    for layer in (model.q, model.k, model.v):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with gl.bits(model, w=4, a=4):
        penalty = gl.GradL1(model, 0.3, 0.2)
        value = ours(model, penalty, loss)
    assert seen[0] is seen[1] is seen[2]
    assert value.penalty > 0
