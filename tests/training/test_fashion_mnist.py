"""Fashion-MNIST: what is read, and every way in which a file can be wrong."""

import gzip
import hashlib
import importlib
import struct

import pytest
import torch

from gradl1_fast.training import data
from gradl1_fast.training.data.idx import IdxFile

reader = importlib.import_module("gradl1_fast.training.data.fashion_mnist")  # the function has the same name

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=GENERATOR) for n in (6, 3)]
LABELS = [torch.tensor([0, 9, 1, 2, 3, 4], dtype=torch.uint8), torch.tensor([5, 6, 7], dtype=torch.uint8)]


def idx(values):
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + values.numpy().tobytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A set of six and three images, written as the real one is."""
    parts = [IMAGES[0], LABELS[0], IMAGES[1], LABELS[1]]
    files = []
    for real, values in zip(reader.FILES, parts, strict=True):
        content = idx(values)
        files.append(IdxFile(real.name, tuple(values.shape), hashlib.sha256(content).hexdigest()))
        (tmp_path / real.name).write_bytes(gzip.compress(content))
    monkeypatch.setattr(reader, "FILES", tuple(files))
    return tmp_path


def test_images_and_labels_are_those_of_the_files(folder):
    found = data.load("fashion-mnist", folder)
    assert (found.name, found.classes, found.channels, found.size) == ("fashion-mnist", 10, 1, (28, 28))
    mean, std = IMAGES[0].double().mean(), IMAGES[0].double().std(correction=0)
    for (images, labels), pixels, classes in zip((found.train, found.test), IMAGES, LABELS, strict=True):
        expected = ((pixels.double() - mean) / std).float().unsqueeze(1)
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(labels, classes.long())


def test_a_missing_set_says_how_to_get_it(tmp_path):
    with pytest.raises(data.DataError, match="apt install dataset-fashion-mnist") as error:
        data.load("fashion-mnist", tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "t10k-labels-idx1-ubyte.gz" in str(error.value)
    assert "--data" in str(error.value)


def damaged(content, kind):
    compressed = gzip.compress(content)
    return {
        "not gzip": b"hello, this is text",
        "cut": compressed[: len(compressed) // 2],
        "flipped": compressed[:-5] + bytes([compressed[-5] ^ 1]) + compressed[-4:],
        "empty": gzip.compress(b""),
        "no magic": gzip.compress(b"\1" + content[1:]),
        "floats": gzip.compress(content[:2] + b"\x0d" + content[3:]),
        "one dimension": gzip.compress(content[:3] + b"\1" + content[4:]),
        "another count": gzip.compress(content[:4] + struct.pack(">I", 7) + content[8:]),
        "short": gzip.compress(content[:-1]),
        "long": gzip.compress(content + b"\0" * 100),
        "altered": gzip.compress(content[:-1] + bytes([content[-1] ^ 1])),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not gzip", "truncated or corrupt gzip file"),
        ("cut", "truncated or corrupt gzip file"),
        ("flipped", "truncated or corrupt gzip file"),
        ("empty", "not an IDX file"),
        ("no magic", "two zero bytes"),
        ("floats", "says type 13 in 3"),
        ("one dimension", "says type 8 in 1"),
        ("another count", r"must be \(6, 28, 28\), the file says \(7, 28, 28\)"),
        ("short", "fewer bytes"),
        ("long", "more bytes"),
        ("altered", "wrong checksum"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(folder, kind, message):
    path = folder / reader.FILES[0].name
    path.write_bytes(damaged(idx(IMAGES[0]), kind))
    with pytest.raises(data.DataError, match=message) as error:
        data.load("fashion-mnist", folder)
    assert str(error.value).startswith(str(path))


def test_a_label_that_is_no_class_is_refused(folder, monkeypatch):
    content = idx(torch.tensor([0, 9, 10, 2, 3, 4], dtype=torch.uint8))
    name = reader.FILES[1].name
    (folder / name).write_bytes(gzip.compress(content))
    wrong = IdxFile(name, (6,), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(reader, "FILES", (reader.FILES[0], wrong, *reader.FILES[2:]))
    with pytest.raises(data.DataError, match="labels must be from 0 to 9, found 10"):
        data.load("fashion-mnist", folder)


def test_the_real_set_where_it_is_installed():
    if not reader.DEBIAN.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    found = data.load("fashion-mnist")
    assert found.train[0].shape == (60000, 1, 28, 28)
    assert found.test[1].bincount().tolist() == [1000] * 10


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match=r"one of 'digits', 'fashion-mnist'.*, got 'mnist'"):
        data.load("mnist")


def test_the_digits_by_name(tmp_path):
    assert data.load("digits").size == (8, 8)
    with pytest.raises(ValueError, match="do not give a folder"):
        data.load("digits", tmp_path)
