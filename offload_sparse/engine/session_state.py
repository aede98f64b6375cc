"""The state of a session between two steps, to be saved and restored bit for bit.

The store holds every weight once it has been settled. Beside it there is little: s and its optimizer, the
masks of the round that is open and of the one that has been drawn ahead, and, in the middle of a round, the
BatchNorm statistics that each rank has gathered by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from offload_sparse.engine.draw import OpenRound
from offload_sparse.engine.rounds import LossFunction
from offload_sparse.engine.session import SparseOffload
from offload_sparse.engine.state import MethodState, Shard


@dataclass
class SmallState:
    """All but the store.

    Attributes:
        tensors: equal on every rank; copies.
        local: this rank's own; copies.
        meta: JSON values.
    """

    tensors: dict[str, Tensor]
    local: dict[str, Tensor]
    meta: dict[str, Any]


def session_state(session: SparseOffload) -> MethodState:
    """The state of ``session``; read its records first. The shards are views of the store."""
    session.settle()
    small = small_state(session)
    meta = small.meta | {"channel_map": session.channel_map.to_json()}
    return MethodState(_shards(session), small.tensors, small.local, meta)


def restore_session(session: SparseOffload, state: MethodState) -> None:
    """Carry on from ``state``; a round that is open is dropped.

    Raises:
        ValueError: the state belongs to another model or policy.
    """
    shards = _shards(session)
    if shards.keys() - state.sharded.keys():
        missing = next(iter(shards.keys() - state.sharded.keys()))
        raise ValueError(f"the state has no {missing}; it is of another model or optimizer")
    session.relay.forget()
    for name, shard in shards.items():
        own = state.sharded[name].own
        if own.data_ptr() != shard.own.data_ptr():
            shard.own.copy_(own)
    restore_small(session, SmallState(state.replicated, state.local, state.meta))


def small_state(session: SparseOffload) -> SmallState:
    """Everything but the store."""
    policy = session.policy.state_dict()
    tensors = {f"integer_buffers/{name}": t.clone() for name, t in session.store.integer_buffers.items()}
    tensors |= {f"policy/{name}": value for name, value in policy["tensors"].items()}
    if session.final_mask is not None:
        tensors["final_mask"] = session.final_mask.clone()
    if session.next_masks is not None:
        tensors |= {f"next/{i}": mask.clone() for i, mask in enumerate(session.next_masks)}
    meta = {
        "steps_done": session.steps_done,
        "rounds_done": session.rounds_done,
        "forward_flops": session.forward_flops,
        "subnet_bytes_peak": session.relay.bytes_peak,
        "bytes_fetched": session.relay.bytes_fetched,
        "bytes_returned": session.relay.bytes_returned,
        "reduction": session.averager.mode,
        "policy_frozen": policy["frozen"],
    }
    local = {}
    if (opened := session.open_round) is not None:
        tensors |= {f"open/{i}": mask.clone() for i, mask in enumerate(opened.masks)}
        meta |= {"round_steps": opened.steps, "round_length": opened.length}
        local = {f"statistics/{i}": value.clone() for i, value in enumerate(opened.statistics)}
    return SmallState(tensors, local, meta)


def restore_small(session: SparseOffload, state: SmallState) -> None:
    """Put everything but the store back.

    Raises:
        ValueError: the state belongs to another model or policy.
    """
    tensors, meta = state.tensors, state.meta
    try:
        learned = {n.removeprefix("policy/"): t for n, t in tensors.items() if n.startswith("policy/")}
        session.policy.load_state_dict({"tensors": learned, "frozen": meta["policy_frozen"]})
        for name, own in session.store.integer_buffers.items():
            own.copy_(tensors[f"integer_buffers/{name}"])
        session.steps_done, session.rounds_done = int(meta["steps_done"]), int(meta["rounds_done"])
        session.forward_flops = float(meta["forward_flops"])
        relay = session.relay
        relay.bytes_peak = max(relay.bytes_peak, int(meta["subnet_bytes_peak"]))
        relay.bytes_fetched, relay.bytes_returned = int(meta["bytes_fetched"]), int(meta["bytes_returned"])
        session.averager.keep(str(meta["reduction"]))
        final = _masks(session, tensors, ["final_mask"])
        if final is None and session.policy.trivial:
            final = (session.channel_map.full_mask(),)
        drawn = _masks(session, tensors, _numbered(tensors, "next"))
        opened = _open_round(session, state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the state does not fit this session ({error}); is it of another model?") from None
    session.reopen(opened, drawn, final[0] if final else None)


def recall(session: SparseOffload, batches: Iterable[Any], loss_fn: LossFunction) -> None:
    """Give a restored session the last batches before its position: the final mask is chosen on them."""
    if session.final_mask is None:
        session.remember(batches, loss_fn)


def _shards(session: SparseOffload) -> dict[str, Shard]:
    store = session.store
    return {
        f"{kind}/{name}": Shard(
            store.own_rows(name, kind), tuple(shape), partition.first_row(name, store.ranks.rank)
        )
        for kind, partition in store.partitions.items()
        for name, shape in partition.layout.shapes.items()
    }


def _open_round(session: SparseOffload, state: SmallState) -> OpenRound | None:
    masks = _masks(session, state.tensors, _numbered(state.tensors, "open"))
    if masks is None:
        return None
    statistics = [state.local[name] for name in ("statistics/0", "statistics/1") if name in state.local]
    return OpenRound(masks, int(state.meta["round_steps"]), int(state.meta["round_length"]), statistics)


def _masks(
    session: SparseOffload, tensors: Mapping[str, Tensor], names: list[str]
) -> tuple[Tensor, ...] | None:
    if not names or names[0] not in tensors:
        return None
    found = tuple(tensors[name] for name in names)
    if any(mask.shape != (session.channel_map.num_atoms,) for mask in found):
        raise ValueError("a saved mask is of another model; start a run of this one")
    return found


def _numbered(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """The names ``name/0``, ``name/1``, … that there are."""
    return [f"{name}/{i}" for i in range(sum(key.startswith(name + "/") for key in tensors))]
