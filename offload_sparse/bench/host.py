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
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.engine import subnet_pair, transfers
from offload_sparse.engine.config import OptimConfig, RoundConfig, Transfer
from offload_sparse.engine.losses import TAIL
from offload_sparse.engine.optimizer import optimizer_factory
from offload_sparse.engine.request import Ask
from offload_sparse.engine.session import Setup, SparseOffload
from offload_sparse.policy.mask_policy import MaskPolicy
from offload_sparse.store import weight_store
from offload_sparse.store.copy.blocks import BlockPlan
from offload_sparse.store.copy.device_copy import send_to_kernel

_WAYS: dict[str, tuple[int, Transfer]] = {
    "before": (1, "delta"),
    "single channels": (1, "overlap"),
    "blocks": (8, "overlap"),
}
"""``atoms.block`` (8 in a CUDA run) and ``round.transfer``."""

_HEADER = ("network", "way", "launching thread ms", "all threads ms")


def run(quick: bool) -> BenchResult:
    """ResNet-50 and VGG-19, 9 rounds of each way; ``quick`` takes 5."""
    device, rounds = default_device(), 5 if quick else 9
    result = BenchResult({}, {}, _HEADER, [])
    with one_thread():  # all work is in the two threads that are measured
        for name in ("resnet50", "vgg19"):
            size = NETWORKS[name][1]
            example = torch.empty(1, 3, size, size, device="meta")
            for way, (main, total) in measure(partial(network_of, name), example, rounds, device).items():
                key = f"host.{name}" + ("" if way == "blocks" else f".{way.split()[0]}")
                result.ratios |= {f"{key}.total_ms": total, f"{key}.main_ms": main}
                result.table.append([name, way, f"{main:.1f}", f"{total:.1f}"])
    return result


def measure(
    factory: Callable[[], nn.Module], example: Tensor, rounds: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Median milliseconds per round of the launching thread and of all threads, by way."""
    channel_map, found = discover(build_on_meta(factory), (example,)), {}
    for way, (block, transfer) in _WAYS.items():
        update = one_by_one if way == "before" else MaskPolicy.update
        with without_copies(device), mock.patch.object(MaskPolicy, "update", update):
            session = SparseOffload(
                factory,
                (example,),
                optimizer_factory(OptimConfig()),
                rounds=RoundConfig(transfer=transfer),
                setup=Setup(channel_map=channel_map, verify=False, block=block),
                device=device,
            )
            seconds = [one_round(session) for _ in range(3 + rounds)][3:]
            session.transfers.close()
        main, total = (1000 * median(part) for part in zip(*seconds, strict=True))
        found[way] = main, total
    return found


def one_round(session: SparseOffload) -> tuple[float, float]:
    """CPU seconds of this thread, and of this and that of the transfers, from the end of one round's steps,
    whose losses are random, to the next round's."""
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
    return main, main + (_side_seconds() - before)


def _side_seconds() -> float:
    """CPU seconds of the thread of the transfers so far."""
    threads = [t.ident for t in threading.enumerate() if t.name.startswith("transfer")]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(number)) for number in threads if number)


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


_update = MaskPolicy.update


def one_by_one(policy: MaskPolicy, losses: Any, references: Any, *rest: Any) -> None:
    """``MaskPolicy.update`` with one comparison per call."""
    for loss, reference in zip(losses, references, strict=True):
        _update(policy, [loss], [reference], *rest)
