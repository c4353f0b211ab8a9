"""Files of ranges: a round trip keeps them, and modified entries are refused by name."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.quantization.ranges_file import METADATA
from tests.networks import RESNET, VGG, Network

safetensors = pytest.importorskip("safetensors.torch", reason="files of ranges are safetensors")

PER_WIDTH = torch.arange(1.0, 17.0)


def calibrated(network: Network = VGG) -> nn.Module:
    """Return a model with every kind of range: for all widths, for each width, stored for weights."""
    model = gl.convert(network.make().eval(), per_channel=True)
    gl.calibrate(model, [network.batch()])
    sites = named_quantizers(model)
    sites.get("3.input", next(iter(sites.values()))).set_range(-PER_WIDTH, 2 * PER_WIDTH)
    layer = next(m for m in model.modules() if isinstance(m, gl.QConv2d))
    layer.weight_quantizer.set_clip(0.1 * PER_WIDTH[:, None] * torch.ones(1, layer.weight.shape[0]))
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    buffers = dict(model.named_buffers())
    ends = ".low", ".high", ".clip", ".rounded_3"
    return {name: t.clone() for name, t in buffers.items() if name.endswith(ends)}


@pytest.mark.parametrize("network", [VGG, RESNET], ids=lambda n: n.id)
def test_outputs_are_the_same_after_a_round_trip(network: Network, tmp_path: Path) -> None:
    saved, loaded = calibrated(network), gl.convert(network.make().eval(), per_channel=True)
    gl.save_ranges(saved, tmp_path / "ranges.safetensors")
    gl.load_ranges(loaded, tmp_path / "ranges.safetensors")
    assert state(loaded).keys() == state(saved).keys()
    x = network.batch()[0]
    for width in (8, 3):
        with gl.bits(saved, w=width, a=width), gl.bits(loaded, w=width, a=width):
            torch.testing.assert_close(loaded(x), saved(x), rtol=0, atol=0)


def test_a_weight_without_an_entry_gets_its_own_range_again(tmp_path: Path) -> None:
    plain, model = gl.convert(VGG.make().eval(), per_channel=True), calibrated()
    gl.calibrate(plain, [VGG.batch()])
    gl.save_ranges(plain, tmp_path / "r")
    gl.load_ranges(model, tmp_path / "r")
    assert not [name for name in state(model) if name.endswith(".clip")]


def test_a_layer_alone_has_a_file_too(tmp_path: Path) -> None:
    layers = [gl.convert(nn.Linear(3, 2)) for _ in range(2)]
    gl.calibrate(layers[0], [torch.randn(5, 3)])
    layers[0].weight_quantizer.set_clip(torch.full((1, 1), 0.3))
    gl.save_ranges(layers[0], tmp_path / "r")
    gl.load_ranges(layers[1], tmp_path / "r")
    assert set(state(layers[1])) == {"weight_quantizer.clip", "input_quantizer.low", "input_quantizer.high"}
    assert layers[1].input_quantizer.is_input


def test_without_ranges_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"save_ranges: no activation has a range: call gradl1_fast\.calibrate"
    ):
        gl.save_ranges(gl.convert(VGG.make()), tmp_path / "r")
    with pytest.raises(ValueError, match="no activation quantizers"):
        gl.save_ranges(VGG.make(), tmp_path / "r")
    assert not list(tmp_path.iterdir())


Entries = dict[str, Tensor]
LOW, HIGH, CLIP = "3.input.low", "3.input.high", "0.weight_quantizer.clip"
CODES, MADE_FOR = "0.weight_quantizer.codes.3", "0.weight_quantizer.made_for.3"


def without(key: str) -> Callable[[Entries], Entries]:
    return lambda entries: {k: v for k, v in entries.items() if k != key}


def with_entry(key: str, value: Tensor) -> Callable[[Entries], Entries]:
    return lambda entries: {**entries, key: value}


TAMPERED: dict[str, tuple[Callable[[Entries], Entries], str]] = {
    "missing": (without(LOW), rf"missing entries for this model: {LOW}"),
    "unknown": (with_entry("evil", torch.ones(1)), "unknown entries for this model: evil"),
    "NaN": (with_entry(LOW, torch.tensor(float("nan"))), rf"entry '{LOW}': must be finite"),
    "one end for all widths": (
        with_entry(LOW, torch.tensor(0.0)),
        r"entry '3\.input': .*got \(\) and \(16,\)",
    ),
    "NaN in one width": (
        with_entry(HIGH, PER_WIDTH.masked_fill(PER_WIDTH == 3, torch.nan)),
        rf"entry '{HIGH}': must be finite",
    ),
    "infinite": (
        with_entry(CLIP, torch.full((1, 4), torch.inf)),
        rf"entry '{CLIP}': must be finite",
    ),
    "negative": (
        with_entry(CLIP, torch.full((1, 4), -1.0)),
        rf"entry '{CLIP}': clip must be finite and 0 or more",
    ),
    "channels": (with_entry(CLIP, torch.ones(16, 5)), "0.weight_quantizer.clip is for 5 channels, not 4"),
    "rows": (with_entry(CLIP, torch.ones(3, 4)), r"clip must have shape \(1 or 16, channels\), got \(3, 4\)"),
    "shape": (with_entry("7.input.low", torch.zeros(2)), "must each have 1 value, or 16"),
    "missing flag": (without("3.input.is_input"), r"missing entries for this model: 3\.input\.is_input"),
    "flag of two": (
        with_entry("3.input.is_input", torch.tensor(2, dtype=torch.uint8)),
        "a single uint8, 0 or 1",
    ),
    "flag of a float": (with_entry("3.input.is_input", torch.tensor(1.0)), "a single uint8, 0 or 1"),
    "flags": (with_entry("3.input.is_input", torch.ones(1, dtype=torch.uint8)), "a single uint8, 0 or 1"),
    "type": (with_entry(LOW, torch.zeros(16, dtype=torch.int64)), f"entry '{LOW}' must have type float32"),
    "code": (with_entry(CODES, torch.full((4, 3, 3, 3), 4, dtype=torch.int8)), "has a code outside -3 to 3"),
    "type of codes": (
        with_entry(CODES, torch.ones(4, 3, 3, 3)),
        rf"entry '{CODES}' must have type torch.int8",
    ),
    "shape of codes": (
        with_entry(CODES, torch.ones(4, 27, dtype=torch.int8)),
        "is for a weight of 2 dimensions and 108 values, not",
    ),
    "codes of no weight": (without(MADE_FOR), f"unknown entries for this model: {CODES}"),
    "a weight without codes": (without(CODES), f"unknown entries for this model: {MADE_FOR}"),
    "codes of 17 bits": (
        with_entry("0.weight_quantizer.codes.17", torch.ones(1, dtype=torch.int16)),
        r"unknown entries for this model: 0\.weight_quantizer\.codes\.17",
    ),
    "what codes are for": (with_entry(MADE_FOR, torch.ones(4)), rf"entry '{MADE_FOR}' must be 4 or 8 int64"),
    "how many they are for": (with_entry(MADE_FOR, torch.ones(5).long()), "must be 4 or 8 int64"),
    "half": (with_entry(LOW, torch.zeros(16).half()), f"entry '{LOW}' must have type float32"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampered_entries_are_named_and_nothing_is_changed(case: str, tmp_path: Path) -> None:
    change, message = TAMPERED[case]
    path = tmp_path / "ranges.safetensors"
    model = calibrated()
    gl.round_weights(model, [VGG.batch()], w={"0": 3})
    gl.save_ranges(model, path)
    safetensors.save_file(change(safetensors.load_file(path)), path, metadata=METADATA)
    before = state(model)
    with pytest.raises(ValueError, match=message) as caught:
        gl.load_ranges(model, path)
    assert str(path) in str(caught.value)
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (3.0, -3.0, "inverted"),
        (0.0, float("inf"), "must be finite"),
        (float("nan"), 1.0, "must be finite"),
    ],
)
def test_invalid_ranges_are_named(low: float, high: float, message: str, tmp_path: Path) -> None:
    model, path = calibrated(), tmp_path / "r"
    gl.save_ranges(model, path)
    entries = safetensors.load_file(path)
    entries |= {
        "7.input.low": torch.tensor(low),
        "7.input.high": torch.tensor(high),
    }
    safetensors.save_file(entries, path, metadata=METADATA)
    with pytest.raises(ValueError, match=rf"r: entry '7\.input.*': .*{message}"):
        gl.load_ranges(model, path)


def truncated(data: bytes) -> bytes:
    return data[:-5]


def huge_header(data: bytes) -> bytes:
    return struct.pack("<Q", 2**60) + data[8:]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "truncated": truncated,
    "huge header": huge_header,
    "empty": lambda data: b"",
    "pickle": lambda data: b"\x80\x04cos\nsystem\n.",
    "bits flipped in the header": lambda data: data[:8] + bytes([data[8] ^ 0xFF]) + data[9:],
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_corrupt_file_is_named(case: str, tmp_path: Path) -> None:
    path, model = tmp_path / "ranges.safetensors", calibrated()
    gl.save_ranges(model, path)
    path.write_bytes(BROKEN[case](path.read_bytes()))
    with pytest.raises(ValueError, match=r"ranges\.safetensors: truncated or corrupt safetensors file"):
        gl.load_ranges(model, path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "its format must be 'gradl1_fast.ranges'"),
        (
            {"format": "gradl1_fast.ranges", "version": "1"},
            "version is '1', but this library reads '2' and '3'",
        ),
    ],
)
def test_another_file_is_named(metadata: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    safetensors.save_file({"a": torch.ones(1)}, tmp_path / "r", metadata=metadata)
    with pytest.raises(ValueError, match=message):
        gl.load_ranges(calibrated(), tmp_path / "r")


def test_a_missing_file_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        gl.load_ranges(calibrated(), tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[export\]'"):
        gl.save_ranges(calibrated(), tmp_path / "r")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranges_stay_wide_in_a_model_of_low_precision(dtype: torch.dtype) -> None:
    model = gl.convert(VGG.make(torch.float32).eval())
    gl.calibrate(model, [VGG.batch(torch.float32)])
    quantizer = model.get_submodule("3.input_quantizer")
    quantizer.set_range(torch.tensor(-1e6), torch.tensor(1e6))
    model.to(dtype)
    assert (float(quantizer.low), quantizer.high.dtype) == (-1e6, torch.float32)
    assert model.get_submodule("0").weight.dtype == dtype


def test_ranges_of_weights_do_not_go_into_codes_of_an_any_bit_file(tmp_path: Path) -> None:
    model = calibrated()
    gl.save_ranges(model, tmp_path / "ranges.safetensors")
    gl.save_any_bit(model, tmp_path / "model.safetensors")
    sliced = gl.convert(VGG.make().eval(), per_channel=True)
    gl.load_any_bit(sliced, tmp_path / "model.safetensors", w=4)
    before = state(sliced)
    with pytest.raises(
        ValueError, match=r"ranges.safetensors has ranges of weights: '0' was loaded from an any-bit file"
    ):
        gl.load_ranges(sliced, tmp_path / "ranges.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in state(sliced).items())


class Shared(nn.Module):
    """Two layers are given the same tensor, which a trace shows or hides; a third one is never called."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.q, self.k, self.rest = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)
        self.spare, self.words, self.hidden = nn.Linear(3, 3), nn.Embedding(4, 3), hidden

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden and x.sum() > 1e9:
            x = x + 1
        return self.rest(self.q(x) * self.k(x))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize(("saved_hidden", "loaded_hidden"), [(False, True), (True, False), (True, True)])
def test_a_file_can_be_loaded_however_shared_sites_were_found(
    saved_hidden: bool, loaded_hidden: bool, ran: bool, tmp_path: Path
) -> None:
    x = torch.randn(5, 4)
    saved, loaded = (gl.convert(Shared(hidden).eval()) for hidden in (saved_hidden, loaded_hidden))
    with pytest.warns(UserWarning, match=r"no value reached spare\.input"):
        gl.calibrate(saved, [x])
    if ran:
        with pytest.warns(UserWarning, match=r"no value reached spare\.input"):
            gl.calibrate(loaded, [2 * x])
    gl.save_ranges(saved, tmp_path / "r")
    gl.load_ranges(loaded, tmp_path / "r")
    for name in ("q", "k"):
        site = loaded.get_submodule(name).input_quantizer
        assert (float(site.low), site.is_input) == (float(x.min()), True)
    assert not loaded.rest.input_quantizer.is_input
    assert loaded.spare.input_quantizer.low is None
    loaded.load_state_dict(saved.state_dict())
    with gl.bits(saved, w=4, a=4), gl.bits(loaded, w=4, a=4):
        assert torch.equal(loaded(x), saved(x))


def test_layers_that_share_a_site_need_one_range(tmp_path: Path) -> None:
    model, path = gl.convert(Shared(False).eval()), tmp_path / "r"
    with pytest.warns(UserWarning, match=r"no value reached spare\.input"):
        gl.calibrate(model, [torch.randn(5, 4)])
    gl.save_ranges(model, path)
    entries = safetensors.load_file(path)
    assert "k.input.low" in entries
    safetensors.save_file({**entries, "k.input.low": torch.tensor(-9.0)}, path, metadata=METADATA)
    with pytest.raises(
        ValueError, match=r"entry 'k\.input': k\.input and q\.input share one tensor in this model"
    ):
        gl.load_ranges(model, path)


def test_stored_ranges_of_weights_along_another_axis(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.ConvTranspose2d(3, 5, 2), nn.Flatten(), nn.Linear(45, 2)]
        return gl.convert(nn.Sequential(*layers).eval(), per_channel=True)

    model, loaded, x = build(), build(), torch.randn(4, 3, 2, 2)
    gl.calibrate(model, [x])
    gl.calibrate_weights(model, ranges="mse")
    assert model[0].weight_quantizer.clip.shape == (16, 5)
    gl.save_ranges(model, tmp_path / "r")
    gl.load_ranges(loaded, tmp_path / "r")
    with gl.bits(model, w=3, a=4), gl.bits(loaded, w=3, a=4):
        assert torch.equal(loaded(x), model(x))
