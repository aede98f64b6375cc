"""A session that survives a crash at any moment, on a store in files.

    mode = "resume" if started else "new"
    session = SparseOffload(..., setup=Setup(store=StoreConfig("file", folder), store_mode=mode))
    durable = DurableRounds(session)
    done = durable.restore()          # steps that need not be run again
    for batch in batches[done:]: session.step(partial(loss_fn, batch=batch))

What a killed process loses are the steps since the last round, or the last ``save``: they are run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from offload_sparse.engine.distributed import everyones, on_every_rank
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.state import MethodState, restore_small, small_state
from offload_sparse.engine.subnet_pair import Piece
from offload_sparse.store.tiers import FileTier
from offload_sparse.store.write_ahead_log import WriteAheadLog

_LOCAL, _RANDOM, _BESIDE, _REPLACED = "local/", "random/", "beside", "replaced"


class DurableRounds:
    """Logs what a session is about to write to its store: every round before it is scattered, and what is
    brought there on the way, by ``settle`` or ``state_dict``. ``load_state_dict`` writes all of it anew.

    The batches that the final mask is chosen on are not kept: a session that is resumed at the very step at
    which the mask is chosen, by ``rounds.freeze_at``, chooses it on those that follow. Raises ValueError: the
    session's store is in memory.

    Args:
        session: a session whose store is in files, between two rounds.

    Attributes:
        beside: JSON values that are logged with each round, for a loop that must not lose what it has not
            written yet.
        found: those that came with the round that ``restore`` has taken up."""

    settle_every: ClassVar[int] = 4
    """Rounds between waits for the disk; as many logs are kept."""

    def __init__(self, session: SparseOffload) -> None:
        tier = session.store.tier
        if not isinstance(tier, FileTier):
            raise ValueError("only a store in files outlives its process; set store.tier file")
        self._session, self._tier = session, tier
        folder = tier.folder / "log"
        self.log = on_every_rank(lambda: WriteAheadLog(folder))
        self._random: dict[str, Tensor] = {}
        self.beside: Callable[[], dict[str, Any]] = dict
        self.found: dict[str, Any] = {}
        self._logged = 0  # steps of the newest log
        if not tier.looks:  # else nothing reaches the files
            session.after_round = self._log
            session.transfers.before_settling = self._before_settling
            session.transfers.replacing = self._replacing

    def restore(self) -> int:
        """Make the store whole and the session what it was after the last round that was logged. Returns
        optimizer steps that are done; 0 when no round was logged. Raises ValueError: a log cannot be read, or
        the process ended while a state was loaded (on every rank)."""
        ranks = self._session.ranks
        if ranks.world_size > 1:  # only what all of them have counts
            newest = everyones(max(self.log.rounds(), default=-1), ranks.world_size, ranks.host_group)
            self.log.drop_after(min(newest))
        entry = on_every_rank(lambda: self.log.replay(self._session.store))
        if entry is None:
            return 0
        if _REPLACED in entry.state:
            raise ValueError(
                f"the store in {self._tier.folder} was left while a state was loaded into it; open it with "
                "store_mode replace and load the state once more"
            )
        self.found = entry.state.pop(_BESIDE, {})
        local = _with_prefix(entry.tensors, _LOCAL)
        restore_small(self._session, MethodState({}, entry.tensors, local, entry.state))
        self._random = _with_prefix(entry.tensors, _RANDOM)
        self.restore_random_state()
        self._logged = self._session.steps_done
        self._session.transfers.went_back = False  # to where the logs lead
        return self._logged

    def restore_random_state(self) -> None:
        """Set torch's generators as they were where ``restore`` has taken up the run."""
        if self._random:
            set_random_state(self._random)

    def save(self) -> None:
        """Make the present step durable, in the middle of a round too. Every rank calls it; one that has had
        fewer batches waits here for the others."""
        self._session.join("save")
        self._save()

    def _save(self) -> None:
        session = self._session
        session.catch_up()  # what the steps have measured is in no log
        if session.transfers.ahead:
            self._log(session.transfers.pair.trained)
        elif session.steps_done != self._logged:
            self._log(())  # a rollback: the store holds the weights, no log yet where the run is

    def _before_settling(self) -> None:
        if self._session.steps_done != self._logged:  # else a log holds all that will be written
            self._save()

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        """Of a store that is left inside no log says what it holds, and the newest one says so."""
        self._append((), {_REPLACED: True}, {})
        yield
        self._log(())

    def _log(self, learned: Sequence[Piece]) -> None:
        """Before any of what has been ``learned`` goes back to the store.

        The logs that ``settle`` deletes are older than the newest: what they hold has been returned, or has
        gone on to the next round and is in the newest."""
        session = self._session
        small = small_state(session)
        meta = small.meta | {_BESIDE: self.beside()}
        tensors = small.replicated | {_LOCAL + name: t for name, t in small.local.items()}
        tensors |= {_RANDOM + name: t for name, t in random_state().items()}
        self._append(learned, meta, tensors)
        self._logged = session.steps_done

    def _append(
        self, learned: Sequence[Piece], meta: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """One more log on every rank. After the session went back, earlier ones may be of what came then."""
        session = self._session
        pieces = [(piece.selection, piece.packed()) for piece in learned]
        alone = session.transfers.went_back
        if alone or len(self.log.rounds()) >= self.settle_every:
            session.transfers.join()
            self.log.settle(self._tier.sync)
        if alone:
            self._tier.sync()
        self.log.append(session.store, pieces, meta, tensors, alone)
        session.transfers.went_back = False
        if session.ranks.world_size > 1:
            # No rank scatters a round that another may not have logged.
            dist.barrier(group=session.ranks.host_group)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def random_state() -> dict[str, Tensor]:
    """uint8 states of torch's global generators in this process (dropout draws from them), by device type."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Go on from ``random_state()``; devices that are not there are left out."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
