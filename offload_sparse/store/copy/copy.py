"""Copies of kept entries between the full arrays and narrow ones: one primitive for every transfer.

    gather    shard -> narrow buffer              copy_blocks(plan, [(weights, narrow), (slot, narrow slot)])
    scatter   narrow buffer -> shard              the same with reverse=True
    patch     device buffer -> device buffer      the same between two narrow buffers

    where the arrays are          how they are copied
    both in host memory           the native kernel, by several threads (torch's indexing without numba)
    both on a CUDA device         a Triton kernel (torch's indexing without Triton)
    one in host memory            a Triton kernel that reads or writes page-locked memory directly, or the
                                  native kernel into staging memory and a plain copy: a probe chooses

All ways move bytes unchanged, so they agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from offload_sparse.store.copy import kernels
from offload_sparse.store.copy.blocks import Block, BlockList, Grid
from offload_sparse.store.copy.tables import Packed
from offload_sparse.store.copy.team import run_on_team
from offload_sparse.store.copy.torch_copy import copy_by_torch

__all__ = ["Block", "BlockPlan", "Grid", "copy_blocks", "prepare"]

NATIVE_FROM = 1 << 18
"""Entries from which a transfer is worth loading the native kernel (half a second)."""

THREADS_FROM = 1 << 17
"""Entries from which a transfer is worth waking other threads."""

STREAM_FROM = 32 << 20
"""Bytes from which a narrow array is written past the caches, which could not hold it anyway."""


class BlockPlan(BlockList):
    """Blocks of all tensors, ready to be copied any number of times, for weights and every optimizer slot.

    Attributes (beside those of ``BlockList``):
        packed: tables for the native kernel, made when they are first needed.
    """

    @cached_property
    def packed(self) -> Packed:
        return Packed(self.blocks)


def prepare(entries: int) -> None:
    """Load the native kernel now if transfers of so many entries will want it, rather than in the first
    round.
    """
    if entries >= NATIVE_FROM:
        kernels.load()


@torch.no_grad()
def copy_blocks(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool = False) -> None:
    """Copy all blocks from the first to the second array of every pair.

    Args:
        plan: the blocks.
        pairs: flat contiguous arrays (source, target) of one dtype, in host memory or on a CUDA device: the
            weights, then each optimizer slot. Entries outside the blocks are not written. Copies that
            involve a CUDA device are in order with its current stream; those that write host memory have
            ended on return.
        reverse: copy from the second to the first array.

    Raises:
        ValueError: an array is too small for the blocks, not flat, or of another dtype than its partner.
    """
    for source, target in pairs:
        _check(plan, source, target)
    if not plan.entries:
        return
    if all(array.device.type == "cpu" for pair in pairs for array in pair):
        _copy_in_host_memory(plan, pairs, reverse)
    else:
        from offload_sparse.store.copy.device_copy import copy_with_device

        for source, target in pairs:
            copy_with_device(plan, source, target, reverse)


def _check(plan: BlockPlan, source: Tensor, target: Tensor) -> None:
    if source.dtype != target.dtype:
        raise ValueError(f"arrays of {source.dtype} and {target.dtype} cannot be copied; give one dtype")
    for name, array, size in (("source", source, plan.source_size), ("target", target, plan.target_size)):
        if array.dim() != 1 or not array.is_contiguous():
            raise ValueError(f"the {name} array must be flat and contiguous, not {list(array.shape)}")
        if array.numel() < size:
            raise ValueError(f"the {name} array has {array.numel()} entries, the blocks need {size}")


def _copy_in_host_memory(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool) -> None:
    wanted = kernels.loaded() or plan.entries * len(pairs) >= NATIVE_FROM
    kernel = kernels.load() if wanted else None
    if kernel is None:
        for source, target in pairs:
            copy_by_torch(plan.blocks, source, target, reverse)
    else:
        _copy_natively(kernel, plan, pairs, reverse)


def _copy_natively(
    kernel: kernels.Kernel, plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool
) -> None:
    threads = torch.get_num_threads() if plan.entries * len(pairs) >= THREADS_FROM else 1
    for source, target in pairs:
        size = plan.entries * source.element_size()
        call = plan.packed.call(source, target, reverse, stream=size >= STREAM_FROM)
        run_on_team(kernel, call.ctypes.data, threads)
