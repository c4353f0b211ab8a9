"""Random small networks as data, and the strategy that draws them.

A network is a value whose ``repr`` is Python: a failing example is replayed by pasting it. Every drawn
network has sizes that fit, runs forward and twice backward in plain PyTorch, and shrinks to fewer and plainer
parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

Sizes = tuple[int, ...]
_FEWEST_VALUES = 8  # of a channel behind which a batch norm stands: with fewer, its gradient is all rounding


class _Part:
    def __repr__(self) -> str:
        """Return the call that makes this part, without what is as usual."""
        fields = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the same in hypothesis' reports."""
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Conv(_Part):
    """A convolution to ``out`` channels; one number for each dimension."""

    out: int
    kernel: Sizes
    stride: Sizes
    padding: Sizes | str
    dilation: Sizes
    groups: int = 1
    bias: bool = True
    mode: str = "zeros"


@dataclass(frozen=True, repr=False)
class Norm(_Part):
    """A batch norm."""

    affine: bool = True
    tracked: bool = True
    momentum: float | None = 0.1


@dataclass(frozen=True, repr=False)
class Act(_Part):
    """An activation, as a module, a module that works in place, a function or a method."""

    kind: str = "relu"
    form: str = "module"


@dataclass(frozen=True, repr=False)
class Pool(_Part):
    """A maximum or mean over windows; padding is half of the window at most."""

    kind: str
    kernel: int
    stride: int
    padding: int = 0


@dataclass(frozen=True, repr=False)
class Same(_Part):
    """``nn.Identity``."""


@dataclass(frozen=True, repr=False)
class Sum(_Part):
    """The sum of two branches; an empty one is the input itself."""

    left: tuple[Part, ...]
    right: tuple[Part, ...]
    form: str = "+"


@dataclass(frozen=True, repr=False)
class Concat(_Part):
    """The channels of two branches."""

    left: tuple[Part, ...]
    right: tuple[Part, ...]


@dataclass(frozen=True, repr=False)
class Twice(_Part):
    """Parts that are called two times, with the same weights."""

    parts: tuple[Part, ...]


Part = Conv | Norm | Act | Pool | Same | Sum | Concat | Twice


@dataclass(frozen=True, repr=False)
class Head(_Part):
    """From the last feature maps to the outputs.

    Attributes:
        form: ``"flatten"``, ``"torch.flatten"``, ``"reshape"``, ``"pool"``, ``"mean"``, or ``"tokens"``:
            the linear layers for every place, and then their mean.
        widths: of the linear layers, all but the last followed by a ReLU.
        bias: of the linear layers.
    """

    form: str
    widths: Sizes
    bias: bool = True


@dataclass(frozen=True, repr=False)
class Network(_Part):
    """A network and its batch.

    Attributes:
        shape: of the batch: ``(N, C, *sizes)``, with one, two or three sizes.
        parts: one after the other.
        head: behind them.
        seed: of parameters and data.
    """

    shape: Sizes
    parts: tuple[Part, ...]
    head: Head
    seed: int = 0

    @property
    def dims(self) -> int:
        """Dimensions of an image."""
        return len(self.shape) - 2

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return self.head.widths[-1]


def all_parts(network: Network) -> list[Part]:
    """Return the parts of a network, also those inside others."""

    def flat(parts: tuple[Part, ...]) -> list[Part]:
        found: list[Part] = []
        for part in parts:
            found.append(part)
            for name in ("left", "right", "parts"):
                found += flat(getattr(part, name, ()))
        return found

    return flat(network.parts)


@dataclass(frozen=True)
class Choice:
    """What may be drawn.

    Attributes:
        dims: of images.
        activations: their kinds.
        modes: of padding.
        forms: of the head.
        plain: no part that has neither a form in ONNX nor can be folded: batch norms without statistics.
    """

    dims: tuple[int, ...] = (2, 1, 3)
    activations: tuple[str, ...] = ("relu", "relu6", "silu", "tanh")
    modes: tuple[str, ...] = ("zeros", "reflect", "replicate", "circular")
    forms: tuple[str, ...] = ("flatten", "pool", "torch.flatten", "reshape", "mean", "tokens")
    plain: bool = False
    twice: bool = True


EVERYTHING = Choice()
EXPORTABLE = Choice(
    activations=("relu", "relu6"),
    modes=("zeros",),
    forms=("flatten", "pool", "torch.flatten", "reshape", "mean"),
    plain=True,
)


@dataclass
class _Chain:
    """Parts while they are drawn, and the shape behind them."""

    batch: int
    channels: int
    sizes: Sizes
    parts: list[Part] = field(default_factory=list)

    @property
    def values(self) -> int:
        """Values in a channel."""
        return self.batch * math.prod(self.sizes)

    def begin(self) -> _Chain:
        """Return an empty chain that begins here."""
        return _Chain(self.batch, self.channels, self.sizes)

    def add(self, part: Part, channels: int, sizes: Sizes) -> None:
        """Append a part and the shape behind it."""
        self.parts.append(part)
        self.channels, self.sizes = channels, sizes


@st.composite
def networks(draw: st.DrawFn, choice: Choice = EVERYTHING) -> Network:
    """Draw a network with at least one layer."""
    dims = draw(st.sampled_from(choice.dims))
    largest = {1: 12, 2: 7, 3: 4}[dims]
    sizes = tuple(draw(st.lists(st.integers(1, largest), min_size=dims, max_size=dims)))
    chain = _Chain(draw(st.integers(2, 4)), draw(st.integers(1, 4)), sizes)
    shape = (chain.batch, chain.channels, *chain.sizes)
    _extend(draw, chain, choice, draw(st.integers(1, 5)), depth=2)
    widths = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    head = Head(draw(st.sampled_from(choice.forms)), tuple(widths), draw(st.booleans()))
    return Network(shape, tuple(chain.parts), head, draw(st.integers(0, 2**16)))


def _extend(draw: st.DrawFn, chain: _Chain, choice: Choice, count: int, depth: int) -> None:
    """Append up to ``count`` parts."""
    makers: list[Callable[..., None]] = [_conv, _norm, _act, _pool, _same]
    if depth:
        makers += [_sum, _concat] + [_twice] * choice.twice
    for _ in range(count):
        draw(st.sampled_from(makers))(draw, chain, choice, depth)


def _conv(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    dims = len(chain.sizes)
    kernel = _each(draw, st.integers(1, 3), dims)
    dilation = _each(draw, st.sampled_from((1, 1, 2)), dims)
    stride = _each(draw, st.sampled_from((1, 1, 2, 3)), dims)
    padding: Sizes | str = _each(draw, st.integers(0, 2), dims)
    mode = draw(st.sampled_from(choice.modes))
    reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    if draw(st.booleans()):  # of a size that always fits
        padding = tuple(-(-r // 2) for r in reach)
    if mode in ("reflect", "circular") and any(p >= n for p, n in zip(padding, chain.sizes, strict=True)):
        mode = "zeros"
    if max(stride) == 1 and mode == "zeros" and draw(st.booleans()):
        padding = draw(st.sampled_from(("same", "valid")))
    both = {"same": reach, "valid": (0,) * dims}.get(padding) if isinstance(padding, str) else None
    both = tuple(2 * p for p in padding) if both is None else both
    if any(n + b <= r for n, b, r in zip(chain.sizes, both, reach, strict=True)):
        kernel, padding, both, reach = (1,) * dims, (0,) * dims, (0,) * dims, (0,) * dims
    sizes = tuple(
        (n + b - r - 1) // s + 1 for n, b, r, s in zip(chain.sizes, both, reach, stride, strict=True)
    )
    groups, out = _groups(draw, chain.channels, draw(st.integers(1, 6)))
    part = Conv(out, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode)
    chain.add(part, out, sizes)
    if draw(st.booleans()):  # what stands behind most convolutions
        _norm(draw, chain, choice, depth)


def _groups(draw: st.DrawFn, channels: int, out: int) -> tuple[int, int]:
    """Return a number of groups that divides the channels, and a multiple of it near ``out``."""
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    return groups, -(-out // groups) * groups


def _each(draw: st.DrawFn, numbers: st.SearchStrategy[int], dims: int) -> Sizes:
    """Draw a number for each dimension, often the same."""
    if draw(st.booleans()):
        return tuple(draw(st.lists(numbers, min_size=dims, max_size=dims)))
    return (draw(numbers),) * dims


def _norm(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    if chain.values < _FEWEST_VALUES:
        return
    tracked = choice.plain or draw(st.sampled_from((True, True, False)))
    momentum = draw(st.sampled_from((0.1, 0.5, None)))
    chain.add(Norm(draw(st.booleans()), tracked, momentum), chain.channels, chain.sizes)
    if draw(st.booleans()):  # what stands behind most batch norms
        _act(draw, chain, choice, depth)


def _act(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    forms = ["module", "function", "method"]
    if chain.parts and isinstance(chain.parts[-1], Conv | Norm | Sum | Concat | Pool):
        forms += ["in place", "in place function"]  # nobody else reads what the part before has made
    chain.add(
        Act(draw(st.sampled_from(choice.activations)), draw(st.sampled_from(forms))),
        chain.channels,
        chain.sizes,
    )


def _pool(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    kernel = draw(st.integers(1, min(3, *chain.sizes)))
    stride, padding = draw(st.integers(1, 3)), draw(st.integers(0, kernel // 2))
    sizes = tuple((n + 2 * padding - kernel) // stride + 1 for n in chain.sizes)
    chain.add(Pool(draw(st.sampled_from(("max", "avg"))), kernel, stride, padding), chain.channels, sizes)


def _same(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    chain.add(Same(), chain.channels, chain.sizes)


def _sum(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    stride = draw(st.sampled_from((1, 1, 2)))
    left = _branch(draw, chain, choice, stride, depth)
    same = left.channels == chain.channels and stride == 1
    right = (
        chain.begin()
        if same and draw(st.booleans())
        else _branch(draw, chain, choice, stride, depth, left.channels)
    )
    forms = ["+", "torch.add"]
    if isinstance(left.parts[-1], Conv | Norm):
        forms.append("+=")
    part = Sum(tuple(left.parts), tuple(right.parts), draw(st.sampled_from(forms)))
    chain.add(part, left.channels, left.sizes)


def _concat(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    stride = draw(st.sampled_from((1, 2)))
    left, right = (_branch(draw, chain, choice, stride, depth) for _ in range(2))
    chain.add(Concat(tuple(left.parts), tuple(right.parts)), left.channels + right.channels, left.sizes)


def _twice(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    inner = _branch(draw, chain, choice, 1, depth, chain.channels)
    chain.add(Twice(tuple(inner.parts)), chain.channels, chain.sizes)


def _branch(
    draw: st.DrawFn, chain: _Chain, choice: Choice, stride: int, depth: int, out: int | None = None
) -> _Chain:
    """Draw a chain of which all with the same ``stride`` end in the same size, with ``out`` channels."""
    inner = chain.begin()
    _same_size(draw, inner, stride, out)
    for maker in draw(st.lists(st.sampled_from((_norm, _act, _same, _same_size)), max_size=3)):
        if maker is _same_size:
            _same_size(draw, inner, 1, out)
        else:
            maker(draw, inner, choice, depth)
    if depth > 1 and draw(st.integers(0, 3)) == 3:
        if out is None:
            _concat_same(draw, inner, choice, depth - 1)
        else:
            inner.add(Sum((), tuple(_branch(draw, inner, choice, 1, depth - 1, out).parts)), out, inner.sizes)
    return inner


def _concat_same(draw: st.DrawFn, chain: _Chain, choice: Choice, depth: int) -> None:
    right = _branch(draw, chain, choice, 1, depth)
    chain.add(Concat((), tuple(right.parts)), chain.channels + right.channels, chain.sizes)


def _same_size(draw: st.DrawFn, chain: _Chain, stride: int, out: int | None) -> None:
    """Add a convolution after which a size is that before, divided by the stride and rounded up."""
    dims = len(chain.sizes)
    kernel, dilation = draw(st.sampled_from(((1, 1), (3, 1), (3, 2))))
    wanted = out or draw(st.integers(1, 4))
    groups = draw(st.sampled_from([g for g in (1, chain.channels) if wanted % g == 0]))
    each = [(value,) * dims for value in (kernel, stride, dilation * (kernel - 1) // 2, dilation)]
    part = Conv(wanted, *each, groups, draw(st.booleans()))
    chain.add(part, wanted, tuple(-(-n // stride) for n in chain.sizes))
