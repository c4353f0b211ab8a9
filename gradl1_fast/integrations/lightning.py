"""The penalty in Lightning's automatic optimization. Requires ``pip install '.[lightning]'``.

Lightning calls ``loss.backward`` itself, and a callback's ``on_before_backward`` cannot replace the loss. The
only hook that can change it is the module's ``backward(loss)``, so the callback wraps this hook while ``fit``
runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradl1_fast import _checks as check
from gradl1_fast._extras import install
from gradl1_fast.penalty import GradL1

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
except ImportError as error:
    raise ImportError(
        f"gradl1_fast.integrations.lightning needs the package lightning: {install('lightning')}"
    ) from error

__all__ = ["GradL1Callback"]


class GradL1Callback(Callback):  # type: ignore[misc, unused-ignore]  # untyped where lightning is absent
    """Adds a penalty to the loss of each training step, before Lightning's backward pass.

    Convert the layers of the module and create the penalty for them before ``fit``. The module's
    ``training_step`` returns the loss without the penalty.

    The penalty is logged as ``gradl1_penalty``. Lightning's factors on the loss, from a ``GradScaler`` and
    ``accumulate_grad_batches``, apply to the penalty too.

    Args:
        penalty: a penalty with ``method="exact"`` for layers of the trained module.
        first_epoch: the first epoch with the penalty, counted from 0 as in Lightning.

    Raises:
        TypeError: the penalty is not a :class:`~gradl1_fast.GradL1`, or ``first_epoch`` is not an int.
        ValueError: the penalty is a finite difference, which needs a closure and two passes, or
            ``first_epoch`` is negative.

    ``fit`` raises a RuntimeError if the penalty could be lost: with manual optimization, with a strategy
    other than a single device or DDP, if the penalty is for layers of another module, and after a backward
    pass that bypassed the module's hook. Under DDP the penalty is the mean over the ranks.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> network = gl.convert(torch.nn.Sequential(torch.nn.Linear(4, 2)))  # the module has it
        >>> penalty = gl.GradL1(network, lambda_w=0.01, lambda_a=0, scale="step")
        >>> callback = GradL1Callback(penalty, first_epoch=15)  # for Trainer(callbacks=[callback])
    """

    def __init__(self, penalty: GradL1, first_epoch: int = 0) -> None:
        if not isinstance(penalty, GradL1):
            raise TypeError(f"GradL1Callback: penalty must be a GradL1, got {type(penalty).__name__}")
        if penalty.method != "exact":
            raise ValueError(
                "GradL1Callback: the finite difference calls a closure twice, which Lightning's automatic "
                "optimization does not support; use method='exact', or manual optimization"
            )
        self.penalty = penalty
        self.first_epoch = check.count("GradL1Callback: first_epoch", first_epoch, smallest=0)
        self._value: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the penalty cannot be lost, and wrap the module's ``backward``."""
        _check_strategy(trainer)
        _check_module(self.penalty, pl_module)
        own = pl_module.backward

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if trainer.current_epoch >= self.first_epoch:
                penalty = self.penalty(loss)
                self._value = penalty.detach()
                loss = loss + penalty
            own(loss, *args, **kwargs)

        # Set on the instance, not the class. A plain function, because copying a module keeps it unchanged.
        vars(pl_module)["backward"] = backward

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Disable the penalty in epochs before ``first_epoch``."""
        self.penalty.enabled = trainer.current_epoch >= self.first_epoch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Reset the last value, so that a missing one is detected."""
        self._value = None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the penalty was part of this backward pass, and log it."""
        if trainer.current_epoch < self.first_epoch:
            return
        if self._value is None:
            raise RuntimeError(
                "GradL1Callback: a backward pass bypassed LightningModule.backward and left out the penalty "
                f"({type(trainer.strategy).__name__}, {type(trainer.precision_plugin).__name__}): "
                "something replaced the module's backward during fit"
            )
        pl_module.log("gradl1_penalty", self._value)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's own ``backward``."""
        _release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the module's own ``backward`` after an error."""
        _release(pl_module)


def _release(module: LightningModule) -> None:
    vars(module).pop("backward", None)


def _check_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):
        raise RuntimeError(
            f"GradL1Callback: {type(strategy).__name__} is not supported: double backprop is known to be "
            "correct only on one device and under DDP; sharded strategies free weights between the two passes"
        )


def _check_module(penalty: GradL1, module: LightningModule) -> None:
    if not module.automatic_optimization:
        raise RuntimeError(
            "GradL1Callback: the module uses manual optimization; call "
            "self.manual_backward(loss + penalty(loss)) in its training_step, without this callback"
        )
    if "backward" in vars(module):
        raise RuntimeError("GradL1Callback: the backward of this module was already replaced")
    inside = {id(each) for each in module.modules()}
    measured = {**penalty.layers, **{site.name: site.quantizer for site in penalty.sites}}
    outside = [name for name, each in measured.items() if id(each) not in inside]
    if outside:
        raise RuntimeError(
            f"GradL1Callback: the penalty measures layers outside of this module: {', '.join(outside)}; "
            "create it for the converted network that the module holds"
        )
