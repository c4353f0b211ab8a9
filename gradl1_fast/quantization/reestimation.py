"""Re-estimates batch-norm statistics at given widths."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradl1_fast._shown import Shown
from gradl1_fast.nn.codes import along
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization._modes import Forward, at_present_widths, run
from gradl1_fast.quantization.absorption import is_batch_norm, is_neutral
from gradl1_fast.quantization.folded import FoldedNorm, folded_norm
from gradl1_fast.quantization.kept import (
    Values,
    keep_values,
    mark_weights,
    put_back_float,
    use_after_loading,
    use_values,
    width_of,
)
from gradl1_fast.quantization.sliced import SlicedWeight

__all__ = ["Reestimation", "reestimate_batch_norm"]


@dataclass(repr=False)
class Reestimation(Shown):
    """The result of :func:`reestimate_batch_norm`.

    Attributes:
        norms: the names of batch norms with new statistics; for a folded batch norm, its layer.
        left: the reason for each batch norm that keeps its statistics, by name.
    """

    norms: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def _parts(self) -> Iterator[str]:
        yield f"statistics re-estimated: {len(self.norms)} batch norm(s)"
        yield from (f"{name}: left: {reason}" for name, reason in self.left.items())


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None
) -> Reestimation:
    """Estimate the statistics of batch norms at the current widths of the model, and store them for these.

    The outputs of quantized layers have another mean and variance than in training, so the following batch
    norm no longer normalises them. This call corrects the statistics for the current widths, and they are
    used whenever :func:`gradl1_fast.set_bits` or :func:`gradl1_fast.bits` sets these widths. Other widths and
    float are not changed. Call it once for each width; :func:`gradl1_fast.save_batch_norms` writes all of
    them to a file. Sweeps, export and any-bit files use them. The state dict always contains the statistics
    of float.

    The statistics are the averages over batches of each batch's mean and unbiased variance, as in
    :func:`torch.optim.swa_utils.update_bn`. Only batch norms run in training mode; dropout is off. In float,
    the running statistics themselves are re-estimated, which the model shares with the original one.

    If a batch norm was folded, the output of its layer is normalised through the bias and, with one range per
    output channel, also through the scale of the weight, whose codes do not change. Keep such a model in
    evaluation mode: its weights at these widths are not those of the optimizer.

    In distributed training, every rank calls this with its own data; the statistics are those of all ranks.

    Args:
        model: a converted model at the required widths. Its modes are restored.
        batches: as for :func:`gradl1_fast.calibrate`, without labels: one or two thousand images, in batches
            of at least 100.
        forward: as for :func:`gradl1_fast.calibrate`.

    Returns:
        The names of the batch norms. A warning is given if there was none to estimate.

    Raises:
        TypeError: ``batches`` is a single tensor or mapping.
        ValueError: the model is not converted, there is no batch, or a statistic is NaN or infinite; the
            message names the batch norm. The model is then unchanged.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> conv, norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        >>> model = gl.convert(torch.nn.Sequential(conv, norm, torch.nn.ReLU())).eval()
        >>> images = [torch.randn(100, 3, 8, 8) for _ in range(4)]
        >>> gl.calibrate(model, images)
        >>> with gl.bits(model, w=3, a=3):
        ...     print(gl.reestimate_batch_norm(model, images))
        statistics re-estimated: 1 batch norm(s)
        >>> with gl.bits(model, w=3, a=3):
        ...     y = model(images[0])  # with the statistics of (3, 3)

    Source: Sun et al. 2019, arXiv 1905.07671 (re-estimation after quantization); measured in
    ``docs/before-training.md``.
    """
    if not named_layers(model):
        raise ValueError("reestimate_batch_norm: the model is not converted: call gradl1_fast.convert first")
    use_values(model)  # drops statistics of other weights
    result, width = Reestimation(), width_of(model)
    norms = _norms(model, result, width)
    if not norms and not result.left:
        warnings.warn(
            "reestimate_batch_norm: the model has no batch norm module; nothing to do",
            stacklevel=2,
        )
        return result
    estimates = {name: _of(module) for name, module in norms.items()}
    put_back_float(model)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(at_present_widths(model))
            for estimate in estimates.values():
                stack.enter_context(estimate.taken())
            run(model, batches, "reestimate_batch_norm", forward)
        _keep(model, estimates, width, result)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "reestimate_batch_norm: a batch norm received a single value per channel, which has no variance: "
            "use larger batches, and drop_last=True in a loader to leave out a small last batch"
        ) from error
    finally:
        use_values(model)
    return result


def _norms(model: nn.Module, result: Reestimation, width: str | None) -> dict[str, Any]:
    """Return the estimators, and record why other batch norms cannot be estimated."""
    estimators = {}
    for name, module in model.named_modules():
        if folded_norm(module) is not None:
            if width is None:
                result.left[name] = "holds a folded batch norm, which is exact in float"
            elif isinstance(module.weight_quantizer, SlicedWeight):
                result.left[name] = (
                    "holds a folded batch norm and was loaded from an any-bit file, without a float weight"
                )
            else:
                estimators[name] = module
        elif isinstance(module, _BatchNorm) and not is_neutral(module):
            if module.running_mean is None:
                result.left[name] = "has no running statistics: it always uses those of the batch"
            else:
                estimators[name] = module
        elif is_batch_norm(module) and not is_neutral(module):
            result.left[name] = "is a frozen batch norm, made of buffers"
    return estimators


class _OfNorm:
    """Estimates the statistics of a batch norm by running it in training mode."""

    _names = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        like = norm.running_mean
        self._fresh = torch.zeros_like(like), torch.ones_like(like), like.new_zeros((), dtype=torch.long)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Run the batch norm in training mode with separate statistics inside the block."""
        norm = self.norm
        before, momentum = dict(norm._buffers), norm.momentum
        norm._buffers |= dict(zip(self._names, self._fresh, strict=True))
        norm.momentum, norm.training = None, True
        try:
            yield
            self.moments = norm.running_mean, norm.running_var
            self.count = int(norm.num_batches_tracked)
        finally:
            norm._buffers |= before
            norm.momentum = momentum

    def values(self) -> Values:
        """Return the values to store for the batch norm."""
        return dict(zip(self._names, self.moments, strict=False))


class _OfLayer:
    """Estimates the statistics of a layer with a folded batch norm, and normalises its output meanwhile."""

    def __init__(self, layer: QuantizedLayer, norm: FoldedNorm) -> None:
        self.layer, self.norm = layer, norm
        self.scale = layer.weight_quantizer.axis is not None
        self.count = 0
        self.moments = torch.zeros(()), torch.zeros(())

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Observe the layer inside the block, with the values of float."""
        hook = self.layer.register_forward_hook(self._normalised)
        try:
            yield
        finally:
            hook.remove()

    def _normalised(self, _layer: Any, _args: Any, y: Tensor) -> Tensor:
        values = y.detach().transpose(0, 1).flatten(1).double()
        mean, variance = values.mean(1), values.var(1, correction=0)
        self._add(mean, variance * values.shape[1] / max(values.shape[1] - 1, 1))
        factor, shift = (along(t, y, 1).to(y) for t in self.norm.again(mean, variance, scale=self.scale))
        return y * factor + shift

    def _add(self, mean: Tensor, variance: Tensor) -> None:
        self.count += 1
        old = self.moments
        self.moments = old[0] + (mean - old[0]) / self.count, old[1] + (variance - old[1]) / self.count

    def values(self) -> Values:
        """Return the values to store for the layer."""
        factor, shift = self.norm.again(*self.moments, scale=self.scale)
        return {"factor": factor, "shift": shift} if self.scale else {"shift": shift}


def _of(module: Any) -> _OfNorm | _OfLayer:
    norm = folded_norm(module)
    return _OfNorm(module) if norm is None else _OfLayer(module, norm)


def _keep(model: nn.Module, estimates: dict[str, Any], width: str | None, result: Reestimation) -> None:
    """Store all estimates, or none if one is invalid."""
    modules = dict(model.named_modules())
    results = {}
    for name, estimate in estimates.items():
        if not estimate.count:
            result.left[name] = "no value reached it"
            continue
        estimate.moments = _over_ranks(*estimate.moments)
        if not all(bool(t.isfinite().all()) for t in estimate.moments):
            raise ValueError(f"reestimate_batch_norm: the input of {name!r} holds NaN or infinity")
        results[name] = estimate.values()
    for name, values in results.items():
        if width is None:
            for key, value in values.items():
                getattr(modules[name], key).copy_(value)
        else:
            keep_values(modules[name], width, values)
    result.norms = list(results)
    if width is not None:
        mark_weights(model)
        use_after_loading(model)


def _over_ranks(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance over all ranks, which are weighted equally."""
    if not (dist.is_available() and dist.is_initialized()):
        return mean, variance
    moments = torch.stack((mean, variance, mean.square()))
    dist.all_reduce(moments)
    moments /= dist.get_world_size()
    return moments[0], moments[1] + moments[2] - moments[0].square()
