"""The ways to train one network that ``bench peers`` compares, each as a step to be timed.

    dense    DistributedDataParallel, everything on the device
    fsdp2    fully_shard with CPUOffloadPolicy: shards of parameters, gradients and momentum on the host
    zero2    DeepSpeed ZeRO-2: momentum and master weights on the host, the optimizer runs there
    zero3    DeepSpeed ZeRO-3: parameters too
    static   the narrow network, written by hand, under DistributedDataParallel
    ours     SparseOffload, whole rounds

All train in float32 with SGD and momentum. The bytes over the bus between host and device are counted from
what a method moves by its design: P parameters of four bytes over R ranks cost ``fsdp2`` and ``zero3`` 3P/R
per step (in for the forward pass, in again for the backward pass, gradients out), ``zero2`` 2P/R (gradients
out, weights in), ours the gathered and scattered slices of a round over its K steps.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from offload_sparse.bench.measure import Batch, loss_of, session_of
from offload_sparse.bench.options import PeersConfig
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import build_on_meta, narrow_module
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.session import Setup
from offload_sparse.workloads.models import build_model

OPTIM = OptimConfig(lr=0.01)
CLASSES, BATCH, RHO = 100, 8, 0.25
_UNIT = 1 << 18
"""Layers of at least so many weights are units of their own under ``fsdp2``; the rest is one unit."""


@dataclass
class Contender:
    """One way to train.

    Attributes:
        compute: forward and backward pass of a step, and its optimizer if that runs on the device.
        update: the optimizer step if it runs on the host.
        resident: tensors that stay on the device though ``update`` touches them.
        on_host: tensors that are on the host though ``compute`` touches them and ``update`` does not.
        bus_bytes: bytes between host and device per step and rank; called after the steps.
        unit: steps that belong together: those of a round."""

    compute: Callable[[], object]
    bus_bytes: Callable[[], float]
    update: Callable[[], object] | None = None
    resident: tuple[Tensor, ...] = ()
    on_host: tuple[Tensor, ...] = ()
    unit: int = 1

    def step(self) -> None:
        self.compute()
        if self.update is not None:
            self.update()


def image_size(config: PeersConfig) -> int:
    """Side of the images in pixels."""
    return 32 if config.model.startswith("offload_sparse/") else 64


def build_network(config: PeersConfig) -> nn.Module:
    """The full network of ``config``. Raises ValueError: the model takes no width."""
    arguments = {"width": config.width} if config.model.startswith("offload_sparse/vgg") else {}
    if config.width != 1 and not arguments:
        raise ValueError(f"{config.model} takes no width; give --width 1")
    return build_model(config.model, CLASSES, 3, image_size(config), **arguments)


def dense(config: PeersConfig, device: torch.device, batch: Batch) -> Contender:
    return data_parallel(build_network(config).to(device), batch)


def static(config: PeersConfig, device: torch.device, batch: Batch) -> Contender:
    """The widths are those of ``rho`` in every group; the full network is never held."""
    full = build_on_meta(partial(build_network, config))
    channel_map = discover(full, (batch[0][:1].to("meta"),))
    module = narrow_module(full, channel_map, channel_map.uniform_mask(RHO)).to_empty(device=device)
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
    return data_parallel(module, batch)


def data_parallel(module: nn.Module, batch: Batch) -> Contender:
    """A network under DistributedDataParallel, in the default process group."""
    device_ids = [batch[0].device] if batch[0].is_cuda else None
    parallel = DistributedDataParallel(module.train(), device_ids=device_ids, gradient_as_bucket_view=True)
    optimizer = _sgd(module)

    def compute() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(parallel, batch).backward()
        optimizer.step()

    return Contender(compute, lambda: 0.0)


def fsdp2(config: PeersConfig, device: torch.device, batch: Batch) -> Contender:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    module = build_network(config).train()
    size = _parameter_bytes(module)
    shard = partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"),
    )
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.numel() >= _UNIT:
            shard(layer)
    shard(module)
    optimizer = _sgd(module, fused=False)  # not implemented for its shards

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    world_size = dist.get_world_size()
    return Contender(lambda: loss_of(module, batch).backward(), lambda: 3 * size / world_size, update)


def zero(stage: int, config: PeersConfig, device: torch.device, batch: Batch) -> Contender:
    deepspeed = _deepspeed()
    module = build_network(config).train()
    size = _parameter_bytes(module)
    # The defaults reserve gigabytes; these hold the largest layer, the least that every library here needs.
    largest = max(p.numel() for p in module.parameters())
    buckets = {"reduce_bucket_size": largest, "allgather_bucket_size": largest}
    if stage == 3:
        buckets = {"reduce_bucket_size": largest, "stage3_prefetch_bucket_size": largest}
        buckets |= {"stage3_max_live_parameters": 2 * largest, "stage3_max_reuse_distance": 0}
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_sgd(module),
        config={
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": stage, "offload_optimizer": host}
            | ({"offload_param": host} if stage == 3 else {})
            | buckets,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 30,
        },
        dist_init_required=False,
    )
    received = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)  # stage 3 offloads into it
    bytes_per_step = (2 if stage == 2 else 3) * size / dist.get_world_size()
    return Contender(
        lambda: engine.backward(loss_of(engine, batch)),
        lambda: bytes_per_step,
        engine.step,
        tuple(module.parameters()) if stage == 2 else (),
        () if received is None else (received,),
    )


def _deepspeed() -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError("deepspeed is not installed; pip install 'offload-sparse[deepspeed]'")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if world_size == 1:  # nothing to exchange: spares compiling its shared-memory collectives, a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def ours(config: PeersConfig, device: torch.device, batch: Batch) -> Contender:
    shape, rounds = batch[0].shape[1:], RoundConfig(k=config.k)
    factory = partial(build_network, config)
    session = session_of(factory, shape, RHO, rounds, OPTIM, device=device, setup=Setup())
    moved = session.transfers
    return Contender(
        lambda: session.step(lambda network: loss_of(network, batch)),
        lambda: (moved.bytes_fetched + moved.bytes_returned) / session.steps_done,
        unit=config.k,
    )


def _sgd(module: nn.Module, fused: bool = True) -> torch.optim.SGD:
    options: Any = {"lr": OPTIM.lr, "momentum": OPTIM.momentum, "weight_decay": OPTIM.weight_decay}
    return torch.optim.SGD(module.parameters(), **options, fused=fused)


def _parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


CONTENDERS: Mapping[str, Callable[[PeersConfig, torch.device, Batch], Contender]] = {
    "dense": dense,
    "fsdp2": fsdp2,
    "zero2": partial(zero, 2),
    "zero3": partial(zero, 3),
    "static": static,
    "ours": ours,
}
