"""Runs a model on data and collects the operands of its layers' weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradl1_fast.nn.foreign import Product, product_in
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.quantization._modes import Forward, call, evaluation, run
from gradl1_fast.quantization.bits import Widths, bits
from gradl1_fast.quantization.rounding.second_moments import SecondMoments

__all__ = ["Data"]

_Products = dict[str, list[Product]]


class Data:
    """Runs a model on batches, in float and at given widths.

    Args:
        model: a model in any mode.
        batches: the data, iterated once per collection; an iterator is converted to a list.
        forward: as for :func:`gradl1_fast.calibrate`.
        w: widths of the weights.
        a: widths of the activations.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], forward: Forward | None, w: Widths, a: Widths
    ) -> None:
        self._model, self._forward = model, forward
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        self._widths = w, a

    def reached(self, layers: Mapping[str, QuantizedLayer]) -> list[str]:
        """Return the names of the layers that a value reaches, in the order of first calls."""
        names: dict[str, None] = {}

        def collect(_model: nn.Module, batch: Any) -> None:
            names.update(dict.fromkeys(self._products(layers, batch, None, None)))

        self._run(collect)
        return list(names)

    def in_float(self, layers: Mapping[str, QuantizedLayer]) -> dict[str, SecondMoments]:
        """Return the float moments of each layer that a value reaches, in the order of first calls."""
        moments: dict[str, SecondMoments] = {}

        def collect(_model: nn.Module, batch: Any) -> None:
            for name, products in self._products(layers, batch, None, None).items():
                for product in products:
                    moments.setdefault(name, SecondMoments()).update(product)

        self._run(collect)
        return moments

    def as_rounded(self, layers: Mapping[str, QuantizedLayer], *, renormalise: bool) -> SecondMoments:
        """Return the moments of layers that share a weight, at the widths, paired with those in float.

        Later layers are not run. A call without a counterpart of the same shape in float is paired with
        itself.

        Args:
            layers: the layers, by name.
            renormalise: use the statistics of each batch in batch norms at the widths.
        """
        statistics = _batch_statistics if renormalise else contextlib.nullcontext
        moments = SecondMoments()

        def collect(_model: nn.Module, batch: Any) -> None:
            exact = self._products(layers, batch, None, None)
            counts = {name: len(products) for name, products in exact.items()}
            with statistics(self._model):
                given = self._products(layers, batch, *self._widths, counts)
            for name, products in given.items():
                for i, product in enumerate(products):
                    others = exact.get(name, [])[i : i + 1]
                    fits = bool(others) and others[0].x.shape == product.x.shape
                    moments.update(product, others[0] if fits else product)

        self._run(collect)
        return moments

    def _run(self, collect: Forward) -> None:
        with evaluation(self._model):
            run(self._model, self._batches, "round_weights", collect)

    def _products(
        self,
        layers: Mapping[str, QuantizedLayer],
        batch: Any,
        w: Widths,
        a: Widths,
        counts: Mapping[str, int] | None = None,
    ) -> _Products:
        """Return the products of layers in a forward pass that ends after a number of calls of each layer."""
        products: _Products = {}
        with bits(self._model, w=w, a=a), _noted(layers, products, counts), contextlib.suppress(_Enough):
            call(self._model, batch, self._forward)
        return products


@contextlib.contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make batch norms use the statistics of the batch inside the block, without storing them."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, state in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = state


class _Enough(BaseException):
    """Ends a forward pass early; not an Exception, so that models do not catch it."""


@contextlib.contextmanager
def _noted(
    layers: Mapping[str, QuantizedLayer], products: _Products, counts: Mapping[str, int] | None
) -> Iterator[None]:
    """Record the products of each call of layers inside the block."""

    def hook(name: str) -> Callable[..., None]:
        def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            products.setdefault(name, []).append(product_in(layer, args, kwargs))
            if counts is not None and all(len(products.get(n, ())) == count for n, count in counts.items()):
                raise _Enough

        return note

    hooks = [layer.register_forward_pre_hook(hook(n), with_kwargs=True) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
