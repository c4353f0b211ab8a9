"""Files of tensors: only those are read whose header agrees with every byte behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gradl1_fast._safetensors import Entry, TensorFile, save

pytest.importorskip("safetensors", reason="files of tensors are written by safetensors")


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    """Return a header's entry of float32 numbers in some bytes."""
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **changes}


def written(path: Path, header: dict[str, object], size: int) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 4), "b": entry(8, 16)}, "overlap or leave gaps"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, "overlap or leave gaps"),
        ({"a": entry(0, 12)}, r"its tensors end after \d+ bytes, the file after \d+"),
        ({"a": entry(0, 20)}, r"its tensors end after \d+ bytes, the file after \d+"),
        ({"a": entry(0, 16, shape=[4] + [1] * 16)}, "must have dtype, shape and data_offsets"),
        ({"a": entry(0, 16, dtype="F4")}, "must have dtype, shape and data_offsets"),
    ],
)
def test_tensors_that_do_not_fill_the_file_are_refused(header: dict, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "file", header, 16)
    with pytest.raises(ValueError, match=message) as error:
        TensorFile(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_not_asked_to_be_whole_may_have_more(tmp_path: Path) -> None:
    with TensorFile(written(tmp_path / "file", {"a": entry(0, 12)}, 16), whole=False) as file:
        assert torch.equal(file.read("a", Entry(torch.float32, (3,))), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.uint16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_tensors_come_back(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.ones(shape).to(dtype)
    shared = {"a": tensor, "b": tensor.T if len(shape) == 2 else tensor}
    save(tmp_path / "file", shared, {"format": "test"}, what="tests")
    with TensorFile(tmp_path / "file") as file:
        file.check_metadata({"format": "test"})
        found = file.read_like(shared)
    assert all(torch.equal(found[key], value) for key, value in shared.items())
    assert all(found[key].dtype == dtype for key in shared)


def test_infinity_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    save(tmp_path / "file", {"a": torch.tensor(torch.inf)}, {}, what="tests")
    with TensorFile(tmp_path / "file") as file:
        with pytest.raises(ValueError, match="entry 'a': must be finite"):
            file.read("a")
        assert file.read("a", finite=False) == torch.inf
