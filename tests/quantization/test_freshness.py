"""A warning if weights have changed since calibration, and only then."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from tests.conversion.lookalikes import BatchNormAct2d
from tests.networks import VGG

MESSAGE = r"the weights of .* have changed since the activation ranges were calibrated: call .*calibrate"


def calibrated() -> nn.Module:
    model = gl.convert(VGG.make(torch.float32).eval())
    gl.calibrate(model, [VGG.batch(torch.float32)])
    return model


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    VGG.loss(model, torch.float32).backward()
    optimizer.step()
    return model


def load_others(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    state = {name: t + 0.01 for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def from_vector(model: nn.Module) -> nn.Module:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.01, model.parameters())
    return model


def gammas(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[1].weight.mul_(1.5)
    return model


def replace(model: nn.Module) -> nn.Module:
    model[3].weight = nn.Parameter(model[3].weight.detach() * 1.01)
    return model


STALE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "training": train,
    "training a copy": lambda model: train(copy.deepcopy(model)),
    "training what was pickled": lambda model: train(pickle.loads(pickle.dumps(model))),
    "other weights": load_others,
    "another parameter": replace,
    "parameters from a vector": from_vector,
    "the gammas of a batch norm": gammas,
    "the gammas of a pickled copy": lambda model: gammas(pickle.loads(pickle.dumps(model))),
    "training a folded copy": lambda model: train(gl.fold_batch_norm(model).model),
    "training an equalized copy": lambda model: train(
        (lambda m: gl.calibrate(m, [VGG.batch(torch.float32)]) or m)(gl.equalize(model).model)
    ),
}


@pytest.mark.parametrize("case", STALE)
def test_a_warning_comes_once(case: str) -> None:
    model = STALE[case](calibrated())
    gl.set_bits(model, w=4, a=None)  # weights alone have no ranges to be stale
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        gl.set_bits(model, w=4, a=4)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_silent(model)


def assert_silent(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.set_bits(model, w=4, a=4)
        with gl.bits(model, w=4, a=4):
            pass
        gl.sweep(model, lambda m: 1.0, [(4, 4), (8, 8)], workers=2)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    return model


def tracked(model: nn.Module) -> nn.Module:
    train(model)
    with gl.track_ranges(model.train()):
        model(VGG.batch(torch.float32)[0])
    return model.eval()


FRESH: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "the same weights loaded": saved_and_loaded,
    "the same parameters from a vector": lambda model: (
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
        or model
    ),
    "half": lambda model: model.half(),
    "half and back": lambda model: model.half().float(),
    "bfloat16": lambda model: copy.deepcopy(model).bfloat16(),
    "double": lambda model: model.double(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "folded": lambda model: gl.fold_batch_norm(model).model,
    "folded, in half": lambda model: gl.fold_batch_norm(model).model.half(),
    "corrected": lambda model: gl.correct_bias(model, [VGG.batch(torch.float32)], w=4),
    "tracked": tracked,
    "calibrated again": lambda model: gl.calibrate(train(model), [VGG.batch(torch.float32)]) or model,
    "statistics alone": lambda model: (model.train()(VGG.batch(torch.float32)[0]), model.eval())[1],
}


@pytest.mark.parametrize("case", FRESH)
def test_operations_that_change_no_weight_give_no_warning(case: str) -> None:
    assert_silent(FRESH[case](calibrated()))


def test_folding_a_batch_norm_with_an_activation_is_no_change_and_hides_none() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 2, 3)).eval()
    nn.init.constant_(plain[1].weight, 2.0)
    model, x = gl.convert(plain), torch.randn(2, 3, 8, 8)
    gl.calibrate(model, [x])
    assert_silent(gl.fold_batch_norm(model).model)
    gammas(model)
    with pytest.warns(UserWarning, match=MESSAGE):
        gl.set_bits(gl.fold_batch_norm(model).model, w=4, a=4)


def test_loaded_ranges_belong_to_the_current_weights(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="files of ranges are safetensors")
    model = calibrated()
    gl.save_ranges(model, tmp_path / "r")
    train(model)
    gl.load_ranges(model, tmp_path / "r")
    assert_silent(model)


def exported_at_current_widths(model: nn.Module, _: Path) -> None:
    from gradl1_fast.quantization.export import simulate

    simulate(model, VGG.batch(torch.float32)[0])


STORES: dict[str, Callable[[nn.Module, Path], object]] = {
    "file of ranges": gl.save_ranges,
    "any-bit file": gl.save_any_bit,
    "export at the current widths": exported_at_current_widths,
}


@pytest.mark.parametrize("case", STORES)
def test_a_file_with_stale_ranges_gives_a_warning(case: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="files of ranges are safetensors")
    model = calibrated()
    gl.set_bits(model, w=8, a=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STORES[case](model, tmp_path / "file")
    train(model.train())
    with pytest.warns(UserWarning, match=MESSAGE):
        STORES[case](model.eval(), tmp_path / "file")


def test_training_with_tracked_ranges_does_not_warn() -> None:
    model = calibrated().train()
    with warnings.catch_warnings(), gl.track_ranges(model):
        warnings.simplefilter("error")
        for _ in range(2):
            with gl.bits(model, w=4, a=4):
                train(model)


def test_a_sweep_in_several_threads_warns_once() -> None:
    model = train(calibrated())
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        gl.sweep(model, lambda m: 1.0, [(4, 4), (3, 3), (2, 2)], workers=2)
    assert len(caught) == 1


def test_embeddings_and_computed_weights_count() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = gl.convert(nn.Sequential(nn.Embedding(5, 4), norm(nn.Linear(4, 3)), nn.Linear(3, 2)).eval())
    ids = torch.arange(5)
    for parameter in (model[0].weight, model[1].parametrizations.weight.original1):
        gl.calibrate(model, [ids])
        assert_silent(model)
        with torch.no_grad():
            parameter.mul_(1.5)
        with pytest.warns(UserWarning, match=MESSAGE):
            gl.set_bits(model, w=4, a=4)


@pytest.mark.parametrize("change", [train, load_others, from_vector], ids=lambda change: change.__name__)
def test_widths_that_were_set_before_the_weights_changed_give_a_warning(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    model, x = calibrated(), VGG.batch(torch.float32)[0]
    gl.set_bits(model, w=4, a=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        change(model.train()).eval()
    with pytest.warns(UserWarning, match="weights have changed since the activation ranges were calibrated"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        gl.calibrate(model, [x])
        model(x)
