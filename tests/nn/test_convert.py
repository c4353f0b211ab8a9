"""What a conversion keeps: outputs, gradients, statistics, parameters, names."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import gradl1_fast as gl
from gradl1_fast.nn import ActivationQuantizer, BatchNormAct2d, QConv2d, QLinear, QuantizedLayer
from gradl1_fast.nn.converted import ConvertedModel
from tests.gradients import assert_gradients
from tests.networks import NETWORKS, RESNET, VGG, Network
from tests.nn import models
from tests.nn.changing import CHANGING
from tests.nn.models import TRACEABLE, UNTRACEABLE
from tests.nn.runs import assert_equal_runs, built, images, run

MODELS = {
    **TRACEABLE,
    **UNTRACEABLE,
    **{name: make for name, (make, _) in CHANGING.items()},
    "sequential": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    "conv as root": lambda: nn.Conv2d(4, 4, 3),
    "linear as root": lambda: nn.Linear(5, 4),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_traceable = pytest.mark.parametrize("name", TRACEABLE)
each_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="gradl1_fast.convert")
        yield


@each_model
@each_mode
def test_outputs_gradients_and_statistics_equal_the_originals(name: str, training: bool) -> None:
    model = built(MODELS[name], training)
    assert_equal_runs(model, gl.convert(model), images())


@each_network
@each_mode
def test_networks_equal_the_original(network: Network, training: bool) -> None:
    model = network.make().train(training)
    assert_equal_runs(model, gl.convert(model), network.batch()[0])


@each_model
def test_nothing_of_the_original_changes_and_its_parameters_are_shared(name: str) -> None:
    model = built(MODELS[name])
    before, twin = copy.deepcopy(model), str(model)
    converted = gl.convert(model)
    assert str(model) == twin
    assert all(a is b for a, b in zip(model.parameters(), converted.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), converted.buffers(), strict=True))
    assert_gradients(run(model, images()), run(before, images()), 1e-15)


@each_model
def test_checkpoints_load_strictly_in_both_directions(name: str) -> None:
    model = built(MODELS[name])
    converted = gl.convert(built(MODELS[name]))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]
    converted.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(converted.state_dict(), strict=True)


@each_model
@each_mode
def test_the_mode_of_every_module_is_kept(name: str, training: bool) -> None:
    model = built(MODELS[name], training)
    modes = {name: module.training for name, module in model.named_modules()}
    converted = dict(gl.convert(model).named_modules())
    assert {name: module.training for name, module in converted.items() if name in modes} == modes
    if name != "TrainOverridden":  # which keeps one layer in evaluation
        assert {module.training for module in converted.values()} == {training}


@each_traceable
def test_what_can_be_traced_is_traced_without_a_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = gl.convert(built(TRACEABLE[name]))
    assert all(m.input_quantizer is None for m in converted.modules() if isinstance(m, QuantizedLayer))


REASONS = {
    "changed_under_another_name": "changes conv1 in place",
    "changed_through_a_view": "changes conv1 in place",
    "view_of_what_changes": "changes view in place",
    "filled": "fill_ changes a tensor in place",
    "assigned": "assign",
    "written_into": "gradients off",
    "without_gradient": "switches gradients off for a part",
    "data_dependent": "control flow",
    "under_autocast": "autocast is on in it",
    "functional_dropout": "differs between training and evaluation",
    **{name: reason for name, (_, reason) in CHANGING.items()},
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_traced_gets_quantizers_for_each_layer_and_one_warning(name: str) -> None:
    with pytest.warns(UserWarning, match="every layer quantizes its own input") as caught:
        converted = gl.convert(built(MODELS[name]))
    assert len(caught) == 1
    assert REASONS[name] in str(caught[0].message)
    assert caught[0].filename == __file__
    found = [m for m in converted.modules() if isinstance(m, QuantizedLayer)]
    assert len(found) == 3
    assert all(m.input_quantizer is not None for m in found)


def test_hooks_on_an_inner_block_are_kept() -> None:
    model = VGG.make()
    block = nn.Sequential(model[:3], model[3:])
    block[0].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(UserWarning, match="module '0' has hooks"):
        converted = gl.convert(block)
    assert_equal_runs(block, converted, VGG.batch()[0])


@pytest.mark.parametrize("hooked", ["conv1", "bn1", "relu", ""])
def test_hooks_on_layers_are_called_with_what_they_saw(hooked: str) -> None:
    def features(m: models.Base, x: Tensor) -> Tensor:
        return m.conv2(m.relu(m.bn1(m.conv1(x)) + x))

    model = built(lambda: models.model(features))
    seen: list[Tensor] = []
    model.get_submodule(hooked).register_forward_hook(lambda _, args, out: seen.append(out))
    model.get_submodule(hooked).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    gl.convert(model)(images())
    expected = [*seen]
    seen.clear()
    model(images())
    torch.testing.assert_close(expected, seen)


# How many quantizers: one for each distinct tensor, the network's input included.
QUANTIZERS = {
    "functional_relu": 3,
    "in_place_add": 3,  # the input is added and convolved
    "torch_add": 4,
    "pre_activation": 3,
    "batch_norm_with_two_readers": 3,
    "conv_called_twice": 3,
    "flattened_and_plain": 3,
    "detached_branch": 3,
    "squeeze": 4,
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_one_quantizer_for_each_distinct_tensor(name: str) -> None:
    converted = gl.convert(built(TRACEABLE[name]))
    found = [m for m in converted.modules() if isinstance(m, ActivationQuantizer)]
    assert len(found) == QUANTIZERS[name]
    assert sum(m.probe is None for m in found) == 1


@each_network
def test_one_quantizer_for_each_producer_and_one_for_the_input(network: Network) -> None:
    found = [m for m in gl.convert(network.make()).modules() if isinstance(m, ActivationQuantizer)]
    assert [m.probe is None for m in found].count(True) == 1
    assert len(found) == 1 + len(network.producers)


def test_batch_norm_takes_in_residual_and_activation() -> None:
    fused = [m for m in gl.convert(RESNET.make()).modules() if isinstance(m, BatchNormAct2d)]
    graph = gl.convert(RESNET.make()).graph
    assert {node.target for node in graph.nodes if node.op != "call_module"} >= {"output"}
    assert not any("add" in node.name or "relu" in node.name for node in graph.nodes)
    assert [m.activation for m in fused].count("relu") == 1 + 8 + 8


def test_an_identity_behind_a_batch_norm_is_no_obstacle() -> None:
    converted = gl.convert(built(TRACEABLE["identities"]))
    assert not any("between" in node.name or "relu" in node.name for node in converted.graph.nodes)
    assert isinstance(converted.get_submodule("between"), nn.Identity)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
    model[2].weight = model[0].weight
    converted = gl.convert(model)
    assert converted.get_submodule("0").weight is converted.get_submodule("2").weight
    assert_equal_runs(model, converted, torch.randn(3, 5).double())


def test_a_module_under_two_names_stays_one() -> None:
    layer = nn.Linear(5, 5)
    converted = gl.convert(nn.Sequential(layer, nn.Tanh(), layer).double())
    assert converted.get_submodule("0") is converted.get_submodule("2")
    assert isinstance(converted.get_submodule("0"), QLinear)


def test_frozen_layers_stay_frozen() -> None:
    model = VGG.make()
    model[0].requires_grad_(False)
    converted = gl.convert(model)
    assert [p.requires_grad for p in converted.parameters()] == [p.requires_grad for p in model.parameters()]


def test_unused_submodules_are_kept() -> None:
    model = models.model(models.functional_relu, spare=nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    converted = gl.convert(model)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert type(converted.get_submodule("spare.0")) is nn.Conv2d  # it has no place in the forward pass


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


LEFT: dict[str, Callable[[], nn.Module]] = {
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 1),
    "subclass": lambda: Doubled(4, 4, 1),
    "parametrized": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("kind", LEFT)
def test_a_layer_that_computes_something_else_is_left_and_named(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.ReLU(), LEFT[kind]())).double()
    with pytest.warns(UserWarning, match=rf"1\.1 \({type(model[1][1]).__name__}\)") as caught:
        converted = gl.convert(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_equal_runs(model, converted, images())


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.GRU(4, 4), nn.Bilinear(4, 4, 4), nn.Embedding(4, 4)])
def test_a_layer_of_another_kind_is_named(layer: nn.Module) -> None:
    def features(m: models.Base, x: Tensor) -> Tensor:
        return m.conv1(m.layer(x))

    with pytest.warns(UserWarning, match=rf"layer \({type(layer).__name__}\)"):
        gl.convert(models.model(features, layer=layer))


def test_normalisations_are_not_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm([4, 5, 5]), nn.PReLU(4)))


def test_a_lazy_layer_without_a_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 is lazy and has no weight yet; run a batch first"):
        gl.convert(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)))


def test_layers_called_as_functions_are_named() -> None:
    def features(m: models.Base, x: Tensor) -> Tensor:
        return m.conv2(x) + torch.nn.functional.conv2d(x, m.conv1.weight, padding=1)

    with pytest.warns(UserWarning, match="conv2d"):
        gl.convert(models.model(features))


def test_an_encoder_that_reads_weights_itself_is_left_whole() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x)) if x.sum() > -1e9 else x

    with pytest.warns(UserWarning, match=r"left in float.*body\.linear1"):
        converted = gl.convert(Model())
    assert type(converted.get_submodule("body.linear1")) is nn.Linear


def test_nothing_to_convert_is_an_error() -> None:
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        gl.convert(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


@each_model
def test_a_second_conversion_changes_nothing(name: str) -> None:
    converted = gl.convert(built(MODELS[name]))
    assert gl.convert(converted) is converted


def test_a_half_converted_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers of this library, and 1 of torch\.nn"):
        gl.convert(nn.Sequential(QConv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    body = gl.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="and 1 of"):
        gl.convert(nn.Sequential(body, nn.Linear(3, 2)))


def test_a_model_that_was_traced_before() -> None:
    for copied in (lambda model: model, deep_copied, pickled):
        converted = copied(gl.convert(torch.fx.symbolic_trace(VGG.make())))
        assert len([m for m in converted.modules() if isinstance(m, QuantizedLayer)]) == 5
        assert_equal_runs(VGG.make(), converted, VGG.batch()[0])


def deep_copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model)
    average.update_parameters(model)
    return average.module


@pytest.mark.parametrize("copied", [deep_copied, pickled, saved, averaged])
@pytest.mark.parametrize("network", [VGG, RESNET], ids=lambda n: n.id)
def test_copies_are_whole_and_independent(copied: Callable[[nn.Module], nn.Module], network: Network) -> None:
    model = gl.convert(network.make())
    gl.calibrate(model, [network.batch()])
    twin = copied(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert list(twin.state_dict()) == list(model.state_dict())
    with gl.bits(model, w=4, a=4), gl.bits(twin, w=4, a=4):
        torch.testing.assert_close(network.loss(twin), network.loss(model), rtol=0, atol=0)
    first, second = (_penalty(m, network) for m in (model, twin))
    assert first == second
    assert len(first[1]) > len(network.producers)


def _penalty(model: nn.Module, network: Network) -> tuple[float, dict[str, float]]:
    penalty = gl.GradL1(model, 1.0, 1.0)
    assert all(site.probe.is_leaf and site.probe.requires_grad for site in penalty.sites)
    value = penalty(network.loss(model)).detach()
    return float(value), {name: float(term) for name, term in penalty.terms.items()}


class Sparing(models.Base):
    features = models.functional_relu

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.note = nn.Conv2d(2, 2, 1), "kept"


@pytest.mark.parametrize("copied", [deep_copied, pickled, saved])
def test_copies_keep_what_the_forward_pass_does_not_use(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = gl.convert(Sparing())
    twin = copied(model)
    assert list(twin.state_dict()) == list(model.state_dict()) == list(Sparing().state_dict())
    assert twin.note == "kept"
    assert isinstance(twin, ConvertedModel)  # which folding and export ask for
    assert twin.spare.weight is not model.spare.weight


class DataDependent(models.Base):
    features = models.data_dependent


class CalledTwice(models.Base):
    features = models.conv_called_twice


@pytest.mark.parametrize("cls", [DataDependent, CalledTwice])
def test_copies_of_small_models(cls: type[nn.Module]) -> None:
    model = gl.convert(built(cls))
    for copied in (deep_copied, saved):
        assert_gradients(run(copied(model), images()), run(copy.deepcopy(model), images()), 1e-15)


@pytest.mark.parametrize("what", [nn.Linear, None, {"weight": torch.ones(1)}])
def test_what_is_no_module_is_refused(what: object) -> None:
    with pytest.raises(TypeError, match=r"convert: the model must be a torch\.nn\.Module, got "):
        gl.convert(what)  # type: ignore[arg-type]


def test_a_converted_model_moves_with_its_probes() -> None:
    model = gl.convert(VGG.make(torch.float32))
    x, y = VGG.batch()
    penalty = gl.GradL1(model, 1.0, 1.0)
    model.double()
    assert penalty(nn.functional.cross_entropy(model(x), y)).dtype == torch.float64
