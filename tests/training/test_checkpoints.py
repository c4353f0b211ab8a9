"""Checkpoints: only whole ones count, and a hostile or damaged one is named."""

import json
import shutil

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.training.config import Config, Penalty, Training
from gradl1_fast.training.data import digits
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.models import digits_net
from gradl1_fast.training.runs import checkpoints
from gradl1_fast.training.runs.state_file import TENSORS, VALUES, read_state, write_state

DATA = tuple(part[:60] for part in digits(0).train)


def trainer(precision="float32"):
    torch.manual_seed(0)
    settings = Config(
        training=Training(2, 20, ema=0.5, precision=precision),
        penalty=Penalty("gradl1", 1, 0, {"lambda_w": 0.1}),
    )
    return Trainer(gl.convert(digits_net(4)), DATA, settings)


@pytest.fixture
def folder(tmp_path):
    made = trainer()
    made.run_epoch()
    made.next_epoch()
    checkpoints.save(tmp_path, made, made.state_dict(), [])
    return tmp_path


def test_the_newest_one_stays_alone(folder):
    made = trainer()
    checkpoints.load(checkpoints.latest(folder), made)
    made.run_epoch()
    checkpoints.save(folder, made, made.state_dict(), [])
    assert [path.name for path in folder.iterdir()] == ["step-000000000006"]
    assert checkpoints.latest(folder).name == "step-000000000006"


def test_what_a_kill_left_half_written_does_not_count(folder):
    (folder / ".partial").mkdir()
    (folder / ".partial" / VALUES).write_bytes(b"half")
    assert checkpoints.latest(folder).name == "step-000000000003"
    made = trainer()
    checkpoints.load(checkpoints.latest(folder), made)
    made.run_epoch()
    checkpoints.save(folder, made, made.state_dict(), [])
    assert [path.name for path in folder.iterdir()] == ["step-000000000006"]


def test_there_is_none_at_first(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "nowhere") is None


def test_nothing_in_it_is_a_pickle(folder):
    kinds = {path.suffix for path in checkpoints.latest(folder).iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_numbers_and_tensors_come_back_as_they_were(tmp_path):
    state = {
        "numbers": [0.1, 1e-300, -0.0, 3, 2**63, True, None, "text"],
        "tensors": {"": torch.tensor(3), "a.b": torch.randn(3, dtype=torch.float64), "none": torch.empty(0)},
        "rows": [{"loss": float("inf"), "penalty": float("nan"), "step": -float("inf")}],
        "seen": [{"losses": torch.tensor([torch.inf, 1.0])}],
        "betas": (0.9, 0.999),
        "state": {0: {"step": torch.tensor(1.0)}},
    }
    write_state(tmp_path, state)
    found = read_state(tmp_path)
    assert found["betas"] == [0.9, 0.999]
    assert found["numbers"] == state["numbers"]
    assert list(map(type, found["numbers"])) == list(map(type, state["numbers"]))
    assert all(torch.equal(found["tensors"][key], value) for key, value in state["tensors"].items())
    assert found["tensors"]["a.b"].dtype == torch.float64
    assert torch.equal(found["seen"][0]["losses"], state["seen"][0]["losses"])
    assert str(found["rows"]) == str(state["rows"])
    assert torch.equal(found["state"]["0"]["step"], torch.tensor(1.0))


def put(*path, value):
    """Return a way to damage a state: the entry at a path is replaced."""

    def damage(state):
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return damage


def drop(key):
    return lambda state: state.pop(key)


DAMAGES = {
    "missing": (drop("order"), "missing entries: order"),
    "unknown": (put("extra", value=1), "unknown entries: extra"),
    "epoch type": (put("epoch", value=1.0), "entry 'epoch' must be a whole number from 0 to 2, got 1.0"),
    "epoch": (put("epoch", value=3), "entry 'epoch' must be a whole number from 0 to 2, got 3"),
    "step": (put("step", value=-1), "entry 'step' must be a whole number from 0 to 3, got -1"),
    "order": (put("order", value=torch.ones(3)), "entry 'order' must be torch.uint8"),
    "order kind": (put("order", value=[1]), "entry 'order' must be torch.uint8 of shape .* got \\[1\\]"),
    "no dictionary": (put("schedule", value=3), "entry 'schedule' must be a dictionary, got int"),
    "average": (
        put("average", "0.weight", value=torch.ones(2)),
        "entry 'average.0.weight' must be torch.float32",
    ),
    "average nan": (
        put("average", "0.weight", value=torch.full((4, 1, 3, 3), torch.nan)),
        "state.safetensors: entry 'average.0.weight': must be finite",
    ),
    "momentum": (
        put("optimizer", "state", "0", "exp_avg", value=torch.ones(5)),
        "optimizer.state.0.exp_avg' must have",
    ),
    "momentum inf": (
        put("optimizer", "state", "0", "exp_avg", value=torch.full((4, 1, 3, 3), torch.inf)),
        "entry 'optimizer.state.0.exp_avg': must be finite",
    ),
    "parameter": (put("optimizer", "state", "99", value={}), "refers to parameter 99"),
    "no parameter": (put("optimizer", "state", "a", value={}), "refers to parameter a"),
    "parameters": (put("optimizer", "state", value=3), "'optimizer.state' must be a dictionary"),
    "groups": (put("optimizer", "param_groups", value=[]), "does not fit this training"),
    "schedule": (put("schedule", value={}), "missing entries: schedule."),
    "random": (put("random", value=[]), "written by 0 ranks, not 1"),
    "random state": (put("random", value=[{"cpu": torch.ones(3)}]), "does not fit this training"),
    "objective": (put("objective", "name", value="l2"), "objective 'l2'"),
    "seen": (put("seen", value=[{}]), "missing entries: seen.0.counts, seen.0.losses"),
    "seen kind": (put("seen", value=1), "entry .seen. must be a list"),
    "losses": (
        put("seen", 0, "losses", value=torch.ones(2)),
        "seen.0.losses. must be .*\\(0,\\), got .*\\(2,\\)",
    ),
    "parts": (put("seen", 0, "parts", value=1), "entry .seen.0.parts. must be a dictionary"),
    "row": (put("rows", value=[{"epoch": "a"}]), "entry .rows. must be a list of dictionaries"),
    "rows": (drop("rows"), "missing entries: rows"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_named_with_its_entry(kind, folder):
    assert_named(*DAMAGES[kind], folder)


def assert_named(damage, message, folder):
    path = checkpoints.latest(folder)
    state = read_state(path)
    damage(state)
    write_state(path, state)
    assert_refused(message, path)


def assert_refused(message, path):
    with pytest.raises(ValueError, match=message) as error:
        checkpoints.load(path, trainer())
    assert str(error.value).startswith(tuple(str(path / name) for name in (VALUES, TENSORS)))


def value(*path, text):
    """Return a way to damage the JSON file: the value at a path is replaced by a text."""

    def damage(values):
        put(*path, value="PLACE")(values)
        return json.dumps(values).replace('"PLACE"', text)

    return damage


RATE = ("optimizer", "param_groups", 0, "lr")
TEXTS = {
    "NaN": (value(*RATE, text="NaN"), "entry 'optimizer.param_groups.0.lr' holds NaN or infinity"),
    "large": (value(*RATE, text="1e400"), "entry 'optimizer.param_groups.0.lr' holds NaN or infinity"),
    "long number": (value("schedule", "T_max", text=str(2**70)), "'schedule.T_max' is a number of more than"),
    "longer number": (value("schedule", "T_max", text="9" * 5000), "truncated or corrupt JSON file"),
    "nested": (value("schedule", "T_max", text="[" * 10**5), "truncated or corrupt JSON file"),
    "nested and closed": (value("schedule", "T_max", text="[" * 900 + "]" * 900), "state.json: "),
    "no tensor": (
        value("order", text='{"type": "tensor", "of": 1}'),
        "unknown entries for this model: order",
    ),
    "a tensor more": (value("schedule", "x", text='{"type": "tensor"}'), "entry 'schedule.x' is missing"),
    "a tensor less": (value("order", text="1"), "unknown entries for this model: order"),
    "a tensor twice": (
        value("average", text='{"0": {"weight": {"type": "tensor"}}, "0.weight": {"type": "tensor"}}'),
        "entry 'average.0.weight': must be in one place, the file has several",
    ),
    "a list": (lambda values: "[1]", "must hold an object, got list"),
    "nothing": (lambda values: "", "truncated or corrupt JSON file"),
    "no text": (lambda values: "\udcff", "truncated or corrupt JSON file"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_damaged_json_file_is_named(kind, folder):
    damage, message = TEXTS[kind]
    path = checkpoints.latest(folder)
    text = damage(json.loads((path / VALUES).read_text()))
    (path / VALUES).write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(message, path)


def test_tensors_of_another_training_are_named(folder, tmp_path):
    path, other = checkpoints.latest(folder), tmp_path / "other"
    made = trainer()
    checkpoints.save(other, made, made.state_dict(), [])
    shutil.copy(checkpoints.latest(other) / TENSORS, path)
    assert_refused("state.safetensors: entry 'optimizer.state.0.*' is missing", path)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_cut_file_is_named(cut, folder):
    path = checkpoints.latest(folder)
    for name in (VALUES, TENSORS, "weights.safetensors"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-cut])
        with pytest.raises(ValueError, match=name):
            checkpoints.load(path, trainer())
        (path / name).write_bytes(content)


def test_weights_of_another_network_are_refused(folder):
    torch.manual_seed(0)
    other = Trainer(gl.convert(digits_net(5)), DATA, trainer().config)
    with pytest.raises(ValueError, match="entry"):
        checkpoints.load(checkpoints.latest(folder), other)
