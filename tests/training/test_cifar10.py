"""CIFAR-10 in both its forms, and what a hostile pickle cannot do."""

import hashlib
import importlib
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from gradl1_fast.training import data
from gradl1_fast.training.data.pickled import UnsafePickleError, read_pickle

reader = importlib.import_module("gradl1_fast.training.data.cifar10")  # the function has the same name

NAMES = [*reader.TRAIN, reader.TEST]
COUNT = 4


@pytest.fixture
def batches(monkeypatch):
    """Four images a file instead of ten thousand."""
    monkeypatch.setattr(reader, "IMAGES", COUNT)
    chance = np.random.default_rng(0)
    pixels = {name: chance.integers(0, 256, (COUNT, 3072), dtype=np.uint8) for name in NAMES}
    labels = {name: [int(one) for one in chance.integers(0, 10, COUNT)] for name in NAMES}
    return pixels, labels


@pytest.fixture
def binary(batches, tmp_path):
    for name in NAMES:
        label = np.array(batches[1][name], dtype=np.uint8)[:, None]
        (tmp_path / f"{name}.bin").write_bytes(np.hstack([label, batches[0][name]]).tobytes())
    return tmp_path


def write_pickled(folder, name, value, monkeypatch, protocol=2):
    content = value if isinstance(value, bytes) else pickle.dumps(value, protocol)
    (folder / name).write_bytes(content)
    sums = {**reader.SUMS, name: hashlib.md5(content, usedforsecurity=False).hexdigest()}
    monkeypatch.setattr(reader, "SUMS", sums)


@pytest.fixture
def pickled(batches, tmp_path, monkeypatch):
    for name in NAMES:
        value = {b"data": batches[0][name], b"labels": batches[1][name], b"filenames": [b"a.png"] * COUNT}
        write_pickled(tmp_path, name, value, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("form", ["binary", "pickled"])
def test_both_forms_hold_the_same_images(form, batches, request):
    found = data.load("cifar10", request.getfixturevalue(form))
    pixels, labels = batches
    assert (found.classes, found.channels, found.size) == (10, 3, (32, 32))
    assert found.train[1].tolist() == [one for name in reader.TRAIN for one in labels[name]]
    assert found.test[1].tolist() == labels[reader.TEST]
    train = np.concatenate([pixels[name] for name in reader.TRAIN]).reshape(-1, 3, 32, 32).astype(np.float64)
    mean, std = (value(train, axis=(0, 2, 3), keepdims=True) for value in (np.mean, np.std))
    torch.testing.assert_close(
        found.train[0].double(), torch.from_numpy((train - mean) / std), atol=1e-5, rtol=1e-5
    )


def test_the_folder_in_which_it_comes_is_found(binary):
    inner = binary / "cifar-10-batches-bin"
    inner.mkdir()
    for name in NAMES:
        (binary / f"{name}.bin").rename(inner / f"{name}.bin")
    assert len(data.load("cifar10", binary).test[1]) == COUNT


@pytest.mark.parametrize("named", [False, True])
def test_a_missing_set_says_how_to_get_it(named, tmp_path):
    with pytest.raises(data.DataError, match=r"Get CIFAR-10.*--data FOLDER"):
        data.load("cifar10", tmp_path if named else None)


def test_a_file_of_another_size_is_named(binary):
    path = binary / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match=r"data_batch_3.bin: must have 12292 bytes, has 12291"):
        data.load("cifar10", binary)


def test_a_label_that_is_no_class_is_named(binary):
    path = binary / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(data.DataError, match=r"test_batch.bin: labels must be from 0 to 9, found 10"):
        data.load("cifar10", binary)


def test_an_altered_pickle_is_refused_before_it_is_read(pickled, monkeypatch):
    path = pickled / "test_batch"
    path.write_bytes(path.read_bytes() + b"x")
    monkeypatch.setattr(reader, "read_pickle", None)  # would be a TypeError
    for name in reader.TRAIN:
        monkeypatch.setitem(reader.SUMS, name, "x")
    with pytest.raises(data.DataError, match="data_batch_1: wrong checksum"):
        data.load("cifar10", pickled)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "must hold a dictionary"),
        ({b"data": np.zeros((4, 3072), np.uint8)}, "must hold a dictionary with b'data' and b'labels'"),
        (
            {b"data": np.zeros((4, 3071), np.uint8), b"labels": [0] * 4},
            r"must be an array of shape \(4, 3072\)",
        ),
        ({b"data": [0], b"labels": [0] * 4}, "b'data' must be an array"),
        ({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0] * 3}, "a list of 4 whole numbers"),
        ({b"data": np.zeros((4, 3072), np.uint8), b"labels": [True] * 4}, "a list of 4 whole numbers"),
        ({b"data": np.zeros((4, 3072)), b"labels": [0] * 4}, "not of unsigned bytes"),
        (b"not a pickle", "cannot be read: it "),
    ],
)
def test_a_pickle_of_something_else_is_named(value, message, pickled, monkeypatch):
    write_pickled(pickled, "data_batch_1", value, monkeypatch)
    with pytest.raises(data.DataError, match=message) as error:
        data.load("cifar10", pickled)
    assert str(pickled / "data_batch_1") in str(error.value)


class Hostile:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_executes_nothing(protocol, tmp_path):
    target = tmp_path / "made"
    for hostile in (Hostile(os.mkdir, str(target)), Hostile(eval, f"open({str(target)!r}, 'w')")):
        with pytest.raises(UnsafePickleError, match=r"asks for (posix|nt|builtins|__builtin__)\.\w+"):
            read_pickle(pickle.dumps({b"data": hostile}, protocol))
        assert not target.exists()


@pytest.mark.parametrize(
    "name", ["numpy.load", "numpy.core.multiarray.scalar", "codecs.decode", "operator.attrgetter"]
)
def test_names_beside_the_allowed_ones_are_refused(name):
    module, function = name.rsplit(".", 1)
    with pytest.raises(UnsafePickleError, match=f"asks for {name}"):
        read_pickle(b"\x80\x02c" + f"{module}\n{function}\n".encode() + b".")


def test_an_object_from_outside_is_refused():
    with pytest.raises(UnsafePickleError, match="outside the file"):
        read_pickle(b"Pname\n.")


@pytest.mark.parametrize("encoding", ["rot13", "unicode_escape", "idna"])
def test_other_encodings_are_refused(encoding):
    call = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX" + len(encoding).to_bytes(4, "little")
    with pytest.raises(UnsafePickleError, match=f"encodes by '{encoding}'"):
        read_pickle(call + encoding.encode() + b"\x86R.")


@pytest.mark.parametrize("name", [b"numpy\nndarray", b"numpy\ndtype", b"_codecs\nencode"])
def test_a_part_of_an_array_by_itself_is_refused(name):
    with pytest.raises(UnsafePickleError, match="holds a part of an array by itself"):
        read_pickle(b"\x80\x02c" + name + b"\n.")


def array_with(shape=b"(K\x02t", kind=b"u1", content=b"ab", fortran=b"\x89"):
    """A pickle of an array, put together by hand as numpy writes it."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\ndtype\nU"
        + bytes([len(kind)])
        + kind
        + b"K\x00K\x01\x87R"
        + fortran
        + b"U"
        + bytes([len(content)])
        + content
        + b"tb."
    )


def test_an_array_written_by_hand_is_read():
    assert read_pickle(array_with()).tolist() == [97, 98]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": b"(K\x03t"}, "more or fewer bytes"),
        ({"shape": b"(J\xff\xff\xff\xfft"}, "array of shape"),
        ({"shape": b"]"}, "array of shape"),
        ({"kind": b"O8"}, "not of unsigned bytes"),
        ({"content": b""}, "more or fewer bytes"),
    ],
)
def test_an_array_that_contradicts_itself_is_refused(changed, message):
    with pytest.raises(UnsafePickleError, match=message):
        read_pickle(array_with(**changed))


@pytest.mark.parametrize("protocol", range(2, 5))  # from 5 on numpy writes arrays another way
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_bytes_are_read_as_numpy_reads_them(protocol, order):
    array = np.asarray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), order=order)
    assert np.array_equal(read_pickle(pickle.dumps(array, protocol)).numpy(), array)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr\xfe\xff\xff\x7f.",  # a place in the memo, up to which it is filled
        b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".",  # bytes that it does not hold
    ],
)
def test_an_operation_cannot_ask_for_more_than_the_pickle_holds(content):
    with pytest.raises(pickle.UnpicklingError, match=r"claims 2147483646 values|expected 8589934592 bytes"):
        read_pickle(content)


def test_a_list_in_many_places_is_looked_at_once():
    value = []
    for _ in range(60):
        value = [value, value]
    assert len(read_pickle(pickle.dumps(value, 2))) == 2


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_cut_pickle_is_damaged(cut):
    content = pickle.dumps({b"data": np.zeros(9, np.uint8)}, 2)
    with pytest.raises(pickle.UnpicklingError):
        read_pickle(content[:-cut])
