"""Checks that the way a model is distributed allows double backprop."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import _C, Tensor, distributed, nn, strided

__all__ = ["is_distributed", "refuse_shards", "refuse_wrappers"]


def refuse_wrappers(model: nn.Module) -> None:
    """Raise if a module has no second derivative on several ranks or devices.

    Raises:
        ValueError: names the module, and what to use instead.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a model wrapped by it has imported it
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "GradL1: FullyShardedDataParallel does not support double backprop: it frees weights between the "
            "two backward passes; use DistributedDataParallel, or fully_shard without resharding"
        )
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                "GradL1: DataParallel runs copies of the model on several devices, which the penalty does "
                "not measure; use DistributedDataParallel"
            )
    if is_distributed() and distributed.get_world_size() > 1:
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise ValueError(
                    f"GradL1: {name} is a SyncBatchNorm, which has no second derivative on several ranks; "
                    "use BatchNorm2d, with separate statistics on each rank"
                )


def is_distributed() -> bool:
    """Return whether a process group is initialized."""
    return distributed.is_available() and distributed.is_initialized()


def refuse_shards(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if a weight is sharded or freed between the two backward passes.

    Raises:
        RuntimeError: names the weight, and the settings that keep it unsharded.
    """
    sharding = sys.modules.get("torch.distributed.tensor")
    for name, weight in named:
        if sharding is not None and isinstance(weight, sharding.DTensor):
            raise RuntimeError(
                f"GradL1: {name} is sharded before both backward passes are done; keep it unsharded: "
                "fully_shard(..., reshard_after_forward=False), and set_reshard_after_backward(False) until "
                "the penalty is computed"
            )
        if _is_freed(weight):  # reading it would crash the process
            raise RuntimeError(
                f"GradL1: the memory of {name} was freed before both backward passes were done, as "
                "FullyShardedDataParallel does; use DistributedDataParallel or fully_shard"
            )


def _is_freed(weight: Tensor) -> bool:
    if weight.layout != strided or _C._functorch.is_functorch_wrapped_tensor(weight):
        return False
    return weight.numel() > 0 and weight.untyped_storage().size() == 0
