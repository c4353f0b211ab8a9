"""Small forward passes that conversion must support, each with one difficulty."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Base(nn.Module):
    """Layers for four channels; a subclass says what to do with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def model(features: Callable[[Base, Tensor], Tensor], *, name: str = "", **modules: nn.Module) -> nn.Module:
    """Return a :class:`Base` with the given features and further modules."""
    made = type(name or "Model", (Base,), {"features": features})()
    for key, module in modules.items():
        made.add_module(key, module)
    return made


def functional_relu(m: Base, x: Tensor) -> Tensor:
    return m.conv2(F.relu(m.bn1(m.conv1(x)))).relu()


def functional_in_place_relu(m: Base, x: Tensor) -> Tensor:
    x = m.conv1(x)
    F.relu(x, True)
    x = m.conv2(x)
    torch.relu_(x)
    return m.conv2(x).relu_()


def in_place_relu(m: Base, x: Tensor) -> Tensor:
    return m.relu_(m.bn2(m.conv2(m.relu_(m.bn1(m.conv1(x))))))


def in_place_add(m: Base, x: Tensor) -> Tensor:
    y = m.bn1(m.conv1(x))
    y += x
    return m.conv2(m.relu_(y))


def torch_add(m: Base, x: Tensor) -> Tensor:
    x = m.conv1(x)
    return m.conv2(m.relu(torch.add(x, m.bn1(m.conv2(x)))))


def method_add(m: Base, x: Tensor) -> Tensor:
    x = m.conv1(x)
    return m.conv2(m.bn1(m.conv2(x)).add(x).relu())


def method_add_in_place(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.bn1(m.conv1(x)).add_(x).relu_())


def add_with_factor(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(torch.add(m.bn1(m.conv1(x)), x, alpha=2)))


def add_to_itself(m: Base, x: Tensor) -> Tensor:
    y = m.bn1(m.conv1(x))
    return m.conv2(m.relu(y + y))


def add_number(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + x.shape[1]))


def broadcast_residual(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + x.mean((2, 3), keepdim=True)))


def broadcast_batch_norm(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x).mean((2, 3), keepdim=True)) + x))


def two_batch_norms(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.bn1(m.conv1(x)) + m.bn2(x)))


def pre_activation(m: Base, x: Tensor) -> Tensor:
    x = m.conv1(x)
    y = m.relu_(x)  # changes what is added below
    return m.conv2(y) + x


def pre_activation_of_the_input(m: Base, x: Tensor) -> Tensor:
    y = m.bn1(x)
    z = m.conv1(m.relu_(y))
    return z + y


def shared_batch_norm(m: Base, x: Tensor) -> Tensor:
    return m.bn1(m.conv2(m.relu(m.bn1(m.conv1(x)))))


def conv_called_twice(m: Base, x: Tensor) -> Tensor:
    return m.conv1(m.relu(m.bn1(m.conv1(x))))


def batch_norm_with_two_readers(m: Base, x: Tensor) -> Tensor:
    y = m.bn1(m.conv1(x))
    return m.conv2(m.relu(y)) + y


def batch_norm_alone(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.bn1(m.conv1(x)))


def relu6(m: Base, x: Tensor) -> Tensor:
    return F.relu6(8 * m.bn2(m.conv2(F.relu6(m.bn1(m.conv1(x)), inplace=True))))


def discarded_batch_norm(m: Base, x: Tensor) -> Tensor:
    m.bn2(x)  # only its statistics matter
    return m.conv1(x)


def method_names(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.conv1(x)).to(torch.float64))


def convolution_called_squeeze(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.squeeze(m.conv1(x)))


def detached_branch(m: Base, x: Tensor) -> Tensor:
    x = m.conv1(x)
    return m.conv2(m.relu(x) + x.detach())


def flattened_and_plain(m: Base, x: Tensor) -> Tensor:
    y = m.relu(m.bn1(m.conv1(x)))
    return m.conv2(y) * m.wide(y.flatten(1)).reshape(-1, 4, 1, 1)


def identities(m: Base, x: Tensor) -> Tensor:
    y = m.relu(m.between(m.bn1(m.conv1(x))))
    return m.relu(m.between(m.bn2(m.conv2(y))) + m.between(y))


PLANNED: dict[str, Callable[[], nn.Module]] = {
    f.__name__: lambda f=f: model(f)
    for f in (
        functional_relu,
        functional_in_place_relu,
        in_place_relu,
        in_place_add,
        torch_add,
        method_add,
        method_add_in_place,
        add_with_factor,
        add_to_itself,
        add_number,
        broadcast_residual,
        broadcast_batch_norm,
        two_batch_norms,
        pre_activation,
        pre_activation_of_the_input,
        shared_batch_norm,
        conv_called_twice,
        batch_norm_with_two_readers,
        batch_norm_alone,
        relu6,
        discarded_batch_norm,
        method_names,
        detached_branch,
    )
}
PLANNED["squeeze"] = lambda: model(convolution_called_squeeze, squeeze=nn.Conv2d(4, 4, 1))
PLANNED["identities"] = lambda: model(identities, between=nn.Identity())
PLANNED["flattened_and_plain"] = lambda: model(flattened_and_plain, wide=nn.Linear(100, 4))


def changed_under_another_name(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    z = y
    z += 1
    return m.conv2(y)


def changed_through_a_view(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    y.flatten(1).mul_(2)
    return m.conv2(y)


def view_of_what_changes(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    flat = y.view(y.shape)
    torch.relu_(y)
    return m.conv2(flat)


def filled(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    y[:, :1].fill_(2)
    return m.conv2(y)


def assigned(m: Base, x: Tensor) -> Tensor:
    y = m.conv1(x)
    y[:, :1] = 2
    return m.conv2(y)


def written_into(m: Base, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.empty_like(x)
        torch.mul(x, 2, out=y)
    return m.conv2(y)


def without_gradient(m: Base, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.conv1(x)
    return m.conv2(y)


def data_dependent(m: Base, x: Tensor) -> Tensor:
    return m.conv2(m.relu(m.conv1(x))) if x.sum() > -1e9 else x


def under_autocast(m: Base, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.conv1(x)
    return m.conv2(y)


def functional_dropout(m: Base, x: Tensor) -> Tensor:
    return m.conv2(F.dropout(m.relu(m.bn1(m.conv1(x))), training=m.training))


NOT_PLANNED: dict[str, Callable[[], nn.Module]] = {
    f.__name__: lambda f=f: model(f)
    for f in (
        changed_under_another_name,
        changed_through_a_view,
        view_of_what_changes,
        filled,
        assigned,
        written_into,
        without_gradient,
        data_dependent,
        under_autocast,
        functional_dropout,
    )
}
MODELS = {**PLANNED, **NOT_PLANNED}
