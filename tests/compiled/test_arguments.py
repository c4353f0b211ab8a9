"""Every argument of every function of the module is checked before any memory is touched."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

WHERE, FLOAT32, COUNT, LAYOUT = (1, 0), 0, 8, (4, 2, 1)
ROOM = 1 << 16


class Memory(NamedTuple):
    """A piece of memory that a call needs; one that may be missing is not required."""

    name: str
    bytes: int
    required: bool = True


def tensor(name: str, required: bool = True) -> Memory:
    return Memory(name, 4 * COUNT, required)


def vector(name: str, required: bool = True) -> Memory:
    return Memory(name, 4 * LAYOUT[1], required)


def scalar(name: str, required: bool = True) -> Memory:
    return Memory(name, 4, required)


SCRATCH = Memory("scratch", ROOM, False)  # which the host has of its own
FLAT = {"dtype": FLOAT32, "layout": (1, 1, COUNT)}
CHANNELS = {"dtype": FLOAT32, "layout": LAYOUT, "code_min": 0, "code_max": 7}
QPARAMS = (vector("scale"), vector("zero_point"))
QUANTIZER = (scalar("scale"), scalar("zero_point"))
AFFINE = (vector("weight", False), vector("bias", False))
STATISTICS = (vector("mean"), vector("rstd"))
OPTIONS = {"training": True, "eps": 0.0, "activation": 1, "with_residual": True, "with_ends": False}
QUANTIZED, FLOAT = CHANNELS | OPTIONS | {"quantized": True}, CHANNELS | OPTIONS | {"quantized": False}
Call = tuple[str, dict[str, Any], tuple[Memory, ...]]
CALLS: list[Call] = [
    ("tap_backward", FLAT, (tensor("dy"), scalar("l1"), SCRATCH)),
    ("tap_double_backward", FLAT, (tensor("d_dx", False), scalar("d_l1"), tensor("dy"), tensor("d_dy"))),
    ("fake_quantize_forward", CHANNELS, (*QPARAMS, tensor("x"), tensor("y"), SCRATCH)),
    (
        "fake_quantize_backward",
        CHANNELS,
        (*QPARAMS, tensor("dy"), tensor("x"), tensor("dx"), scalar("l1", False), SCRATCH),
    ),
    (
        "fake_quantize_double_backward",
        CHANNELS,
        (
            *QPARAMS, tensor("d_dx", False), scalar("d_l1", False), tensor("dy"), tensor("x"), tensor("d_dy"),
            SCRATCH,
        ),
    ),
    (
        "batch_norm_act_forward",
        FLOAT | {"with_ends": True},
        (
            *AFFINE, tensor("x"), tensor("residual"), tensor("y"), *STATISTICS, Memory("ends", 16), SCRATCH,
        ),
    ),
    (
        "batch_norm_act_forward",
        QUANTIZED | {"training": False},
        (
            *AFFINE, vector("running_mean"), vector("running_var"), *QUANTIZER, tensor("x"),
            tensor("residual"), tensor("y"), tensor("activated"), *STATISTICS, SCRATCH,
        ),
    ),
    (
        "batch_norm_act_backward",
        QUANTIZED,
        (
            *AFFINE, *STATISTICS, *QUANTIZER, tensor("dy"), tensor("x"), tensor("activated"),
            tensor("dx"), vector("dweight"), vector("dbias"), tensor("dresidual"),
            scalar("l1", False), SCRATCH,
        ),
    ),
    (
        "batch_norm_act_backward",
        FLOAT | {"with_residual": False},
        (
            *AFFINE, *STATISTICS, Memory("ends", 16), Memory("d_ends", 8, False), tensor("dy"), tensor("x"),
            tensor("dx"), vector("dweight"), vector("dbias"), SCRATCH,
        ),
    ),
    (
        "batch_norm_act_double_backward",
        QUANTIZED,
        (
            *AFFINE, *STATISTICS, *QUANTIZER, tensor("d_dx"), vector("d_dweight", False),
            vector("d_dbias", False), tensor("d_dresidual", False), scalar("d_l1", False),
            tensor("dy"), tensor("x"), tensor("activated"),
            tensor("d_dy"), tensor("d_x"), vector("d_weight"), SCRATCH,
        ),
    ),
]  # fmt: skip
PIECE_CALLS: list[tuple[str, tuple[Memory, ...], tuple[Memory, ...]]] = [
    ("l1_norm", (tensor("x"), tensor("v", False)), (scalar("norms"), SCRATCH)),
    ("l1_norm_backward", (tensor("x"), tensor("v")), (scalar("dy"),)),
]


class Room:
    """Memory that is there for every piece, each with an address of its own."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def __call__(self, memory: Memory) -> tuple[int, int]:
        self.kept.append((ctypes.c_double * (ROOM // 8))())
        return ctypes.addressof(self.kept[-1]), memory.bytes


Give = Callable[[Memory], Any]


class Prepared(NamedTuple):
    """A function of the module that only lacks what ``give`` returns for each of its memories."""

    name: str
    memories: tuple[Memory, ...]
    call: Callable[[Any, Give], None]


def _run(name: str, settings: dict[str, Any], memories: tuple[Memory, ...]) -> Prepared:
    def call(loops: Any, give: Give) -> None:
        getattr(loops, name)(WHERE, settings, **{m.name: give(m) for m in memories})

    return Prepared(name, memories, call)


def _run_pieces(name: str, piece: tuple[Memory, ...], memories: tuple[Memory, ...]) -> Prepared:
    def call(loops: Any, give: Give) -> None:
        settings = {"pieces": [(FLOAT32, COUNT, *map(give, piece))], "wide": False}
        getattr(loops, name)(WHERE, settings, **{m.name: give(m) for m in memories})

    return Prepared(name, (*piece, *memories), call)


ALL = [*itertools.starmap(_run, CALLS), *itertools.starmap(_run_pieces, PIECE_CALLS)]
each = pytest.mark.parametrize("function", ALL, ids=[f"{f.name} {i}" for i, f in enumerate(ALL)])


@each
def test_memory_that_is_missing_is_named(function: Prepared, loops: Any) -> None:
    room = Room()
    function.call(loops, room)
    for memory in function.memories:

        def without(m: Memory, missing: Memory = memory) -> Any:
            return None if m is missing else room(m)

        if memory.required:
            reason = rf"{memory.name}.* (is|are) missing|nowhere to put its gradient"
            with pytest.raises(ValueError, match=reason):
                function.call(loops, without)
        else:
            function.call(loops, without)


TAPS = {"dtype": FLOAT32, "numels": [COUNT, COUNT]}
ADDRESSES = 16  # bytes of a list of two


def addresses(room: Room, *tensors: Memory | int) -> tuple[int, int]:
    """Return the memory of a list of addresses: of memory, or as they are given."""
    values = [t if isinstance(t, int) else room(t)[0] for t in tensors]
    room.kept.append((ctypes.c_uint64 * len(values))(*values))
    return ctypes.addressof(room.kept[-1]), 8 * len(values)


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"x": None}, "x is missing"),
        ({"total": None}, "total is missing"),
        ({"ends": None}, "ends is missing"),
        ({"d_ends": None}, "d_ends is missing"),
        ({"x": (tensor("x"), 0)}, "x has no memory"),
        ({"x": (tensor("x"), 2)}, "x is not aligned"),
        ({"dy": (2, 0)}, "dy is not aligned"),
        ({"total": (0, tensor("total"))}, "total has no memory"),
        ({"x": (tensor("x"),)}, f"x has 8 bytes, needs {ADDRESSES}"),
        ({"ends": Memory("ends", 31)}, "ends has 31 bytes, needs 32"),
        ({"d_ends": Memory("d_ends", 15)}, "d_ends has 15 bytes, needs 16"),
    ],
)
def test_addresses_of_several_tensors_are_checked(spoiled: Any, message: str, loops: Any) -> None:
    room = Room()
    given = {
        "dy": (tensor("dy"), 0),
        "x": (tensor("x"), tensor("x")),
        "ends": Memory("ends", 32),
        "d_ends": Memory("d_ends", 16),
        "total": (tensor("total"), tensor("total")),
    }

    def one(m: Any) -> tuple[int, int]:
        return room(m) if isinstance(m, Memory) else addresses(room, *m)

    def run(memory: dict[str, Any]) -> None:
        spans = {name: m and one(m) for name, m in memory.items()}
        loops.taps_add_ends_gradients(WHERE, TAPS, **spans)

    run(given)
    run(given | {"dy": None})
    with pytest.raises(ValueError, match=message):
        run(given | spoiled)


@pytest.mark.parametrize("numels", [[0], [COUNT, -1], [2**61]])
def test_sizes_of_several_tensors_are_checked(numels: list[int], loops: Any) -> None:
    with pytest.raises(ValueError, match=r"negative or too large|no elements"):
        loops.prepare_taps_ends(TAPS | {"numels": numels})


def test_one_cotangent_is_needed(loops: Any) -> None:
    room = Room()
    function = next(f for f in ALL if f.name == "fake_quantize_double_backward")
    with pytest.raises(ValueError, match="d_l1 is missing"):
        function.call(loops, lambda m: None if m.name in ("d_dx", "d_l1") else room(m))


@each
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda address, size: (address, size - 1), "{} has {} bytes, needs {}"),
        (lambda address, size: (0, size), "{} has no memory"),
        (lambda address, size: (address + 1, size), "{} is not aligned"),
        (lambda address, size: (address, size, 0), "{} must be"),
    ],
)
def test_memory_that_cannot_be_is_named(spoil: Any, message: str, function: Prepared, loops: Any) -> None:
    room = Room()
    for memory in function.memories:
        size = memory.bytes if memory is not SCRATCH else needed(function.name, loops)

        def spoiled(m: Memory, bad: Memory = memory, size: int = size) -> Any:
            return spoil(room(m)[0], size) if m is bad else room(m)

        with pytest.raises(ValueError, match=message.format(memory.name, size - 1, size)):
            function.call(loops, spoiled)


def needed(name: str, loops: Any) -> int:
    """Return the bytes of scratch that the function asks for."""
    if name.startswith("l1_norm"):
        pieces = [(FLOAT32, COUNT, (8, 4 * COUNT), None)]
        return int(loops.l1_norm_scratch_bytes({"pieces": pieces, "wide": False}))
    return int(loops.scratch_bytes((1, 1, COUNT) if name.startswith("tap") else LAYOUT))


@pytest.mark.parametrize(("name", "settings", "memories"), CALLS)
def test_settings_that_are_too_few_or_too_many_are_refused(
    name: str, settings: dict[str, Any], memories: tuple[Memory, ...], loops: Any
) -> None:
    for setting in settings:
        fewer = {key: value for key, value in settings.items() if key != setting}
        with pytest.raises(ValueError, match=f"the setting {setting} is missing"):
            _run(name, fewer, memories).call(loops, Room())
    with pytest.raises(ValueError, match="and no others"):
        _run(name, settings | {"numel": COUNT}, memories).call(loops, Room())


def test_a_piece_that_is_too_short_is_refused(loops: Any) -> None:
    with pytest.raises(ValueError, match="a piece must be"):
        loops.l1_norm_scratch_bytes({"pieces": [(FLOAT32, COUNT, (8, 32))], "wide": False})


@pytest.mark.parametrize("tag", [-1, 4])
def test_an_unknown_type_is_refused(tag: int, loops: Any) -> None:
    for name, settings, memories in CALLS:
        with pytest.raises(ValueError, match=f"dtype tag {tag} is not one of"):
            _run(name, settings | {"dtype": tag}, memories).call(loops, Room())
    with pytest.raises(ValueError, match=f"dtype tag {tag} is not one of"):
        loops.l1_norm_scratch_bytes({"pieces": [(tag, COUNT, (8, 8 * COUNT), None)], "wide": False})


@pytest.mark.parametrize("tag", [-1, 3])
def test_an_unknown_activation_is_refused(tag: int, loops: Any) -> None:
    for name, settings, memories in CALLS:
        if name.startswith("batch_norm_act"):
            with pytest.raises(ValueError, match=f"activation tag {tag} is not one of"):
                _run(name, settings | {"activation": tag}, memories).call(loops, Room())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((-1, 2, 4), "negative"),
        ((-2, -2, 2), "negative"),
        ((4, -2, -1), "negative"),
        ((2**40, 2**40, 1), "too large"),
        ((2**60, 1, 1), "too large"),  # in elements it would fit
        ((4, 0, 1), "no elements"),
    ],
)
def test_sizes_that_cannot_be_are_refused(layout: Any, message: str, loops: Any) -> None:
    with pytest.raises(ValueError, match=message):
        loops.scratch_bytes(layout)
    with pytest.raises(ValueError, match="negative"):
        loops.l1_norm_scratch_bytes({"pieces": [(FLOAT32, -1, (8, 8), None)], "wide": False})


def test_scratch_is_bounded_however_many_channels_and_pixels(loops: Any) -> None:
    """At most 256 chunks, of 5 sums in float64, and less than 20 coefficients."""
    pixels, channels = 511, 20_000
    assert loops.scratch_bytes((pixels, channels, 1)) < (256 * 5 + 20) * channels * 8
