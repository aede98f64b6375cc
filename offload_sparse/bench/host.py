"""Host work per round at the settings of a CUDA run: CPU time of the launching thread and of all threads.

A round without its steps: losses of K steps are put where steps leave them, then the round ends, s learns,
the next one opens and the one after it is drawn, planned and prefetched. Without a GPU the subnets are on the
CPU, and a stand-in takes the place of the copies, which a device makes: it works out the tables that they
read and moves nothing, so that launches are not counted. With one all of it is real.

``before`` is the straightforward way: single channels, everything on the launching thread, and a call per
comparison to learn from it.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import NETWORKS, default_device, network_of, one_thread
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.selection import Selection
from offload_sparse.engine import subnet_pair, transfers
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.losses import TAIL
from offload_sparse.engine.optimizer import optimizer_factory
from offload_sparse.engine.request import Ask
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.store import weight_store
from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.device_copy import send_to_kernel
from offload_sparse.store.copy.tables import DeviceTables

BLOCK = 8
"""``atoms.block`` of a CUDA run."""

_PARTS: dict[str, list[tuple[Any, str]]] = {
    "learn": [(MaskPolicy, "update")],
    "sample": [(MaskPolicy, "sample")],
    "resolve": [(Selection, "__init__")],
    "bind": [(subnet_pair.SubnetPair, "bind")],
    "plans": [(transfers.Transfers, "_fetch"), (transfers.Transfers, "_put_back")],
}
"""What is measured by itself; what one of them calls of another counts there."""

_WAYS = (("before", 1, "delta"), ("single channels", 1, "overlap"), ("blocks", BLOCK, "overlap"))

_HEADER = ("network", "way", *_PARTS, "tables", "else", "launching thread ms", "all threads ms")


def run(quick: bool) -> BenchResult:
    """ResNet-50 and VGG-19, 9 rounds of each way; ``quick`` takes 5."""
    device, rounds = default_device(), 5 if quick else 9
    result = BenchResult({}, {"device": str(device)}, _HEADER, [])
    with one_thread():  # all work is in the two threads that are measured
        for name in ("resnet50", "vgg19"):
            size = NETWORKS[name][1]
            example = torch.empty(1, 3, size, size, device="meta")
            for way, figures in measure(partial(network_of, name), example, rounds, device).items():
                key = f"host.{name}" + ("" if way == "blocks" else f".{way.split()[0]}")
                result.ratios |= {f"{key}.total_ms": figures["total"], f"{key}.main_ms": figures["main"]}
                result.raw[key] = figures
                parts = [figures[part] for part in (*_PARTS, "tables", "else", "main", "total")]
                result.table.append([name, way, *(f"{value:.1f}" for value in parts)])
    return result


def measure(
    factory: Callable[[], nn.Module], example: Tensor, rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median milliseconds per round of every part, by way; ``main`` is the launching thread's share."""
    with torch.device("meta"):
        model = factory()
    channel_map = discover(model, (example,))
    return {
        way: measure_way(factory, channel_map, example, block, transfer, rounds, device, way == "before")
        for way, block, transfer in _WAYS
    }


def measure_way(
    factory: Callable[[], nn.Module],
    channel_map: ChannelMap,
    example: Tensor,
    block: int,
    transfer: Any,
    rounds: int,
    device: torch.device,
    one_by_one: bool,
) -> dict[str, float]:
    """``measure`` for one way; ``one_by_one``: s is updated by one comparison per call."""
    with parts_measured() as spent, without_copies(device), learning(one_by_one):
        session = SparseOffload(
            factory,
            (example,),
            optimizer_factory(OptimConfig()),
            rounds=RoundConfig(transfer=transfer),
            setup=Setup(channel_map=channel_map, verify=False, block=block),
            device=device,
        )
        seen: dict[str, list[float]] = {}
        for number in range(3 + rounds):
            spent.clear()
            main, side = one_round(session)
            found = {part: spent[part] for part in (*_PARTS, "tables")}
            found |= {"else": main + side - sum(found.values()), "main": main, "total": main + side}
            for part, seconds in found.items() if number >= 3 else ():
                seen.setdefault(part, []).append(1000 * seconds)
        session.transfers.close()
    return {part: median(values) for part, values in seen.items()}


def one_round(session: SparseOffload) -> tuple[float, float]:
    """CPU seconds of this thread and of that of the transfers, from the end of one round's steps to the next
    round's, whose losses are random."""
    session._open()
    session.transfers.join()
    count = session.round_length - session.round_step
    for row in torch.rand(count, TAIL).to(session.device):
        session.losses.add(row, row, True, ())
    session.round_step += count
    session.steps_done += count
    session.transfers.stepped(session.steps_done)
    start, before = time.thread_time(), _side_seconds()
    session._ask(Ask.FINISH)
    session._open()
    main = time.thread_time() - start
    session.transfers.join()
    return main, _side_seconds() - before


def _side_seconds() -> float:
    """CPU seconds of the thread of the transfers so far."""
    threads = [t for t in threading.enumerate() if t.name.startswith("transfer") and t.ident is not None]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(t.ident)) for t in threads if t.ident)


@contextmanager
def parts_measured() -> Iterator[defaultdict[str, float]]:
    """Inside, the CPU seconds of ``_PARTS`` and of the tables of plans add up."""
    spent: defaultdict[str, float] = defaultdict(float)
    within = threading.local()

    def measured(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            outer, within.nested = getattr(within, "nested", 0.0), 0.0
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time() - start
                spent[part] += taken - within.nested
                within.nested = outer + taken

        return call

    with ExitStack() as patches:
        places = [(part, *place) for part, found in _PARTS.items() for place in found]
        for part, owner, name in (*places, ("tables", DeviceTables, "of")):
            patches.enter_context(mock.patch.object(owner, name, measured(part, getattr(owner, name))))
        yield spent


@contextmanager
def without_copies(device: torch.device) -> Iterator[None]:
    """Inside, copies on a CPU only make the tables that a device's would read."""

    def send(plans: Iterable[BlockPlan], *_: object) -> None:
        send_to_kernel([plan for plan in plans if plan.entries], device)

    stand_ins = {"copy_blocks": lambda plan, *_, **__: send([plan], device), "send_tables": send}
    with ExitStack() as patches:
        for module in (weight_store, transfers, subnet_pair) if device.type == "cpu" else ():
            for name in stand_ins.keys() & vars(module).keys():
                patches.enter_context(mock.patch.object(module, name, stand_ins[name]))
        yield


@contextmanager
def learning(one_by_one: bool) -> Iterator[None]:
    """Inside, s is updated by one comparison per call, or by as many as there are."""
    update = MaskPolicy.update

    def singly(policy: MaskPolicy, losses: Any, references: Any, *rest: Any) -> None:
        for loss, reference in zip(losses, references, strict=True):
            update(policy, loss, reference, *rest)

    with mock.patch.object(MaskPolicy, "update", singly if one_by_one else update):
        yield
