"""A model read from an any-bit file stores bits of weights instead of weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization.bias_correction import correct_bias
from gradl1_fast.quantization.costs import costs
from gradl1_fast.quantization.equalization import equalize
from tests.networks import VGG
from tests.quantization.any_bit.models import FIRST, converted, other

pytest.importorskip("safetensors", reason="any-bit files need safetensors")


class TestASlicedModel:
    """What such a model cannot do is refused by name."""

    @pytest.fixture
    def model(self, path: Path) -> nn.Module:
        return gl.load_any_bit(other(), path, w=4)

    def test_widths(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="w = 5: only 4 bits were read"):
            gl.set_bits(model, w=5, a=2)
        assert {q.bits for q in named_quantizers(model).values()} == {None}
        gl.set_bits(model, w=None, a=None)
        assert {layer.weight_quantizer.bits for layer in named_layers(model).values()} == {4}
        with pytest.raises(ValueError, match="1 to 4"):
            model.get_submodule(FIRST).weight_quantizer.bits = 5

    def test_it_can_be_calibrated_and_copied(self, model: nn.Module) -> None:
        x = VGG.batch(torch.float32)[0]
        gl.calibrate(model, [x])
        twin = copy.deepcopy(model)
        gl.set_bits(twin, w=2, a=None)
        assert not torch.equal(twin(x), model(x))

    def test_it_has_nothing_to_train_or_to_save(self, model: nn.Module, path: Path) -> None:
        with pytest.raises(ValueError, match="'0' was loaded from an any-bit file"):
            gl.save_any_bit(model, path)
        with pytest.raises(ValueError, match="GradL1: 0 has no trainable weight"):
            gl.GradL1(model, 0.1, 0.0)
        with pytest.raises(RuntimeError, match="no grid of integers"):
            model.get_submodule(FIRST).weight_quantizer.step(None, 4)

    def test_functions_that_need_float_weights_raise(self, model: nn.Module) -> None:
        x = VGG.batch(torch.float32)[0]
        for name, call in {
            "calibrate_weights": lambda: gl.calibrate_weights(model),
            "equalize": lambda: equalize(model),
            "correct_bias": lambda: correct_bias(model, [x], w=4),
            "costs": lambda: costs(model),
        }.items():
            with pytest.raises(
                ValueError, match=f"{name}: '0' was loaded from an any-bit file and has no float"
            ):
                call()

    def test_its_batch_norms_are_kept(self, model: nn.Module) -> None:
        with pytest.warns(UserWarning, match="was loaded from an any-bit file"):
            assert not gl.fold_batch_norm(model).folded

    def test_state_dicts_are_not_accepted_as_those_of_a_float_model(self, model: nn.Module) -> None:
        with pytest.raises(RuntimeError, match="Missing key"):
            converted().load_state_dict(model.state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict(converted().state_dict())

    def test_report(self, model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
        assert gl.report(model).layers[0][2:4] == ("4x3x3x3", "4, but not called yet")
        model(VGG.batch(torch.float32)[0])
        assert gl.report(model).layers[0][2:4] == ("4x3x3x3", "4")
