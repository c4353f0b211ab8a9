"""Bytes and multiplications compared with manual counts, and the quantizer of each layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from tests.networks import MOBILENET, NETWORKS, VGG, Network
from tests.quantization.export.models import OfDict

CONVS = {"0": (4, 3 * 9, 64), "3": (6, 4 * 9, 64), "7": (8, 6 * 9, 16)}  # outputs, weights of one, places
LINEARS = {"12": (10, 32, 1), "14": (5, 10, 1)}


def test_weights_and_multiplications_of_a_small_network() -> None:
    counted = gl.costs(gl.convert(VGG.make()), VGG.batch()[0])
    both = CONVS | LINEARS
    assert counted.weights == {name: n * m for name, (n, m, _) in both.items()}
    assert counted.products == {name: n * m * places for name, (n, m, places) in both.items()}
    w = {"0": 8, "3": 4, "7": 2, "12": None, "14": 1}
    size = (4 * 27 * 8 + 6 * 36 * 4 + 8 * 54 * 2 + 320 * 32 + 50) / 8
    assert counted.size(w) == size
    a = {"0.input": 8, "3.input": 5}
    assert counted.inputs["0"] in a
    operations = (
        4 * 27 * 64 * 8 * 8 + 6 * 36 * 64 * 4 * 5 + 8 * 54 * 16 * 2 * 32 + 320 * 32 * 32 + 50 * 1 * 32
    )
    assert counted.bit_operations(w, a) == operations


def test_grouped_convolutions_multiply_within_their_groups() -> None:
    counted = gl.costs(gl.convert(MOBILENET.make()), MOBILENET.batch()[0])
    assert counted.products["blocks.0.depthwise.0"] == 8 * 9 * 16
    assert counted.weights["blocks.0.depthwise.0"] == 8 * 9


def test_without_an_example_nothing_is_multiplied() -> None:
    assert gl.costs(gl.convert(VGG.make())).products == {}


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
def test_the_site_of_each_layer_has_the_range_of_its_input(network: Network) -> None:
    model = gl.convert(network.make().eval())
    gl.calibrate(model, [network.batch()])
    inputs = gl.costs(model).inputs
    seen = {}
    for name in inputs:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].detach()})
        )
    model(network.batch()[0])
    quantizers = named_quantizers(model)
    for name, site in inputs.items():
        values = seen[name]
        assert float(values.min()) >= float(quantizers[str(site)].low)
        extremes = {float(values.min()), float(values.max())}
        assert extremes == {float(quantizers[str(site)].low), float(quantizers[str(site)].high)}


def test_a_layer_alone_and_tied_weights() -> None:
    assert gl.costs(gl.convert(nn.Linear(3, 2))).inputs == {"": "input"}
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert gl.costs(gl.convert(tied)).weights == {"0": 9, "1": 0}


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers of this library"):
        gl.costs(VGG.make())


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(7, 4), nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.head = nn.Linear(6, 7)

    def forward(self, *, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.words(ids).transpose(1, 2)).transpose(1, 2))


def test_embeddings_are_weights_without_multiplications_and_transposed_ones_multiply_inputs() -> None:
    model = gl.convert(Text().eval())
    ids = torch.arange(10).reshape(2, 5) % 7
    counted = gl.costs(model, {"ids": ids})
    assert counted.weights == {"words": 28, "up": 4 * 3 * 3, "head": 42}
    assert counted.products == {"words": 0, "up": 5 * 4 * 3 * 3, "head": 7 * 42}
    assert counted.inputs["words"] is None
    assert counted == gl.costs(model, [ids], forward=lambda model, batch: model(ids=batch[0]))


def test_a_weight_that_only_a_function_reads_is_neither_counted_nor_quantized_alone() -> None:
    batch = {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    called = {"a": 12, "b": 12, "last": 6}
    model = gl.convert(OfDict().eval())
    assert gl.costs(model, batch, forward=lambda m, batch: m(batch)).products == called
    assert gl.costs(model).weights == called
    assert [row.name for row in gl.sensitivity(model, lambda m: 1.0, a=()).rows] == list(called)
    assert list(gl.search(model, lambda m: 1.0, size=30).best.w) == list(called)


def test_a_weight_that_a_function_reads_too_is_counted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.layer = nn.Embedding(7, 4), nn.Linear(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.layer(self.words(ids)), self.words.weight)

    assert gl.costs(gl.convert(Tied())).weights == {"words": 28, "layer": 16}


def test_a_computed_weight_counts_once_each() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = gl.convert(nn.Sequential(norm(nn.Linear(3, 3)), norm(nn.Linear(3, 3))))
    assert gl.costs(model).weights == {"0": 9, "1": 9}
