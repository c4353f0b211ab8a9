"""Every argument of every function of the module is checked before any memory is touched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
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


SCRATCH = Memory("scratch", ROOM)
HEAD = (WHERE, FLOAT32, LAYOUT)
GRID = (vector("scale"), vector("zero_point"), 0, 7)
QUANTIZER, NO_QUANTIZER = (scalar("scale", False), scalar("zero_point"), 0, 7), (None, None, 0, 0)
AFFINE = (vector("weight", False), vector("bias", False))
GIVEN = (vector("mean"), vector("rstd"), *AFFINE)
RESIDUAL = (True, True, 1, 0.0)
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("tap_backward", (WHERE, FLOAT32, COUNT, tensor("dy"), scalar("l1"), SCRATCH)),
    (
        "tap_double_backward",
        (WHERE, FLOAT32, COUNT, tensor("d_dx", False), scalar("d_l1"), tensor("dy"), tensor("out")),
    ),
    ("fake_quantize_forward", (*HEAD, GRID, tensor("x"), tensor("out"), SCRATCH)),
    (
        "fake_quantize_backward",
        (*HEAD, GRID, tensor("dy"), tensor("x"), tensor("out"), scalar("l1", False), SCRATCH),
    ),
    (
        "fake_quantize_double_backward",
        (
            *HEAD, GRID, tensor("d_dx", False), scalar("d_l1", False),
            tensor("dy"), tensor("x"), tensor("out"), SCRATCH,
        ),
    ),
    ("l1_norm", (WHERE, [(FLOAT32, COUNT, tensor("x"), tensor("v", False))], False, scalar("out"), SCRATCH)),
    ("l1_norm_backward", (WHERE, [(FLOAT32, COUNT, tensor("x"), tensor("v"))], False, scalar("dy"))),
    (
        "batch_norm_act_forward",
        (
            *HEAD, (True, False, 1, 1e-5), (None, None, *AFFINE), NO_QUANTIZER,
            tensor("x"), tensor("residual", False),
            (tensor("y"), None, vector("mean"), vector("rstd")), SCRATCH,
        ),
    ),
    (
        "batch_norm_act_forward",
        (
            *HEAD, (False, False, 1, 1e-5), GIVEN, QUANTIZER, tensor("x"), tensor("residual", False),
            (tensor("y"), tensor("activated"), vector("mean"), vector("rstd")), SCRATCH,
        ),
    ),
    (
        "batch_norm_act_backward",
        (
            *HEAD, RESIDUAL, GIVEN, QUANTIZER, tensor("dy"), tensor("x"), tensor("activated"),
            (tensor("dx"), vector("dweight"), vector("dbias"), tensor("dresidual"), scalar("l1", False)),
            SCRATCH,
        ),
    ),
    (
        "batch_norm_act_double_backward",
        (
            *HEAD, RESIDUAL, GIVEN, QUANTIZER,
            (
                tensor("d_dx"), vector("d_dweight", False), vector("d_dbias", False),
                tensor("d_dresidual", False), scalar("d_l1", False),
            ),
            tensor("dy"), tensor("x"), tensor("activated"),
            (tensor("d_dy"), tensor("d_x"), vector("d_weight")), SCRATCH,
        ),
    ),
]  # fmt: skip


def memories(value: Any) -> Iterator[Memory]:
    if isinstance(value, Memory):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from memories(part)


def filled(value: Any, give: Callable[[Memory], Any]) -> Any:
    """Return the arguments with each piece of memory replaced by what ``give`` returns for it."""
    if isinstance(value, Memory):
        return give(value)
    if isinstance(value, tuple | list):
        return type(value)(filled(part, give) for part in value)
    return value


def shortened(value: Any) -> Iterator[Any]:
    """Yield the arguments with one tuple after the other, of settings or of memory, one entry short."""
    for i, part in enumerate(value):
        if isinstance(part, tuple) and not isinstance(part, Memory) and part is not WHERE:
            yield (*value[:i], part[:-1], *value[i + 1 :])


class Room:
    """Memory that is there for every piece, each with an address of its own."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def __call__(self, memory: Memory) -> tuple[int, int]:
        self.kept.append((ctypes.c_double * (ROOM // 8))())
        return ctypes.addressof(self.kept[-1]), memory.bytes


ids = [f"{name} {i}" for i, (name, _) in enumerate(CALLS)]


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=ids)
def test_memory_that_is_missing_is_named(name: str, arguments: Any, loops: Any) -> None:
    room, call = Room(), getattr(loops, name)
    call(*filled(arguments, room))
    for memory in memories(arguments):
        without = filled(arguments, lambda m, memory=memory: None if m is memory else room(m))
        if memory.required:
            reason = rf"{memory.name}.* (is|are) missing|nowhere to put its gradient"
            with pytest.raises(ValueError, match=reason):
                call(*without)
        else:
            call(*without)


def test_one_cotangent_is_needed(loops: Any) -> None:
    room, name = Room(), "fake_quantize_double_backward"
    without = filled(dict(CALLS)[name], lambda m: None if m.name in ("d_dx", "d_l1") else room(m))
    with pytest.raises(ValueError, match="d_l1 is missing"):
        getattr(loops, name)(*without)


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=ids)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda address, size: (address, size - 1), "{} has {} bytes, needs {}"),
        (lambda address, size: (0, size), "{} has no memory"),
        (lambda address, size: (address + 1, size), "{} is not aligned"),
        (lambda address, size: (address, size, 0), "{} must be"),
    ],
)
def test_memory_that_cannot_be_is_named(
    spoil: Any, message: str, name: str, arguments: Any, loops: Any
) -> None:
    room, call = Room(), getattr(loops, name)
    for memory in memories(arguments):
        size = memory.bytes if memory is not SCRATCH else needed(name, loops)
        bad = filled(
            arguments, lambda m, memory=memory, size=size: spoil(room(m)[0], size) if m is memory else room(m)
        )
        with pytest.raises(ValueError, match=message.format(memory.name, size - 1, size)):
            call(*bad)


def needed(name: str, loops: Any) -> int:
    """Return the bytes of scratch that the function asks for."""
    if name.startswith("l1_norm"):
        return int(loops.l1_norm_scratch_bytes([(FLOAT32, COUNT, (8, 4 * COUNT), None)]))
    return int(loops.scratch_bytes((1, 1, COUNT) if name.startswith("tap") else LAYOUT))


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=ids)
def test_settings_that_are_too_few_are_refused(name: str, arguments: Any, loops: Any) -> None:
    room = Room()
    for short in shortened(arguments):
        with pytest.raises(ValueError, match=r"must be|5 cotangents, 3 results"):
            getattr(loops, name)(*filled(short, room))


@pytest.mark.parametrize("tag", [-1, 4])
def test_an_unknown_type_is_refused(tag: int, loops: Any) -> None:
    for name, arguments in CALLS:
        if not name.startswith("l1_norm"):
            with pytest.raises(ValueError, match=f"dtype tag {tag} is not one of"):
                getattr(loops, name)(arguments[0], tag, *filled(arguments[2:], Room()))
    with pytest.raises(ValueError, match=f"dtype tag {tag} is not one of"):
        loops.l1_norm_scratch_bytes([(tag, COUNT, (8, 8 * COUNT), None)])


@pytest.mark.parametrize("tag", [-1, 3])
def test_an_unknown_activation_is_refused(tag: int, loops: Any) -> None:
    for name, arguments in CALLS:
        if name.startswith("batch_norm_act"):
            options = (*arguments[3][:2], tag, 0.0)
            with pytest.raises(ValueError, match=f"activation tag {tag} is not one of"):
                getattr(loops, name)(*arguments[:3], options, *filled(arguments[4:], Room()))


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
        loops.l1_norm_scratch_bytes([(FLOAT32, -1, (8, 8), None)])


def test_scratch_is_bounded_however_many_channels_and_pixels(loops: Any) -> None:
    """At most 256 chunks, of 5 sums in float64, and less than 20 coefficients."""
    pixels, channels = 511, 20_000
    assert loops.scratch_bytes((pixels, channels, 1)) < (256 * 5 + 20) * channels * 8
