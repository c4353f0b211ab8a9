"""The folder of a run: what is written is taken up again, and what is damaged is named."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save

import gradl1_fast as gl
from gradl1_fast.training import data
from gradl1_fast.training.config import Config, Model
from gradl1_fast.training.runs import folder as runs
from gradl1_fast.training.runs.weights_file import FORMAT

CONFIG = Config(model=Model(width=4))
DIGITS = data.load("digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that was never trained, and its model."""
    folder = runs.Folder(tmp_path_factory.mktemp("run"))
    torch.manual_seed(0)
    model = runs.network(CONFIG, 10, 1)
    model(DIGITS.train[0][:50])
    gl.calibrate(model, [DIGITS.train[0]])
    folder.write_config(CONFIG)
    folder.write_model(model, DIGITS)
    return folder.path, model.eval()


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the run to be damaged."""
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_run_is_taken_up_whole(finished):
    path, model = finished
    loaded = runs.load(path)
    assert loaded.config == CONFIG
    assert not loaded.model.training
    assert torch.equal(loaded.data.test[0], DIGITS.test[0])
    images = DIGITS.test[0][:20]
    for width in (None, 8, 4):
        with gl.bits(model, w=width, a=width), gl.bits(loaded.model, w=width, a=width):
            assert torch.equal(loaded.model(images), model(images))


def test_the_weights_are_those_of_the_float_network(finished):
    from gradl1_fast.training.models import digits_net

    plain = digits_net(4)
    plain.load_state_dict(load_file(finished[0] / "weights.safetensors"))


@pytest.mark.parametrize("name", ["config.toml", "weights.safetensors", "ranges.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(runs.RunError, match=f"no {name}$"):
        runs.load(folder)
    (folder / "checkpoint").mkdir()
    with pytest.raises(runs.RunError, match="--resume"):
        runs.load(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(runs.RunError, match="not the folder of a finished run"):
        runs.load(tmp_path / "nowhere")


def weights(change=None, facts=None):
    """Return a way to damage the weights: the entries changed, and other texts beside them."""

    def damage(path):
        entries = load_file(path)
        if change is not None:
            change(entries)
        path.write_bytes(
            save(entries, metadata={**FORMAT, "classes": "10", "channels": "1", **(facts or {})})
        )

    return damage


def nan(entries):
    entries["3.weight"][0] = float("nan")


def hostile_header(path):
    """A header that promises more than the file has."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


DAMAGES = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "truncated or corrupt safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "truncated or corrupt safetensors file"),
    "a pickle": (lambda p: torch.save({"a": torch.ones(1)}, p), "truncated or corrupt safetensors file"),
    "hostile": (hostile_header, "truncated or corrupt safetensors file"),
    "format": (weights(facts={"format": "x"}), "its format must be 'gradl1_fast.weights'"),
    "version": (weights(facts={"version": "9"}), "its version must be '1'"),
    "classes": (weights(facts={"classes": "ten"}), "must say how many classes there are, says 'ten'"),
    "more": (weights(facts={"classes": "9" * 5000}), "must say how many classes"),
    "many": (weights(facts={"channels": "9" * 30}), "must say how many channels"),
    "missing": (weights(lambda e: e.pop("0.weight")), "missing entries for this model: 0.weight"),
    "unknown": (weights(lambda e: e.update(x=torch.ones(1))), "unknown entries for this model: x"),
    "shape": (
        weights(lambda e: e.update({"0.weight": torch.ones(4)})),
        r"entry '0.weight': must be float32 of shape \(4, 1, 3, 3\), the file has float32 of shape \(4,\)",
    ),
    "type": (weights(lambda e: e.update({"0.weight": e["0.weight"].double()})), "the file has float64"),
    "nan": (weights(nan), "entry '3.weight': must be finite"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_weights_are_named(folder, kind):
    damage, message = DAMAGES[kind]
    path = folder / "weights.safetensors"
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        runs.load(folder)
    assert str(error.value).startswith(str(path))


def test_a_damaged_configuration_is_named(folder):
    (folder / "config.toml").write_text("[model]\nwidht = 4\n")
    with pytest.raises(ValueError, match=r"config.toml: model: unknown key 'widht'"):
        runs.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidth = 100000\n", r"weights.safetensors: entry .* must be .* \(100000,"),
        ("[model]\nwidth = 1000000000000\n", "config.toml: unknown network: .*overflow"),
        ("[model]\nname = 'os.system'\n", "config.toml: unknown network: model must be one of"),
    ],
)
def test_a_configuration_of_another_network_is_refused_before_it_is_made(folder, text, message):
    (folder / "config.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        runs.load(folder)


def test_damaged_ranges_are_named(folder):
    path = folder / "ranges.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"ranges.safetensors"):
        runs.load(folder)
