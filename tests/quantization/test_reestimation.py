"""Batch-norm statistics at a width equal those of training mode there, and are used only there."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.quantization import reestimation
from tests.networks import MOBILENET, NO_NORM, RESNET, VGG, Network

WIDTHS = [(3, None), (4, 4), ({"stem.0": 2}, {"stem.0.input": 8})]


def batches(network: Network) -> list[Tensor]:
    x = network.batch()[0]
    return [x, x.flip(0) * 1.5 + 0.1, x[:5]]


def calibrated(network: Network, *, per_channel: bool = True) -> nn.Module:
    model = gl.convert(network.make(), per_channel=per_channel).eval()
    gl.calibrate(model, batches(network))
    return model


def textbook(network: Network, w: Any, a: Any) -> nn.Module:
    """Return a model whose own batch norms ran as in training, at a width."""
    model = calibrated(network)
    gl.set_bits(model, w=w, a=a)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
    with torch.no_grad():
        for x in batches(network):
            model(x)
    return model.eval()


@pytest.mark.parametrize(("w", "a"), WIDTHS, ids=str)
def test_statistics_are_those_of_training_mode_and_belong_to_the_width(w: Any, a: Any) -> None:
    x = RESNET.batch()[0]
    plain = RESNET.make().eval()
    model = gl.convert(plain, per_channel=True)
    gl.calibrate(model, batches(RESNET))
    state = copy.deepcopy(plain.state_dict())
    with gl.bits(model, w=5, a=5):
        other = model(x)
    with gl.bits(model, w=w, a=a):
        before = model(x)
        done = gl.reestimate_batch_norm(model, batches(RESNET))
        norms = [name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert done.norms == norms
        assert not done.left
        found = model(x)
        assert torch.equal(found, textbook(RESNET, w, a)(x))
        assert not torch.allclose(found, before)
        assert not any(m.training for m in model.modules())
    assert torch.equal(model(x), plain(x))
    with gl.bits(model, w=5, a=5):
        assert torch.equal(model(x), other)
    with gl.bits(model, w=w, a=a):
        assert torch.equal(model(x), found)
        at_width = model.state_dict()
    for key, value in state.items():
        assert torch.equal(value, plain.state_dict()[key])
        assert torch.equal(value, at_width[key])


def test_two_widths_keep_separate_statistics() -> None:
    model, x = calibrated(VGG), VGG.batch()[0]
    for w, a in ((3, 3), (4, 4), (3, 3)):
        with gl.bits(model, w=w, a=a):
            gl.reestimate_batch_norm(model, batches(VGG))
    gl.set_bits(model, w=4, a=4)
    assert torch.equal(model(x), textbook(VGG, 4, 4)(x))
    gl.set_bits(model, w=3, a=3)
    assert torch.equal(model(x), textbook(VGG, 3, 3)(x))
    gl.reestimate_batch_norm(model, [2 * x])
    assert not torch.equal(model(x), textbook(VGG, 3, 3)(x))


def test_in_float_the_running_statistics_themselves_are_estimated() -> None:
    plain = VGG.make()
    model = gl.convert(plain).eval()
    gl.reestimate_batch_norm(model, batches(VGG))
    norm: Any = plain[1]
    assert model[1].running_mean is norm.running_mean
    outputs = [plain[0](x) for x in batches(VGG)]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)


@pytest.mark.parametrize("network", [VGG, MOBILENET, RESNET], ids=lambda n: n.id)
@pytest.mark.parametrize("stored", [False, True], ids=["own range", "stored range"])
def test_a_folded_model_computes_the_same_as_the_unfolded_one(network: Network, stored: bool) -> None:
    model, x = calibrated(network), network.batch()[0]
    if stored:
        gl.calibrate_weights(model)
    folded = gl.fold_batch_norm(model, x).model
    for w, a in ((3, None), (4, 6)):
        for each in (model, folded):
            with gl.bits(each, w=w, a=a):
                gl.reestimate_batch_norm(each, batches(network))
    for w, a in ((3, None), (4, 6), (None, None), (5, None)):
        with gl.bits(model, w=w, a=a), gl.bits(folded, w=w, a=a):
            torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    with gl.bits(model, w=3, a=None):  # folded at the width, for good
        again = gl.fold_batch_norm(model, x)
        assert again.statistics == "in use"
        assert again.difference is not None
        assert again.difference < 1e-9
        with gl.bits(again.model, w=3, a=None):
            torch.testing.assert_close(again.model(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_folded_layer_keeps_its_codes(per_channel: bool) -> None:
    model = gl.fold_batch_norm(calibrated(VGG, per_channel=per_channel), VGG.batch()[0]).model
    gl.round_weights(model, batches(VGG), w=3)
    with gl.bits(model, w=3, a=None):
        quantizer, weight = model[0].weight_quantizer, model[0].weight
        codes, before = quantizer.codes_of(weight, 3).clone(), model(VGG.batch()[0])
        gl.reestimate_batch_norm(model, batches(VGG))
        assert (model[0].weight is weight) == (not per_channel)
        assert torch.equal(quantizer.codes_of(model[0].weight, 3), codes)
        assert not torch.equal(model(VGG.batch()[0]), before)
        again = model(VGG.batch()[0])
    with gl.bits(model, w=3, a=None):
        assert torch.equal(model(VGG.batch()[0]), again)


def test_folding_at_another_width_warns_that_statistics_are_dropped() -> None:
    model = calibrated(VGG)
    with gl.bits(model, w=3, a=None):
        gl.reestimate_batch_norm(model, batches(VGG))
    with pytest.warns(UserWarning, match="left behind: fold at the width"):
        folding = gl.fold_batch_norm(model)
    assert "re-estimated statistics: left behind" in str(folding)
    assert not gl.fold_batch_norm(calibrated(VGG)).statistics


def test_with_one_range_per_tensor_a_folded_layer_restores_its_mean() -> None:
    model = gl.fold_batch_norm(calibrated(VGG, per_channel=False), VGG.batch()[0]).model
    beta = VGG.make()[1].bias
    with gl.bits(model, w=2, a=None):
        off = model[0](VGG.batch()[0]).mean((0, 2, 3)) - beta
        gl.reestimate_batch_norm(model, [VGG.batch()[0]])
        torch.testing.assert_close(model[0](VGG.batch()[0]).mean((0, 2, 3)), beta)
    assert float(off.detach().abs().max()) > 1e-3


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "half and back", "convert again"])
def test_copies_keep_them(way: str) -> None:
    model, x = calibrated(VGG), VGG.batch()[0]
    gl.set_bits(model, w=3, a=3)
    gl.reestimate_batch_norm(model, batches(VGG))
    expected = model(x)
    gl.set_bits(model, w=None, a=None)
    in_float = model(x)
    gl.set_bits(model, w=3, a=3)
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    elif way == "convert again":
        model = gl.convert(nn.Sequential(model, nn.Linear(5, 5).double()))[0]
    else:
        model = model.float().double()
    close = {"rtol": 1e-5, "atol": 1e-5} if way == "half and back" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(model(x), expected, **close)
    gl.set_bits(model, w=None, a=None)
    torch.testing.assert_close(model(x), in_float, **close)
    gl.set_bits(model, w=3, a=3)
    torch.testing.assert_close(model(x), expected, **close)


def test_statistics_of_other_weights_are_dropped_with_a_warning() -> None:
    model, x = calibrated(VGG), VGG.batch()[0]
    with gl.bits(model, w=3, a=3):
        gl.reestimate_batch_norm(model, batches(VGG))
    with torch.no_grad():
        model[0].weight *= 1.5
    fresh = calibrated(VGG)
    with torch.no_grad():
        fresh[0].weight *= 1.5
    gl.calibrate(fresh, batches(VGG))
    gl.set_bits(fresh, w=3, a=3)
    with pytest.warns(UserWarning, match="weights of 0 have changed since batch norms"):
        gl.calibrate(model, batches(VGG))
    gl.set_bits(model, w=3, a=3)
    assert torch.equal(model(x), fresh(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.set_bits(model, w=3, a=3)


def test_loading_at_a_width_sets_the_values_of_float() -> None:
    model, x = calibrated(VGG), VGG.batch()[0]
    gl.set_bits(model, w=3, a=3)
    gl.reestimate_batch_norm(model, batches(VGG))
    expected = model(x)
    other = VGG.make().eval()
    for norm in (m for m in other.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.constant_(norm.running_mean, 0.25)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), expected)  # the weights are the same, and so are the statistics of the width
    with gl.bits(model, w=None, a=None):
        assert torch.equal(model(x), other(x))
    state = model.state_dict()
    state["0.weight"] = 2 * state["0.weight"]
    with pytest.warns(UserWarning, match="weights of 0 have changed since batch norms"):
        model.load_state_dict(state)
    assert float(model[1].running_mean[0]) == 0.25


def test_statistics_updated_by_training_at_a_width_are_kept() -> None:
    model, x = calibrated(VGG), VGG.batch()[0]
    gl.set_bits(model, w=3, a=3)
    gl.reestimate_batch_norm(model, batches(VGG))
    model.train()
    model(x)
    moved, in_float = model[1].running_mean.clone(), VGG.make()[1].running_mean
    assert torch.equal(model.state_dict()["1.running_mean"], in_float)
    gl.set_bits(model, w=None, a=None)
    assert torch.equal(model[1].running_mean, in_float)
    gl.set_bits(model, w=3, a=3)
    assert torch.equal(model[1].running_mean, moved)
    with torch.no_grad():
        model[0].weight *= 1.5
    model(x)
    trained = model[1].running_mean.clone()
    with pytest.warns(UserWarning, match="have changed since"):
        gl.set_bits(model, w=None, a=None)
    assert torch.equal(model[1].running_mean, trained)


class Sparse(nn.Module):
    """A batch norm without statistics, one that is never reached, dropout, and no plain chain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.dropout = nn.Dropout(0.9)
        self.norm = nn.BatchNorm2d(4)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.untracked(self.conv(x))))


def test_unchanged_batch_norms_are_named_and_only_batch_norms_run_in_training_mode() -> None:
    model = gl.convert(Sparse().double())
    with gl.bits(model, w=3, a=None):
        done = gl.reestimate_batch_norm(model, batches(VGG))
        assert model.training
        assert model.dropout.training
        assert model.norm.training
        y = model.eval().norm.running_var
        assert float(y.max()) < 1.5  # dropout would have multiplied it by ten
    assert done.norms == ["norm"]
    assert set(done.left) == {"untracked", "unused"}
    assert "unused: left: no value" in str(done)
    with gl.bits(gl.convert(NO_NORM.make()), w=3, a=None) as bare, pytest.warns(match="nothing to do"):
        assert not gl.reestimate_batch_norm(bare, batches(VGG)).norms
    with pytest.raises(ValueError, match="not converted"):
        gl.reestimate_batch_norm(VGG.make(), batches(VGG))


def test_nan_is_refused_and_nothing_is_changed() -> None:
    model, x = calibrated(VGG), VGG.batch()[0]
    gl.set_bits(model, w=3, a=None)
    gl.reestimate_batch_norm(model, batches(VGG))
    before = model(x)
    tiny = gl.convert(nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4)).double())
    with pytest.raises(ValueError, match="single value per channel"):
        gl.reestimate_batch_norm(tiny, [x, x[:1]])
    for bad, error in (([x * float("nan")], "'1' holds NaN"), ([], "no batches")):
        with pytest.raises(ValueError, match=error):
            gl.reestimate_batch_norm(model, bad)
        assert torch.equal(model(x), before)
        assert model[1].momentum == 0.1
        assert not model[1].training


def test_ranks_combine_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank has seen the second half: statistics are those of both, but for the unbiased variance."""
    x = VGG.batch()[0]
    model = gl.convert(VGG.make()).eval()
    y = model[0](x[3:])
    theirs = y.mean((0, 2, 3)), y.var((0, 2, 3))

    def add(moments: Tensor) -> None:
        if len(moments[0]) == len(theirs[0]):
            moments += torch.stack((*theirs, theirs[0].square()))

    monkeypatch.setattr(reestimation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(reestimation.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(reestimation.dist, "all_reduce", add)
    gl.reestimate_batch_norm(model, [x[:3]])
    both = model[0](x)
    torch.testing.assert_close(model[1].running_mean, both.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, both.var((0, 2, 3), correction=0), rtol=0.02, atol=0)


def test_under_autocast_statistics_are_those_of_the_narrow_type() -> None:
    model = gl.convert(VGG.make(torch.float32)).eval()
    with gl.bits(model, w=4, a=None), torch.autocast("cpu", torch.bfloat16):
        gl.reestimate_batch_norm(model, [x.float() for x in batches(VGG)])
        assert model[1].running_mean.dtype == torch.float32
        expected = torch.stack([model[0](x.float()).float().mean((0, 2, 3)) for x in batches(VGG)]).mean(0)
        torch.testing.assert_close(model[1].running_mean, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_uses_them(workers: int) -> None:
    model, x = calibrated(VGG), VGG.batch()[0]
    with gl.bits(model, w=3, a=3):
        gl.reestimate_batch_norm(model, batches(VGG))
        expected = float(model(x).abs().sum())
    table = gl.sweep(model, lambda m: float(m(x).abs().sum()), [(3, 3), (None, None)], workers=workers)
    assert table[3, 3] == expected
    assert table[None, None] == float(model(x).abs().sum())


def test_a_penalised_pass_at_the_width_uses_them() -> None:
    """In evaluation mode, where plans and regions normalise by the statistics too."""
    model, (x, y) = calibrated(RESNET, per_channel=False), RESNET.batch()
    gl.set_bits(model, w=4, a=4)
    gl.reestimate_batch_norm(model, batches(RESNET))
    expected = model(x)
    gradl1 = gl.GradL1(model, 0.01, 0.01, scale="none")
    loss = F.cross_entropy(model(x), y)
    (loss + gradl1(loss)).backward()
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))


def test_export_folds_those_of_its_widths(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from gradl1_fast.quantization.export import compare, export_onnx

    model = gl.convert(VGG.make(torch.float32), per_channel=True).eval()
    images = [x.float() for x in batches(VGG)]
    gl.calibrate(model, images)
    plain = export_onnx(model, images[0], w=4, a=8)
    with gl.bits(model, w=4, a=8):
        gl.reestimate_batch_norm(model, images)
        expected = model(images[0])
    file = export_onnx(model, images[0], w=4, a=8)
    torch.testing.assert_close(file.prepared.model(images[0]), expected, rtol=0.05, atol=0.05)
    assert not torch.allclose(plain.prepared.model(images[0]), expected, rtol=0.05, atol=0.05)
    assert not compare(file, images[0]).faults()


def test_a_file_holds_every_width_and_restores_each(tmp_path: Path) -> None:
    path = tmp_path / "norms.safetensors"
    model, x = calibrated(VGG), VGG.batch()[0]
    with pytest.raises(RuntimeError, match="has no statistics"):
        gl.save_batch_norms(model, path)
    expected = {}
    for w, a in ((3, 3), (4, None)):
        with gl.bits(model, w=w, a=a):
            gl.reestimate_batch_norm(model, batches(VGG))
            expected[w, a] = model(x)
    gl.save_batch_norms(model, path)
    gl.save_batch_norms(torch.compile(model, backend="eager"), path)
    other = calibrated(VGG)
    gl.set_bits(other, w=3, a=3)
    gl.load_batch_norms(torch.compile(other, backend="eager"), path)
    assert torch.equal(other(x), expected[3, 3])
    with gl.bits(other, w=4, a=None):
        assert torch.equal(other(x), expected[4, None])
    with pytest.raises(ValueError, match=r"norms.safetensors: unknown entries .*running_mean"):
        gl.load_batch_norms(gl.convert(NO_NORM.make()), path)
    wide = gl.convert(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).double())
    with pytest.raises(ValueError, match=r"entry '0.running_mean.1': must be .* of shape \(5,\)"):
        gl.load_batch_norms(wide, path)


def test_a_model_from_an_any_bit_file_gets_its_own_statistics(tmp_path: Path) -> None:
    model, x = calibrated(VGG), VGG.batch()[0]
    gl.save_any_bit(model, tmp_path / "weights")
    narrow = gl.load_any_bit(calibrated(VGG), tmp_path / "weights", w=2)
    gl.reestimate_batch_norm(narrow, batches(VGG))
    after = narrow(x)
    means = torch.stack([narrow[0](each).mean((0, 2, 3)) for each in batches(VGG)])
    torch.testing.assert_close(narrow[1].running_mean, means.mean(0))
    gl.save_batch_norms(narrow, tmp_path / "norms")
    again = gl.load_any_bit(calibrated(VGG), tmp_path / "weights", w=2)
    gl.load_batch_norms(again, tmp_path / "norms")
    assert torch.equal(again(x), after)
