"""Tensors that have other values at some widths: statistics of batch norms, and what stands for them.

A module keeps them by width, beside its tables, and its state dict holds those of float at every width.
"""

from __future__ import annotations

import contextlib
import json
import operator
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from gradl1_fast import _json
from gradl1_fast._checks import some
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization._sites import every_site
from gradl1_fast.quantization.folded import scaled
from gradl1_fast.quantization.freshness import is_fresh, is_rounded, remember_weights
from gradl1_fast.quantization.rounding.kept import rescaled

__all__ = [
    "Values",
    "drop_values",
    "forget_width",
    "is_width",
    "keep_values",
    "kept_values",
    "mark_weights",
    "put_back_float",
    "settle_values",
    "use_after_loading",
    "use_values",
    "width_of",
]

Values = dict[str, Tensor]

_KEPT = "values_by_width"  # in the table of a module, which copies and pickles it; never changed in place
_IN_FLOAT = "values_in_float"  # those in whose place others are now
_IS_KEEPER = "keeps_float_in_its_state_dict"
_IS_ROOT = "uses_values_after_loading"
_MARK = "values_found_with"


def width_of(model: nn.Module) -> str | None:
    """Return the present widths of a model as text, the same for the same widths; None for float."""
    weights = {name: layer.weight_quantizer.bits for name, layer in named_layers(model).items()}
    quantizers = named_quantizers(model).values()
    sites = {name: quantizer.bits for name, quantizer in every_site(model).items()}
    if all(width is None for width in (*weights.values(), *sites.values())):
        return None
    inputs = _one(q.bits for q in quantizers if q.is_input)
    others = _one(q.bits for q in quantizers if not q.is_input)
    activations = {"a": sites} if "mixed" in (inputs, others) else {"a": others, "input": inputs}
    w = _one(weights.values())
    described = {"w": weights if w == "mixed" else w, **activations}
    return _json.dumps(dict(sorted(described.items())))


def is_width(text: object) -> bool:
    """Return whether something is what :func:`width_of` returns for some model."""
    try:
        described = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return False
    return isinstance(described, dict) and described.keys() in ({"w", "a"}, {"w", "a", "input"})


def _one(widths: Iterable[int | None]) -> int | str | None:
    """Return the width of all, ``"none"`` where there are none, or ``"mixed"``."""
    distinct: set[int | str | None] = set(widths)
    if len(distinct) > 1:
        return "mixed"
    return distinct.pop() if distinct else "none"


def use_after_loading(model: nn.Module) -> None:
    """Let a model use its values again after a state dict was loaded into it."""
    if not vars(model).get(_IS_ROOT):
        vars(model)[_IS_ROOT] = True
        model.register_load_state_dict_post_hook(_after_loading)


def _after_loading(model: nn.Module, _keys: Any) -> None:
    use_values(model)


def keep_values(module: nn.Module, width: str, values: Values) -> None:
    """Keep values for a width; they are in use after the next :func:`use_values`."""
    if not vars(module).get(_IS_KEEPER):
        vars(module)[_IS_KEEPER] = True  # once, though all values may be dropped and others kept
        module.register_state_dict_post_hook(_write_float)
        module.register_load_state_dict_pre_hook(_read_float)
    vars(module)[_KEPT] = {**kept_values(module), width: values}


def kept_values(module: nn.Module) -> dict[str, Values]:
    """Return what a module keeps, by width."""
    return vars(module).get(_KEPT, {})


def put_back_float(model: nn.Module) -> None:
    """Give each module the values of float, until the next :func:`use_values`."""
    for module in _keepers(model):
        _take_out(module)


def drop_values(model: nn.Module) -> None:
    """Go back to the values of float, and forget those of all widths."""
    put_back_float(model)
    for module in _keepers(model):
        del vars(module)[_KEPT]


def use_values(model: nn.Module) -> None:
    """Give each module the values for the present widths, or those of float where it keeps none for them.

    A warning says so where weights have changed since they were found; all are then dropped.
    """
    keepers = _keepers(model)
    if not keepers:
        return
    for module in keepers:
        if isinstance(module, QuantizedLayer):  # marks are of the weights in float
            _take_out(module)
    stale = [name or "the layer" for name, m in named_layers(model).items() if not is_fresh(m, _MARK)]
    for module in keepers:
        _take_out(module, trained=bool(stale))
    if stale:
        drop_values(model)
        warnings.warn(
            f"the weights of {some(stale)} have changed since batch norms were re-estimated: the "
            "training statistics are used; call gradl1_fast.reestimate_batch_norm(model, batches) again",
            stacklevel=4,
        )
        return
    width = width_of(model)
    for module in keepers:
        if width is not None and width in kept_values(module):
            _put_in(module, kept_values(module)[width])


def forget_width(model: nn.Module) -> None:
    """Forget the values for the present widths; those of float are in use afterwards."""
    put_back_float(model)
    width = width_of(model)
    for module in _keepers(model):
        vars(module)[_KEPT] = {key: values for key, values in kept_values(module).items() if key != width}


def settle_values(model: nn.Module) -> str:
    """Let the values in use be those of float from now on, and forget all others; for a copy of a model.

    Returns:
        ``"in use"`` where there were some, ``"left behind"`` where all were of other widths, or nothing.
    """
    keepers = _keepers(model)
    in_use = any(_IN_FLOAT in vars(module) for module in keepers)
    for module in keepers:
        vars(module).pop(_IN_FLOAT, None)
        del vars(module)[_KEPT]
    return "in use" if in_use else "left behind" if keepers else ""


def mark_weights(model: nn.Module) -> None:
    """Take the present weights for those that the values kept belong to."""
    remember_weights(named_layers(model).values(), _MARK)


def _keepers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _KEPT in vars(module)]


def _put_in(module: nn.Module, values: Values) -> None:
    tensors = scaled(module, values) if isinstance(module, QuantizedLayer) else values
    before = {name: _get(module, name) for name in tensors}
    vars(module)[_IN_FLOAT] = before, values
    with _rest_kept(module, tensors):
        for name, tensor in tensors.items():
            _set(module, name, tensor.detach().to(before[name], copy=True))


def _take_out(module: nn.Module, *, trained: bool = False) -> None:
    """Put the values of float back, on the device and in the type that the module has now.

    Statistics that passes in training mode have moved at the width are kept for it; where weights were
    trained meanwhile they become those of float: none are newer.
    """
    if _IN_FLOAT not in vars(module):
        return
    before, values = vars(module).pop(_IN_FLOAT)
    moved: Values = {}
    with _rest_kept(module, before):
        for name, value in before.items():
            now = _get(module, name)
            if name in values and not is_rounded(now, values[name]):
                moved[name] = now
                if trained:
                    continue
            same = (value.device, value.dtype) == (now.device, now.dtype)
            _set(module, name, value if same else value.to(now))
    if moved:
        kept = kept_values(module).items()
        vars(module)[_KEPT] = {width: {**v, **moved} if v is values else v for width, v in kept}


@contextlib.contextmanager
def _rest_kept(module: nn.Module, changed: Values) -> Iterator[None]:
    """Let ranges of activations and rounded codes belong to a layer after the block if they did before."""
    if not isinstance(module, QuantizedLayer) or "weight" not in changed:
        yield
        return
    fresh = is_fresh(module)
    with rescaled(module):
        yield
    if fresh:
        remember_weights([module])


def _get(module: nn.Module, name: str) -> Tensor:
    return operator.attrgetter(name)(module)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor into the table that has one of its name; a parameter without a gradient, if a new one."""
    *path, last = name.split(".")
    owner = module.get_submodule(".".join(path))
    if last in owner._parameters:
        own = isinstance(value, nn.Parameter)
        owner.register_parameter(last, value if own else nn.Parameter(value, requires_grad=False))  # type: ignore[arg-type]
    else:
        owner._buffers[last] = value


def _write_float(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Let a state dict hold the network in float, whatever the present widths are."""
    for name, value in vars(module).get(_IN_FLOAT, ({},))[0].items():
        if f"{prefix}{name}" in state:
            state[f"{prefix}{name}"] = value.detach()


def _read_float(module: nn.Module, *_: Any) -> None:
    """Let what is loaded become the network in float."""
    _take_out(module)
