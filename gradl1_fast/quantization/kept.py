"""Values that depend on the width: statistics of batch norms, and those of folded batch norms.

A module stores them by width in an attribute. Its state dict always contains the values of float.
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

_KEPT = "values_by_width"  # attribute of a module, so that it is copied and pickled; never changed in place
_IN_FLOAT = "values_in_float"  # the replaced values of float
_IS_KEEPER = "keeps_float_in_its_state_dict"
_IS_ROOT = "uses_values_after_loading"
_MARK = "values_found_with"


def width_of(model: nn.Module) -> str | None:
    """Return a text that identifies the current widths of a model; None for float."""
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
    """Return whether a value is a possible result of :func:`width_of`."""
    try:
        described = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return False
    return isinstance(described, dict) and described.keys() in ({"w", "a"}, {"w", "a", "input"})


def _one(widths: Iterable[int | None]) -> int | str | None:
    """Return the common width, ``"none"`` if there is no quantizer, or ``"mixed"``."""
    distinct: set[int | str | None] = set(widths)
    if len(distinct) > 1:
        return "mixed"
    return distinct.pop() if distinct else "none"


def use_after_loading(model: nn.Module) -> None:
    """Restore the use of values by width after a state dict was loaded."""
    if not vars(model).get(_IS_ROOT):
        vars(model)[_IS_ROOT] = True
        model.register_load_state_dict_post_hook(_after_loading)


def _after_loading(model: nn.Module, _keys: Any) -> None:
    use_values(model)


def keep_values(module: nn.Module, width: str, values: Values) -> None:
    """Store values for a width; they take effect at the next :func:`use_values`."""
    if not vars(module).get(_IS_KEEPER):
        vars(module)[_IS_KEEPER] = True  # stays set even if all values are dropped
        module.register_state_dict_post_hook(_write_float)
        module.register_load_state_dict_pre_hook(_read_float)
    vars(module)[_KEPT] = {**kept_values(module), width: values}


def kept_values(module: nn.Module) -> dict[str, Values]:
    """Return the stored values of a module, by width."""
    return vars(module).get(_KEPT, {})


def put_back_float(model: nn.Module) -> None:
    """Set each module to the values of float, until the next :func:`use_values`."""
    for module in _keepers(model):
        _take_out(module)


def drop_values(model: nn.Module) -> None:
    """Restore the values of float, and drop those of all widths."""
    put_back_float(model)
    for module in _keepers(model):
        del vars(module)[_KEPT]


def use_values(model: nn.Module) -> None:
    """Set each module to the values of the current widths, or to those of float if there are none.

    If weights have changed since the values were measured, all are dropped with a warning.
    """
    keepers = _keepers(model)
    if not keepers:
        return
    for module in keepers:
        if isinstance(module, QuantizedLayer):  # marks refer to the weights in float
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
    """Drop the values of the current widths, and restore those of float."""
    put_back_float(model)
    width = width_of(model)
    for module in _keepers(model):
        vars(module)[_KEPT] = {key: values for key, values in kept_values(module).items() if key != width}


def settle_values(model: nn.Module) -> str:
    """Make the values in use those of float, and drop all others; for a copy of a model.

    Returns:
        ``"in use"`` if the current widths had values, ``"left behind"`` if only other widths had, or an empty
        string.
    """
    keepers = _keepers(model)
    in_use = any(_IN_FLOAT in vars(module) for module in keepers)
    for module in keepers:
        vars(module).pop(_IN_FLOAT, None)
        del vars(module)[_KEPT]
    return "in use" if in_use else "left behind" if keepers else ""


def mark_weights(model: nn.Module) -> None:
    """Record the current weights as those that the stored values belong to."""
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
    """Restore the values of float, on the current device and in the current type of the module.

    Statistics that were updated in training mode at a width are stored for it. If the weights were trained
    meanwhile, they become the statistics of float, since they are the most recent.
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
    """Keep activation ranges and rounded codes valid for a layer that the block changes."""
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
    """Replace the parameter or buffer of a name; a new one becomes a parameter without gradient."""
    *path, last = name.split(".")
    owner = module.get_submodule(".".join(path))
    if last in owner._parameters:
        own = isinstance(value, nn.Parameter)
        owner.register_parameter(last, value if own else nn.Parameter(value, requires_grad=False))  # type: ignore[arg-type]
    else:
        owner._buffers[last] = value


def _write_float(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State-dict hook that stores the values of float at any width."""
    for name, value in vars(module).get(_IN_FLOAT, ({},))[0].items():
        if f"{prefix}{name}" in state:
            state[f"{prefix}{name}"] = value.detach()


def _read_float(module: nn.Module, *_: Any) -> None:
    """Loading hook that makes the loaded values those of float."""
    _take_out(module)
