"""Forward passes that tracing would silently change: they modify the model or depend on the caller."""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conversion.models import Base, model


class WithState(Base):
    """A buffer, a number and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4, 1, 1))
        self.calls, self.seen, self.cache = 0, [], None


class BufferChangedInPlace(WithState):
    def features(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1)
        return self.conv2(self.conv1(x) - self.average)


class BufferGivenAnotherValue(WithState):
    def features(self, x: Tensor) -> Tensor:
        self.total = self.total + 1
        return self.conv2(self.conv1(x) * self.total)


class BufferChangedByTheInput(WithState):
    def features(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        self.average.add_(y.detach().mean((0, 2, 3)).view(4, 1, 1))
        return self.conv2(y - self.average)


class ParameterClamped(WithState):
    def features(self, x: Tensor) -> Tensor:
        self.conv1.weight.data.clamp_(-0.05, 0.05)
        return self.conv2(self.conv1(x))


class ParameterPointedElsewhere(WithState):
    def features(self, x: Tensor) -> Tensor:
        self.conv1.weight.data = self.conv1.weight.data.clamp(-0.05, 0.05)
        return self.conv2(self.conv1(x))


class CallsCounted(WithState):
    def features(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv2(self.conv1(x) * self.calls)


class OutputsListed(WithState):
    def features(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        self.seen.append(y.detach())
        return self.conv2(y) * len(self.seen)


class OutputCached(WithState):
    def features(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.conv1(x).detach()
        return self.conv2(self.cache)


class BufferPointedElsewhere(WithState):
    def features(self, x: Tensor) -> Tensor:
        self.average.data = self.average.data * 0.9 + 0.1
        return self.conv2(self.conv1(x) - self.average)


class BuffersChangedTogether(WithState):
    def features(self, x: Tensor) -> Tensor:
        torch._foreach_add_([self.average], 1.0)
        return self.conv2(self.conv1(x) - self.average)


class OutputsInTheDepth(WithState):
    def __init__(self) -> None:
        super().__init__()
        self.kept = {"outputs": deque(maxlen=3)}

    def features(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        self.kept["outputs"].append(y.detach())
        return self.conv2(y) * len(self.kept["outputs"])


class OutputsByName(WithState):
    def __init__(self) -> None:
        super().__init__()
        self.by_name = OrderedDict()

    def features(self, x: Tensor) -> Tensor:
        if "y" not in self.by_name:
            self.by_name["y"] = self.conv1(x).detach()
        return self.conv2(self.by_name["y"])


class TensorMade(WithState):
    def features(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x) + torch.randn(4, 1, 1, dtype=torch.float64))


class TrainOverridden(Base):
    """Keeps its batch norms in evaluation, as detectors do."""

    def train(self, mode: bool = True) -> TrainOverridden:
        super().train(mode)
        self.bn1.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn1(self.conv1(x))))


class MaskOptional(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv1(x)
        if mask is None:
            x = torch.tanh(x) * 2
        return self.fc(self.conv2(x).mean((2, 3)))


class FlagOptional(Base):
    def forward(self, x: Tensor, shape: str = "plain") -> Tensor:
        x = self.conv1(x)
        x = x.tanh() if isinstance(shape, str) else x.relu()
        return self.fc(self.conv2(x).mean((2, 3)))


class DefaultNotTraceable(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and x.sum() > 0:
            x = 2 * x
        return self.fc(self.conv2(self.conv1(x)).mean((2, 3)))


class ScaleOptional(Base):
    """No branch: what is done with the input is the same, with a default or without."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.fc(self.conv2(self.relu(self.bn1(self.conv1(x)))).mean((2, 3)) * (1 - scale * 0.5))


def own_forward() -> nn.Module:
    made = model(lambda m, x: m.conv2(m.conv1(x)))
    original = made.conv1.forward
    made.conv1.forward = lambda x: 2 * original(x)
    return made


def gradients_asked_for(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.conv1(x) * (2 if torch.is_grad_enabled() else 1))


# Ways to a view of what a convolution returns; in place, each is changed together with it.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "adjoint": lambda y: y.adjoint(),
    "as_strided": lambda y: y.as_strided((4,), (1,)),
    "atleast_3d": torch.atleast_3d,
    "broadcast_to": lambda y: torch.broadcast_to(y, y.shape),
    "cpu": lambda y: y.cpu(),
    "data": lambda y: y.data,
    "dropout2d": lambda y: F.dropout2d(y, training=False),
    "getitem": lambda y: y[:, 1:],
    "moveaxis": lambda y: y.moveaxis(1, 2),
    "positive": torch.positive,
    "real": torch.real,
    "swapdims": lambda y: torch.swapdims(y, 1, 2),
    "tuple of tensors": lambda y: operator.add(y.chunk(2, 1), (y,))[2],
    "view of a view": lambda y: y.flatten(1).view_as(y),
}


def changed_view(view: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    def features(m: Base, x: Tensor) -> Tensor:
        y = m.conv1(x)
        view(y).mul_(3)
        return m.conv2(y)

    return lambda: model(features)


_CLASSES = (
    BufferChangedInPlace,
    BufferGivenAnotherValue,
    BufferChangedByTheInput,
    ParameterClamped,
    ParameterPointedElsewhere,
    CallsCounted,
    OutputsListed,
    OutputCached,
    BufferPointedElsewhere,
    BuffersChangedTogether,
    OutputsInTheDepth,
    OutputsByName,
    TensorMade,
    TrainOverridden,
    MaskOptional,
    FlagOptional,
    DefaultNotTraceable,
)
CHANGING: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: cls for cls in _CLASSES},
    "gradients_asked_for": lambda: model(gradients_asked_for),
}
CHANGED_VIEWS = {f"view by {name}": changed_view(view) for name, view in VIEWS.items()}
