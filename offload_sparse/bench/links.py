"""Two ranks on a slow link: dense DDP, ranks that talk at every step, and ranks that talk once per round.

    namespace 0 | rank 0 | veth ──── rate limited by tc, both ways ──── veth | rank 1 | namespace 1

Steps per second are of a whole round of ours (the faster of two at each rate, in turns, behind one that is
not counted) and of a few steps of DDP; bytes are those that the kernel counts at both interfaces. The
reference is evaluated at every step, so one subnet is trained. Needs root, ``ip`` and ``tc`` (iproute2).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from offload_sparse.bench.contenders import data_parallel
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import loss_of, random_batch, session_of
from offload_sparse.bench.options import LinksConfig
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.store.files import write_file
from offload_sparse.workloads.models import build_model

MODELS: dict[str, tuple[str, int, int, int]] = {
    "vgg19": ("offload_sparse/vgg19_cifar", 32, 16, 10),
    "resnet50": ("torchvision/resnet50", 64, 16, 1000),
}
"""Name, image side, images per rank, classes."""

UNLIMITED, RATES = "unlimited", ("1gbit", "100mbit")
MODES = ("dense", "step", "round")

_RHO, _TURNS, _LIMIT = 0.25, 2, 3600
_HEADER = ("network", "mode", "rate", "steps/s", "of its own without limit", "MiB on the wire per step")


def run(config: LinksConfig) -> BenchResult:
    """Both networks at both rates, K = 50; ``quick`` takes VGG-19 at 100 Mbit/s, K = 10, few images, once."""
    models, rates = list(MODELS), [UNLIMITED, *RATES]
    settings = {"rates": rates, "images": config.images, "k": 50, "turns": _TURNS}
    if config.quick:
        models, rates = ["vgg19"], [UNLIMITED, RATES[1]]
        settings = {"rates": rates, "images": config.images or 4, "k": 10, "turns": 1}
    found: dict[str, dict[str, Any]] = {}
    try:
        with _linked() as names:
            for model, mode in product(models, MODES):
                found |= _measured(names, {"model": model, "mode": mode} | settings, config.cache)
    except PermissionError as error:
        return BenchResult({}, {"skipped": str(error)}, _HEADER, [[f"skipped: {error}", *[""] * 5]])
    ratios, rows = {}, []
    for model in models:
        for mode in MODES:
            alone = found[f"{model}.{mode}.{UNLIMITED}"]["steps_per_second"]
            for rate in rates:
                figures = found[f"{model}.{mode}.{rate}"]
                share = figures["steps_per_second"] / alone
                sent = figures["bytes_per_step"] / 2**20
                rows.append([model, mode, rate, figures["steps_per_second"], share, sent])
                if rate != UNLIMITED:
                    ratios[f"links.{model}.{rate}.{mode}"] = share
        step, once = (
            sum(found[f"{model}.{mode}.{rate}"]["bytes_per_step"] for rate in rates) for mode in MODES[1:]
        )
        ratios[f"links.{model}.wire.round_vs_step"] = once / step
    return BenchResult(ratios, settings | {"measured": found}, _HEADER, rows)


# --- the link ---


@contextmanager
def _linked() -> Iterator[tuple[str, str]]:
    """Two network namespaces, each with one end of a veth pair. Raises PermissionError: they cannot be
    made."""
    names = (f"offload{os.getpid()}a", f"offload{os.getpid()}b")
    try:
        for name in names:
            _call("ip", "netns", "add", name)
        _call(
            "ip", "-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "veth0", "netns", names[1]
        )
        for rank, name in enumerate(names):
            _call("ip", "-n", name, "addr", "add", f"10.77.0.{rank + 1}/30", "dev", "veth0")
            for device in ("lo", "veth0"):
                _call("ip", "-n", name, "link", "set", device, "up")
            _call("tc", "-n", name, *_limit("100mbit"))
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _limit(rate: str) -> tuple[str, ...]:
    """Arguments of tc that limit what leaves."""
    bucket = ("tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
    return ("qdisc", "replace", "dev", "veth0", "root", *(("pfifo",) if rate == UNLIMITED else bucket))


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PermissionError(f"there is no {command[0]}; install iproute2") from None
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[0]
        raise PermissionError(f"network namespaces need root and a kernel that has them ({said})")


def _measured(names: tuple[str, str], settings: dict[str, Any], cache: str) -> dict[str, dict[str, Any]]:
    """What was measured of one network and mode, now or by an earlier start with this ``cache``."""
    values = (value if isinstance(value, list) else [value] for value in settings.values())
    file = Path(cache) / f"links-{'-'.join(str(v) for part in values for v in part)}.json"
    if cache and file.exists():
        return dict(json.loads(file.read_text()))
    found = _on_both(names, settings)
    if cache:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(found))
    return found


def _on_both(names: tuple[str, str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What both ranks have measured: the slower one's speed, and what both have sent."""
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-m", "offload_sparse.bench.links", folder, json.dumps(settings))
        ranks = [
            subprocess.Popen(["ip", "netns", "exec", name, *command, str(rank)])
            for rank, name in enumerate(names)
        ]
        try:
            codes = [rank.wait(_LIMIT) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise RuntimeError(f"the ranks have ended with the codes {codes}")
        one, other = (json.loads((Path(folder) / f"result{r}").read_text()) for r in range(2))
    found = {}
    for name, turns in one.items():
        steps, seconds, sent = zip(*turns, strict=True)
        _, seconds_there, sent_there = zip(*other[name], strict=True)
        slower = list(map(max, seconds, seconds_there))
        found[name] = {
            "steps_per_second": steps[0] / min(slower),  # what else the machine does only takes time
            "bytes_per_step": (sum(sent) + sum(sent_there)) / sum(steps),
            "seconds": slower,
        }
    return found


# --- a rank ---


def _rank(folder: str, settings: dict[str, Any], rank: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "veth0"
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "rendezvous"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found: dict[str, list[tuple[int, float, int]]] = {}
    model, mode, k = (settings[name] for name in ("model", "mode", "k"))
    name, side, images, classes = MODELS[model]
    images = settings["images"] or images
    batch = random_batch(images, side, classes, torch.device("cpu"), torch.Generator().manual_seed(rank))
    build = partial(build_model, name, classes, 3, side)
    if mode == "dense":
        steps, step = 2, data_parallel(build(), batch).compute
    else:
        rounds = RoundConfig(k=k, reference="every_step", sync=mode)
        session = session_of(build, (3, side, side), _RHO, rounds, OptimConfig(lr=0.01))
        steps, step = k, partial(session.step, partial(loss_of, batch=batch))
    for turn in range(settings["turns"] + 1):  # the first is not counted: what happens once
        for rate in settings["rates"] if turn else [UNLIMITED]:
            figures = _timed(step, steps, rate)
            if turn:
                found.setdefault(f"{model}.{mode}.{rate}", []).append(figures)
    (Path(folder) / f"result{rank}").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def _timed(step: Callable[[], object], steps: int, rate: str) -> tuple[int, float, int]:
    """Steps on a link of this rate, their seconds, and the bytes that have left meanwhile."""
    _call("tc", *_limit(rate))
    dist.barrier()
    sent, start = _sent_bytes(), time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return steps, time.perf_counter() - start, _sent_bytes() - sent


def _sent_bytes() -> int:
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("veth0:"))


if __name__ == "__main__":
    _rank(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
