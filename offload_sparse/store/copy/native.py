"""The native copy kernel for host memory: one loop over work items, on raw addresses, without temporaries.

Kept entries are a few cache lines here and there, which no hardware prefetcher foresees. While it copies a
row the kernel therefore asks for the lines of the next one, which pays most where little is kept. Imports
numba, whose intrinsics name arguments that they do not use.
"""

# ruff: noqa: ARG001

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numba.extending
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from offload_sparse.store.copy import tables as t

_BYTE = ir.IntType(8).as_pointer()
_WORD = ir.IntType(64)
_FLAG = ir.IntType(32)

_LINE = 64
"""Bytes of a cache line."""

Rows = tuple[int, int, int]
"""Addresses of a row in the source, in the target, and of the row to look ahead to."""

intrinsic: Any = numba.extending.intrinsic  # its calls are typed by numba, not by Python


@intrinsic
def load(typingctx: Any, table: Any, index: Any) -> Any:
    """int64 number ``index`` of the array at address ``table``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]))

    return types.intp(types.intp, types.intp), generate


@intrinsic
def copy_bytes(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
    """memcpy; a constant ``size`` becomes a few moves."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(address, _BYTE) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


@intrinsic
def ask_for(typingctx: Any, address: Any) -> Any:
    """Start loading a cache line."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE, _FLAG, _FLAG, _FLAG])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE], kind)
        # For reading, into the second cache level, data.
        builder.call(prefetch, [builder.inttoptr(arguments[0], _BYTE), _FLAG(0), _FLAG(2), _FLAG(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def take(typingctx: Any, address: Any) -> Any:
    """The int64 at ``address``, which is one more from then on, for all threads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", pointer, _WORD(1), "monotonic")

    return types.intp(types.intp), generate


@intrinsic
def drain(typingctx: Any) -> Any:
    """Let all that was written past the caches arrive."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _streaming(bits: int) -> Any:
    """An intrinsic that copies a word of so many bits, written past the caches."""

    @intrinsic
    def stream(typingctx: Any, target: Any, source: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.IntType(bits).as_pointer()
            target, source = (builder.inttoptr(address, kind) for address in arguments)
            store = builder.store(builder.load(source, align=1), target, align=1)
            store.set_metadata("nontemporal", builder.module.add_metadata([_FLAG(1)]))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return stream


stream_word, stream_long = _streaming(32), _streaming(64)


@njit(nogil=True, inline="always")
def row_address(blocks: int, indices: int, block: int, grid: int, row: int, array: int, size: int) -> int:
    base = block * t.BLOCK_WIDTH + grid
    row = load(indices, load(blocks, base + t.GRID_ROWS) + row)
    return array + (load(blocks, base + t.GRID_START) + row * load(blocks, base + t.GRID_ROW_LENGTH)) * size


@njit(nogil=True, inline="always")
def ask_for_all(address: int, width: int) -> None:
    for line in range(0, width, _LINE):
        ask_for(address + line)
    if width > 8:
        ask_for(address + width - 1)


@njit(nogil=True, inline="always")
def copy_units(
    n: int, from_units: int, to_units: int, ahead_units: int, rows: Rows, size: int, width: int
) -> None:
    """Copy ``n`` units of ``width`` bytes, and ask for those of a row to come."""
    source, target, ahead = rows
    for j in range(n):
        ask_for_all(ahead + load(ahead_units, j) * size, width)
        copy_bytes(target + load(to_units, j) * size, source + load(from_units, j) * size, width)


@njit(nogil=True, inline="always")
def stream_units(n: int, from_units: int, rows: Rows, size: int, width: int) -> None:
    """``copy_units`` for a target without gaps, written past the caches; ``width`` is a multiple of 4."""
    source, target, ahead = rows
    longs = width // 8
    for j in range(n):
        offset = load(from_units, j) * size
        ask_for_all(ahead + offset, width)
        for k in range(longs):
            stream_long(target + 8 * k, source + offset + 8 * k)
        if width % 8:
            stream_word(target + 8 * longs, source + offset + 8 * longs)
        target += width


@njit(nogil=True, inline="always")
def copy_item(
    item: int,
    items: int,
    blocks: int,
    indices: int,
    source: int,
    target: int,
    size: int,
    from_grid: int,
    to_grid: int,
    stream: bool,
) -> None:
    entry = item * t.ITEM_WIDTH
    block = load(items, entry + t.ITEM_BLOCK)
    row_end = load(items, entry + t.ITEM_ROW_END)
    unit = load(items, entry + t.ITEM_UNIT)
    n = load(items, entry + t.ITEM_UNIT_END) - unit
    base = block * t.BLOCK_WIDTH
    from_units = indices + 8 * (load(blocks, base + from_grid + t.GRID_UNITS) + unit)
    to_units = indices + 8 * (load(blocks, base + to_grid + t.GRID_UNITS) + unit)
    lengths = load(blocks, base + t.BLOCK_LENGTHS)
    width = load(blocks, base + t.BLOCK_UNIT) * size
    ahead_in_source = load(blocks, base + from_grid + t.GRID_AHEAD) != 0
    ahead_units = from_units if ahead_in_source else to_units
    dense = load(blocks, base + to_grid + t.GRID_DENSE) != 0
    first = load(to_units, 0) * size
    for row in range(load(items, entry + t.ITEM_ROW), row_end):
        from_row = row_address(blocks, indices, block, from_grid, row, source, size)
        to_row = row_address(blocks, indices, block, to_grid, row, target, size)
        following = min(row + 1, row_end - 1)
        if ahead_in_source:
            ahead = row_address(blocks, indices, block, from_grid, following, source, size)
        else:
            ahead = row_address(blocks, indices, block, to_grid, following, target, size)
        rows = (from_row, to_row, ahead)
        if lengths >= 0:
            of_run = indices + 8 * (lengths + unit)
            for j in range(n):
                ask_for(ahead + load(ahead_units, j) * size)
                to = to_row + load(to_units, j) * size
                copy_bytes(to, from_row + load(from_units, j) * size, load(of_run, j) * size)
        elif stream and dense and width % 4 == 0:
            rows = (from_row, to_row + first, ahead)
            if width == 4 and size == 4:  # constant sizes become part of the addresses
                stream_units(n, from_units, rows, 4, 4)
            elif width == 36 and size == 4:  # a 3x3 window of float32
                stream_units(n, from_units, rows, 4, 36)
            else:
                stream_units(n, from_units, rows, size, width)
        elif width == 4 and size == 4:
            if ahead_in_source:
                copy_units(n, from_units, to_units, from_units, rows, 4, 4)
            else:
                copy_units(n, from_units, to_units, to_units, rows, 4, 4)
        elif width == 36 and size == 4:
            copy_units(n, from_units, to_units, ahead_units, rows, 4, 36)
        elif width == 32 and size == 4:  # eight float32
            copy_units(n, from_units, to_units, ahead_units, rows, 4, 32)
        elif width == 4:
            copy_units(n, from_units, to_units, ahead_units, rows, size, 4)
        elif width == 2:
            copy_units(n, from_units, to_units, ahead_units, rows, size, 2)
        elif width == 8:
            copy_units(n, from_units, to_units, ahead_units, rows, size, 8)
        elif width == 18:  # a 3x3 window of bfloat16
            copy_units(n, from_units, to_units, ahead_units, rows, size, 18)
        else:
            copy_units(n, from_units, to_units, ahead_units, rows, size, width)


def copy_call(call: int) -> None:
    """Copy items of the call at this address until none is left; see ``Tables.call``."""
    items, blocks, indices = load(call, t.CALL_ITEMS), load(call, t.CALL_BLOCKS), load(call, t.CALL_INDICES)
    source, target, size = load(call, t.CALL_FROM), load(call, t.CALL_TO), load(call, t.CALL_SIZE)
    from_grid, to_grid = load(call, t.CALL_FROM_GRID), load(call, t.CALL_TO_GRID)
    stream = load(call, t.CALL_STREAM) != 0
    while True:
        item = take(call + 8 * t.CALL_NEXT)
        if item >= load(call, t.CALL_COUNT):
            break
        copy_item(item, items, blocks, indices, source, target, size, from_grid, to_grid, stream)
    drain()


@cache  # the code goes when the compiled function does
def _compiled() -> Any:
    return numba.cfunc(types.void(types.intp), cache=True)(copy_call)


def compiled() -> Callable[[int], None]:
    """``copy_call`` as a function that releases the interpreter lock."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_compiled().address)
