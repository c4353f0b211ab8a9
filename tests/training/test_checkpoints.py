"""Checkpoints: only whole ones count, and a hostile or damaged one is named and never executed."""

import os
import pickle
import struct
import warnings
import zipfile

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.training.config import Config, Penalty, Training
from gradl1_fast.training.data import digits
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.models import digits_net
from gradl1_fast.training.runs import checkpoints, state_file

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
    (folder / ".partial" / "state.pt").write_bytes(b"half")
    assert checkpoints.latest(folder).name == "step-000000000003"
    made = trainer()
    checkpoints.load(checkpoints.latest(folder), made)
    made.run_epoch()
    checkpoints.save(folder, made, made.state_dict(), [])
    assert [path.name for path in folder.iterdir()] == ["step-000000000006"]


def test_there_is_none_at_first(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "nowhere") is None


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def state_with_code(file, target, protocol):
    """Write a whole archive, one entry of which is a call."""
    state = torch.load(file, weights_only=True)
    torch.save({**state, "epoch": Hostile(target)}, file, pickle_protocol=protocol)


def state_with_an_instance(file, target):
    """Write an archive whose pickle calls by INST, as the oldest pickles do."""
    with zipfile.ZipFile(file, "w") as archive:
        content = f"(dS'epoch'\n(S'{target}'\ni{os.mkdir.__module__}\nmkdir\ns."
        archive.writestr("state/data.pkl", content.encode())
        archive.writestr("state/version", b"3\n")


CODE = {
    "plain pickle": lambda file, target: file.write_bytes(pickle.dumps(Hostile(target))),
    "protocol 2": lambda file, target: state_with_code(file, target, 2),
    "protocol 4": lambda file, target: state_with_code(file, target, 4),
    "instance": state_with_an_instance,
}


@pytest.mark.parametrize("kind", CODE)
def test_a_hostile_checkpoint_executes_nothing(kind, folder, tmp_path):
    file, target = checkpoints.latest(folder) / "state.pt", tmp_path / "made"
    CODE[kind](file, target)
    reason = "File is not a zip file" if kind == "plain pickle" else "it refers to .*; nothing was executed"
    with pytest.raises(ValueError, match=f"state.pt: truncated or corrupt checkpoint: {reason}"):
        checkpoints.load(file.parent, trainer())
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", CODE)
def test_nothing_is_executed_even_if_the_look_at_the_archive_finds_nothing(
    kind, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(state_file, "_check_archive", lambda opened: None)
    file, target = checkpoints.latest(folder) / "state.pt", tmp_path / "made"
    CODE[kind](file, target)
    with pytest.raises(ValueError, match="truncated or corrupt checkpoint: Weights only load failed"):
        checkpoints.load(file.parent, trainer())
    assert not target.exists()


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
        "entry 'average.0.weight' holds NaN or infinity",
    ),
    "momentum": (
        put("optimizer", "state", 0, "exp_avg", value=torch.ones(5)),
        "optimizer.state.0.exp_avg' must have",
    ),
    "momentum inf": (
        put("optimizer", "state", 0, "exp_avg", value=torch.full((4, 1, 3, 3), torch.inf)),
        "entry 'optimizer.state.0.exp_avg' holds NaN",
    ),
    "parameter": (put("optimizer", "state", 99, value={}), "refers to parameter 99"),
    "rate": (put("optimizer", "param_groups", 0, "lr", value=float("nan")), "param_groups.0.lr' holds NaN"),
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
    file = checkpoints.latest(folder) / "state.pt"
    state = torch.load(file, weights_only=True)
    damage(state)
    torch.save(state, file)
    with pytest.raises(ValueError, match=message) as error:
        checkpoints.load(file.parent, trainer())
    assert str(error.value).startswith(str(file))


def expanded(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1).expand(2**40)


def nested(state):
    value = []
    for _ in range(100):
        value = [value]
    state["schedule"]["last_epoch"] = value


def laughing(state):
    value = []
    for _ in range(15):
        value = [value] * 10
    state["schedule"]["last_epoch"] = value


GREEDY = {
    "expanded": (expanded, "'optimizer.state.0.exp_avg' is a tensor with fewer values than its shape says"),
    "meta": (put("order", value=torch.empty(2**40, device="meta")), "refers to 'torch._utils _rebuild_meta"),
    "nested": (nested, "nested more than 20 levels deep"),
    "in many places": (laughing, "there are more values than the file has bytes"),
    "long number": (put("schedule", "T_max", value=2**70), "'schedule.T_max' is a number of more than 64"),
    "long key": (put("schedule", 2**70, value=1), "'schedule' has a key that is neither"),
    "bytes": (put("schedule", "T_max", value=bytearray(3)), "refers to '(__builtin__|builtins) bytearray'"),
    "set": (put("schedule", "T_max", value={3}), "refers to"),
}


@pytest.mark.parametrize("kind", GREEDY)
def test_a_state_cannot_ask_for_more_than_it_holds(kind, folder):
    assert_named(*GREEDY[kind], folder)


def rewritten(file, method=zipfile.ZIP_STORED, twice=False):
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in entries.items():
            archive.writestr(name, content)
        if twice:
            archive.writestr(*next(iter(entries.items())))


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def larger(file):
    content = file.read_bytes()
    place = content.rindex(b"PK\x01\x02")
    file.write_bytes(content[: place + 20] + struct.pack("<II", 2**30, 2**30) + content[place + 28 :])


ARCHIVES = {
    "compressed": (
        lambda file: rewritten(file, zipfile.ZIP_DEFLATED),
        "an entry of the archive is compressed",
    ),
    "twice": (lambda file: rewritten(file, twice=True), "two entries of the archive have one name"),
    "flipped": (flipped, "the checksum of .* is wrong"),
    "larger": (larger, "the archive claims more bytes than the file has"),
    "old form": (
        lambda file: torch.save(torch.load(file), file, _use_new_zipfile_serialization=False),
        "File is not a zip file",
    ),
    "no state": (lambda file: zipfile.ZipFile(file, "w").close(), "the archive holds no state"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_is_not_as_torch_writes_it_is_refused(kind, folder):
    damage, message = ARCHIVES[kind]
    file = checkpoints.latest(folder) / "state.pt"
    damage(file)
    with pytest.raises(ValueError, match=f"state.pt: truncated or corrupt checkpoint: {message}"):
        checkpoints.load(file.parent, trainer())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100])
def test_a_file_of_something_else_is_named(content, folder):
    file = checkpoints.latest(folder) / "state.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or corrupt checkpoint"):
        checkpoints.load(file.parent, trainer())


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_cut_file_is_named(cut, folder):
    path = checkpoints.latest(folder)
    for name in ("state.pt", "weights.safetensors"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-cut])
        with pytest.raises(ValueError, match=name):
            checkpoints.load(path, trainer())
        (path / name).write_bytes(content)


def test_no_dictionary(folder):
    file = checkpoints.latest(folder) / "state.pt"
    torch.save([1], file)
    with pytest.raises(ValueError, match="must hold a dictionary, got list"):
        checkpoints.load(file.parent, trainer())


def test_weights_of_another_network_are_refused(folder):
    torch.manual_seed(0)
    other = Trainer(gl.convert(digits_net(5)), DATA, trainer().config)
    with pytest.raises(ValueError, match="entry"):
        checkpoints.load(checkpoints.latest(folder), other)
