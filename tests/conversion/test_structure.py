"""The parts of a model that conversion keeps, replaces and refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn import QuantizedLayer
from tests.conversion import models
from tests.conversion.changing import CHANGING, own_forward
from tests.conversion.models import MODELS, Base
from tests.conversion.runs import assert_equal_runs, assert_equal_steps, built, images, loss_of, run
from tests.gradients import assert_gradients
from tests.networks import RESNET, VGG
from tests.quantization.export.models import OfDict

EVERY = {**MODELS, **CHANGING}
each_model = pytest.mark.parametrize("name", EVERY)


@each_model
def test_the_original_is_not_changed_and_shares_its_parameters(name: str) -> None:
    model = built(EVERY[name])
    before, shown, attributes = copy.deepcopy(model), str(model), str(vars(model))
    converted = gl.convert(model)
    assert (str(model), str(vars(model))) == (shown, attributes)
    assert all(a is b for a, b in zip(model.parameters(), converted.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), converted.buffers(), strict=True))
    assert_gradients(run(model, images()), run(before, images()), 1e-15)


@each_model
def test_state_dicts_names_and_modes_equal_those_of_the_original(name: str) -> None:
    model = built(EVERY[name], training=False)
    converted = gl.convert(built(EVERY[name], training=False))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not any(module.training for module in converted.modules())
    converted.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(converted.state_dict(), strict=True)


@each_model
def test_a_second_conversion_changes_nothing(name: str) -> None:
    converted = gl.convert(built(EVERY[name]))
    assert gl.convert(converted) is converted


class Backbone(nn.Module):
    """A model with what users rely on: attributes, methods, properties, a class attribute, an own train()."""

    kind = "backbone"

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.head = nn.Linear(4, 3)
        self.grad_checkpointing, self.sizes = False, [4, 3]

    def no_weight_decay(self) -> set[str]:
        return {n for n, m in self.named_modules() if isinstance(m, nn.Linear)}

    def groups(self) -> list[list[Tensor]]:
        norms = [p for m in self.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        rest = {id(p) for p in norms}
        return [norms, [p for p in self.parameters() if id(p) not in rest]]

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        self.stem[1].eval()
        return self

    @property
    def width(self) -> int:
        return self.head.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def test_class_methods_attributes_and_blocks_are_kept() -> None:
    model = built(Backbone)
    model.note = {"epoch": 3}
    converted = gl.convert(model)
    assert type(converted) is Backbone
    assert (converted.kind, converted.note, converted.width) == ("backbone", {"epoch": 3}, 4)
    assert converted.no_weight_decay() == {"head"}
    assert isinstance(converted.get_classifier(), nn.Linear)
    assert type(converted.stem) is nn.Sequential
    assert type(converted.stem[1]) is nn.BatchNorm2d
    torch.testing.assert_close(converted.forward_features(images()), model.forward_features(images()))


def test_parameter_groups_by_methods_and_classes_are_the_same() -> None:
    model = built(Backbone)
    converted = gl.convert(model)
    theirs, ours = ([list(map(id, group)) for group in m.groups()] for m in (model, converted))
    assert ours == theirs
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = converted.head.weight.detach().clone()
    converted(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(
        converted.head.weight, before
    )  # an optimizer made before serves the converted model


def test_an_overridden_train_is_called() -> None:
    converted = gl.convert(built(Backbone))
    converted.eval().train()
    assert not converted.stem[1].training
    assert converted.stem[0].training
    x = images()
    assert_equal_steps(built(Backbone), gl.convert(built(Backbone)), loss_of(x))


def test_layers_are_instances_of_torchs_classes() -> None:
    converted = gl.convert(RESNET.make())
    for (_, ours), (_, theirs) in zip(
        [(n, m) for n, m in converted.named_modules() if "quantizer" not in n],
        RESNET.make().named_modules(),
        strict=True,
    ):
        assert isinstance(ours, type(theirs))


def test_tied_weights_stay_tied_and_count_once() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        model[2].weight = model[0].weight
        return model

    x = torch.randn(3, 5).double()
    converted = gl.convert(built(tied))
    assert converted[0].weight is converted[2].weight
    assert_equal_steps(built(tied), converted, loss_of(x))


def test_a_module_under_two_names_stays_one() -> None:
    layer = nn.Linear(5, 5)
    converted = gl.convert(nn.Sequential(layer, nn.Tanh(), layer).double())
    assert converted[0] is converted[2]


def test_frozen_layers_stay_frozen() -> None:
    model = VGG.make()
    model[0].requires_grad_(False)
    converted = gl.convert(model)
    assert [p.requires_grad for p in converted.parameters()] == [p.requires_grad for p in model.parameters()]


def test_per_channel_applies_to_every_layer() -> None:
    axes = {
        m.weight_quantizer.axis for m in gl.convert(VGG.make(), per_channel=True).modules() if _is_ours(m)
    }
    assert axes == {0}


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer)


def test_layers_inside_a_plain_module_are_converted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.body.inner = nn.Module(), nn.Module()
            self.body.inner.conv = nn.Conv2d(4, 4, 1)
            self.body.parts = nn.ModuleDict({"a": nn.ModuleList([nn.Conv2d(4, 4, 1)])})
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body.parts["a"][0](self.body.inner.conv(x).relu()))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = gl.convert(built(Model))
    assert sum(map(_is_ours, converted.modules())) == 3
    assert_equal_steps(built(Model), converted, loss_of(images()))


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.GRU(4, 4), nn.Bilinear(4, 4, 4)])
def test_a_layer_of_another_kind_is_named(layer: nn.Module) -> None:
    with pytest.warns(UserWarning, match=rf"layer \({type(layer).__name__}\)") as caught:
        gl.convert(models.model(lambda m, x: m.conv1(x), layer=layer))
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_normalisations_are_not_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm([4, 5, 5]), nn.PReLU(4)))


def test_a_layer_with_a_replaced_forward_stays_in_float_and_is_named() -> None:
    model = built(own_forward)
    with pytest.warns(UserWarning, match=r"in float.*conv1 \(Conv2d\)"):
        converted = gl.convert(model)
    assert torch.equal(converted(images()), model(images()))
    assert type(converted.conv1) is nn.Conv2d


def test_a_weight_that_only_a_function_reads_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"17% of the weights stay in float.*: by_function \(used by linear\)"
    ):
        gl.convert(OfDict())


def test_an_encoder_that_reads_weights_directly_is_not_converted() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"in float.*0\.linear1"):
        converted = gl.convert(model.double())
    assert type(converted[0].linear1) is nn.Linear
    assert_equal_runs(model, converted, torch.randn(2, 3, 4).double())


def distributed() -> nn.Module:
    """Return a wrapper as it is behind a process group, without one."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = nn.Linear(3, 3)
    return wrapper


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "lazy": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)),
        ValueError,
        "1 is lazy and has no weight",
    ),
    "nothing": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)),
        ValueError,
        "no layer to convert",
    ),
    "data parallel": (
        lambda: nn.DataParallel(nn.Linear(3, 3)),
        ValueError,
        "convert the model first, then wrap",
    ),
    "distributed": (distributed, ValueError, "convert the model first, then wrap"),
    "a distributed part": (
        lambda: nn.Sequential(nn.Linear(3, 3), distributed()),
        ValueError,
        "1 is wrapped in DistributedDataParallel; convert the model first, then wrap",
    ),
    "a class": (lambda: nn.Linear, TypeError, r"the model must be a torch\.nn\.Module, got "),
    "a state dict": (
        lambda: {"weight": torch.ones(1)},
        TypeError,
        r"the model must be a torch\.nn\.Module, got ",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_converted_are_refused(kind: str) -> None:
    make, error, message = REFUSED[kind]
    with pytest.raises(error, match=f"convert: .*{message}"):
        gl.convert(make())  # type: ignore[arg-type]


class Spare(Base):
    features = models.functional_relu

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


def test_unused_submodules_are_kept() -> None:
    model = built(Spare)
    converted = gl.convert(model)
    assert list(converted.state_dict()) == list(model.state_dict())
    x = images()
    assert_equal_steps(built(Spare), gl.convert(built(Spare)), loss_of(x))


class Scaled(nn.Linear):
    """A layer of another library: its input may be given by name, behind another tensor."""

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * scale


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(5, 4), nn.Linear(5, 6)
        self.scaled, self.last = Scaled(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.first(input=x), self.gate(x).sigmoid()
        return self.last(input=gate) + self.scaled(scale=gate, x=hidden)


def test_a_tensor_given_by_name_passes_the_site_of_its_layer() -> None:
    torch.manual_seed(0)
    plain, x = ByName(), torch.randn(8, 5)
    model = gl.convert(plain)
    assert model.get_submodule("scaled").input_quantizer is not model.get_submodule("last").input_quantizer
    assert torch.equal(model(x), plain(x))
    penalty = gl.GradL1(model, 0.1, 0.1)
    loss = model(x).square().mean()
    (loss + penalty(loss)).backward()
    assert {"scaled.input", "last.input"} <= set(penalty.terms)
