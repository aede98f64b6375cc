"""The write-ahead log of a store in files: a crash in the middle of a scatter never leaves a torn store.

    append   round-12.safetensors.tmp ─ fsync ─ rename ─ fsync of the folder   the store has not changed yet
    scatter  the same values go to their places in the mapped files            torn if the process dies here
    start    every log that is left is applied again, in order                 whole again

Logs are numbered in the order in which they were written; none replaces another.

A log holds what a scatter is about to write (this rank's run of each narrow buffer, with the masks that place
it) and the small state that belongs to it. Applying it twice gives the same bits. The system writes mapped
files back when it likes, so logs are kept until ``settle`` has waited for the store to reach the disk: a kill
and a loss of power are both survived.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload_sparse.channels.require import Explained
from offload_sparse.channels.selection import Selection
from offload_sparse.store.files import make_folder, sync_folder, write_file
from offload_sparse.store.tensor_file import blocks_of
from offload_sparse.store.weight_store import WeightStore

_NAME = re.compile(r"round-(\d+)\.safetensors")
_ALONE = "alone"


@dataclass(frozen=True)
class Entry:
    """What came with the newest log: the JSON and the tensors that the caller gave."""

    state: dict[str, Any]
    tensors: dict[str, Tensor]


class WriteAheadLog:
    """The log of one rank, a file per entry in ``folder``, which is made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)
        for left in folder.glob("*.tmp"):  # of a process that died while it wrote
            left.unlink()

    def append(
        self,
        store: WeightStore,
        pieces: Sequence[tuple[Selection, Mapping[str, Tensor]]],
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        alone: bool = False,
    ) -> None:
        """Log what is about to be scattered into ``store`` (of which only the layout is read): by selection
        and kind whole narrow flat buffers, on any device; with small JSON and tensors that are handed back
        with it, under the number behind the newest. ``alone``: the store on the disk holds all else, and
        earlier logs no longer count. When this returns, the log outlives the process and the machine. Raises
        OSError: it cannot be written."""
        round = max(self.rounds(), default=-1) + 1
        content: dict[str, Tensor] = {f"state.{name}": t for name, t in (tensors or {}).items()}
        for index, (selection, arrays) in enumerate(pieces):
            content[f"{index}.mask"] = selection.mask
            for kind, values in arrays.items():
                low, high = own_segment(store, selection, kind)
                content[f"{index}.values.{kind}"] = values[low:high]
        metadata = {"round": str(round), "state": json.dumps(state)} | ({_ALONE: "true"} if alone else {})
        write_file(self._path(round), blocks_of(content, metadata))

    def rounds(self) -> list[int]:
        """The numbers of the logs that are there, oldest first."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> Entry | None:
        """What came with the newest log; None when there is none. Raises ValueError: the log cannot be read.
        """
        if not (rounds := self.rounds()):
            return None
        with self._open(rounds[-1]) as log:
            names = [name for name in log.keys() if name.startswith("state.")]  # noqa: SIM118 - no mapping
            tensors = {name.removeprefix("state."): log.get_tensor(name).clone() for name in names}
            return Entry(self._state(log.metadata() or {}), tensors)

    def _state(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        try:
            state = json.loads(metadata["state"])
        except (ValueError, KeyError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise ValueError(f"a log in {self.folder} does not say where its run was; it is damaged")
        return state

    def replay(self, store: WeightStore) -> Entry | None:
        """Apply every log that counts, oldest first, and hand back what came with the newest. Raises
        ValueError: a log cannot be read, or is of another network."""
        counting: list[int] = []
        for round in reversed(self.rounds()):
            counting.insert(0, round)
            with self._open(round) as log:
                if _ALONE in (log.metadata() or {}):
                    break
        for round in counting:
            for selection, kind, values in self.pieces(round, store):
                self._scatter(store, selection, kind, values)
        return self.latest()

    def drop_after(self, round: int) -> None:
        """Delete the logs after ``round``: another rank never wrote them, so nobody scattered."""
        for later in self.rounds():
            if later > round:
                self._path(later).unlink()
        sync_folder(self.folder)

    def settle(self, sync: Callable[[], None]) -> None:
        """Delete all logs but the newest, after ``sync`` has brought the store to the disk.

        Called before the newest one is scattered or after; the newest stays, since its state is needed."""
        old = self.rounds()[:-1]
        if old:
            sync()
            for round in old:  # one by one: a log that came back without the next would undo what that wrote
                self._path(round).unlink()
                sync_folder(self.folder)

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round}.safetensors"

    def pieces(self, round: int, store: WeightStore) -> Iterator[tuple[Selection, str, Tensor]]:
        """(selection, kind, this rank's values) of everything in a log."""
        with self._open(round) as log:
            names = list(log.keys())
            for mask in sorted(name for name in names if name.endswith(".mask")):
                selection = Selection(store.channel_map, log.get_tensor(mask))
                prefix = mask.removesuffix("mask") + "values."
                for name in (n for n in names if n.startswith(prefix)):
                    yield selection, name.removeprefix(prefix), log.get_tensor(name)

    def _scatter(self, store: WeightStore, selection: Selection, kind: str, values: Tensor) -> None:
        low, high = own_segment(store, selection, kind)
        if values.numel() != high - low:
            raise ValueError(
                f"a log in {self.folder} holds {values.numel()} values of {kind} where this rank has "
                f"{high - low}; it belongs to another run, delete the store"
            )
        # Entries of other ranks are never read, and memory that is never written is never taken.
        size = selection.layout(store.partitions[kind].layout.shapes).size
        narrow = torch.empty(size, dtype=store.dtype)
        narrow[low:high] = values
        store.scatter(selection, kind, narrow)

    def _open(self, round: int) -> Any:
        advice = "); the store may be torn, go back to a checkpoint"
        with Explained(f"{self._path(round)} is damaged (", advice, (SafetensorError, OSError)):
            return safe_open(self._path(round), framework="pt")


def own_segment(store: WeightStore, selection: Selection, kind: str) -> tuple[int, int]:
    """Half-open range of the narrow flat buffer of ``kind`` that this rank's rows take."""
    partition = store.partitions[kind]
    return partition.segment(selection, selection.layout(partition.layout.shapes), store.ranks.rank)
