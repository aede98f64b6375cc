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

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.host_copy import copy_in_host_memory


@torch.no_grad()
def copy_blocks(plan: BlockPlan, pairs: Sequence[tuple[Tensor, Tensor]], reverse: bool = False) -> None:
    """Copy all blocks from the first to the second array of every pair.

    Args:
        plan: the blocks.
        pairs: flat contiguous arrays (source, target) of one dtype, of the sizes of the plan or larger, in
            host memory or on a CUDA device: the weights, then each optimizer slot. Entries outside the blocks
            are not written. Copies that involve a CUDA device are in order with its current stream; those
            that write host memory have ended on return.
        reverse: copy from the second to the first array."""
    for source, target in pairs:
        assert source.dtype == target.dtype, f"arrays of {source.dtype} and {target.dtype}"
        for array, size in ((source, plan.source_size), (target, plan.target_size)):
            assert array.dim() == 1, f"an array {list(array.shape)} is not flat"
            assert array.is_contiguous(), "an array has gaps"
            assert array.numel() >= size, f"an array has {array.numel()} entries, the blocks need {size}"
    if not plan.entries:
        return
    if all(array.device.type == "cpu" for pair in pairs for array in pair):
        copy_in_host_memory(plan, pairs, reverse)
    else:
        from offload_sparse.store.copy.device_copy import copy_with_device

        for source, target in pairs:
            copy_with_device(plan, source, target, reverse)


def send_tables(
    plans: Iterable[BlockPlan], device: torch.device, host: Tensor | None = None, to_host: bool = False
) -> None:
    """Send what copies of ``plans`` look up on a CUDA device, in one piece and on the current stream: their
    first copies, which may be on another stream that waits for this one, then send nothing.

    Args:
        plans: of copies on the device.
        host, to_host: or from this array, or to it, as far as the device makes them itself."""
    if device.type == "cuda":
        from offload_sparse.store.copy import device_copy

        plans = [plan for plan in plans if plan.entries]
        if host is not None:
            plans = [plan for plan in plans if device_copy.is_direct(plan, host, device, to_host)]
        device_copy.send_tables(plans, device)
