"""Second derivatives of fused attention and the hard sigmoid, compared with PyTorch's unfused form."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradl1_fast.ops import second_derivatives
from gradl1_fast.ops.second_derivatives import install
from tests.gradients import assert_gradients, relative_error

FUSED, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
HEADS, L, S, E = 4, 4, 6, 5  # the fused kernels pad head dimensions that are no multiple of 8


@pytest.fixture(autouse=True)
def _installed() -> None:
    install()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "bool_mask": {"attn_mask": torch.arange(L * S).reshape(L, S) % 3 > 0},
    "masked_row": {"attn_mask": (torch.arange(L) != 1)[:, None].expand(L, S)},
    "float_mask": {"attn_mask": torch.linspace(-2, 2, 2 * L * S).double().reshape(2, 1, L, S)},
    "grouped_query": {"enable_gqa": True},
}


def operands(heads: int = HEADS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value; not contiguous, as from a projection that is split into heads."""
    sizes = [(L, HEADS), (S, heads), (S, heads)]
    tensors = [torch.randn(2, n, h, E, dtype=torch.float64).transpose(1, 2) for n, h in sizes]
    return [(t / 2).to(dtype).requires_grad_() for t in tensors]


def orders(f: Callable[..., Tensor], inputs: list[Tensor], highest: int = 3) -> list[Tensor]:
    """Return the gradients of all orders up to the highest, each of a function of those before."""
    scalar, results = f(*inputs).sin().sum(), []
    for order in range(1, highest + 1):
        grads = torch.autograd.grad(scalar, inputs, create_graph=order < highest)
        results += grads
        scalar = sum((i + 1) * grad.sin().sum() for i, grad in enumerate(grads))
    return results


def attention(backend: SDPBackend, **options: Any) -> Callable[..., Tensor]:
    def f(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            options["attn_mask"] = mask.to(query.dtype)
        key = key.sin()
        with sdpa_kernel(backend):  # the operands depend on each other, as in self-attention
            return F.scaled_dot_product_attention(query, key, value * key, **options)

    return f


def inputs_of(case: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return operands(2 if case == "grouped_query" else HEADS, dtype)


@pytest.mark.parametrize("case", CASES)
def test_attention_has_the_gradients_of_all_orders_of_the_math_backend(case: str) -> None:
    inputs, options = inputs_of(case), CASES[case]
    assert_gradients(orders(attention(FUSED, **options), inputs), orders(attention(MATH, **options), inputs))


@pytest.mark.parametrize("case", CASES)
def test_attention_agrees_with_finite_differences(case: str) -> None:
    assert torch.autograd.gradgradcheck(attention(FUSED, **CASES[case]), inputs_of(case), fast_mode=True)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("case", ["plain", "causal", "float_mask"])
def test_attention_in_low_precision(case: str, dtype: torch.dtype, error: float) -> None:
    inputs, options = inputs_of(case, dtype), CASES[case]
    truth = orders(attention(MATH, **options), [t.detach().double().requires_grad_() for t in inputs], 2)
    for actual, expected in zip(orders(attention(FUSED, **options), inputs, 2), truth, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= error


def test_only_requested_inputs_are_differentiated() -> None:
    query, key, value = operands()
    key.requires_grad_(False)
    results = []
    for backend in (FUSED, MATH):
        y = attention(backend)(query, key, value)
        grad = torch.autograd.grad(y.square().sum(), query, create_graph=True)[0]
        results.append(torch.autograd.grad(grad.sin().sum(), value))
    assert_gradients(*results)


def test_a_mask_that_requires_gradients_is_differentiated_twice() -> None:
    inputs = [*operands(), torch.randn(L, S, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradgradcheck(F.scaled_dot_product_attention, inputs, fast_mode=True)


def test_autograd_functional_hessian() -> None:
    query = torch.randn(1, 1, 3, 2, dtype=torch.float64)

    def hessian(backend: SDPBackend, vectorize: bool) -> Tensor:
        f = attention(backend)
        return torch.autograd.functional.hessian(
            lambda q: f(q, q, q).square().sum(), query, vectorize=vectorize
        )

    for vectorize in (False, True):
        assert_gradients([hessian(FUSED, vectorize)], [hessian(MATH, False)])


MODULES = {
    "attention": lambda: _SelfAttention(need_weights=False),
    "attention_with_weights": lambda: _SelfAttention(need_weights=True),
    "encoder_layer": lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class _SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_differentiated_twice(name: str) -> None:
    module = nn.Sequential(nn.Linear(8, 8), MODULES[name]()).double()
    inputs = [torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), *module.parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return module(x)

    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    with sdpa_kernel(MATH):
        truth = orders(call, inputs, 2)
    assert_gradients(orders(call, inputs, 2), truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["hardsigmoid", "hardswish"])
def test_first_gradients_of_activations_are_the_kernels(name: str, dtype: torch.dtype) -> None:
    edges = torch.tensor([-3.0, 3.0, float("inf"), -float("inf"), -0.0, 2.9999, -3.0001] * 8)
    x = torch.cat([edges, 3 * torch.randn(200)]).to(dtype).view(4, -1).t().requires_grad_()
    y = getattr(F, name)(x)
    dy = torch.randn(x.shape).to(dtype)
    plain, recorded = (torch.autograd.grad(y, x, dy, retain_graph=True, create_graph=c)[0] for c in (0, 1))
    assert recorded.requires_grad
    assert recorded.stride() == plain.stride()
    assert torch.equal(plain, recorded.detach())


def test_a_hard_sigmoid_of_constant_gradient_has_second_derivative_zero() -> None:
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(F.hardsigmoid(x).sum(), x, create_graph=True)[0]
    assert torch.equal(torch.autograd.grad(grad.sum(), x)[0], torch.zeros_like(x))


def test_torch_func_is_not_affected() -> None:
    x = 3 * torch.randn(3, 7)
    for f in (F.hardsigmoid, F.hardswish):
        single = torch.func.grad(lambda x, f=f: f(x).square().sum())
        assert torch.equal(torch.func.vmap(single)(x), torch.stack([single(row) for row in x]))
    q = torch.randn(2, HEADS, L, E, requires_grad=True)
    loss = lambda q: F.scaled_dot_product_attention(q, q, q).square().sum()  # noqa: E731
    assert torch.equal(torch.func.grad(loss)(q), torch.autograd.grad(loss(q), q)[0])
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.func.jacrev(torch.func.grad(loss))(q)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        q = torch.randn(2, HEADS, L, E, requires_grad=True)
        y = F.hardsigmoid(F.scaled_dot_product_attention(q, q, q))
        grad = torch.autograd.grad(y.square().sum(), q, create_graph=True)[0]
        grad.square().sum().backward()
    assert q.grad.shape == q.shape


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attention = _SelfAttention(need_weights=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.linear(x))
        return F.hardsigmoid(x + self.attention(x)).square().mean()


def penalised(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    parameters, loss = list(net.parameters()), net(x)
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(loss + 0.1 * sum(g.abs().sum() for g in grads), parameters)


@pytest.mark.usefixtures("trace_autograd")
def test_steps_can_be_compiled() -> None:
    net, x = _Net(), torch.randn(2, 5, 8)

    def plain(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(net(x), list(net.parameters()))

    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_gradients(plain(compiled, x), plain(net, x), rtol=1e-5)
    step = torch.compile(penalised, backend="aot_eager", fullgraph=True)
    assert_gradients(step(net, x), penalised(net, x), rtol=1e-5)


def test_autocast_does_not_reach_the_second_derivative() -> None:
    net, x = _Net(), torch.randn(2, 5, 8)
    parameters = list(net.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        penalty = sum(g.abs().sum() for g in grads)
        inside = torch.autograd.grad(penalty, parameters, retain_graph=True)
    outside = torch.autograd.grad(penalty, parameters)
    assert all(torch.equal(i, o) for i, o in zip(inside, outside, strict=True))
    assert_gradients(inside, _second(net, x), rtol=0.1)


def _second(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    parameters = list(net.parameters())
    grads = torch.autograd.grad(net(x), parameters, create_graph=True)
    return torch.autograd.grad(sum(g.abs().sum() for g in grads), parameters)


def unfused(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, ...]:
    """Return output and gradients by the textbook formulas."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * scale + (0 if bias is None else bias)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    p, dp = scores.softmax(-1), dy @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return p @ v, ds @ k * scale, ds.mT @ q * scale, p.mT @ dy, ds


# By operator of CUDA, for CPU tensors: the forward, the backward, and how the forward is called.
# What a kernel leaves undefined is None here as well.
def _flash(q, k, v, p=0.0, causal=False, debug=False, *, scale=None):
    return unfused(q, q, k, v, None, causal, scale)[0], q.sum(-1), None, None, L, S, q, q, q


def _flash_backward(dy, q, k, v, out, lse, cq, ck, mq, mk, p, causal, seed, offset, *, scale=None):
    return unfused(dy, q, k, v, None, causal, scale)[1:4]


def _efficient(q, k, v, bias, lse, p=0.0, causal=False, *, scale=None):
    return unfused(q, q, k, v, bias, causal, scale)[0], q.sum(-1), q, q


def _efficient_backward(dy, q, k, v, bias, out, lse, seed, offset, p, mask, causal=False, *, scale=None):
    grads = unfused(dy, q, k, v, bias, causal, scale)[1:]
    return tuple(grad if wanted else None for grad, wanted in zip(grads, mask, strict=True))


def _cudnn(q, k, v, bias, lse, p=0.0, causal=False, debug=False, *, scale=None):
    return unfused(q, q, k, v, bias, causal, scale)[0], q.sum(-1), None, None, L, S, q, q, q


def _cudnn_backward(dy, q, k, v, out, lse, seed, offset, bias, cq, ck, mq, mk, p, causal, *, scale=None):
    return unfused(dy, q, k, v, bias, causal, scale)[1:4]


CUDA = {
    "flash": (_flash, _flash_backward),
    "efficient": (_efficient, _efficient_backward),
    "cudnn": (_cudnn, _cudnn_backward),
}
OPTIONS = [(name, "no bias", o) for name in CUDA for o in ({}, {"is_causal": True}, {"scale": 0.7})]
BIASES = [("efficient", "bias"), ("efficient", "bias with gradient"), ("cudnn", "bias")]
CUDA_CASES = OPTIONS + [(name, bias, options) for name, bias in BIASES for options in ({}, {"scale": 0.7})]


@pytest.fixture
def _on_cpu(operator: str) -> Iterator[None]:
    """Make an operator of CUDA compute on CPU tensors, differentiated by the kernel made for CUDA."""
    name = f"_scaled_dot_product_{operator}_attention"
    with torch.library._scoped_library("aten", "IMPL") as library:
        for suffix, kernel in zip(("", "_backward"), CUDA[operator], strict=True):
            library.impl(name + suffix, kernel, "CPU")
        kernel = second_derivatives._AttentionBackward.kernel(f"{name}_backward")
        second_derivatives._override(library, f"{name}_backward", "AutogradCPU", kernel)
        yield


def cuda(
    operator: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any, **kw: Any
) -> Tensor:
    middle = () if operator == "flash" else (bias, True)
    return getattr(torch.ops.aten, f"_scaled_dot_product_{operator}_attention")(
        q, k, v, *middle, *rest, **kw
    )[0]


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize(("operator", "kind", "options"), CUDA_CASES, ids=str)
def test_arguments_of_cuda_operators(operator: str, kind: str, options: dict[str, Any]) -> None:
    inputs, bias = operands(), None
    if kind != "no bias":
        bias = torch.randn(2, HEADS, L, S, dtype=torch.float64, requires_grad=kind == "bias with gradient")
    if kind == "bias with gradient":
        inputs.append(bias)
    rest = [0.0, True] if "is_causal" in options else []
    scale = {"scale": options["scale"]} if "scale" in options else {}
    actual = orders(lambda q, k, v, *_: cuda(operator, q, k, v, bias, *rest, **scale), inputs)
    with sdpa_kernel(MATH):
        truth = orders(lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, bias, **options), inputs)
    assert_gradients(actual, truth)


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("operator", CUDA)
def test_dropout_raises_when_differentiated_twice(operator: str) -> None:
    inputs = operands()
    y = cuda(operator, *inputs, None, 0.5)
    grads = torch.autograd.grad(y.sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"set dropout_p=0, or .*SDPBackend\.MATH"):
        torch.autograd.grad(grads[0].sum(), inputs)


IN_A_FRESH_PROCESS = """
import torch
import torch.nn.functional as F
from torch import nn

operators = ["hardsigmoid_backward", "_scaled_dot_product_flash_attention_for_cpu_backward"]

def kernels():
    return [str(torch.library.get_kernel(f"aten::{name}", "AutogradCPU")) for name in operators]

q = torch.randn(2, 2, 9, 5, requires_grad=True)
x = q.detach().reshape(4, 9, 5)[..., :4].requires_grad_()
attention = nn.MultiheadAttention(4, 2, batch_first=True)
encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
functions = {
    "attention": lambda: F.scaled_dot_product_attention(q, q.sin(), q.cos()),
    "causal": lambda: F.scaled_dot_product_attention(q, q.sin(), q.cos(), is_causal=True),
    "half": lambda: F.scaled_dot_product_attention(q.bfloat16(), q.sin().bfloat16(), q.cos().bfloat16()),
    "multihead": lambda: attention(x, x, x, need_weights=False)[0],
    "encoder": lambda: encoder(x),
    "hardsigmoid": lambda: F.hardsigmoid(4 * q),
    "hardswish": lambda: F.hardswish(4 * q),
}

def gradients(name, create_graph=False):
    y, inputs = functions[name](), [t for t in (q, x) if t is not None]
    return torch.autograd.grad(y.float().square().sum(), inputs, create_graph=create_graph, allow_unused=True)

def same(some, others):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(some, others))

def second(name):
    sum(g.abs().sum() for g in gradients(name, True) if g is not None).backward()

def raises(name):
    try:
        second(name)
    except RuntimeError as error:
        return "is not implemented" in str(error)
    return False
"""


def fresh(code: str) -> str:
    """Return what the code prints, in a process that has not installed anything yet."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_A_FRESH_PROCESS + code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "overrid" not in result.stderr.lower()
    return result.stdout.strip()


def test_importing_the_library_changes_nothing() -> None:
    code = "before = kernels(); import gradl1_fast.ops.second_derivatives; print(before == kernels())"
    assert fresh(code) == "True"


def test_pytorch_raises_before_and_not_after() -> None:
    code = """
from gradl1_fast.ops.second_derivatives import install
print([name for name in functions if not raises(name)])
install()
for name in functions:
    second(name)
"""
    assert fresh(code) == "['hardswish']", "PyTorch has second derivatives that it did not have"


def test_first_gradients_are_bitwise_unchanged() -> None:
    code = """
from gradl1_fast.ops.second_derivatives import install
before = {name: gradients(name) for name in functions}
install()
print(all(same(gradients(name, graph), before[name]) for name in functions for graph in (False, True)))
"""
    assert fresh(code) == "True"


def test_installing_again_changes_nothing() -> None:
    code = """
from gradl1_fast.ops.second_derivatives import install
bare = kernels(); install(); first = kernels(); install()
print(bare != first == kernels())
"""
    assert fresh(code) == "True"
