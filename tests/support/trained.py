"""Imported by a server of processes, which has then trained once on each tier: what takes longer the first
time is done.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from offload_sparse.config.parse import RUN_OPTIONS
from offload_sparse.run.trainer import train
from tests.run import killed_run

torch.set_num_threads(1)
for tier in ("ram", "file"):
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        more = ["--run_dir", str(Path(folder) / "run"), "--store.tier", tier, "--train.max_steps", "2"]
        with redirect_stdout(nowhere):  # on which the server says that it is ready
            train(RUN_OPTIONS.parse([*killed_run.OPTIONS, *more]))
AcceleratorState._reset_state(reset_partial_state=True)
