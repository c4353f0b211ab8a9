"""Folders of images: order of the classes, scaling, and what is missing or damaged."""

import importlib
import sys

import pytest
import torch

from gradl1_fast.training import data
from gradl1_fast.training.config import Config, Data, Model, Penalty, Training
from gradl1_fast.training.loop.simple import accuracy
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.runs import launch

pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
reader = importlib.import_module("gradl1_fast.training.data.image_folder")

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for name, colour in COLOURS.items():
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pillow.new("RGB", (20 + number, 30), colour).save(place / f"{number}.png")
    return tmp_path


def colour_of(value):
    mean, std = torch.tensor(reader.MEAN), torch.tensor(reader.STD)
    return (torch.tensor(value) / 255 - mean) / std


def test_classes_are_in_the_order_of_their_names(folder):
    found = data.load("images", folder, size=8)
    assert (found.name, found.classes, found.channels, found.size) == ("images", 3, 3, (8, 8))
    assert found.train[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    images = found.test[0][torch.tensor([5, 0, 3])]
    assert images.shape == (3, 3, 8, 8)
    for image, name in zip(images, ("cat", "ant", "bee"), strict=True):
        torch.testing.assert_close(image[:, 4, 4], colour_of(COLOURS[name]), atol=1e-5, rtol=1e-5)


def test_they_are_chosen_as_from_a_tensor(folder):
    images = data.load("images", folder, size=8).train[0]
    whole = images[:]
    assert whole.shape == images.shape == (9, 3, 8, 8)
    assert torch.equal(images[torch.tensor([8, 1])], whole[[8, 1]])
    assert torch.equal(torch.cat(list(images.split(4))), whole)
    assert [len(part) for part in images.split(4)] == [4, 4, 1]
    assert images[:0].shape == (0, 3, 8, 8)


def test_the_accuracy_of_a_network_on_files(folder):
    class Reddest(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    assert accuracy(Reddest(), data.load("images", folder, size=8).test, 4) == 100.0


@pytest.mark.parametrize(("width", "height"), [(70, 14), (14, 70), (3, 3), (1000, 2)])
def test_the_middle_is_cut_out(width, height, tmp_path):
    image = pillow.new("RGB", (width, height), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, width // 4, height))
    image.save(tmp_path / "a.png")
    found = reader.ImageFiles([tmp_path / "a.png"], 7)[:]
    assert found.shape == (1, 3, 7, 7)
    assert found[0, :, 3, 3].tolist() == pytest.approx(colour_of((255, 255, 255)).tolist(), abs=1e-4)


def test_scaling_the_middle_alone_changes_nothing(tmp_path):
    values = torch.randint(0, 256, (50, 83, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = pillow.fromarray(values.numpy())
    scaled = image.resize((round(83 * 8 / 7 * 20 / 50), round(8 / 7 * 20)), pillow.Resampling.BILINEAR)
    left, top = (scaled.size[0] - 20) // 2, (scaled.size[1] - 20) // 2
    expected = scaled.crop((left, top, left + 20, top + 20))
    found = reader._square(image, 20)
    apart = torch.tensor(list(found.tobytes())) - torch.tensor(list(expected.tobytes()))
    assert apart.abs().max() <= 1


def test_grey_images_become_three_channels(tmp_path):
    pillow.new("L", (9, 9), 128).save(tmp_path / "a.png")
    assert reader.ImageFiles([tmp_path / "a.png"], 4)[:].shape == (1, 3, 4, 4)


GREYS = ("a.png", "a.tif", "a.pgm")


@pytest.mark.parametrize("name", GREYS)
def test_grey_images_of_16_bits_are_read_at_their_depth(name, tmp_path):
    values = torch.arange(0, 65536, 64).reshape(32, 32)
    pillow.fromarray(values.to(torch.uint16).numpy()).save(tmp_path / name)
    pillow.fromarray((values / 257).round().to(torch.uint8).numpy()).save(tmp_path / "8.png")
    found, expected = reader.ImageFiles([tmp_path / name, tmp_path / "8.png"], 16)[:]
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert len(found.unique()) > 200


@pytest.mark.parametrize(
    ("dtype", "tags", "kind"),
    [
        (torch.float32, {}, "of floats"),
        (torch.int32, {}, "of 32-bit integers"),
        (torch.uint16, {262: 0}, "whose white is 0"),
    ],
)
def test_grey_images_whose_white_is_unknown_are_refused_by_name(dtype, tags, kind, tmp_path):
    path = tmp_path / "a.tif"
    pillow.fromarray(torch.ones(9, 9, dtype=dtype).numpy()).save(path, tiffinfo=tags)
    with pytest.raises(data.DataError, match=f"a.tif: is a grey image {kind}; save it with 8 or 16 bits"):
        reader.ImageFiles([path], 4)[:]


def damage_file(folder):
    path = folder / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:40])


DAMAGES = {
    "no val": (lambda f: (f / "val").rename(f / "other"), "must hold the folders train and val"),
    "no train": (lambda f: (f / "train").rename(f / "other"), "must hold the folders train and val"),
    "another class": (lambda f: (f / "val" / "ant").rename(f / "val" / "dog"), "only one has ant, dog"),
    "empty class": (lambda f: [p.unlink() for p in (f / "val" / "ant").iterdir()], "ant: holds no image"),
    "no class": (lambda f: [p.rename(f / p.name) for p in (f / "train").iterdir()], "but has no folders"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_missing_is_named(kind, folder):
    damage, message = DAMAGES[kind]
    damage(folder)
    with pytest.raises(data.DataError, match=message):
        data.load("images", folder)


def test_content_that_needs_a_program_is_no_image(folder, tmp_path, monkeypatch):
    program = tmp_path / "programs" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'executed'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (folder / "train" / "bee" / "1.png").write_text(script)
    with pytest.raises(data.DataError, match=r"1.png: truncated or corrupt image: cannot identify"):
        data.load("images", folder, size=8).train[0][:]
    assert not (tmp_path / "executed").exists()


def test_a_damaged_image_is_named(folder):
    damage_file(folder)
    with pytest.raises(data.DataError, match=r"1.png: truncated or corrupt image"):
        data.load("images", folder, size=8).train[0][:]


def test_no_folder_and_no_such_size(folder):
    with pytest.raises(data.DataError, match="no folder was given"):
        data.load("images")
    with pytest.raises(ValueError, match="size must be 1 or more"):
        data.load("images", folder, size=0)
    with pytest.raises(ValueError, match="have a fixed size"):
        data.load("digits", size=8)


def test_without_pillow_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[vision\]'"):
        data.load("images", folder)


def test_norms_are_measured_on_images_of_all_classes(folder, tmp_path, monkeypatch):
    seen, loss_of = [], Trainer.loss_of
    monkeypatch.setattr(Trainer, "loss_of", lambda self, batch: seen.append(batch[1]) or loss_of(self, batch))
    chosen = Config(
        data=Data("images", str(folder), size=32),
        model=Model("vgg_small", width=4),
        training=Training(epochs=1, batch_size=6),
        penalty=Penalty(epochs=0),
    )
    launch.launch(chosen, tmp_path / "run", device="cpu")
    assert [set(labels.tolist()) for labels in seen] == [{0, 1, 2}]  # the first six are of two classes


def test_an_image_of_more_pixels_than_the_limit_is_named_before_it_is_drawn(tmp_path):
    pillow.new("1", (8192, 8193)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 10_000
    message = r"large.png: is too large: 8192 x 8193 pixels; at most 67108864 are allowed"
    with pytest.raises(data.DataError, match=message):
        reader.ImageFiles([tmp_path / "large.png"], 8)[:]
