"""Where the full weights live."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

TierName = Literal["ram", "file", "nvme"]
Switch = Literal["auto", "on", "off"]


@dataclass
class StoreConfig:
    """Where the full weights and their optimizer slots live.

    Attributes:
        tier: ``ram`` holds them in memory, ``file`` in memory-mapped files, of which the system keeps in
            memory what it has room for. ``nvme`` is ``file`` with rounds that go past the page cache, through
            DeepSpeed's DeepNVMe (extra ``deepspeed``, package libaio-dev), and equals ``file`` without it.
        path: folder of the files; empty takes ``store`` in the run's folder.
        pin: page-lock the store's host memory, so that a CUDA device reads it directly. ``auto`` does so for
            runs on a CUDA device and goes on with ordinary memory if the driver refuses, ``on`` makes a
            refusal an error, ``off`` never does.
        shard: ``world`` spreads the rows over all ranks; ``node`` over those of each node, so that every node
            holds all weights and assembling a subnet needs no network between nodes.
    """

    tier: TierName = "ram"
    path: str = ""
    pin: Switch = "auto"
    shard: Literal["world", "node"] = "world"

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(self.path)
