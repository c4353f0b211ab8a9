"""Contents that are made to do harm, for each kind of file."""

from __future__ import annotations

import functools
import gzip
import io
import json
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.readers.damage import Damaged

HUGE = 2**40
LARGE = 220 * 2**20  # more than a reader may use, and small when compressed
DEEP = 100_000


class Calls:
    """What is pickled as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Say what to call."""
        return self.function, self.args


def contents(kind: str, data: bytes, sentinel: Path) -> Iterator[Damaged]:
    """Yield hostile files by name: those of any kind, then those of the kind that the reader expects."""
    yield from _foreign(sentinel)
    yield from _KINDS.get(kind, _nothing)(data, sentinel)


def _nothing(data: bytes, sentinel: Path) -> Iterator[Damaged]:
    yield from ()


def _foreign(sentinel: Path) -> Iterator[Damaged]:
    """Yield files of other kinds, with code where they can have it."""
    code = Calls(os.mkdir, str(sentinel))
    yield "empty", b""
    yield "pickled code", pickle.dumps(code)
    yield "torch file with code", _torch_file(code)
    yield "torch file with code, old form", _torch_file(code, _use_new_zipfile_serialization=False)
    yield "zip bomb", zip_bomb()
    yield "gzip bomb", gzip_bomb()
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    yield "text", b"hello\n"


@functools.cache
def zip_bomb() -> bytes:
    """Return an archive of zeros."""
    return _zip({"archive/data.pkl": bytes(LARGE)}, zipfile.ZIP_DEFLATED)


@functools.cache
def gzip_bomb() -> bytes:
    """Return compressed zeros."""
    return gzip.compress(bytes(LARGE), 1, mtime=0)


@functools.cache
def deflated() -> bytes:
    """Return zeros as they are compressed in a PNG."""
    return zlib.compress(bytes(LARGE), 1)


def _torch_file(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def _zip(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method, compresslevel=1) as written:
        for name, content in entries.items():
            written.writestr(name, content)
    return file.getvalue()


def _state(data: bytes, sentinel: Path) -> Iterator[Damaged]:
    """Yield the values of a training's state: deep, large, or of types that no entry should have."""
    state = json.loads(data)
    tensor = {"type": "tensor"}
    values: dict[str, Any] = {
        **{"None": None, "text": "a", "list": [1], "object": {"a": 1}, "list of None": [None]},
        **{"negative": -1, "infinity": math.inf, "long number": 10**3000, "large text": {"a": "b" * 10**6}},
        **{"a tensor": tensor, "tensors": [tensor] * 10, "infinite": {"type": "float", "value": "inf"}},
    }
    for name, value in values.items():
        for entry in ("epoch", "step", "seen", "rows", "schedule", "optimizer", "average", "objective"):
            yield f"{name} as {entry}", json.dumps({**state, entry: value}).encode()
    text = json.dumps(state)[:-1]
    yield "nested arrays", f'{text}, "rows": {"[" * DEEP}'.encode()
    yield "nested objects", (f'{text}, "rows": ' + '{"a": ' * DEEP).encode()
    yield "nested and closed", f'{text}, "rows": {"[" * 900}{"]" * 900}}}'.encode()
    yield "longer number", f'{text}, "epoch": {"9" * 5000}}}'.encode()
    yield "duplicate name", f'{text}, "epoch": -1}}'.encode()
    yield "no UTF-8", data + b"\xff\xfe"
    yield "missing entry", json.dumps({key: value for key, value in state.items() if key != "order"}).encode()


def _safetensors(data: bytes, sentinel: Path) -> Iterator[Damaged]:
    """Yield headers that promise too much, or contradict themselves, and values that are none."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    first = next(key for key, claim in header.items() if key != "__metadata__" and claim["dtype"] == "F32")
    claim = header[first]

    def with_header(value: object) -> bytes:
        text = (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + body

    def claiming(**changes: Any) -> bytes:
        return with_header({**header, first: {**claim, **changes}})

    yield "huge header", struct.pack("<Q", 2**62) + data[8:]
    yield "header of the file's size", struct.pack("<Q", len(data)) + data[8:]
    yield "nested header", with_header("[" * DEEP)
    yield "nested entry", with_header('{"a":' * DEEP)
    yield "long number", with_header('{"a": ' + "9" * 5000 + "}")
    yield "empty header", with_header({})
    yield "list as header", with_header([])
    yield "huge shape", claiming(shape=[HUGE])
    yield "huge shape and place", claiming(shape=[HUGE], data_offsets=[0, 4 * HUGE])
    yield "overflowing shape", claiming(shape=[2**33, 2**33])
    yield "no values of huge shape", claiming(shape=[HUGE, 0], data_offsets=[0, 0])
    yield "negative shape", claiming(shape=[-1])
    yield "fractional shape", claiming(shape=[1.5])
    yield "many dimensions", claiming(shape=[1] * 10000)
    yield "inverted place", claiming(data_offsets=claim["data_offsets"][::-1])
    yield "no place", claiming(data_offsets=None)
    for dtype in ("F64", "I32", "U8", "BOOL", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "X"):
        yield f"type {dtype}", claiming(dtype=dtype)
    text = json.dumps(header)
    yield "duplicate entry", with_header(text[:-1] + f", {json.dumps(first)}: {json.dumps(claim)}}}")
    yield "duplicate metadata", with_header(text[:-1] + ', "__metadata__": {"format": "pt"}}')
    yield "metadata of numbers", with_header({**header, "__metadata__": {"format": 1}})
    facts = header["__metadata__"]
    yield "long fact", with_header({**header, "__metadata__": {**facts, "classes": "9" * 5000}})
    yield "large fact", with_header({**header, "__metadata__": {**facts, "classes": "999999"}})
    yield (
        "fact in other digits",
        with_header({**header, "__metadata__": {**facts, "classes": "\u0661\u0660"}}),
    )
    yield "missing entry", with_header({key: value for key, value in header.items() if key != first})
    yield (
        "many unknown entries",
        with_header(
            {
                **header,
                **{
                    f"unknown {i}": {**claim, "shape": [0], "data_offsets": [len(body)] * 2}
                    for i in range(3000)
                },
            }
        ),
    )
    for name in ("", "a\n\0b", "\ud800", "__class__", "../../etc/passwd"):
        yield (
            f"entry {name!r}",
            with_header({**header, name: {**claim, "shape": [0], "data_offsets": [len(body)] * 2}}),
        )
    floats = [key for key, place in header.items() if key != "__metadata__" and place["dtype"] == "F32"]
    for key in (floats[0], floats[len(floats) // 2], floats[-1]):
        for name, value in (("NaN", float("nan")), ("infinity", float("inf"))):
            begin = 8 + length + header[key]["data_offsets"][0]
            yield f"{name} in {key}", data[:begin] + struct.pack("<f", value) + data[begin + 4 :]


def _toml(data: bytes, sentinel: Path) -> Iterator[Damaged]:
    """Yield configurations that are deep, large, or of values that nobody can use."""
    yield "nested arrays", b"data = " + b"[" * DEEP
    yield "nested tables", b"data = " + b"{a=" * DEEP
    yield "nested keys", b".".join([b"data"] + [b"a"] * 3000) + b" = 1"
    yield "nested keys for a name", b"data.name" + b".a" * 3000 + b" = 1"
    yield "long text", b"[model]\nwidth = '" + b"a" * 10**6 + b"'"
    yield "long name", b"a" * 10**6 + b" = 1"
    yield "long number", b"[training]\nepochs = " + b"9" * 5000
    yield "duplicate key", data + b"\n[data]\nname = 'digits'\n"
    yield "no UTF-8", data + b"# \xff\xfe"
    yield "zero bytes", data + b"\0"
    yield "array of tables", b"[[data]]\nname = 'digits'"
    for table, key, values in (
        ("training", "seed", ("18446744073709551616", "-1", "1e400", "nan")),
        ("training", "epochs", ("9223372036854775808", "0", "inf", "1979-05-27")),
        ("training", "ema", ("nan", "inf", "-inf")),
        ("model", "width", ("1000000000000", "100000", "0", "[]", "{}")),
        ("model", "name", ("'timm:../../x'", "'os.system'", "''", "'\\u0000'")),
        ("optimizer", "learning_rate", ("nan", "inf", "1e400", "-1")),
        ("penalty", "settings", ("{lambda_w = nan}", "{lambda_w = [1]}", "{lambda_w = {}}", "{'' = 1}", "1")),
    ):
        for value in values:
            yield f"{table}.{key} = {value}", f"[{table}]\n{key} = {value}\n".encode()


def _json(data: bytes, sentinel: Path) -> Iterator[Damaged]:
    """Yield results that are deep, or of other types."""
    yield "nested arrays", b"[" * DEEP
    yield "nested objects", b'[{"a":' * DEEP
    yield "long number", b"[" + b"9" * 5000 + b"]"
    whole = json.loads(data)
    for key in whole[0]:
        for value in (None, 1, "a", [1], {"a": 1}, [{"a": 1}], [None]):
            yield f"{key} = {value}", json.dumps([{**whole[0], key: value}]).encode()
    row = whole[0]["rows"][0]
    for key in row:
        for value in (None, "a", [1], 1e400, True, -1):
            yield f"row.{key} = {value}", json.dumps([{**whole[0], "rows": [{**row, key: value}]}]).encode()


def _gzip(data: bytes, sentinel: Path) -> Iterator[Damaged]:
    """Yield compressed files whose content is too large or none."""
    content = gzip.decompress(data)
    yield "huge sizes", gzip.compress(content[:4] + b"\xff" * 12 + content[16:])
    yield "bomb behind", data + gzip_bomb()
    yield "raw deflate", zlib.compress(content)
    yield "endless name", data[:3] + b"\x08" + data[4:10] + b"a" * 10**6


def _pickle(data: bytes, sentinel: Path) -> Iterator[Damaged]:
    """Yield pickles that ask for memory by single operations."""
    yield "code", pickle.dumps({b"data": Calls(os.mkdir, str(sentinel)), b"labels": [0] * 4}, 2)
    yield "bytes of any size", b"\x80\x05\x8e" + struct.pack("<Q", HUGE) + b"."
    yield "bytearray of any size", b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"."
    yield "text of any size", b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"."
    yield "number of any size", b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"."
    yield "frame of any size", b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"."
    yield "place in the memo", b"\x80\x02Nr" + struct.pack("<I", 2**31 - 2) + b"."
    yield "place in the memo, text", b"Np2147483646\n."
    yield "nested", b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."
    yield "nested tuples", b"\x80\x02)" + b"\x85" * DEEP + b"."
    yield "entry in itself", b"\x80\x02}q\x00U\x04datah\x00s."
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"]q" + bytes([i]) + b"(h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"e" for i in range(1, 60)
    )
    yield "laughs", laughs + b"."


def _image(data: bytes, sentinel: Path) -> Iterator[Damaged]:
    """Yield pictures, of the format of a whole one, that are larger than their files."""
    resized, yet_more = next(makers for magic, makers in _FORMATS.items() if data.startswith(magic))
    for name, sizes in (
        ("a little larger than the limit", (8192, 8193)),
        ("larger than the limit", (13000, 13000)),
        ("huge sizes", (2**31 - 1, 2**31 - 1)),
        ("no pixel", (0, 0)),
    ):
        yield name, resized(data, *sizes)
    yield from yet_more(data)


def _png(width: int, height: int, rows: bytes, bits: int = 8) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _resized_png(data: bytes, width: int, height: int) -> bytes:
    return _png(width, height, zlib.compress(bytes(100)))


def _more_png(data: bytes) -> Iterator[Damaged]:
    yield "bomb of a bit a pixel", _png(13000, 13000, zlib.compress(bytes(13000 * (1 + 13000 // 8))), 1)
    yield "wide", _png(2_000_000, 1, zlib.compress(bytes(2_000_001)))
    yield "high", _png(1, 2_000_000, zlib.compress(bytes(4_000_000)))
    yield "endless rows", _png(8, 8, deflated())
    small = _png(8, 8, zlib.compress(bytes(72)))
    yield "huge chunk", small[:33] + struct.pack(">I", 2**31 - 1) + small[37:]


def _put(data: bytes, place: int, layout: str, *values: int) -> bytes:
    """Return bytes with some numbers, each as large as fits, in place of others."""
    single = struct.calcsize(layout[:2])
    content = struct.pack(layout, *(min(value, 2 ** (8 * single) - 1) for value in values))
    return data[:place] + content + data[place + len(content) :]


def _resized_jpeg(data: bytes, width: int, height: int) -> bytes:
    return _put(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


def _more_jpeg(data: bytes) -> Iterator[Damaged]:
    frame = data.index(b"\xff\xc0")
    yield "huge segment", _put(data, frame + 2, ">H", 2**16 - 1)
    yield "many components", _put(data, frame + 9, ">B", 255)
    yield "sampled by 15", _put(data, frame + 11, ">B", 255)


def _resized_bmp(data: bytes, width: int, height: int) -> bytes:
    return _put(data, 18, "<II", width, height)


def _more_bmp(data: bytes) -> Iterator[Damaged]:
    yield "upside down and huge", _put(data, 18, "<II", 2**15, 2**32 - 2**15)
    yield "huge header", _put(data, 14, "<I", 2**31 - 1)
    yield "a palette of any size", _put(_put(data, 28, "<H", 8), 46, "<I", 2**31 - 1)
    yield "pixels that are not there", _put(data, 10, "<I", 2**31 - 1)


def _resized_ppm(data: bytes, width: int, height: int) -> bytes:
    return b"P6 %d %d 255\n" % (width, height)


def _more_ppm(data: bytes) -> Iterator[Damaged]:
    yield "a bit a pixel", b"P4 13000 13000\n"
    yield "long number", b"P6 " + b"9" * 10**6 + b" 1 255\n"
    yield "no largest value", b"P6 8 8 0\n" + bytes(192)
    yield "texts", b"P3 8 8 255\n" + b"9" * 10**6
    yield "floats of any scale", b"Pf 8 8 1e999\n" + bytes(256)


def _tag(data: bytes, number: int) -> int:
    """Return where the entry of a tag stands in a TIFF: tag, type, count, value."""
    first = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[first : first + 2], "little")
    places = range(first + 2, first + 2 + 12 * count, 12)
    return next(place for place in places if data[place : place + 2] == struct.pack("<H", number))


def _resized_tiff(data: bytes, width: int, height: int) -> bytes:
    wide = _put(_put(data, _tag(data, 256) + 2, "<H", 4), _tag(data, 256) + 8, "<I", width)
    return _put(_put(wide, _tag(data, 257) + 2, "<H", 4), _tag(data, 257) + 8, "<I", height)


def _more_tiff(data: bytes) -> Iterator[Damaged]:
    first = int.from_bytes(data[4:8], "little")
    yield "many entries", _put(data, first, "<H", 2**16 - 1)
    yield "a directory that is not there", _put(data, 4, "<I", 2**31 - 1)
    yield "huge count of strips", _put(data, _tag(data, 273) + 4, "<I", 2**31 - 1)
    yield "a strip that is not there", _put(data, _tag(data, 273) + 8, "<I", 2**31 - 1)
    yield "huge count of bits", _put(data, _tag(data, 258) + 4, "<I", 2**31 - 1)
    yield "unknown compression", _put(data, _tag(data, 259) + 8, "<H", 34925)


def _resized_webp(data: bytes, width: int, height: int) -> bytes:
    place = data.index(b"\x9d\x01\x2a") + 3
    return _put(data, place, "<HH", min(width, 2**14 - 1), min(height, 2**14 - 1))


def _more_webp(data: bytes) -> Iterator[Damaged]:
    for width, height in ((13000, 13000), (2**24, 2**24), (2**24, 1)):
        flags, sizes = bytes(4), b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
        canvas = b"VP8X" + struct.pack("<I", 10) + flags + sizes + data[12:]
        yield f"canvas of {width} x {height}", b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas
    yield "huge file", _put(data, 4, "<I", 2**32 - 1)
    yield "huge chunk", _put(data, 16, "<I", 2**32 - 1)


_FORMATS = {
    b"\x89PNG": (_resized_png, _more_png),
    b"\xff\xd8": (_resized_jpeg, _more_jpeg),
    b"BM": (_resized_bmp, _more_bmp),
    b"P6": (_resized_ppm, _more_ppm),
    b"II": (_resized_tiff, _more_tiff),
    b"RIFF": (_resized_webp, _more_webp),
}

_KINDS: dict[str, Callable[[bytes, Path], Iterator[Damaged]]] = {
    "state": _state,
    "safetensors": _safetensors,
    "toml": _toml,
    "json": _json,
    "gzip": _gzip,
    "pickle": _pickle,
    "image": _image,
}
