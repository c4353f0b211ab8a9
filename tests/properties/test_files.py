"""Folding and export of random networks, and any-bit files."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization.export import compare, compare_torch, export_onnx, export_torch, simulate
from tests.properties.build import batch, make
from tests.properties.examples import examples
from tests.properties.grammar import EXPORTABLE, Network, networks

EXPORTED = st.sampled_from((None, 2, 3, 4, 6, 8, 16))


def converted(network: Network, *, per_channel: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = gl.convert(make(network, dtype).eval(), per_channel=per_channel)
    gl.calibrate(model, [batch(network, dtype)])
    return model


@examples(30)
@given(networks(), st.booleans())
def test_a_folded_network_is_the_same(network: Network, per_channel: bool) -> None:
    model, x = converted(network, per_channel=per_channel, dtype=torch.float64), batch(network)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is not folded, and why
        folding = gl.fold_batch_norm(model, x)
    torch.testing.assert_close(folding.model(x), model(x), rtol=1e-9, atol=1e-12)


@examples(12, share=0.3)
@given(networks(EXPORTABLE), EXPORTED, EXPORTED, st.booleans())
def test_onnxruntime_agrees_with_the_simulation(
    network: Network, w: int | None, a: int | None, per_channel: bool
) -> None:
    pytest.importorskip("onnx", reason="export needs onnx")
    pytest.importorskip("onnxruntime", reason="export needs onnxruntime")
    model, x = converted(network, per_channel=per_channel), batch(network, torch.float32)[0]
    exported = export_onnx(model, x, w=w, a=a)
    assert not [fault for fault in compare(exported, x).faults() if "top-1" not in fault]


@examples(2, share=0.05)
@given(networks(EXPORTABLE), EXPORTED, EXPORTED, st.booleans())
def test_a_program_agrees_with_the_simulation(
    network: Network, w: int | None, a: int | None, per_channel: bool
) -> None:
    model, x = converted(network, per_channel=per_channel), batch(network, torch.float32)[0]
    prepared = simulate(model, x, w=w, a=a)
    found = compare_torch(export_torch(prepared, x), prepared, x)
    assert found.outputs < 1e-5


def weights(model: nn.Module, w: int) -> dict[str, Tensor]:
    """Return the weights of all layers as they are used at a width."""
    with gl.bits(model, w=w, a=None):
        return {name: m.weight_quantizer(m.weight) for name, m in named_layers(model).items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@examples(25)
@given(networks(), st.integers(1, 8), st.booleans())
def test_any_bit_files_hold_every_width(network: Network, w: int, per_channel: bool) -> None:
    pytest.importorskip("safetensors", reason="any-bit files are safetensors")
    model, x = converted(network, per_channel=per_channel), batch(network, torch.float32)[0]
    whole, cut = (
        gl.convert(make(network, torch.float32, seed=network.seed + i).eval(), per_channel=per_channel)
        for i in (1, 2)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        sizes = gl.save_any_bit(model, path)
        gl.load_any_bit(whole, path)
        path.write_bytes(path.read_bytes()[: sizes[w]])
        gl.load_any_bit(cut, path, w=w)
    assert_same_tensors(weights(whole, 8), weights(model, 8))
    assert_same_tensors(weights(cut, w), weights(whole, w))
    for other in (whole, cut):
        assert_same_tensors(dict(other.named_buffers()), {**dict(other.named_buffers()), **kept(model)})
    with gl.bits(model, w=8, a=None), gl.bits(whole, w=8, a=None):
        torch.testing.assert_close(whole(x), model(x), rtol=1e-4, atol=1e-5)


def kept(model: nn.Module) -> dict[str, Tensor]:
    """Return the statistics of batch norms and the ranges of activations."""
    return {name: t for name, t in model.named_buffers() if not name.endswith("weight_quantizer.clip")}


@examples(12)
@given(networks(), st.integers(1, 16), st.booleans(), st.sampled_from(("min_max", "mse", "percentile")))
def test_ranges_files_keep_ranges(network: Network, width: int, per_channel: bool, ranges: str) -> None:
    pytest.importorskip("safetensors", reason="files of ranges are safetensors")
    model, x = converted(network, per_channel=per_channel), batch(network, torch.float32)[0]
    gl.calibrate(model, [x], ranges=ranges)
    gl.calibrate_weights(model, ranges="mse")
    other = gl.convert(make(network, torch.float32).eval(), per_channel=per_channel)
    with tempfile.TemporaryDirectory() as folder:
        gl.save_ranges(model, Path(folder) / "ranges")
        gl.load_ranges(other, Path(folder) / "ranges")
    assert_same_tensors(dict(other.named_buffers()), dict(model.named_buffers()))
    with gl.bits(model, w=width, a=width), gl.bits(other, w=width, a=width):
        assert torch.equal(other(x), model(x))
