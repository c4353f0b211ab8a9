"""Foreign layers and computed weights are quantized as their forward pass uses the weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.nn.utils.parametrize import register_parametrization

import gradl1_fast as gl
from gradl1_fast.nn import QuantizedLayer
from gradl1_fast.nn.foreign import used_weight
from tests.conversion.lookalikes import Conv1D, Conv2dSame, ScaledStdConv2d, StdConv2d
from tests.conversion.runs import (
    assert_equal_runs,
    assert_equal_steps,
    built,
    images,
    loss_of,
    penalised,
    truth,
)
from tests.gradients import assert_gradients


class Doubled(nn.Conv2d):
    """Does something to the result."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Conv2d):
    """Nothing of its own but a method."""

    def size(self) -> int:
        return self.weight.numel()


class ByKeyword(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, weight=self.weight.tanh(), bias=self.bias)


class Low(nn.Linear):
    """A product of its own and a low-rank one, as adapters are."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.down, self.up = nn.Parameter(torch.randn(2, 4) / 2), nn.Parameter(torch.randn(4, 2) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class OwnConvolution(nn.Conv2d):
    """Replaces what the forward pass of torch's calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Widened(nn.ConvTranspose2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight.sin(), self.bias, self.stride)


class Strided1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (1, 1)), self.weight, None, self.stride)


class OnLast(nn.Module):
    """Puts a layer for vectors between convolutions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


def spectral(module: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(module.double().eval())


def pruned(module: nn.Module) -> nn.Module:
    prune.random_unstructured(module, "weight", 0.3)
    return module


def scaled(module: nn.Module) -> nn.Module:
    class Scale(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 0.5 + w.mean()

    register_parametrization(module, "weight", Scale())
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning")
def old_weight_norm(module: nn.Module) -> nn.Module:
    return weight_norm(module)


SUBCLASSES: dict[str, Callable[[], nn.Module]] = {
    "result doubled": lambda: Doubled(4, 4, 1),
    "a method more": lambda: Renamed(4, 4, 1),
    "keyword": lambda: OnLast(ByKeyword(4, 4)),
    "adapter": lambda: OnLast(Low(4, 4)),
    "own convolution": lambda: OwnConvolution(4, 4, 3),
    "own transposed convolution": lambda: Widened(4, 4, 2, stride=2),
    "standardised": lambda: StdConv2d(4, 4, 3),
    "scaled standardised": lambda: ScaledStdConv2d(4, 4, 3),
    "same padding": lambda: Conv2dSame(4, 4, 3, stride=2),
    "transformers' Conv1D": lambda: OnLast(_contiguous(Conv1D(4, 4))),
}
COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    "weight norm of old": lambda: old_weight_norm(nn.Conv2d(4, 4, 1)),
    "spectral norm": lambda: spectral(nn.Conv2d(4, 4, 1)),
    "pruning": lambda: pruned(nn.Conv2d(4, 4, 3)),
    "pruning of a linear layer": lambda: OnLast(pruned(nn.Linear(4, 4))),
    "orthogonal": lambda: OnLast(parametrizations.orthogonal(nn.Linear(4, 4))),
    "a parametrization": lambda: scaled(nn.Conv2d(4, 4, 1)),
    "two parametrizations": lambda: scaled(scaled(nn.Conv2d(4, 4, 1))),
    "a parametrized subclass": lambda: scaled(ScaledStdConv2d(4, 4, 1)),
}
EVERY = {**SUBCLASSES, **COMPUTED}


# What the weight in use is, of the attribute; of the others it is the attribute.
COMPUTED_INSIDE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "standardised": lambda m, w: F.batch_norm(
        w.reshape(1, 4, -1), None, None, training=True, momentum=0.0, eps=1e-6
    ).reshape_as(w),
    "scaled standardised": lambda m, w: _standardised(m, w),
    "keyword": lambda m, w: w.tanh(),
    "own convolution": lambda m, w: w - w.mean(),
    "own transposed convolution": lambda m, w: w.sin(),
    "a parametrized subclass": lambda m, w: _standardised(m, w),
}
PLAIN = {"keyword": nn.Linear, "own transposed convolution": nn.ConvTranspose2d}


def _standardised(module: nn.Module, weight: Tensor) -> Tensor:
    std, mean = torch.std_mean(weight, (1, 2, 3), keepdim=True, correction=0)
    return module.gain * (weight - mean) / (std + 1e-5)


def _contiguous(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    return layer


def make(kind: str) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Sequential(nn.Tanh(), EVERY[kind]()), nn.Conv2d(4, 2, 1)
    )


def inner(model: nn.Module) -> QuantizedLayer:
    """Return the layer of the kind."""
    (layer,) = (m for m in model[1][1].modules() if isinstance(m, QuantizedLayer))
    return layer


each_kind = pytest.mark.parametrize("kind", EVERY)


@each_kind
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.filterwarnings("error:gradl1_fast.convert", "ignore:.*weight_norm.* is deprecated")
def test_ordinary_steps_equal_those_of_the_original(kind: str, training: bool) -> None:
    model = built(make(kind), training)
    assert_equal_runs(model, gl.convert(model), images())


@pytest.mark.parametrize("kind", [kind for kind in EVERY if kind not in COMPUTED_INSIDE])
@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_penalised_steps_equal_double_backprop(kind: str, scale: str) -> None:
    models = [built(make(kind), training=False) for _ in range(2)]
    assert_equal_steps(models[0], gl.convert(models[1]), loss_of(images()), scale=scale, steps=3)


@pytest.mark.parametrize("kind", COMPUTED_INSIDE)
@pytest.mark.parametrize("scale", ["none", "step"])
def test_a_computed_weight_is_penalised_as_it_is_used(kind: str, scale: str) -> None:
    """Against the layer of torch with that computation as a parametrization."""
    plain, converted = built(make(kind)), gl.convert(built(make(kind)))
    torch.testing.assert_close(used_weight(inner(converted)), _in_use(inner_plain(plain), kind).detach())
    as_parametrization(inner_plain(plain), kind)
    theirs, ours = truth(plain, loss_of(images()), scale), penalised(converted, loss_of(images()), scale)
    torch.testing.assert_close(ours.penalty, theirs.penalty, rtol=1e-9, atol=0)
    gradients = [
        {name.replace("parametrizations.weight.original", "weight"): g for name, g in r.gradients.items()}
        for r in (ours, theirs)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-8, atol=1e-9, msg=name)


def inner_plain(model: nn.Module) -> nn.Module:
    wrapped = model[1][1]
    return wrapped.layer if isinstance(wrapped, OnLast) else wrapped


def _in_use(module: nn.Module, kind: str) -> Tensor:
    return COMPUTED_INSIDE[kind](module, module.weight)


def as_parametrization(module: nn.Module, kind: str) -> None:
    """Make a layer of torch's own class of one that computes its weight inside."""

    class Computation(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return COMPUTED_INSIDE[kind](module, weight)

    if parametrize.is_parametrized(module):
        module.parametrizations.weight.append(Computation())
        parametrized = type(module)
        module.__class__ = type(
            parametrized.__name__, (PLAIN.get(kind, nn.Conv2d),), {"weight": parametrized.weight}
        )
        return
    module.__class__ = PLAIN.get(kind, nn.Conv2d)
    register_parametrization(module, "weight", Computation())


@each_kind
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_width_of_the_weight_takes_effect(kind: str) -> None:
    converted = gl.convert(built(make(kind), training=False))
    before = converted(images())
    layer = inner(converted)
    changes = []
    for bits in (2, 8):
        layer.weight_quantizer.bits = bits
        changes.append((converted(images()) - before).norm())
    layer.weight_quantizer.bits = None
    assert changes[0] > 3 * changes[1] > 0
    torch.testing.assert_close(converted(images()), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", COMPUTED_INSIDE)
def test_the_quantized_weight_is_on_its_grid(kind: str) -> None:
    converted = gl.convert(built(make(kind), training=False))
    layer, used = inner(converted), []
    layer.weight_quantizer.bits = 3
    layer.weight_quantizer.register_forward_hook(lambda m, args, out: used.append((args[0], out)))
    converted(images())
    ((given, quantized),) = used
    torch.testing.assert_close(given, _in_use(inner_plain(built(make(kind), training=False)), kind))
    assert len(quantized.unique()) <= 7


@each_kind
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_penalty_on_activations_only_is_accepted(kind: str) -> None:
    converted = gl.convert(built(make(kind)))
    penalty = gl.GradL1(converted, 0.0, 0.2)
    loss = loss_of(images())(converted)
    (loss + penalty(loss)).backward()
    assert len(penalty.terms) == 2


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_copies_and_pickles(kind: str) -> None:
    if kind == "transformers' Conv1D":
        pytest.skip("its hook here is a function of this test")
    converted = gl.convert(built(make(kind)))
    for twin in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(inner(twin)) is type(inner(converted))
        assert_gradients([twin(images())], [converted(images())], 1e-15)


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_a_foreign_layer_stays_an_instance_of_its_class(kind: str) -> None:
    model = built(make(kind))
    ours, theirs = inner(gl.convert(model)), inner_plain(model)
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == f"Q{type(theirs).__name__}"
    back = ours.to_float()
    assert type(back) is type(theirs)
    assert back.__dict__.keys() == theirs.__dict__.keys()


def test_custom_methods_are_kept() -> None:
    assert inner(gl.convert(built(make("a method more")))).size() == 16


class Strange(nn.Linear):
    """Never calls a product with a weight that is seen."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Raising(nn.Conv2d):
    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        return F.conv2d(x * style.mean(), self.weight, self.bias)


class Named(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight * 2)


@pytest.mark.parametrize(
    "layer", [Strange(4, 4), Raising(4, 4, 1), Named(4, 4)], ids=lambda m: type(m).__name__
)
def test_an_unsupported_layer_stays_in_float_and_is_named(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), layer)
    with pytest.warns(UserWarning, match=rf"1 \({type(layer).__name__}\)"):
        converted = gl.convert(model)
    assert type(converted[1]) is type(layer)
    assert any(name == "1" for name, *_ in gl.report(converted).unquantized)


def test_conv1d_is_known_by_name_and_module() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    with pytest.warns(UserWarning, match="Conv1D"):
        converted = gl.convert(nn.Sequential(nn.Linear(2, 2), Conv1D()))
    assert type(converted[1]) is Conv1D


class Noisy(nn.Linear):
    """Adds noise to its weight."""

    generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(self.weight.shape, generator=self.generator) + torch.randn([])
        return F.linear(x, self.weight + noise, self.bias)


def test_conversion_and_reading_a_weight_draw_no_random_numbers() -> None:
    model = nn.Sequential(Noisy(3, 3), nn.Linear(3, 2))
    before = torch.get_rng_state(), Noisy.generator.get_state()
    used_weight(gl.convert(model)[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(Noisy.generator.get_state(), before[1])


def test_a_weight_that_is_parametrized_after_conversion() -> None:
    models = [built(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))) for _ in range(2)]
    plain, converted = models[0], gl.convert(models[1])
    assert_equal_steps(plain, converted, loss_of(images()))
    for model in (plain, converted):
        scaled(model[1])
    assert_equal_steps(plain, converted, loss_of(images()))
    for model in (plain, converted):
        parametrize.remove_parametrizations(model[1], "weight")
    assert_equal_steps(plain, converted, loss_of(images()))


@pytest.mark.parametrize("layer", [nn.Conv2d, Doubled])
def test_a_parametrization_from_before_conversion_can_be_removed(layer: type[nn.Conv2d]) -> None:
    models = [
        built(lambda: nn.Sequential(nn.Conv2d(4, 4, 1), parametrizations.weight_norm(layer(4, 2, 1))))
        for _ in range(2)
    ]
    plain, converted = models[0], gl.convert(models[1])
    assert_equal_steps(plain, converted, loss_of(images()))
    for model in (plain, converted):
        parametrize.remove_parametrizations(model[1], "weight")
    assert type(converted[1]) is type(gl.convert(layer(4, 2, 1)))
    assert list(converted.state_dict()) == list(plain.state_dict())
    assert_equal_steps(plain, converted, loss_of(images()))
