"""Rounds on a small store in files, killed at a chosen stage."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from offload_sparse.channels.channel_map import ChannelMap, Group
from offload_sparse.channels.selection import Selection
from offload_sparse.store import write_ahead_log
from offload_sparse.store.tensor_file import blocks_of
from offload_sparse.store.tiers import FileTier, Identity, Mode
from offload_sparse.store.weight_store import Ranks, WeightStore
from offload_sparse.store.write_ahead_log import WriteAheadLog

ROUNDS = 4
STAGES = (
    "half_written",
    "written",
    "renamed",
    "logged",
    "half_scattered",
    "between_kinds",
    "scattered",
    "settled",
)
"""In the order in which they happen."""

A, B = torch.arange(12), torch.arange(12, 20)
MAP = ChannelMap(
    (Group("a", 0, 12), Group("b", 12, 8)),
    {"first": (12, 9), "second": (8, 12), "norm": (12,)},
    {"first": (A, None), "second": (B, A), "norm": (A,)},
)


def open_store(folder: Path, mode: Mode, rank: int = 0, world_size: int = 1) -> tuple[WeightStore, FileTier]:
    tier = FileTier(folder, Identity.of("run", MAP, torch.float32, world_size, rank), mode=mode)
    ranks = Ranks(rank, world_size)
    store = WeightStore(MAP, ("first", "second"), ("norm",), ("slot",), ranks=ranks, tier=tier)
    if not tier.filled:
        store.fill((name, torch.ones(shape)) for name, shape in MAP.shapes.items())
        tier.complete({})
    return store, tier


def pieces_of(store: WeightStore, round: int) -> list[tuple[Selection, dict[str, Tensor]]]:
    """Two overlapping subnets of a round and what they were trained to, a function of the round only."""
    generator = torch.Generator().manual_seed(round)
    full = {name: torch.randn(shape, generator=generator) for name, shape in MAP.shapes.items()}
    pieces = []
    for side in range(2):
        mask = torch.rand(20, generator=generator) < 0.5
        mask[[0, 12 + side]] = True
        selection = Selection(MAP, mask)
        values = {
            kind: torch.cat([selection.take(n, full[n] + i).flatten() for n in partition.layout.shapes])
            for i, (kind, partition) in enumerate(store.partitions.items())
        }
        pieces.append((selection, values))
    return pieces


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rounds(folder: Path, stage: str, fatal: int, first: int = 0) -> None:
    """Run the rounds from ``first`` on; die at ``stage`` of round ``fatal``."""
    store, tier = open_store(folder, "resume" if (folder / "rank0").exists() else "new")
    log = WriteAheadLog(folder / "log")
    for round in range(first, ROUNDS):
        dying = stage if round == fatal else ""
        pieces = pieces_of(store, round)
        _append(log, store, round, pieces, dying)
        for number, (selection, arrays) in enumerate(pieces):
            for kind, values in arrays.items():
                if number == 1 and kind == "weights" and dying == "half_scattered":
                    # What a scatter that was torn half-way leaves: some entries new, the others as they were.
                    torn = torch.empty_like(values)
                    store.gather(selection, kind, torn)
                    torn[: values.numel() // 2] = values[: values.numel() // 2]
                    store.scatter(selection, kind, torn)
                    die()
                if number == 1 and kind == "slot" and dying == "between_kinds":
                    die()
                store.scatter(selection, kind, values)
        if dying == "scattered":
            die()
        if round % 2:
            log.settle(tier.sync)
        if dying == "settled":
            die()


def main(arguments: list[str]) -> None:
    """``FOLDER STAGE ROUND``: the rounds from the first on."""
    rounds(Path(arguments[0]), arguments[1], int(arguments[2]))


def _append(
    log: WriteAheadLog,
    store: WeightStore,
    round: int,
    pieces: list[tuple[Selection, dict[str, Tensor]]],
    stage: str,
) -> None:
    state, tensors = {"next": round + 1}, {"s": torch.full((3,), float(round))}
    if stage == "half_written":
        write_ahead_log.blocks_of = _half_written
    if stage in ("written", "renamed"):
        replace = os.replace

        def fatal(source: str, target: str) -> None:
            if stage == "renamed":
                replace(source, target)
            die()

        os.replace = fatal  # type: ignore[assignment]
    log.append(store, pieces, state, tensors)
    if stage == "logged":
        die()


def _half_written(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    content = b"".join(blocks_of(tensors, metadata))
    yield content[: len(content) // 2]
    die()
