"""Copies of blocks in which a CUDA device takes part. Not yet run on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload_sparse.store.copy import probe
from offload_sparse.store.copy.blocks import Block, BlockList, Grid
from offload_sparse.store.copy.torch_copy import copy_by_torch

if TYPE_CHECKING:
    from offload_sparse.store.copy.copy import BlockPlan
    from offload_sparse.store.copy.triton_kernels import DeviceTables

STAGE = 1 << 23
"""Entries staged at a time: while one part crosses the bus, the next is gathered."""

_tables: weakref.WeakKeyDictionary[BlockList, dict[torch.device, DeviceTables]] = weakref.WeakKeyDictionary()
_stages: weakref.WeakKeyDictionary[BlockList, list[Stage]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Stage:
    """Some blocks of a plan, moved through memory in which they lie packed, one after the other.

    Attributes:
        source: source array -> packed.
        target: packed -> target array.
    """

    source: BlockPlan
    target: BlockPlan


def copy_with_device(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool) -> None:
    """``transfer.copy_blocks`` for one pair of arrays of which at least one is on a CUDA device."""
    device = source.device if source.device.type == "cuda" else target.device
    host = [array for array in (source, target) if array.device.type == "cpu"]
    if not host:
        _on_device(plan, source, target, reverse)
        return
    if host[0].is_pinned() and probe.zero_copy_is_faster(device):
        _by_triton(plan, source, target, reverse, device)
        if (source if reverse else target) is host[0]:
            torch.cuda.current_stream(device).synchronize()
        return
    copy_staged(plan, source, target, reverse)


def copy_staged(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool) -> None:
    """Copy through packed memory: blocks are moved by the processor that holds them, runs cross the bus."""
    for stage in _stages_of(plan):
        first, second = (stage.target, stage.source) if reverse else (stage.source, stage.target)
        arrays = (target, source) if reverse else (source, target)
        _send(first, second, *arrays, reverse)


def _send(first: BlockPlan, second: BlockPlan, giver: Tensor, taker: Tensor, reverse: bool) -> None:
    """Pack at the giver, cross, unpack at the taker; runs need neither packing nor unpacking."""
    packed = _run_of(first, giver, reverse)
    if packed is None:
        # Page-locked memory comes from torch's cache, which does not reuse it before the copy has ended.
        packed = torch.empty(first.entries, dtype=giver.dtype, device=giver.device, pin_memory=_pins(giver))
        _copy(first, giver, packed, reverse)
    run = _run_of(second, taker, not reverse)
    if run is not None:
        run.copy_(packed, non_blocking=taker.device.type == "cuda")
        return
    arrived = torch.empty(second.entries, dtype=taker.dtype, device=taker.device, pin_memory=_pins(taker))
    arrived.copy_(packed, non_blocking=taker.device.type == "cuda")
    _copy(second, arrived, taker, reverse)


def _run_of(plan: BlockPlan, array: Tensor, target_side: bool) -> Tensor | None:
    run = plan.target_run if target_side else plan.source_run
    return None if run is None else array[run[0] : run[1]]


def _copy(plan: BlockPlan, giver: Tensor, taker: Tensor, reverse: bool) -> None:
    from offload_sparse.store.copy.copy import copy_blocks

    copy_blocks(plan, [(taker, giver) if reverse else (giver, taker)], reverse)


def _pins(array: Tensor) -> bool:
    return array.device.type == "cpu" and torch.cuda.is_available()


def _on_device(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool) -> None:
    if probe.has_triton():
        _by_triton(plan, source, target, reverse, source.device)
    else:
        copy_by_torch(plan.blocks, source, target, reverse)


def _by_triton(plan: BlockPlan, source: Tensor, target: Tensor, reverse: bool, device: torch.device) -> None:
    from offload_sparse.store.copy.triton_kernels import DeviceTables, launch

    known = _tables.setdefault(plan, {})
    if device not in known:
        known[device] = DeviceTables(plan.blocks, device)
    with torch.cuda.device(device):
        launch(known[device], source, target, reverse)


def _stages_of(plan: BlockPlan) -> list[Stage]:
    from offload_sparse.store.copy.copy import BlockPlan

    if plan not in _stages:
        stages, part, entries = [], list[Block](), 0
        for block in plan.blocks:
            if part and entries + block.entries > STAGE:
                stages.append(part)
                part, entries = [], 0
            part.append(block)
            entries += block.entries
        groups = [*stages, part] if part else stages
        _stages[plan] = [Stage(*(BlockPlan(side) for side in _halves(group))) for group in groups]
    return _stages[plan]


def _halves(blocks: Sequence[Block]) -> tuple[list[Block], list[Block]]:
    into, out_of, at = [], [], 0
    for block in blocks:
        packed = Grid(at, block.n_units * block.unit)
        into.append(replace(block, target=packed))
        out_of.append(replace(block, source=packed))
        at += block.entries
    return into, out_of
