"""Folding with an observed pass, of subclasses, frozen batch norms and other layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl

X = torch.randn(2, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class Untraceable(nn.Module):
    """Runs a body where a condition on values hides it from traces."""

    def __init__(self, body: Callable[[Any, Tensor], Any] | None = None, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body or (lambda m, x: m.bn(m.conv(x)))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x if x.sum() < 1e9 else x + 1)


def converted(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in model.modules():
        for name in ("running_var", "weight"):
            value = getattr(module, name, None)
            if hasattr(module, "running_var") and value is not None:
                nn.init.uniform_(value, 0.5, 2)
        for name in ("running_mean", "bias"):
            value = getattr(module, name, None)
            if hasattr(module, "running_var") and value is not None:
                nn.init.uniform_(value, -1, 1)
    return gl.convert(model.double().eval())


def pair(norm: nn.Module | None = None, conv: nn.Module | None = None) -> dict[str, nn.Module]:
    return {"conv": conv or nn.Conv2d(3, 4, 3, bias=False), "bn": norm or nn.BatchNorm2d(4)}


def test_a_model_that_cannot_be_traced_is_folded_with_an_observed_pass() -> None:
    model = converted(Untraceable(**pair()))
    with pytest.warns(UserWarning, match="bn is in a part that cannot be traced: give inputs"):
        assert not gl.fold_batch_norm(model).folded
    folding = gl.fold_batch_norm(model, X)
    assert folding.folded == {"bn": "conv"}
    assert type(folding.model) is Untraceable
    assert isinstance(folding.model.bn, nn.Identity)
    torch.testing.assert_close(folding.model(X), model(X), rtol=0, atol=1e-12)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folding.model.modules())


def read(how: Callable[[Tensor, Any], Any]) -> Callable[[Any, Tensor], Any]:
    def body(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        how(y, m)
        return m.bn(y)

    return body


def returned(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return {"features": [y], "out": m.bn(y)}


def branch(y: Tensor, m: Any) -> None:
    if y.mean() > 1e9:
        raise AssertionError


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x.sigmoid()


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.add_(1)
    return m.bn(y)


READ_ELSEWHERE: dict[str, Callable[[Any, Tensor], Any]] = {
    "an operation": lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)),
    "after the batch norm": lambda m, x: (lambda y: (m.bn(y), y.relu()))(m.conv(x)),
    "a branch on its values": read(branch),
    "data": read(lambda y, m: setattr(m, "kept", y.data)),
    "numpy": read(lambda y, m: setattr(m, "kept", y.numpy())),
    "detached": read(lambda y, m: setattr(m, "kept", y.detach())),
    "scripted code": read(lambda y, m: scripted(y)),
    "in place": in_place,
    "returned": returned,
}


@pytest.mark.parametrize("case", READ_ELSEWHERE)
def test_a_layer_whose_output_is_read_elsewhere_is_not_folded(case: str) -> None:
    model = converted(Untraceable(READ_ELSEWHERE[case], **pair()))
    with pytest.warns(UserWarning, match="bn follows conv, whose output is read elsewhere too"):
        folding = gl.fold_batch_norm(model, X)
    assert folding.difference == 0


def metadata(y: Tensor, m: Any) -> None:
    assert (y.shape[0], y.size(1), y.dim(), y.ndim, y.numel(), len(y)) == (2, 4, 4, 4, 200, 2)
    assert (y.dtype, y.device.type, y.is_floating_point(), y.requires_grad) == (
        torch.float64,
        "cpu",
        True,
        False,
    )


def test_reading_shape_type_and_device_is_allowed() -> None:
    model = converted(Untraceable(read(metadata), **pair()))
    assert gl.fold_batch_norm(model, X).folded == {"bn": "conv"}


def twice(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) + m.bn(m.conv(2 * x))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "called twice": (twice, "bn is called in several places"),
    "convolution called twice": (
        lambda m, x: m.bn(m.conv(x)) + m.conv(2 * x),
        "bn follows conv, which is called in several places",
    ),
    "weight by function": (
        lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight),
        "bn follows conv, which has a weight that is also used by function",
    ),
    "not called": (lambda m, x: m.conv(x), "bn was not called with these inputs"),
    "something between": (lambda m, x: m.bn(m.conv(x).relu()), "bn does not follow a convolution directly"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_ruled_out_by_the_observed_pass_are_refused(case: str) -> None:
    body, message = REFUSED[case]
    with pytest.warns(UserWarning, match=message):
        assert not gl.fold_batch_norm(converted(Untraceable(body, **pair())), X).folded


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        w, b, mean, var = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


class BatchNormAct(nn.BatchNorm2d):
    """As timm has it: dropout and activation inside."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.drop, self.act = nn.Dropout(0.5), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(self.drop(y))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: FrozenBatchNorm2d(4),
    "activation inside": lambda: BatchNormAct(4),
    "without weights": lambda: BatchNormAct(4, affine=False),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("case", NORMS)
def test_other_batch_norms_keep_their_class_and_become_the_identity(case: str, traced: bool) -> None:
    modules = pair(NORMS[case]())
    plain = nn.Sequential(modules["conv"], modules["bn"]) if traced else Untraceable(**modules)
    model = converted(plain)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    folding = gl.fold_batch_norm(model, None if traced else X)
    ((norm, conv),) = folding.folded.items()
    new, old = folding.model.get_submodule(norm), model.get_submodule(norm)
    assert type(new) is type(old)
    assert float(new.running_mean.abs().max()) == new.eps == 0.0
    assert float(new.running_var.min()) == float(new.running_var.max()) == 1.0
    torch.testing.assert_close(folding.model(X), model(X), rtol=0, atol=1e-12)
    assert folding.model.get_submodule(conv).bias is not None
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert old.eps > 0


class Renormalising(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.std())


def test_a_subclass_that_computes_something_else_is_refused() -> None:
    with pytest.warns(UserWarning, match="bn computes more than a batch norm"):
        assert not gl.fold_batch_norm(converted(Untraceable(**pair(Renormalising(4)))), X).folded


class SamePadding(nn.Conv2d):
    """As timm's Conv2dSame: the used weight is the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class WithoutBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_foreign_convolutions_are_folded_if_they_use_their_parameters() -> None:
    model = converted(Untraceable(**pair(conv=SamePadding(3, 4, 3, bias=False))))
    folding = gl.fold_batch_norm(model, X)
    assert folding.folded == {"bn": "conv"}
    assert isinstance(folding.model.conv, SamePadding)
    torch.testing.assert_close(folding.model(X), model(X), rtol=0, atol=1e-12)
    for cls, message in (
        (Standardised, "bn follows conv, which computes its weight"),
        (WithoutBias, "bn follows conv, which has no bias in its forward pass"),
    ):
        with pytest.warns(UserWarning, match=message):
            folding = gl.fold_batch_norm(converted(Untraceable(**pair(conv=cls(3, 4, 3, bias=False)))), X)
        assert folding.difference == 0


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_transposed_convolutions_fold_along_their_own_axis(groups: int, per_channel: bool) -> None:
    plain = nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=groups), nn.BatchNorm2d(6), nn.ReLU())
    model = gl.convert(converted(plain), per_channel=per_channel)
    model[0].weight_quantizer.axis = 1 if per_channel else None
    channels = 6 // groups if per_channel else 1
    model[0].weight_quantizer.set_clip(torch.full((1, channels), 0.3, dtype=torch.float64))
    folding = gl.fold_batch_norm(model, X)
    assert folding.folded == {"1": "0"}
    torch.testing.assert_close(folding.model(X), model(X), rtol=0, atol=1e-12)
    assert folding.without_range == ([] if per_channel and groups == 1 else ["0"])


def test_linear_layers_fold_if_the_channels_match() -> None:
    model = converted(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.warns(UserWarning, match="1 follows 0, which is linear: give inputs"):
        assert not gl.fold_batch_norm(model).folded
    assert gl.fold_batch_norm(model, X[0, :, 0, :3]).folded == {"1": "0"}
    with pytest.warns(UserWarning, match="1 follows 0, which is linear"):
        assert not gl.fold_batch_norm(model, torch.randn(2, 4, 3).double()).folded


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    loss: Tensor | None = None


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda y: [y, 2 * y],
    "dictionary": lambda y: {"out": y, "aux": {"deep": y.relu()}},
    "dataclass": lambda y: Output(y, [y]),
    "numbers and nothing": lambda y: (y, None, 3, "name", y.argmax()),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_of_any_form_are_compared(case: str) -> None:
    make = OUTPUTS[case]
    model = converted(Untraceable(lambda m, x: make(m.bn(m.conv(x))), **pair()))
    folding = gl.fold_batch_norm(model, X)
    assert folding.folded == {"bn": "conv"}
    assert folding.difference is not None
    assert folding.difference < 1e-12 < float(folding.scale or 0)


class TwoInputs(Untraceable):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x - y)


INPUTS: dict[str, tuple[Any, Any]] = {
    "in order": ((X, X / 2), None),
    "by name": ({"x": X, "y": X / 2}, None),
    "function": (X, lambda model, x: model(x, y=x / 2)),
}


@pytest.mark.parametrize("case", INPUTS)
def test_models_with_several_inputs(case: str) -> None:
    inputs, forward = INPUTS[case]
    assert gl.fold_batch_norm(converted(TwoInputs(**pair())), inputs, forward=forward).folded == {
        "bn": "conv"
    }
