"""The state of a session between two steps, to be saved and restored bit for bit; and the form in which every
method hands out its own.

The store holds every weight once it has been settled. Beside it there is little: s and its optimizer, the
masks of the round that is open and of the one that has been drawn ahead, and, in the middle of a round, the
BatchNorm statistics that each rank has gathered by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from itertools import chain
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.engine.distributed import everyones, first_word
from offload_sparse.engine.optimizer import numbers_of
from offload_sparse.engine.roles import Masks
from offload_sparse.engine.rounds import Rounds
from offload_sparse.export.json_values import digest
from offload_sparse.store.weight_store import BUFFERS, WeightStore

_LIVE = "live_steps"

IN_PLACE = "steps_in_place"
"""In the meta of a method whose own files hold its state: the optimizer steps that they have seen."""


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a tensor that is spread over the ranks by its first dimension.

    Attributes:
        own: [rows, ...] on the CPU, contiguous, from ``first_row`` of the whole on; a view of the store where
            there is one. A scalar is [] on the rank that owns it; a rank that owns nothing has zero rows."""

    own: Tensor
    global_shape: tuple[int, ...]
    first_row: int = 0


@dataclass
class MethodState:
    """Everything that the rest of a run depends on, beside its configuration and its position.

    Attributes:
        sharded: rows that each rank owns. They may be read until the method's ``while_saving`` callback has
            returned; a checkpoint is read into the ``own`` tensors of a fresh state.
        replicated: tensors that are equal on every rank (copies); rank 0 writes them.
        local: tensors of this rank alone (copies); given back only on as many ranks as wrote them.
        meta: JSON values, equal on every rank."""

    sharded: dict[str, Shard] = field(default_factory=dict)
    replicated: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, default: int | None = None) -> int:
        """A number of steps or bytes in ``meta``. Raises ValueError: it is none."""
        value = self.meta.get(name, default)
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{name} of the state is no count; it is damaged, or of another method")
        return value


def session_state(session: Rounds) -> MethodState:
    """The state of ``session``; read its records first. The shards are views of the store."""
    session.transfers.settle()
    state = small_state(session)
    state.sharded = _shards(session)
    state.meta["channel_map"] = channels_digest(session.channel_map)
    return state


@lru_cache(maxsize=1)  # of millions of channels it takes seconds
def channels_digest(channel_map: ChannelMap) -> str:
    """What a saved state says of the channels: equal for equal maps."""
    return digest(channel_map.to_json())


def restore_session(session: Rounds, state: MethodState) -> None:
    """Resume from ``state``; a round that is open is dropped. Raises ValueError: the state belongs to another
    model or policy."""
    shards = _shards(session)
    if shards.keys() - state.sharded.keys():
        missing = next(iter(shards.keys() - state.sharded.keys()))
        raise ValueError(f"the state has no {missing}; it is of another model or optimizer")
    session.transfers.forget()
    for name, shard in shards.items():
        own = state.sharded[name].own
        if own.data_ptr() != shard.own.data_ptr():
            shard.own.copy_(own)
    restore_small(session, state)


def small_state(session: Rounds) -> MethodState:
    """Everything but the store."""
    integers = session.transfers.integer_buffers
    tensors = {f"integer_buffers/{name}": value.cpu().clone() for name, value in integers.items()}
    for name, group, key in _scalars(session):
        exact = torch.float64 if isinstance(group[key], float) else None
        tensors[name] = torch.as_tensor(group[key], dtype=exact).cpu().clone()
    if session.loss_scale is not None:
        tensors["loss_scale"] = session.loss_scale.state.cpu().clone()
    tensors |= {f"policy/{name}": value for name, value in session.policy.state_dict().items()}
    if session.final_mask is not None:
        tensors["final_mask"] = session.final_mask.clone()
    if session.next_masks is not None:
        tensors |= {f"next/{i}": mask.clone() for i, mask in enumerate(session.next_masks)}
    meta = {
        "steps_done": session.steps_done,
        "rounds_done": session.rounds_done,
        "forward_flops": session.forward_flops,
        "subnet_bytes_peak": session.transfers.bytes_peak,
        "bytes_fetched": session.transfers.bytes_fetched,
        "bytes_returned": session.transfers.bytes_returned,
        "policy_frozen": session.frozen,  # read by earlier versions
        "ema_steps": session.ema_steps,
        "trained_steps": session.trained_steps,
        "skipped_steps": session.nonfinite.skipped,
        "asked_freeze": session.asked_freeze,
        "counted": [
            {name: value for name, value in group.items() if isinstance(value, int | float)}
            for group in session.transfers.optimizer.counted
        ],
    }
    local = {}
    if session.masks is not None:
        tensors |= {f"open/{i}": mask.clone() for i, mask in enumerate(session.masks)}
        meta |= {"round_steps": session.round_step, "round_length": session.round_length}
        held: Sequence[Mapping[str, Tensor]] = session.restored
        if session.pair is not None:
            held = [side.packed() for side in session.pair.trained]
        kinds = (BUFFERS,) if not session.local else dict.fromkeys(chain.from_iterable(held))
        # On the CPU, where any rank, on any device or none, can read them.
        local = {f"{kind}/{i}": v[kind].to("cpu", copy=True) for i, v in enumerate(held) for kind in kinds}
        local[_LIVE] = torch.tensor(float(len(session.live)))
    return MethodState({}, tensors, local, meta)


def restore_small(session: Rounds, state: MethodState) -> None:
    """Put everything but the store back. Raises ValueError: the state belongs to another model or policy."""
    tensors, meta = state.replicated, state.meta
    try:
        learned = {n.removeprefix("policy/"): t for n, t in tensors.items() if n.startswith("policy/")}
        session.policy.load_state_dict(learned)
        for name, own in session.transfers.integer_buffers.items():
            own.copy_(tensors[f"integer_buffers/{name}"])
        for name, group, key in _scalars(session):
            old, new = group[key], tensors[name]
            group[key] = old.copy_(new) if isinstance(old, Tensor) else type(old)(new.item())
        if "counted" in meta:  # an earlier version kept it with the settings of a state_dict alone
            session.transfers.optimizer.count_from(meta["counted"])
        if session.loss_scale is not None:
            session.loss_scale.state.copy_(tensors["loss_scale"])
        session.steps_done, session.rounds_done = state.count("steps_done"), state.count("rounds_done")
        if type(meta["forward_flops"]) not in (int, float):
            raise TypeError("forward_flops")
        session.forward_flops = float(meta["forward_flops"])
        session.ema_steps = state.count("ema_steps")
        session.trained_steps = state.count("trained_steps", session.steps_done)
        session.nonfinite.restore(state.count("skipped_steps", 0))
        session.asked_freeze = state.count("asked_freeze", sys.maxsize)
        if session.ema_steps and not session.ema:
            raise KeyError("ema_steps")
        transfers = session.transfers
        transfers.bytes_peak = max(transfers.bytes_peak, state.count("subnet_bytes_peak"))
        transfers.bytes_fetched = state.count("bytes_fetched")
        transfers.bytes_returned = state.count("bytes_returned")
        final, drawn, opened = (_masks(session, tensors, name) for name in ("final_mask", "next", "open"))
        if final is None and session.policy.trivial:
            final = (session.channel_map.full_mask(),)
        step, length = state.count("round_steps", 0), state.count("round_length", 0)
    except (KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"the state does not fit this session ({error}); is it of another model?") from None
    restored: list[dict[str, Tensor]] = [{}, {}]
    for name, values in state.local.items():
        kind, _, side = name.rpartition("/")
        if side.isdecimal():
            restored[int(side)][kind] = values
    live_steps = int(state.local.get(_LIVE, torch.tensor(step)))
    session.reopen(opened, step, length, live_steps, [arrays for arrays in restored if arrays])
    if session.local and step and not session.restored:
        raise ValueError(
            "the state was saved in the middle of a round that every rank trained by itself; resume it on as "
            "many ranks"
        )
    session.next_masks, session.final_mask = drawn, final[0] if final else None
    if session.frozen:  # a state of an earlier version does not say since when; of a longer run it is not yet
        session.asked_freeze = min(session.freeze_step, session.steps_done)


def whole_state(session: Rounds) -> dict[str, Any]:
    """The state of ``session`` as a user saves it. Every rank calls it. Returns ``rows``: every tensor of the
    store, whole, on the first of the ranks that share one, else empty; ``small``: all else, the same bytes on
    every rank."""
    session.transfers.settle()
    session.before = session.policy.state_dict(), session.ema_steps  # a rollback comes back to here now
    state, store = small_state(session), session.transfers.store
    every = everyones(state.local, session.ranks.world_size, session.ranks.host_group)
    groups = [numbers_of(group) for group in session.transfers.optimizer.shown.param_groups]
    small = {"replicated": state.replicated, "meta": state.meta, "local": every, "groups": groups}
    file = BytesIO()
    # A rate that NumPy has computed is a float, but not one that a file without code may hold.
    torch.save(tree_map_only(np.generic, np.generic.item, small), file)
    rows = {key: store.to_first_rank(name, kind) for key, kind, name, _ in _tensors(store)}
    return {"rows": {n: t for n, t in rows.items() if t is not None}, "small": file.getvalue()}


def load_state(session: Rounds, state: Mapping[str, Any]) -> None:
    """Resume from what ``whole_state`` returned, on any number of ranks. Every rank calls it.

    What each rank has learned by itself in a round (BatchNorm statistics; with ``round.sync round`` all) is
    averaged on another number of ranks; subnets of their own cannot be. Raises ValueError: the state belongs
    to another session (on every rank)."""
    store, ranks = session.transfers.store, session.ranks
    problem, small = _problem(session, state)
    if problem := first_word(problem, ranks.world_size, ranks.host_group):
        raise ValueError(problem)
    session.transfers.forget()
    every = small["local"]
    local = every[ranks.rank] if len(every) == ranks.world_size else _mean(every)
    with session.transfers.replacing():
        for key, kind, name, _ in _tensors(store):
            store.from_first_rank(name, kind, state["rows"].get(key))
        restore_small(session, MethodState({}, small["replicated"], local, small["meta"]))
    for group, settings in zip(session.transfers.optimizer.shown.param_groups, small["groups"], strict=True):
        group.update(settings)


def _problem(session: Rounds, state: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Why ``state`` does not fit, or "", and its small part."""
    store = session.transfers.store
    try:
        small = torch.load(BytesIO(state["small"]), weights_only=True)
        groups = len(small["groups"])
    except (KeyError, TypeError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        return f"this is no state_dict of a session ({type(error).__name__}: {error})".split("\n")[0], {}
    if groups != len(session.transfers.optimizer.groups):
        own = len(session.transfers.optimizer.groups)
        return f"the state has {groups} parameter groups, this session {own}; give it the same groups", {}
    between = not small["meta"].get("round_steps") or "final_mask" in small["replicated"]
    if session.rounds.own_subnets and not between and len(small["local"]) != session.ranks.world_size:
        return "the state is of the middle of a round of a subnet per rank; resume it on as many ranks", {}
    wanted = {key: shape for key, *_, shape in _tensors(store)}
    found = {name: tuple(tensor.shape) for name, tensor in state.get("rows", {}).items()}
    if store.ranks.rank == 0 and found != wanted:
        odd = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        return f"the state and this session differ in {odd[0]!r}; is it of another model or optimizer?", {}
    return "", small


def _mean(every: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([local[name] for local in every]).mean(0) for name in every[0]}


def _shards(session: Rounds) -> dict[str, Shard]:
    store = session.transfers.store
    parts, rank = store.partitions, store.ranks.rank
    return {
        key: Shard(store.own_rows(name, kind), shape, parts[kind].first_row(name, rank))
        for key, kind, name, shape in _tensors(store)
    }


def _tensors(store: WeightStore) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """Of every tensor of the store its name in a state, its kind, name and shape."""
    for kind, partition in store.partitions.items():
        for name, shape in partition.layout.shapes.items():
            yield f"{kind}/{name}", kind, name, tuple(shape)


def _masks(session: Rounds, tensors: Mapping[str, Tensor], name: str) -> Masks | None:
    """Those saved as ``name``, or as ``name/0``, ``name/1``, …; None if there are none."""
    count = sum(key.startswith(name + "/") for key in tensors)
    names = [f"{name}/{i}" for i in range(count)] or [name] * (name in tensors)
    found = tuple(tensors[name] for name in names)
    if any(mask.shape != (session.channel_map.num_atoms,) for mask in found):
        raise ValueError("a saved mask is of another model; start a run of this one")
    return found or None


def _scalars(session: Rounds) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The state of the optimizer that is no value per weight, without the number of steps: name in a state,
    and where it is."""
    for i, group in enumerate(session.transfers.optimizer.scalars):
        yield from ((f"optimizer/{i}/{key}", group, key) for key in group if key != "step")
