"""Any-bit files: the bytes that a reader of w bits reads, and the resulting weights."""

from __future__ import annotations

import builtins
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast import _safetensors
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization import bit_planes
from tests.networks import MOBILENET, VGG, Network
from tests.quantization.any_bit.models import FIRST, converted, other

pytest.importorskip("safetensors", reason="any-bit files need safetensors")


def expected(weight: Tensor, per_channel: bool, bits: int) -> Tensor:
    """Return, one weight at a time, the middle of the cell that the 8-bit code falls into."""
    result = torch.empty_like(weight)
    for channel, (values, out) in enumerate(zip(weight, result, strict=True)):
        largest = float((weight[channel] if per_channel else weight).abs().max())
        scale = float(torch.tensor(largest) / 127)
        for i, value in enumerate(values.flatten().tolist()):
            code = round(value / scale)
            cell = 2 ** (8 - bits)
            first = math.floor(code / cell) * cell
            out.view(-1)[i] = scale * sum(range(first, first + cell)) / cell
    return result


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("network", [VGG, MOBILENET], ids=lambda n: n.id)
def test_every_width_is_a_slice_of_the_8_bit_codes(
    network: Network, per_channel: bool, tmp_path: Path
) -> None:
    model = converted(network, per_channel=per_channel)
    gl.save_any_bit(model, tmp_path / "file")
    for w in (8, 5, 3, 1):
        loaded = gl.load_any_bit(other(network, per_channel=per_channel), tmp_path / "file", w=w)
        for name, layer in named_layers(loaded).items():
            wanted = expected(named_layers(model)[name].weight.detach(), per_channel, w)
            torch.testing.assert_close(layer.weight_quantizer(None), wanted, rtol=1e-5, atol=1e-7)


def test_the_file_is_the_whole_network(path: Path) -> None:
    model, x = converted(), VGG.batch(torch.float32)[0]
    loaded = gl.load_any_bit(other(), path)
    with gl.bits(model, w=8, a=8), gl.bits(loaded, w=8, a=8):
        assert torch.equal(loaded(x), model(x))  # at 8 bits: bit for bit
    for name, quantizer in named_quantizers(model).items():
        assert torch.equal(named_quantizers(loaded)[name].low, quantizer.low)
    assert int(loaded.get_submodule("1").num_batches_tracked) == 0


def test_a_network_without_ranges(tmp_path: Path) -> None:
    gl.save_any_bit(converted(calibrated=False), tmp_path / "file")
    loaded = gl.load_any_bit(converted(), tmp_path / "file")
    assert all(q.low is None for q in named_quantizers(loaded).values())


def test_switching_the_width_equals_reading_at_it(path: Path) -> None:
    x = VGG.batch(torch.float32)[0]
    wide = gl.load_any_bit(other(), path)
    for w in (3, 8, 1, 5):
        narrow = gl.load_any_bit(other(), path, w=w)
        with gl.bits(wide, w=w, a=None):
            assert torch.equal(wide(x), narrow(x))
    assert not torch.equal(wide(x), narrow(x))


def test_switching_copies_nothing_and_no_float_weight_is_kept(path: Path) -> None:
    model = gl.load_any_bit(other(), path)
    before = {name: layer.weight_quantizer.codes.data_ptr() for name, layer in named_layers(model).items()}
    gl.set_bits(model, w=2, a=None)
    for name, layer in named_layers(model).items():
        assert not any(layer.weight.stride())
        assert layer.weight_quantizer.codes.data_ptr() == before[name]
        assert layer.weight_quantizer.codes.dtype == torch.uint8
    assert not any(key.endswith("weight") and value.dim() > 1 for key, value in model.state_dict().items())


def test_the_file_can_be_read_again_at_another_width(path: Path) -> None:
    x = VGG.batch(torch.float32)[0]
    model = gl.load_any_bit(other(), path, w=3)
    gl.load_any_bit(model, path, w=6)
    assert torch.equal(model(x), gl.load_any_bit(other(), path, w=6)(x))


class Counting:
    """A file that counts the bytes read from it."""

    def __init__(self, file: Any) -> None:
        self.file, self.read_bytes = file, 0

    def read(self, count: int) -> bytes:
        data = self.file.read(count)
        self.read_bytes += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_reader_of_w_bits_reads_only_its_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Counting] = []

    def counting(*args: Any, **kwargs: Any) -> Counting:
        files.append(Counting(builtins.open(*args, **kwargs)))  # noqa: SIM115  # the reader closes it
        return files[-1]

    monkeypatch.setattr(_safetensors, "open", counting, raising=False)
    sizes = gl.save_any_bit(converted(), path)
    assert sizes[8] == path.stat().st_size
    plane = sum(bit_planes.plane_bytes(layer.weight.numel()) for layer in named_layers(converted()).values())
    for w in sizes:
        files.clear()
        gl.load_any_bit(other(), path, w=w)
        (file,) = files
        assert sizes[8] - sizes[w] == (8 - w) * plane
        assert file.read_bytes <= sizes[w]
        assert sizes[w] - file.read_bytes < 16  # the gap that aligns the tensors


@pytest.mark.parametrize("w", [1, 4, 7])
def test_the_beginning_of_the_file_is_enough(path: Path, w: int) -> None:
    x, whole = VGG.batch(torch.float32)[0], gl.load_any_bit(other(), path, w=w)
    sizes = gl.save_any_bit(converted(), path)
    data = path.read_bytes()
    path.write_bytes(data[: sizes[w]])
    assert torch.equal(gl.load_any_bit(other(), path, w=w)(x), whole(x))
    with pytest.raises(ValueError, match=rf"model.safetensors: entry 'plane.{w}.0'.*cut off"):
        gl.load_any_bit(other(), path, w=w + 1)
    path.write_bytes(data[: sizes[w] - 1])
    with pytest.raises(ValueError, match=rf"entry 'plane.{w - 1}.*cut off"):
        gl.load_any_bit(other(), path, w=w)


def test_lower_planes_do_not_matter(path: Path) -> None:
    x, sizes = VGG.batch(torch.float32)[0], gl.save_any_bit(converted(), path)
    whole = {w: gl.load_any_bit(other(), path, w=w)(x) for w in (4, 5)}
    data = path.read_bytes()
    path.write_bytes(data[: sizes[4]] + bytes(byte ^ 0xFF for byte in data[sizes[4] :]))
    assert torch.equal(gl.load_any_bit(other(), path, w=4)(x), whole[4])
    assert not torch.equal(gl.load_any_bit(other(), path, w=5)(x), whole[5])


def test_other_readers_of_safetensors_can_read_it(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "gradl1_fast.any_bit", "version": "2"}
        assert file.get_tensor(f"shape.{FIRST}").tolist() == [4, 3, 3, 3]


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 64, 65])
def test_planes_hold_every_bit(numel: int) -> None:
    codes = torch.randint(0, 256, (numel, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes = [bit_planes.pack(codes, i) for i in range(8)]
    assert {len(plane) for plane in planes} == {bit_planes.plane_bytes(numel)}
    for w in range(1, 9):
        assert torch.equal(bit_planes.unpack(planes[:w], codes.shape), (codes >> (8 - w)) << (8 - w))


def test_the_order_of_bits_is_the_documented_one() -> None:
    codes = torch.tensor([0x80, 0, 0, 0, 0, 0, 0, 0, 0x80], dtype=torch.uint8)
    assert bit_planes.pack(codes, 0).tolist() == [0b10000000, 0b10000000]
    assert bit_planes.pack(codes, 7).tolist() == [0, 0]


def test_dropping_bits_adds_no_bias() -> None:
    weight = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = weight.abs().max() / 127
    codes = bit_planes.encode(weight, scale)
    for w in range(2, 9):
        error = bit_planes.decode(codes, scale, w) - weight
        step = float(scale) * 2 ** (8 - w)
        assert abs(float(error.mean())) < 0.01 * step
        assert float(error.abs().max()) <= 0.5 * step * (1 + 1e-9)


def test_tied_layers_and_layers_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Embedding(8, 8)).eval()
    plain[2].weight = plain[0].weight
    plain[3].weight = plain[0].weight
    plain = nn.Sequential(*plain[:3]).to(torch.bfloat16)
    model, x = gl.convert(plain), torch.randn(4, 8, dtype=torch.bfloat16)
    gl.save_any_bit(model, tmp_path / "file")
    loaded = gl.load_any_bit(gl.convert(copy.deepcopy(plain)), tmp_path / "file", w=8)
    with gl.bits(model, w=8, a=None):
        assert torch.equal(loaded(x), model(x))
    scale = loaded.get_submodule("0").weight_quantizer.scale
    assert loaded.half().get_submodule("0").weight_quantizer.scale.dtype == torch.float32
    assert torch.equal(loaded.get_submodule("0").weight_quantizer.scale, scale)
    assert loaded(x.half()).dtype == torch.float16


def test_one_layer_alone(tmp_path: Path) -> None:
    layer = gl.QLinear(3, 2)
    gl.save_any_bit(layer, tmp_path / "file")
    loaded = gl.load_any_bit(gl.QLinear(3, 2), tmp_path / "file")
    assert torch.equal(loaded.bias, layer.bias)


class Odd(nn.Module):
    """Layers whose output channels lie on another axis, and weights that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.words, self.up = nn.Embedding(9, 4), nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.same, self.standard = SamePadding(6, 4, 3), Standardised(4, 4, 1)
        self.head = norm(nn.Linear(4, 3))

    def forward(self, ids: Tensor) -> Tensor:
        y = self.standard(self.same(self.up(self.words(ids).transpose(1, 2)).relu()))
        return self.head(y.mean(2))


class SamePadding(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(nn.functional.pad(x, (1, 1)), self.weight, self.bias)


class Standardised(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return nn.functional.conv1d(x, weight, self.bias)


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_layers_of_every_kind(per_channel: bool, tmp_path: Path) -> None:
    ids = torch.randint(9, (5, 7))
    model, loaded = (gl.convert(Odd().eval(), per_channel=per_channel) for _ in range(2))
    gl.calibrate(model, [ids])
    gl.save_any_bit(model, tmp_path / "file")
    for w in (8, 3):
        gl.load_any_bit(loaded, tmp_path / "file", w=w)
        for name, layer in named_layers(loaded).items():
            assert layer.weight_quantizer.axis == named_layers(model)[name].weight_quantizer.axis
    gl.load_any_bit(loaded, tmp_path / "file")
    with gl.bits(model, w=8, a=6), gl.bits(loaded, w=8, a=6):
        assert torch.equal(loaded(ids), model(ids))
    assert {"standard.weight", "head.parametrizations.weight.original0"} <= loaded.state_dict().keys()
    assert not {"words.weight", "up.weight", "same.weight"} & loaded.state_dict().keys()
    assert torch.equal(loaded.standard.weight, model.standard.weight)


def test_weights_have_shape_type_and_place_and_no_memory(path: Path) -> None:
    model, plain = gl.load_any_bit(other(), path), converted()
    for dtype, like in (
        (torch.float32, model),
        (torch.float16, copy.deepcopy(model).half()),
        (torch.float64, copy.deepcopy(model).to(torch.float64)),
    ):
        for name, layer in named_layers(like).items():
            assert layer.weight.shape == named_layers(plain)[name].weight.shape
            assert (layer.weight.dtype, layer.weight.device.type) == (dtype, "cpu")
            assert layer.weight.untyped_storage().nbytes() <= 8
            assert torch.equal(layer.weight, layer.weight_quantizer())
        assert not any(
            ".weight" in key and "norm" not in key and t.dim() > 1 for key, t in like.state_dict().items()
        )
    assert model.to("meta").get_submodule(FIRST).weight.device.type == "meta"


def test_inputs_and_shared_sites_are_kept(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x if x.sum() < 1e9 else x + 1)

    model, loaded, x = gl.convert(Shared().eval()), gl.convert(Shared().eval()), torch.randn(5, 4)
    gl.calibrate(model, [x])
    gl.save_any_bit(model, tmp_path / "file")
    gl.load_any_bit(loaded, tmp_path / "file")
    assert loaded.q.input_quantizer.is_input
    with gl.bits(model, w=8, a=4), gl.bits(loaded, w=8, a=4):
        assert torch.equal(loaded(x), model(x))
