"""Starting from trained weights: narrow networks from scratch, cuts and searches, fine-tuned; and loading.

A dense network is trained once (``--method dense``; sunk cost, of all seeds the same). From it a share rho of
the channels is kept and fine-tuned, every cell a run of ``offload-sparse train`` in a folder of its own:

    scratch        the even narrow network, with fresh weights (method static)
    random         channels kept at random, with their trained weights
    l1, l2         the largest filters: one-shot cuts
    norm_scale     the largest filters, weighed by the scales behind them: what ``train`` takes by itself
    exchange       that cut, of which channels are exchanged for a twentieth of the steps (policy.search
                   sampled)
    forward        a search from that cut, half of it by pairs of forward passes alone (policy.search forward)
    distilled_scratch, distilled_cut, distilled_forward    scratch, norm_scale and forward, learning from the
                   dense network's logits

A pair of forward passes counts two thirds of a step and a step of a search four thirds, so that the steps of
all arms of as many epochs take the same train FLOPs. The choice of the final mask (36 forward passes) and the
pass of the teacher come on top; the table lists what each run took, in its search and in all, and the steps
to two points below the dense network and to where ``scratch`` ends, in the mean, if every seed came there.

Loading is measured on two ranks and a file of 2 GB: ``pretrained.read`` is bytes read over bytes of a rank's
rows, ``pretrained.rss`` the peak of resident memory above the store, in bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from offload_sparse.bench.cells import BATCH, SETS, Run, accuracy, finish, kept, last, options_on, outcome
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import on_ranks, peak_resident, reset_peak
from offload_sparse.bench.options import PretrainedConfig, chosen
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.engine.config import RoundConfig
from offload_sparse.engine.pretrained import WeightSource
from offload_sparse.methods.controls import undivided_map
from offload_sparse.store.tensor_file import blocks_of
from offload_sparse.store.weight_store import Ranks, WeightStore
from offload_sparse.workloads.config import LOGITS_ONLY
from offload_sparse.workloads.models import build_model

_DENSE_EPOCHS = 30
_FORWARD = {"policy.search": "forward", "policy.start": "norm_scale"}
_CUT = {"method": "static", "policy.start": "norm_scale"}
ARMS: dict[str, dict[str, Any]] = {
    "scratch": {"method": "static"},
    "random": _CUT | {"policy.start": "random"},
    "l1": _CUT | {"policy.start": "l1"},
    "l2": _CUT | {"policy.start": "l2"},
    "norm_scale": _CUT,
    "exchange": {"policy.search": "sampled", "policy.start": "norm_scale"},
    "forward": _FORWARD,
    "distilled_scratch": {"method": "static", "train.distill": "true"},
    "distilled_cut": _CUT | {"train.distill": "true"},
    "distilled_forward": _FORWARD | {"train.distill": "true"},
}
_CUTS = ("l1", "l2", "norm_scale")

_BELOW = 2.0
"""Percentage points below the dense accuracy that steps are counted to; they are to ``scratch``, too."""

_COSTS = ("train_flops", "search_flops", "teacher_flops")

_STEPS = (f"to -{_BELOW:g}", "scratch")
_HEADER = ("rho", "epochs", "arm", "accuracy", "±", *_STEPS, "GFLOPs", "search", "teacher")


def run(config: PretrainedConfig) -> BenchResult:
    """Every cell that is not in the cache yet, and loading; ``quick`` takes three arms of 30 steps after a
    dense epoch, and a file of 0.13 GB. Raises ValueError: there is no arm of a name.
    """
    arms = chosen("arms", config.arms, ARMS, ["scratch", "norm_scale", "forward"] if config.quick else ARMS)
    prefix, raw, rows = f"pretrained.{config.set}", dict[str, list[dict[str, Any]]](), []
    ratios, images = loading(config.quick), SETS[config.set][1]
    with kept(config) as folder:
        dense = cell(config, folder)
        finish([dense])
        level = ratios[f"{prefix}.dense.accuracy"] = 100 * figures(dense, images)["accuracy"]
        settings = [(0.5, 1)] if config.quick else list(product(config.rho, config.epochs))
        seeds = range(config.seeds or (1 if config.quick else 2))
        cells = {
            (*setting, arm): [cell(config, folder, arm, *setting, seed) for seed in seeds]
            for setting, arm in product(settings, arms)
        }
        finish([run for of in cells.values() for run in of], config.jobs)
        found = {each: [figures(run, images) for run in of] for each, of in cells.items()}
        for (rho, epochs, arm), runs in found.items():
            key = f"{prefix}.rho{rho:g}.epochs{epochs}.{arm}"
            raw[key] = runs
            scratch = [run["accuracy"] for run in found.get((rho, epochs, "scratch"), [])]
            levels = {"steps_to": (level - _BELOW) / 100, "steps_to_scratch": fmean(scratch or [1.0])}
            for (name, least), run in product(levels.items(), runs):
                run[name] = next((step for step, reached in run["reached"] if reached >= least), 0)
            counts = [[run[name] for run in runs] for name in levels]
            steps = [f"{fmean(each):.0f}" if all(each) else "-" for each in counts]
            percents = accuracy(key, [100 * run["accuracy"] for run in runs])
            ratios |= percents
            costs = [f"{fmean(run[cost] / 1e9 for run in runs):.0f}" for cost in _COSTS]
            rows.append([rho, epochs, arm, *(f"{p:.2f}" for p in percents.values()), *steps, *costs])
    for rho, epochs in settings:
        ratios |= _won(f"{prefix}.rho{rho:g}.epochs{epochs}", ratios)
    return BenchResult(ratios, raw, _HEADER, rows)


def _won(key: str, ratios: Mapping[str, float]) -> dict[str, float]:
    """Percentage points by which the search is better than the best one-shot cut, with the larger spread."""
    cuts = [arm for arm in _CUTS if f"{key}.{arm}.accuracy" in ratios]
    if not cuts or f"{key}.forward.accuracy" not in ratios:
        return {}
    best = max(cuts, key=lambda arm: ratios[f"{key}.{arm}.accuracy"])
    return {
        f"{key}.search_vs_cut": ratios[f"{key}.forward.accuracy"] - ratios[f"{key}.{best}.accuracy"],
        f"{key}.search_vs_cut_spread": max(ratios[f"{key}.{arm}.spread"] for arm in ("forward", best)),
    }


def cell(
    config: PretrainedConfig,
    folder: Path,
    arm: str = "dense",
    rho: float = 1.0,
    epochs: int = 0,
    seed: int = 0,
) -> Run:
    """The run of an arm, or of the dense network."""
    options = options_on(config) | {"train.eval_every": 1}
    dense_epochs = config.dense_epochs or (1 if config.quick else _DENSE_EPOCHS)
    name, images = f"{config.set}-dense{dense_epochs}", config.images_name
    dense = folder / f"{name}-{images}"
    if arm == "dense":
        return Run(dense, options | {"method": "dense", "optim.lr": 0.1, "train.epochs": dense_epochs})
    fresh = arm.endswith("scratch")
    options |= {"optim.lr": 0.1 if fresh else 0.02}
    options |= {"model.weights": f"{dense}{LOGITS_ONLY if fresh else ''}"} if arm != "scratch" else {}
    options |= {"policy.rho": rho, "train.seed": seed, "train.epochs": epochs}
    options |= {"train.max_steps": 30} if config.quick else {}
    name += f"-{arm}-rho{rho:g}-epochs{epochs}-seed{seed}{'-quick' if config.quick else ''}"
    return Run(folder / f"{name}-{images}", options | ARMS[arm])


def figures(run: Run, images: int) -> dict[str, Any]:
    """Of a finished run; ``reached`` are its accuracies by step, ``search_flops`` those of ``train_flops``
    before its mask was final. A teacher looks at each of the ``images`` once."""
    summary, lines = outcome(run)
    reached = [(line["step"], line["test_accuracy"]) for line in lines if "test_accuracy" in line]
    reached.append((summary["steps"], summary["test_accuracy"]))
    flops = last(lines, "train_flops")
    steps, search = summary["steps"], run.options.get("policy.search", "none")
    dense = flops * summary["train_cost_saving"] / (3 * steps * BATCH)  # of an image, forward
    trained = (steps - RoundConfig().freeze_step(search, steps)) * 3 * BATCH * dense * summary["flops_ratio"]
    return {
        "accuracy": summary["test_accuracy"],
        "reached": sorted(reached),
        "train_flops": flops,
        "search_flops": flops - trained if search != "none" else 0.0,
        "teacher_flops": images * dense if "train.distill" in run.options else 0.0,
        **{name: summary[name] for name in ("flops_ratio", "params_ratio", "steps", "seconds")},
    }


# --- loading ---


def loading(quick: bool) -> dict[str, float]:
    """The largest figures of two ranks that fill their rows of a store from one file."""
    arguments = {"stream": 1024, "hidden": 16384, "depth": 1} if quick else {"stream": 4096, "hidden": 16384}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.safetensors"
        write_zeros(path, arguments)
        found = on_ranks(2, load, str(path), arguments)
    return {f"pretrained.{name}": max(rank[name] for rank in found) for name in ("read", "rss")}


def write_zeros(path: Path, arguments: Mapping[str, int]) -> None:
    """A file of the weights of an MLP, all zero, which takes no room on the disk."""
    state = _network(arguments).state_dict()
    tensors = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in state.items()}
    with path.open("wb") as file:
        file.write(next(blocks_of(tensors)))
        file.truncate(file.tell() + sum(tensor.nbytes for tensor in tensors.values()))


def load(path: str, arguments: Mapping[str, int]) -> dict[str, float]:
    """On this rank: bytes read over bytes of its rows, and the peak of memory above the store."""
    network = _network(arguments)
    buffers = tuple(name for name, b in network.named_buffers() if b.is_floating_point())
    names = tuple(name for name, _ in network.named_parameters())
    store = WeightStore(undivided_map(network), names, buffers, ranks=Ranks.current())
    idle = reset_peak()  # the rows have been touched when they were allocated
    read = WeightSource(path).fitted(network).fill(store)
    return {"read": read / store.nbytes, "rss": peak_resident() - idle}


def _network(arguments: Mapping[str, int]) -> torch.nn.Module:
    return build_on_meta(partial(build_model, "offload_sparse/mlp", **arguments))
