"""Every reader of files that may come from elsewhere: how a whole file is written, and how it is read."""

from __future__ import annotations

import copy
import functools
import gzip
import hashlib
import importlib
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.training.config import Config, Model, Penalty, Training
from gradl1_fast.training.data import digits
from gradl1_fast.training.data.idx import IdxFile
from gradl1_fast.training.experiment.results import Results, Row, Run
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.models import digits_net
from gradl1_fast.training.runs import checkpoints
from gradl1_fast.training.runs import folder as runs
from gradl1_fast.training.runs.state_file import TENSORS, VALUES
from gradl1_fast.training.runs.weights_file import load_weights, save_weights

image_folder = importlib.import_module("gradl1_fast.training.data.image_folder")  # likewise
cifar10 = importlib.import_module("gradl1_fast.training.data.cifar10")  # the function has the same name

CONFIG = Config(
    model=Model(width=4),
    training=Training(2, 20, ema=0.5),
    penalty=Penalty("gradl1", 1, 0, {"lambda_w": 0.1}),
)


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        name: of the reader.
        file: the one that is damaged, in the folder.
        write: fills a folder with whole files.
        read: reads what is in the folder.
        kind: of the file: which hostile contents are made for it.
    """

    name: str
    file: str
    write: Callable[[Path], None]
    read: Callable[[Path], object]
    kind: str


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Return a few digits."""
    return tuple(part[:60] for part in digits(0).train)  # type: ignore[return-value]


@functools.cache
def templates() -> tuple[nn.Module, nn.Module]:
    """Return a small network, and the same with ranges of activations and weights."""
    torch.manual_seed(0)
    model = gl.convert(digits_net(4))
    ranged = copy.deepcopy(model).eval()
    gl.calibrate(ranged, [images()])
    gl.calibrate_weights(ranged, ranges="mse")
    return model, ranged


def network() -> nn.Module:
    """Return the network as it is made."""
    return copy.deepcopy(templates()[0])


def calibrated() -> nn.Module:
    """Return the network with ranges."""
    return copy.deepcopy(templates()[1])


def trainer() -> Trainer:
    """Return one that has taken no step."""
    return Trainer(network(), images(), CONFIG)


def write_checkpoint(folder: Path) -> None:
    """Write the checkpoint of a training after its first epoch, with optimizer state and averages."""
    made = trainer()
    made.run_epoch()
    made.next_epoch()
    checkpoints.save(folder, made, made.state_dict(), [{"epoch": 1.0, "loss": 2.0}])


def read_checkpoint(folder: Path) -> object:
    """Read it."""
    return checkpoints.load(folder / STEP, trainer())


def write_run(folder: Path) -> None:
    """Write what a finished run consists of."""
    run, model = runs.Folder(folder), calibrated()
    run.write_config(CONFIG)
    gl.save_ranges(model, run.ranges)
    with gl.bits(model, w=3, a=3):
        gl.reestimate_batch_norm(model, [images()])
    gl.save_batch_norms(model, folder / NORMS)
    save_weights(model.state_dict(), run.weights, {"classes": "10", "channels": "1"})


def write_codes(folder: Path) -> None:
    """Write ranges, and codes of the weights at one width."""
    model = calibrated()
    gl.round_weights(model, [images()], w=3, method=gl.rounding.GPTQ(inputs="float"))
    gl.save_ranges(model, folder / RANGES)


def write_results(folder: Path) -> None:
    """Write the results of an experiment of one run."""
    row = Row("plain", 0, "calibrated", None, 8, 91.5)
    Results([Run("plain", 0, {"a": 1}, [row], [], [], [], [], {"x": {"y": "z"}})]).write_runs(
        folder / "runs.json"
    )


IDX = torch.arange(24, dtype=torch.uint8).reshape(6, 2, 2)


def idx_content() -> bytes:
    """Return the values as IDX has them."""
    return struct.pack(">BBBB3I", 0, 0, 8, 3, *IDX.shape) + IDX.numpy().tobytes()


def write_idx(folder: Path) -> None:
    """Write an IDX file."""
    (folder / "images.gz").write_bytes(gzip.compress(idx_content(), mtime=0))


def read_idx(folder: Path) -> object:
    """Read it."""
    return IdxFile("images.gz", tuple(IDX.shape), hashlib.sha256(idx_content()).hexdigest()).read(folder)


def write_cifar10(folder: Path, ending: str, content: bytes) -> None:
    """Write six files of four images each."""
    cifar10.IMAGES = 4  # type: ignore[attr-defined]  # instead of ten thousand
    for name in (*cifar10.TRAIN, cifar10.TEST):
        (folder / f"{name}{ending}").write_bytes(content)


def cifar10_pickle() -> bytes:
    """Return four images as numpy pickled them in CIFAR-10's time."""
    import numpy as np

    value = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3], b"filenames": [b"a.png"] * 4}
    return pickle.dumps(value, 2)


def read_cifar10(folder: Path) -> object:
    """Read them, whatever their checksums: a damaged file would not come further."""
    for name in (*cifar10.TRAIN, cifar10.TEST):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            cifar10.SUMS[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return cifar10.cifar10(folder)


def write_image(folder: Path, name: str) -> None:
    """Write a picture, by its ending."""
    from PIL import Image

    chance = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8, generator=chance)
    Image.fromarray(values.numpy()).save(folder / name)


def read_image(folder: Path, name: str) -> object:
    """Read it as a data set does."""
    return image_folder.ImageFiles([folder / name], 8)[:]


def loading(load: Callable[[nn.Module, Path], object], name: str) -> Callable[[Path], object]:
    """Return a reader into a model, which is to stay as it is if the file is refused."""

    def read(folder: Path) -> object:
        model = calibrated()
        before = {key: value.clone() for key, value in (*model.named_buffers(), *model.named_parameters())}
        try:
            return load(model, folder / name)
        except ValueError:
            after = dict((*model.named_buffers(), *model.named_parameters()))
            assert after.keys() == before.keys(), "the model was changed"
            assert all(torch.equal(after[key], before[key]) for key in after), "the model was changed"
            raise

    return read


def any_bit(width: int) -> Reader:
    """Return the reader of one width of an any-bit file."""
    name = "model.safetensors"
    write = functools.partial(write_any_bit, name=name)
    read = loading(functools.partial(gl.load_any_bit, w=width), name)
    return Reader(f"any-bit file at {width} bits", name, write, read, "safetensors")


def write_any_bit(folder: Path, name: str) -> None:
    """Write an any-bit file."""
    gl.save_any_bit(calibrated(), folder / name)


def image(name: str) -> Reader:
    """Return the reader of a picture."""
    write, read = (functools.partial(function, name=name) for function in (write_image, read_image))
    return Reader(f"image {name}", name, write, read, "image")


STEP = "step-000000000003"
NORMS = "norms.safetensors"
WEIGHTS, RANGES, CONFIGURATION = "weights.safetensors", "ranges.safetensors", "config.toml"
binary = functools.partial(write_cifar10, ending=".bin", content=bytes(4 * 3073))
pickled = functools.partial(write_cifar10, ending="", content=cifar10_pickle())

READERS = {
    reader.name: reader
    for reader in (
        Reader("checkpoint values", f"{STEP}/{VALUES}", write_checkpoint, read_checkpoint, "state"),
        Reader("checkpoint tensors", f"{STEP}/{TENSORS}", write_checkpoint, read_checkpoint, "safetensors"),
        Reader("checkpoint weights", f"{STEP}/{WEIGHTS}", write_checkpoint, read_checkpoint, "safetensors"),
        Reader("run configuration", CONFIGURATION, write_run, runs.load, "toml"),
        Reader("run weights", WEIGHTS, write_run, runs.load, "safetensors"),
        Reader("weights file", WEIGHTS, write_run, loading(load_weights, WEIGHTS), "safetensors"),
        Reader("ranges file", RANGES, write_run, loading(gl.load_ranges, RANGES), "safetensors"),
        Reader("codes in a ranges file", RANGES, write_codes, loading(gl.load_ranges, RANGES), "safetensors"),
        Reader("batch norms file", NORMS, write_run, loading(gl.load_batch_norms, NORMS), "safetensors"),
        any_bit(8),
        any_bit(3),
        Reader("recipe", CONFIGURATION, write_run, lambda f: Config.read(f / CONFIGURATION), "toml"),
        Reader("results", "runs.json", write_results, lambda f: Results.read_runs(f / "runs.json"), "json"),
        Reader("IDX file", "images.gz", write_idx, read_idx, "gzip"),
        Reader("CIFAR-10, binary", "data_batch_2.bin", binary, read_cifar10, "bytes"),
        Reader("CIFAR-10, pickled", "data_batch_2", pickled, read_cifar10, "pickle"),
        *(image(f"picture.{ending}") for ending in ("png", "jpg", "bmp", "ppm", "tiff", "webp")),
    )
}
