"""Two processes over gloo that shard a model; a script for test_distributed, which compares results."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl

RANKS = 2
DATA = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(5)).double(), torch.arange(12) % 4
LAMBDAS = {"both": (0.05, 0.03), "weights": (0.05, 0.0), "activations": (0.0, 0.03)}


def network() -> nn.Module:
    torch.manual_seed(7)
    inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU6())
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), inner, nn.Flatten(), nn.Linear(16, 4)).double()


def loss_of(model: nn.Module, rank: int) -> Tensor:
    x, y = (t[rank::RANKS] for t in DATA)
    return F.cross_entropy(model(x), y)


def sharded(each_layer: bool, whole_after_forward: bool) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = gl.convert(network())
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    layers = [m for m in model.modules() if isinstance(m, gl.QConv2d | gl.QLinear)] if each_layer else []
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=not whole_after_forward)
    return model


def step(model: nn.Module, penalty: gl.GradL1, rank: int) -> None:
    """Add the gradients of a step as the documentation says: no resharding until the penalty is there."""
    model.set_reshard_after_backward(False)
    loss = loss_of(model, rank)
    extra = penalty(loss)
    model.set_reshard_after_backward(True)
    (loss + extra).backward()


def gradients(rank: int, each_layer: bool, lambdas: tuple[float, float]) -> list[Tensor]:
    model = sharded(each_layer, True)
    params = list(model.parameters())
    step(model, gl.GradL1(model, *lambdas), rank)
    return [p.grad.full_tensor() for p in params]


def weights_after_steps(rank: int) -> list[Tensor]:
    model = sharded(True, True)
    params, penalty = list(model.parameters()), gl.GradL1(model, *LAMBDAS["both"])
    optimizer = torch.optim.SGD(params, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step(model, penalty, rank)
        optimizer.step()
    return [p.detach().full_tensor() for p in params]


def said(call: Callable[[], object]) -> str:
    """Return what the error of a call says; nothing if it raises none."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def penalised(rank: int, lambdas: tuple[float, float], whole_after_forward: bool) -> None:
    model = sharded(True, whole_after_forward)
    gl.GradL1(model, *lambdas)(loss_of(model, rank))


def wrapped_afterwards(rank: int, original: bool, lambdas: tuple[float, float]) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = gl.convert(network())
    penalty = gl.GradL1(model, *lambdas)
    outer = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    loss = loss_of(outer, rank)
    (loss + penalty(loss)).backward()


def with_synchronised_norms() -> None:
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    gl.GradL1(gl.convert(nn.SyncBatchNorm.convert_sync_batchnorm(plain)), 0.1, 0.1)


def with_a_static_graph(rank: int) -> None:
    model = gl.convert(network())
    penalty = gl.GradL1(model, 0.1, 0.1)
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)
    loss = loss_of(wrapped, rank)
    (loss + penalty(loss)).backward()


def refusals(rank: int) -> dict[str, str]:
    both, activations = LAMBDAS["both"], LAMBDAS["activations"]
    return {
        "after the forward pass": said(lambda: penalised(rank, both, False)),
        "after the first backward pass": said(lambda: penalised(rank, both, True)),
        "activations alone": said(lambda: penalised(rank, activations, False)),
        "FSDP1 afterwards": said(lambda: wrapped_afterwards(rank, True, both)),
        "FSDP1 afterwards, activations": said(lambda: wrapped_afterwards(rank, True, activations)),
        "FSDP1 afterwards, flat": said(lambda: wrapped_afterwards(rank, False, both)),
        "FSDP1 afterwards, flat, activations": said(lambda: wrapped_afterwards(rank, False, activations)),
        "SyncBatchNorm": said(with_synchronised_norms),
        "static_graph": said(lambda: with_a_static_graph(rank)),
    }


def one_rank(rank: int, folder: str, port: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    dist.init_process_group("gloo")
    found: dict[str, object] = {
        f"{name} {each_layer}": gradients(rank, each_layer, lambdas)
        for name, lambdas in LAMBDAS.items()
        for each_layer in (False, True)
    }
    found["trained"] = weights_after_steps(rank)
    found["refused"] = refusals(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def alone(model: nn.Module, lambdas: tuple[float, float]) -> list[Tensor]:
    """Return the mean over the ranks' gradients, computed by one process."""
    for p in model.parameters():
        p.grad = None
    penalty = gl.GradL1(model, *lambdas)
    for rank in range(RANKS):
        loss = loss_of(model, rank)
        ((loss + penalty(loss)) / RANKS).backward()
    return [p.grad for p in model.parameters()]


def trained_alone() -> list[Tensor]:
    model = gl.convert(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        alone(model, LAMBDAS["both"])
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(one_rank, (folder, sys.argv[2]), nprocs=RANKS)
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    expected: dict[str, object] = {
        name: alone(gl.convert(network()), lambdas) for name, lambdas in LAMBDAS.items()
    }
    expected["plain"] = alone(gl.convert(network()), (0.0, 0.0))
    expected["trained"] = trained_alone()
    torch.save({"found": found, "expected": expected}, sys.argv[1])


if __name__ == "__main__":
    main()
