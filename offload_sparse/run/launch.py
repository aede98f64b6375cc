"""From the launcher's environment to an ``Accelerator`` and process groups, with every mismatch made an error
at the start.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from offload_sparse.config import parse as arguments
from offload_sparse.config.run import RunConfig
from offload_sparse.engine.distributed import on_first_rank, rank_and_world_size
from offload_sparse.run import resume
from offload_sparse.run.errors import RunError, disk_fails
from offload_sparse.run.log import TRACKERS_FOLDER
from offload_sparse.run.process import end_with_parent, grow_segments
from offload_sparse.store.lock import lock_folder
from offload_sparse.store.weight_store import default_timeout

if TYPE_CHECKING:
    from accelerate import Accelerator

TWO_CPU_RANKS = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 launch/train.py --config …"
)

_PROJECT = "offload_sparse"
_PACKAGES = {"comet_ml": "comet-ml", "aim": "'aim<4'"}
"""What is installed under another name than the tracker's."""

_LAST_WORD = "offload_sparse/last_word"
"""Where a rank that ends alone leaves why, for those that see nothing but its end."""

_LOST_RANK = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout",
)


def check_environment(env: Mapping[str, str]) -> None:
    """Refuse launches whose processes would each train alone.

    ``accelerate launch --cpu --num_processes 2`` starts one process, and leaves nothing but MASTER_ADDR to
    tell; a process started by MPI or Slurm without a rendezvous knows its rank only from variables that torch
    does not read. Raises ValueError: the launcher wanted several ranks, but they cannot find each other; says
    what to run."""
    if "WORLD_SIZE" in env:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if int(env["WORLD_SIZE"]) > 1 and missing:
            raise ValueError(
                f"WORLD_SIZE is {env['WORLD_SIZE']}, but {missing[0]} is not set; use accelerate launch"
            )
        return
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        raise ValueError(
            "several processes were asked for, but this one was started alone (no WORLD_SIZE); "
            f"on CPU start two ranks with: {TWO_CPU_RANKS}"
        )
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(env.get(name) or 1) > 1:
            raise ValueError(
                f"{name} is {env[name]}, but the ranks have no rendezvous (no WORLD_SIZE); "
                "start one accelerate launch per node instead"
            )


def as_launched(config: RunConfig, env: Mapping[str, str], launcher: Sequence[str]) -> RunConfig:
    """The configuration with what ``accelerate launch`` was told in the environment, or in its own command
    line (``launcher``): precision and compilation are adopted. Raises ValueError: the launcher was told what
    a run cannot do, or something else than the configuration says."""
    for flag, following in zip(launcher, [*launcher[1:], ""], strict=False):
        name, _, value = flag.partition("=")
        value = value or following
        if name.replace("-", "_") == "__gradient_accumulation_steps" and value != "1":
            raise ValueError(
                f"accelerate launch was told --gradient_accumulation_steps {value}, but a step of a run is "
                "one batch; leave it out and set data.batch_size"
            )
    for name in ("deepspeed", "fsdp", "megatron_lm", "parallelism_config"):
        if env.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            raise ValueError(
                f"accelerate launch was told --use_{name}, or its file of defaults says so, but a run "
                "spreads its weights over the ranks by itself; take a --config_file of launch/"
            )
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no" and precision != config.train.precision:
        if config.train.precision != "no" or precision not in ("bf16", "fp16"):
            raise ValueError(
                f"accelerate launch was told --mixed_precision {precision}, and train.precision is "
                f"{config.train.precision}; leave one of them out"
            )
        config = replace(config, train=replace(config.train, precision=precision))  # type: ignore[arg-type]
    backend = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "inductor"):
        raise ValueError(
            f"accelerate launch was told --dynamo_backend {backend}, but subnets are compiled by inductor; "
            "leave it out and set compile"
        )
    return replace(config, compile=config.compile or backend == "inductor")


def parent_command() -> list[str]:
    """The command line of ``accelerate launch`` if it has started this process."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return words if any("accelerate" in word for word in words) else []


@contextmanager
def launched(config: RunConfig) -> Iterator[Accelerator]:
    """The accelerator of this process; what may befall a run inside is one line. Raises ValueError: ranks do
    not find each other, or the device cannot do what is asked; RunError: memory or the disk is too small, or
    another process has died."""
    accelerator = start(config)
    from accelerate.state import AcceleratorState

    before, heard = threading.excepthook, None
    # A thread of a tracker that meets a full disk ends; this one hears of it with its next line.
    threading.excepthook = lambda found: None if disk_fails(found.exc_value) else before(found)
    try:
        yield accelerator
        accelerator.end_training()  # which writes what trackers still hold
    except BaseException as error:
        heard = _hear_of_no_worker()
        _leave_word(error)
        reason = _in_one_line(error, config)
        with suppress(OSError):
            accelerator.end_training()
        if reason:
            raise RunError(reason) from error
        raise
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # of which a next run knows nothing
        threading.excepthook = before
        if heard is not None:
            signal.signal(signal.SIGCHLD, heard)


def _hear_of_no_worker() -> Any:
    """Torch raises wherever the signal of a data worker's end finds this process: not while it ends. Returns
    what handled that signal so far."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _in_one_line(error: BaseException, config: RunConfig) -> str:
    """What has befallen the run, and what to do; empty for an error that says so itself, or is a fault."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of device memory; `offload-sparse plan` says which policy.rho and data.batch_size fit"
    again = f"{resume.again(config)} from the last checkpoint"
    if disk_fails(error):
        where = error.filename or config.run_dir
        return f"{where} cannot be written ({error.strerror}); free space, and {again}"
    if isinstance(error, RuntimeError) and is_lost_rank(error):
        seconds = config.train.timeout
        if word := _word_left():
            return word
        return f"another rank has died, or has not answered within train.timeout ({seconds} s); {again}"
    if "DataLoader worker" in str(error) or _breaks_a_pipe(error):
        return (
            "a process that loads data was killed, most likely for want of memory; lower data.num_workers or "
            f"data.batch_size, and {again}"
        )
    return ""


def _leave_word(error: BaseException) -> None:
    """What this rank has to say, which a rank that is not the first does not print; in the store that the
    ranks have met at, since no other rank may listen."""
    rank, world_size = rank_and_world_size()
    if world_size > 1 and isinstance(error, ValueError | OSError):
        with suppress(RuntimeError):
            word = " ".join(str(error).split()) or type(error).__name__
            dist.distributed_c10d._get_default_store().set(_LAST_WORD, f"rank {rank}: {word}")


def _word_left() -> str:
    """What a rank has left by ``_leave_word``; empty if none has."""
    with suppress(RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        if store.check([_LAST_WORD]):
            return bytes(store.get(_LAST_WORD)).decode()
    return ""


def _breaks_a_pipe(error: BaseException) -> bool:
    """Whether another process of this run has left its end of a connection."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, EOFError | ConnectionError) and frames[-1].filename == connection.__file__


def start(config: RunConfig) -> Accelerator:
    """The accelerator of this process. Raises ValueError: ranks do not find each other, or the device cannot
    do what is asked."""
    check_environment(os.environ)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # saved; it must not train on beside the next job
    check_trackers(config.trackers)
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import ProjectConfiguration

    grow_segments()
    timeout, run_dir = timedelta(seconds=config.train.timeout), config.run_dir
    _join_again(timeout)
    accelerator = Accelerator(
        mixed_precision=config.train.autocast,
        cpu=not torch.cuda.is_available(),
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(str(run_dir), logging_dir=str(run_dir / TRACKERS_FOLDER)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    if config.train.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ValueError(
            f"the launcher started {expected} processes, but accelerate sees {accelerator.num_processes}; "
            f"on CPU start two ranks with: {TWO_CPU_RANKS}"
        )
    if not accelerator.is_main_process:
        _be_quiet()
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Make sure that accelerate knows every tracker and that its package is installed (accelerate itself
    passes over one that is not). Raises ValueError: it does not, or it is not; says what to install."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"trackers names {name!r}, which accelerate does not know; give some of {known}")
        if name not in available:
            package = _PACKAGES.get(name, name)
            raise ValueError(
                f"trackers names {name}, which is not installed; run: pip install {package} "
                "(or choose others with --trackers, none with --trackers [])"
            )


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Begin to track a run, with its settings."""
    settings = arguments.flat_tree(config)
    plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.items()}
    accelerator.init_trackers(_PROJECT, config=plain)


@contextmanager
def sole_job(run_dir: Path) -> Iterator[None]:
    """Inside, every rank of this job holds the lock of ``run_dir``, and no other job can. Raises ValueError:
    another job does (on every rank)."""
    rank, world_size = rank_and_world_size()
    with ExitStack() as held:

        def first() -> None:
            lock = held.enter_context(lock_folder(run_dir))
            if world_size > 1:
                lock.share()

        on_first_rank(first)
        if rank:
            held.enter_context(lock_folder(run_dir, shared=True))
        yield


def is_lost_rank(error: BaseException) -> bool:
    """Whether ``error`` is what a rank sees of another one that has died or no longer answers."""
    if rank_and_world_size()[1] == 1:
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST_RANK)


def own_group() -> dist.ProcessGroup | None:
    """A new gloo group of all ranks, for messages that must not mix with others; None for a single rank."""
    if rank_and_world_size()[1] == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=default_timeout())
    assert not isinstance(group, int), "every rank is a member of the new group"
    return group


def _be_quiet() -> None:
    """What every rank would say alike, the first one says."""
    import datasets

    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")


def _join_again(timeout: timedelta) -> None:
    """Start the default process group of ranks that the launcher has restarted.

    With a static rendezvous the launcher's store outlives its attempts, and torch does not tell their keys
    apart: a rank would be sent to the address of one that has died. The prefix keeps the attempts apart."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    own = dist.PrefixStore(f"attempt_{attempt}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)
