"""Exported networks, changed by someone who knows the format, and a place where opening them does no harm."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.discovery import discover
from offload_sparse.channels.stream_add import expose_additions
from offload_sparse.channels.subnet import narrow_module
from offload_sparse.export import json_values
from offload_sparse.export.description import DESCRIPTION_FILE, FILES, file_digest
from offload_sparse.export.network_file import STRUCTURE_FILE, WEIGHTS_FILE, FinalNetwork
from offload_sparse.run.checkpoint_files import MANIFEST_FILE
from offload_sparse.workloads.models import build_model
from tests.support.fork_server import shared

SECONDS, BYTES = 10, 1 << 30
"""What opening a file may take: no longer, and no more over the interpreter."""

HUGE = 10**8
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 2**31, 2**63 - 1, 2**63, 10**30, 1.5, 1e308, -0.0, "", "x", "../../x"),
    *("/etc/passwd", "\x00", "\udcff", "\n\x1b[2J", "x" * 100_000, [], {}, [[]], [HUGE], [-1, HUGE, HUGE]),
    *([1] * 1000, {"a": 1}, {"__class__": "os.system"}, {"name": "timm/resnet18"}, {"depths": [HUGE]}),
)
RAW = (b"[" * 100_000, b'{"a":' * 5000, b"1e400", b"NaN", b"9" * 5000, b'"' + b"\\ud800" * 9 + b'"', b"\xff")


def save_networks(folder: Path) -> None:
    """Three exports: a plain network, one with sums of different channels, and one that is not narrowed."""
    arguments = {"num_classes": 3, "in_channels": 3, "image_size": 8}
    flat = {"num_classes": 10, "in_channels": 1, "image_size": 28}
    torch.manual_seed(0)
    lenet = build_model("offload_sparse/lenet_300_100", **flat).eval()
    whole = FinalNetwork(lenet, torch.ones(0, dtype=torch.bool), ChannelMap((), {}, {}))
    networks = {
        "offload_sparse/vgg_small": (_narrowed("offload_sparse/vgg_small", "coupled", arguments), arguments),
        "offload_sparse/resnet20_cifar": (
            _narrowed("offload_sparse/resnet20_cifar", "filter", arguments),
            arguments,
        ),
        "offload_sparse/lenet_300_100": (whole, flat),
    }
    for name, (network, own) in networks.items():
        shape = [own["in_channels"], own["image_size"], own["image_size"]]
        images = {
            "shape": shape,
            "mean": [0.5] * shape[0],
            "std": [0.25] * shape[0],
            "class_names": ["a", "b"],
        }
        network.save(folder / name.rpartition("/")[2], {"name": name, "arguments": own}, images)


def _narrowed(name: str, residual: Any, arguments: dict[str, Any]) -> FinalNetwork:
    full = build_model(name, **arguments)
    size = arguments["image_size"]
    channel_map = discover(full, (torch.empty(1, arguments["in_channels"], size, size),), residual)
    mask = torch.rand(channel_map.num_atoms) < 0.5
    mask[[group.start for group in channel_map.groups]] = True
    expose_additions(full, channel_map.additions)
    return FinalNetwork(narrow_module(full, channel_map, mask).eval(), mask, channel_map)


# --- changes ------------------------------------------------------------------------------------------


def mutated(document: Any, generator: random.Random) -> Any:
    """A JSON document with one to three changes somewhere in it."""
    document = copy.deepcopy(document)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return document
        holder, key = generator.choice(places)
        kind = generator.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[generator.choice(["", "odd", "digest", "weights_digest", key + "x"])] = holder[key]
        elif kind == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = generator.choice(
                [holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * HUGE]
            )
        elif kind == 3:
            other, name = generator.choice(places)
            holder[key] = copy.deepcopy(other[name]) if not _holds(other[name], holder) else None
        else:
            holder[key] = copy.deepcopy(generator.choice(VALUES))
    return document


def _inner(value: Any) -> list[tuple[Any, Any]]:
    """Keys and values; of a list the first five."""
    return list(
        value.items() if isinstance(value, dict) else enumerate(value[:5] if isinstance(value, list) else ())
    )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in _inner(value):
        yield value, key
        yield from _places(inner)


def _holds(value: Any, part: Any) -> bool:
    return value is part or any(_holds(inner, part) for _, inner in _inner(value))


def sign_structure(folder: Path, structure: Any) -> None:
    """Write ``structure.json`` so that every digest fits."""
    if isinstance(structure, dict):
        structure.pop("digest", None)
        if "weights_digest" in structure and (folder / WEIGHTS_FILE).is_file():
            structure["weights_digest"] = file_digest(folder / WEIGHTS_FILE)
        structure["digest"] = json_values.digest(structure)
    (folder / STRUCTURE_FILE).write_text(json.dumps(structure))


def sign_description(folder: Path, description: Any) -> None:
    """Write ``network.json`` so that every digest fits, as far as it has any."""
    files = description.get("files") if isinstance(description, dict) else None
    for name in files if isinstance(files, dict) else ():
        if name in (*FILES["onnx"], *FILES["torch_export"]) and (folder / name).is_file():
            files[name] = file_digest(folder / name)
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description))


def sign_manifest(folder: Path, manifest: Any) -> None:
    """Write ``manifest.json`` so that its digest fits."""
    if isinstance(manifest, dict):
        body = {key: value for key, value in manifest.items() if key != "digest"}
        manifest["digest"] = json_values.digest(body)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def change_header(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite the JSON header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


# --- a safe place -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt to open something.

    Attributes:
        said: the error, or what the action returned.
        trouble: a traceback, a signal, or what was taken too much of; empty for a clean refusal or success.
        seconds, bytes: what it took; bytes over those of the interpreter.
    """

    said: str
    trouble: str
    seconds: float
    bytes: int


def attempt(
    action: Callable[[], object], folder: Path, may_write: bool = False, seconds: float = SECONDS
) -> Outcome:
    """Do it in a process of its own, which may write nothing beside ``folder``, nor into it unless it may.

    One that may is no fork of this process, in which a test may have started threads. Its action is pickled.
    """
    own, peak_of = (folder, _peak_of_fresh) if may_write else (None, _peak)
    before, base = _listing(folder.parent, own), _base(peak_of)
    said, status, peak, took = peak_of(action)
    trouble = said if status == 1 else f"ended by signal {-status}" if status < 0 else ""
    if "\n" in said and not trouble:
        trouble = f"several lines: {said[:200]!r}"
    if len(said) > 1000 and not trouble:
        trouble = f"a whole value: {said[:200]!r}"
    if _listing(folder.parent, own) != before:
        trouble = trouble or "it wrote something"
    if took > seconds or peak - base > BYTES:
        trouble = trouble or f"it took {took:.0f} s and {(peak - base) >> 20} MiB"
    return Outcome(said, trouble, took, peak - base)


@contextmanager
def bounded() -> Iterator[None]:
    """What is done inside, in this process, takes no more than opening a file may."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begun, before = time.process_time(), _peak_now()
    try:
        yield
    finally:
        assert _peak_now() - before < BYTES
        assert time.process_time() - begun < SECONDS


def _peak_now() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


PeakOf = Callable[[Callable[[], object]], tuple[str, int, int, float]]


def _nothing() -> None:
    pass


@cache
def _base(peak_of: PeakOf) -> int:
    """Of a process that does nothing."""
    return peak_of(_nothing)[2]


def _peak_of_fresh(action: Callable[[], object]) -> tuple[str, int, int, float]:
    """As ``_peak``, in a process that is forked from one that has trained, and is none of this test's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "action").write_bytes(pickle.dumps(action))
        with (Path(folder) / "printed").open("w") as printed:
            code = (
                shared("tests.support.trained", __name__)
                .start("tests.support.hostile_files:perform", [folder], os.environ, printed.fileno())
                .wait(20 * SECONDS)
            )
        if code:
            return "", code, 0, 0.0
        said, status, peak, seconds = json.loads((Path(folder) / "outcome").read_text())
    return said, status, peak, seconds


def perform(arguments: list[str]) -> None:
    """The action that is pickled in a folder; its outcome goes there too."""
    folder = Path(arguments[0])
    status, said = _outcome_of(pickle.loads((folder / "action").read_bytes()))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    outcome = said[:60_000], status, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime
    (folder / "outcome").write_text(json.dumps(outcome))


def _outcome_of(action: Callable[[], object]) -> tuple[int, str]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(12 * SECONDS)  # it waits for something
    try:
        torch.set_num_threads(1)
        result = action()
    except (ValueError, FileNotFoundError) as error:
        return 0, str(error)
    except BaseException:
        return 1, traceback.format_exc()
    return 0, "" if result is None else str(result)


def _peak(action: Callable[[], object]) -> tuple[str, int, int, float]:
    """What the action said, its exit status (1: a traceback; negative: a signal), its peak memory, and its
    seconds, on however busy a machine: those of its own computing.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        status, said = _outcome_of(action)
        os.write(write, said.encode("utf-8", "backslashreplace")[:60_000])
        sys.stdout.flush()
        os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    return said, os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, seconds


def _listing(folder: Path, own: Path | None) -> list[tuple[str, int, int]]:
    """What is there, but for what is in ``own``."""
    found = [path for path in folder.rglob("*") if own is None or not path.is_relative_to(own)]
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in found)


def run_once(network: nn.Module, shape: tuple[int, ...]) -> None:
    """One forward pass of one image."""
    if shape:
        with torch.no_grad():
            network(torch.zeros(1, *shape))
