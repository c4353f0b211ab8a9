"""Constructs of well-known packages equal the original, and double backprop when penalised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn import QuantizedLayer
from gradl1_fast.nn.sites import named_quantizers
from tests.conversion.lookalikes import GPT, OF_IMAGES, Conv1D, LayerDrop, ModelOutput
from tests.conversion.runs import assert_equal_runs, assert_equal_steps, built, images, loss_of

each_model = pytest.mark.parametrize("name", OF_IMAGES)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@each_model
@each_mode
@pytest.mark.filterwarnings("error:gradl1_fast.convert")
def test_ordinary_steps_equal_those_of_the_original(name: str, training: bool) -> None:
    model = built(OF_IMAGES[name], training)
    assert_equal_runs(model, gl.convert(model), images())


# Of a standardised weight it is the computed one that is penalised: see the tests of layers of others.
PENALISED = [name for name in OF_IMAGES if "standardised" not in name]


@pytest.mark.parametrize("name", PENALISED)
@each_mode
def test_penalised_steps_equal_double_backprop(name: str, training: bool) -> None:
    x, models = images(), [built(OF_IMAGES[name], training) for _ in range(2)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the oracle cannot without
        assert_equal_steps(models[0], gl.convert(models[1]), loss_of(x), steps=3)


@each_model
def test_every_weight_is_quantized(name: str) -> None:
    plain = built(OF_IMAGES[name], training=False)
    converted = gl.convert(plain)
    before = converted(images())
    gl.calibrate(converted, [images()])
    weights = [n for n, m in plain.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]
    for layer in weights:
        quantizer = converted.get_submodule(layer).weight_quantizer
        quantizer.bits = 2
        assert not torch.equal(converted(images()), before), layer
        quantizer.bits = None
    torch.testing.assert_close(converted(images()), before, rtol=0, atol=0)
    with gl.bits(converted, w=8, a=8):
        torch.testing.assert_close(converted(images()), before, rtol=0.1, atol=0.15)


def test_layer_drop_drops_the_same_layers_as_the_original() -> None:
    """The numbers of layers that a pass uses are drawn anew each time, and the same as in the original."""
    calls: list[list[str]] = []
    for model in (built(LayerDrop), gl.convert(built(LayerDrop))):
        seen: list[str] = []
        for name, layer in model.layers.named_children():
            layer.register_forward_hook(lambda *_, name=name, seen=seen: seen.append(name))
        penalty = gl.GradL1(model, 0.1, 0.0) if isinstance(model.layers[0][0], QuantizedLayer) else None
        torch.manual_seed(3)
        for _ in range(12):
            seen.append("|")
            y = model(images())
            if penalty is not None and y.requires_grad:
                penalty(y.sum())
        calls.append(seen)
    assert calls[0] == calls[1]
    assert len(set("".join(calls[0]).split("|"))) > 3


def test_a_layer_that_a_step_did_not_use_contributes_zero() -> None:
    converted = gl.convert(built(OF_IMAGES["layer drop"]))
    penalty = gl.GradL1(converted, 0.1, 0.1)
    used, zero = set(), set()
    for seed in range(8):
        torch.manual_seed(seed)
        penalty(converted(images()).sum())
        used |= {n for n, t in penalty.terms.items() if t}
        zero |= {n for n, t in penalty.terms.items() if not t}
    assert used & zero


def ids() -> Tensor:
    return torch.arange(12).reshape(2, 6) * 5 % 11


def language_loss(model: nn.Module) -> Tensor:
    return model(ids()).logits.sin().sum()


def test_a_language_model_with_tied_embeddings() -> None:
    plain, converted = built(GPT), gl.convert(built(GPT))
    assert converted.lm_head.weight is converted.wte.weight
    assert isinstance(converted(ids()), ModelOutput)
    assert isinstance(converted(ids(), return_hidden=False), ModelOutput)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_equal_steps(plain, converted, language_loss)
    names = {n for n, m in converted.named_modules() if isinstance(m, QuantizedLayer)}
    assert names == {"wte", "wpe", "c_attn", "c_proj", "c_fc", "c_out", "lm_head"}
    assert isinstance(converted.c_attn, Conv1D)


def test_fused_attention_can_be_penalised() -> None:
    x = images()
    converted = gl.convert(built(OF_IMAGES["encoder"]))
    penalty = gl.GradL1(converted, 0.3, 0.2)
    penalty(loss_of(x)(converted)).backward()
    converted = gl.convert(built(GPT))
    penalty = gl.GradL1(converted, 0.3, 0.2)
    penalty(language_loss(converted)).backward()


def test_an_embedding_has_a_weight_and_no_site() -> None:
    converted = gl.convert(built(GPT).eval())
    assert not {"wte.input", "wpe.input"} & set(named_quantizers(converted))
    before = converted(ids()).logits
    gl.set_bits(converted, w=2, a=None)
    assert not torch.equal(converted(ids()).logits, before)


@pytest.mark.filterwarnings("ignore:gradl1_fast.convert")
def test_multihead_attention_of_torch_stays_in_float_and_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    x = torch.randn(2, 3, 4).double()
    model = built(Model)
    with pytest.warns(UserWarning, match="attention"):
        converted = gl.convert(model)
    assert_equal_runs(model, converted, x)
    assert any("attention" in name for name, *_ in gl.report(converted).unquantized)
