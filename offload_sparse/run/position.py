"""How far a run is: its step, its place in the data, when it is saved, and how it gets back to where it was.

Everything here is equal on all ranks at every step, since what it decides is a matter of all of them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from statistics import median
from typing import Any

import torch

from offload_sparse.config.run import RunConfig
from offload_sparse.engine.config import FinalConfig
from offload_sparse.engine.distributed import rank_and_world_size
from offload_sparse.engine.durable import random_state, set_random_state
from offload_sparse.engine.losses import StepRecord
from offload_sparse.engine.state import IN_PLACE, MethodState
from offload_sparse.export import json_values
from offload_sparse.export.json_values import Count
from offload_sparse.methods.method import Method
from offload_sparse.run.checkpoint import Checkpointer, Loaded
from offload_sparse.run.checkpoint_files import CHECKPOINT_FOLDER
from offload_sparse.run.errors import RunError
from offload_sparse.run.log import Recorder
from offload_sparse.run.resume import Start, again, run_values, same_place
from offload_sparse.run.signals import Agreement, Interruption
from offload_sparse.run.terminal import tell
from offload_sparse.workloads.data.order import seed_of

logger = logging.getLogger(__name__)

MOST_ROLLBACKS = 10
"""Rollbacks of one run, after which it is the run that is wrong and not a batch."""

_RNG = "run/rng/"


@dataclass(frozen=True)
class Remembered:
    """What the loop itself would lose with its process: a part of every checkpoint and write-ahead log.

    Attributes:
        recent: places in the order of the data of the last batches.
        best: the highest score of an evaluation.
        unlogged: what the steps measured that no line of the log has in it, as of ``StepRecord``.
        images: which they are, as ``Splits.identity`` says it; empty in checkpoints of earlier versions."""

    skipped_batches: Count
    rollbacks: Count
    recent: tuple[Count, ...]
    best: float | None
    unlogged: tuple[tuple[Any, ...], ...]
    seconds: float = 0.0
    total_steps: int = 0
    images: str = ""

    def records(self) -> list[StepRecord]:
        """``unlogged``. Raises ValueError: it is none."""
        names = [field.name for field in fields(StepRecord)]
        found = [
            json_values.convert(dict(zip(names, values, strict=False)), StepRecord)
            for values in self.unlogged
        ]
        if any(record.compared is not None and len(record.compared) != 2 for record in found):
            raise ValueError("two losses are compared")
        return found


class Progress:
    """The position of a run, and its checkpoints. A context manager: signals are noted while it is entered.

    Args:
        recorder: whose lines must agree with the position.
        start: how the run begins in its folder.
        batches_at: the batches at given places in the order of the data.
        images: which they are, in words that are compared.

    Attributes:
        step, rollbacks: optimizer steps done, and how often the run went back.
        stopped: the run was asked to stop, and has been saved, if it has made a step.
        taken_up: the run resumed from the method's own files, whose last step may lack its lines in the log.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        recorder: Recorder,
        start: Start,
        batches_at: Callable[[list[int]], Iterable[Any]],
        images: str,
    ) -> None:
        self._images = images
        self._config, self._method, self._recorder, self._batches_at = config, method, recorder, batches_at
        self._start, self._total_steps = start, 0
        self._rank, self._world_size = rank_and_world_size()
        folder = config.run_dir / CHECKPOINT_FOLDER
        self._checkpointer = Checkpointer(folder, config.checkpoint, run_values(config))
        self._interruption, self._agreement = Interruption(), Agreement()
        self.step = 0
        self.rollbacks = 0
        self.stopped = False
        self.taken_up = False
        self._skipped_batches = 0
        self._recent: deque[int] = deque(maxlen=FinalConfig.selection_batches)
        self._unlogged: list[StepRecord] = []
        self._best: float | None = None
        self._improved, self._wanted, self._stopping = False, False, False
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._blank = MethodState()  # what checkpoints are read into
        if method.durable is not None:
            method.durable.beside = self._remembered
        self._step_seconds: list[float] = []
        self._mark = time.perf_counter()

    # --- the position ---

    @property
    def data_position(self) -> int:
        """The place of the next batch in the order of the data: the step, and what rollbacks left out."""
        return self.step + self._skipped_batches

    def begin(self, total_steps: int, steps_per_epoch: int) -> None:
        """Start, or resume from the newest checkpoint. Raises ValueError: there are checkpoints, but none can
        be used."""
        self._seed()
        self._total_steps = total_steps
        start, loaded, kept, in_place = self._start, None, None, 0
        reads = start.status == "started" or start.source is not None
        if reads or self._config.train.on_nonfinite == "rollback":
            state = self._method.state()
            assert state is not None, "before its first step a method has a state"
            self._blank = MethodState(state.sharded, meta=state.meta)
            in_place = int(state.meta.get(IN_PLACE, 0))
        if reads:
            if start.status == "started" and not start.goes_back:
                loaded = self._checkpointer.load(self._blank)
            if loaded is None and start.source is not None and not in_place:
                loaded = self._checkpointer.load(self._blank, start.source)
        if loaded is not None:
            kept = self._take(loaded)
        if in_place:
            here = self._checkpointer.folder.of_step(in_place)
            if start.goes_back and start.source and not same_place(start.source, here):
                raise ValueError(
                    f"a store in files goes on from where it is, step {in_place}, and not back to "
                    f"{start.source}; set resume auto, or start anew with --overwrite true"
                )
            kept = self._take_up(in_place) or kept
        if start.goes_back and self._rank == 0:
            self._checkpointer.folder.drop_after(self.step)
        origin = str(start.source) if start.source else None
        self._recorder.begin(total_steps, steps_per_epoch, self.step, kept.seconds if kept else 0.0, origin)
        if self.step and self._rank == 0 and start.status != "look":
            where = "its own store" if loaded is None or in_place else str(loaded.folder)
            tell(f"resuming at step {self.step} from {where}")
            if start.moved and kept and kept.images:
                tell(f"the run had {start.moved}; the classes and all labels are the same")
            if kept and kept.total_steps not in (0, total_steps):
                tell(f"the run grows from {kept.total_steps} to {total_steps} steps, as does its schedule")
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._mark = time.perf_counter()

    def advance(self) -> None:
        """One more optimizer step is done."""
        self._recent.append(self.data_position)
        self.step += 1
        now = time.perf_counter()
        self._step_seconds.append(now - self._mark)
        self._mark = now

    def evaluated(self, score: float) -> None:
        """An evaluation gave ``score``; its time is no part of the next step's."""
        if self._best is None or score > self._best:
            self._best, self._improved = score, True
        self._mark = time.perf_counter()

    def take_records(self) -> list[StepRecord]:
        """The records of the steps since the last call, whatever was saved in between."""
        records = self._unlogged + self._method.records()
        self._unlogged = []
        return records

    @property
    def step_seconds_median(self) -> float:
        """Of the steps of this process."""
        return median(self._step_seconds) if self._step_seconds else 0.0

    # --- saving ---

    def asked_to_stop(self) -> bool:
        """Whether some rank was, where nothing has to be saved; the run is then stopped. Every rank asks."""
        stop, _ = self._agreement.exchange(bool(self._interruption.signal_name), False)
        self._stopping |= stop
        self.stopped = self._stopping
        return self.stopped

    def save_when_due(self) -> None:
        """Save if some rank wants to, as soon as the method can be saved; then stop if asked to."""
        config = self._config.checkpoint
        minutes = (time.monotonic() - self._saved_at) / 60
        late = self._rank == 0 and 0 < config.every_minutes <= minutes
        stop, late = self._agreement.exchange(bool(self._interruption.signal_name), late)
        self._stopping |= stop
        enough = 0 < config.every_steps <= self.step - self._saved_step
        self._wanted |= self._stopping or late or enough or self._improved
        if not self._wanted:
            return
        self._unlogged += self._method.records()  # raises before anything that is not finite is saved
        state = self._method.state()
        if state is not None:
            self._save(state)
            self.stopped = self._stopping
            self._mark = time.perf_counter()

    def save_the_end(self) -> None:
        """Save where the last step has led, so that a finished run can grow."""
        state = self._method.state()
        if state is not None and self._saved_step != self.step:
            self._unlogged += self._method.records()
            self._save(state)
        self._checkpointer.join()

    def tell_stopped(self) -> dict[str, Any]:
        """Say that and where the run was stopped. Raises RunError: it could not be saved."""
        if self._saved_step != self.step:
            raise RunError(f"asked to stop at step {self.step}, but the checkpoint could not be written")
        if self._rank == 0:
            why = self._interruption.signal_name or "another rank was asked to"
            tell(f"stopped at step {self.step} ({why}); {again(self._config)}")
        return {"stopped_at": self.step}

    def _save(self, state: MethodState) -> None:
        state.local |= {_RNG + name: value for name, value in random_state().items()}
        run = self._remembered()
        self._saved_step, self._saved_at, self._wanted = self.step, time.monotonic(), False
        best, self._improved = self._improved, False
        self._checkpointer.save(self.step, state, run, best)
        if self._stopping:
            written = self._checkpointer.join()
            self._saved_step = self.step if written else -1
        else:
            self._method.while_saving(self._checkpointer.release)

    def _remembered(self) -> dict[str, Any]:
        """``Remembered`` as JSON has it; the lines of the log are on the disk before it."""
        self._recorder.sync()
        records = self._unlogged + self._method.unread_records()
        return {
            "seconds": self._recorder.seconds,
            "skipped_batches": self._skipped_batches,
            "rollbacks": self.rollbacks,
            "recent": list(self._recent),
            "best": self._best,
            "unlogged": [astuple(record) for record in records],
            "total_steps": self._total_steps,
            "images": self._images,
        }

    def _recall(self, run: dict[str, Any]) -> Remembered:
        try:
            kept = json_values.convert(run, Remembered)
            self._unlogged = kept.records()
        except ValueError as error:
            raise ValueError(f"what the run remembers of step {self.step} is damaged: {error}") from None
        if kept.images not in ("", self._images):
            raise ValueError(
                f"the run was trained on {kept.images}, but data.name {self._config.data.name} has "
                f"{self._images}; give its own images, another folder with --run_dir, or start anew with "
                "--overwrite true"
            )
        self.rollbacks, self._skipped_batches = kept.rollbacks, kept.skipped_batches
        self._best, self._improved = kept.best, False
        self._recent.clear()
        self._recent.extend(kept.recent)
        return kept

    # --- going back ---

    @contextmanager
    def rolling_back(self) -> Iterator[None]:
        """With ``train.on_nonfinite rollback``, an error of that kind inside leads back to the last
        checkpoint; the batches up to the one that failed are left out."""
        position = self.data_position
        try:
            yield
        except FloatingPointError as error:
            if self._config.train.on_nonfinite != "rollback":
                raise
            self._roll_back(error, position + 1)

    def _roll_back(self, error: FloatingPointError, position: int) -> None:
        """Restore, and resume with the batch at ``position``."""
        rollbacks = self.rollbacks + 1
        if rollbacks > MOST_ROLLBACKS:
            raise FloatingPointError(f"{error} (after {MOST_ROLLBACKS} rollbacks)") from error
        if self._method.durable is not None:
            raise FloatingPointError(f"{error} (a store in files does not go back)") from error
        loaded = self._checkpointer.load(self._blank)
        if loaded is None:
            raise FloatingPointError(f"{error} (there is no checkpoint to go back to)") from error
        self._take(loaded)
        self.rollbacks, self._skipped_batches = rollbacks, position - self.step
        self._recorder.go_back(self.step)
        self._saved_step, self._wanted = self.step, False
        if self._rank == 0:
            logger.warning("%s; went back to step %d and left out the batches since", error, self.step)

    def _take(self, loaded: Loaded) -> Remembered:
        state, run = loaded.state, loaded.manifest.run
        generators = {n.removeprefix(_RNG): t for n, t in state.local.items() if n.startswith(_RNG)}
        state.local = {n: t for n, t in state.local.items() if not n.startswith(_RNG)}
        self.step = loaded.manifest.step
        kept = self._recall(run)
        self._method.restore(state)
        self._method.recall(self._batches_at(list(self._recent)))
        if generators:
            set_random_state(generators)
        else:
            self._seed()  # on another number of ranks
        return kept

    def _take_up(self, step: int) -> Remembered | None:
        """Resume where a method stands that keeps its state by itself, whatever the last checkpoint; what the
        loop remembers came with it."""
        self.step, self.taken_up = step, True
        durable = self._method.durable
        kept = self._recall(durable.found) if durable is not None and durable.found else None
        position = self.data_position
        self._recent.clear()
        self._recent.extend(range(max(0, position - (self._recent.maxlen or 0)), position))
        self._seed()
        self._method.restore(self._blank)
        self._method.recall(self._batches_at(list(self._recent)))
        return kept

    def _seed(self) -> None:
        """torch's own generator (dropout) is a function of seed, rank and step."""
        torch.manual_seed(seed_of(self._config.train.seed, self._rank, self.step))

    # --- the context ---

    def __enter__(self) -> Progress:
        self._interruption.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._interruption.__exit__(kind, error, trace)
        # After any other error a rank may be gone, and waiting for it would only delay the end.
        if error is None or isinstance(error, FloatingPointError) or self._world_size == 1:
            self._agreement.drain()
            self._checkpointer.join()
