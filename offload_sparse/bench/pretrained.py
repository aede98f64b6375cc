"""Starting from trained weights: narrow networks from scratch, cuts and searches, fine-tuned; and loading.

A dense network is trained once (``--method dense``; sunk cost, of all seeds the same). From it a share rho of
the channels is kept and fine-tuned, every cell a run of ``offload-sparse train`` in a folder of its own:

    scratch        the even narrow network, with fresh weights (method static)
    random         channels kept at random, with their trained weights
    l1, l2         the largest filters: one-shot cuts
    norm_scale     the largest filters, weighed by the scales behind them
    forward        a search from that cut, half of it by pairs of forward passes alone (policy.search forward)
    distilled_cut, distilled_forward    the same two, learning from the dense network's logits

A pair of forward passes counts two thirds of a step and a step of a search four thirds, so that the steps of
all arms of as many epochs take the same train FLOPs. The choice of the final mask (36 forward passes) and the
pass of the teacher come on top; the table lists what each run took.

Loading is measured on two ranks and a file of 2 GB: ``pretrained.read`` is bytes read over bytes of a rank's
rows, ``pretrained.rss`` the peak of resident memory above the store, in bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from offload_sparse.bench.cells import BATCH, SETS, Run, finish, finished_run, last, options_on, spread
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import on_ranks, peak_resident, reset_peak
from offload_sparse.bench.options import PretrainedConfig, check_names
from offload_sparse.channels.subnet import build_on_meta
from offload_sparse.engine.pretrained import WeightSource
from offload_sparse.methods.controls import undivided_map
from offload_sparse.store.tensor_file import blocks_of
from offload_sparse.store.weight_store import Ranks, WeightStore
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
    "forward": _FORWARD,
    "distilled_cut": _CUT | {"train.distill": "true"},
    "distilled_forward": _FORWARD | {"train.distill": "true"},
}
_CUTS = ("l1", "l2", "norm_scale")

_BELOW = 2.0
"""Percentage points below the dense accuracy that the steps are counted to."""

_HEADER = ("rho", "epochs", "arm", "accuracy %", "±", f"steps to -{_BELOW:g}", "train GFLOPs", "teacher", "s")


def run(quick: bool, config: PretrainedConfig) -> BenchResult:
    """Every cell that is not in the cache yet, and loading; ``quick`` takes three arms of 30 steps after a
    dense epoch, and a file of 0.13 GB. Raises ValueError: there is no arm of a name.
    """
    check_names("arms", config.arms, ARMS)
    arms = config.arms or (["scratch", "norm_scale", "forward"] if quick else list(ARMS))
    ratios, raw, rows = loading(quick), {}, []
    with tempfile.TemporaryDirectory() as folder:
        dense = Cell(config, Path(config.cache or folder), quick)
        level = 100 * dense.figures()["accuracy"]
        ratios[f"pretrained.{config.set}.dense.accuracy"] = level
        settings = product([0.5] if quick else config.rho, [1] if quick else config.epochs)
        seeds = range(config.seeds or (1 if quick else 2))
        cells = {
            setting: {
                arm: [Cell(config, dense.folder, quick, arm, *setting, seed) for seed in seeds]
                for arm in ARMS
                if arm in arms
            }
            for setting in settings
        }
        finish([cell.run for of in cells.values() for arm in of.values() for cell in arm], config.jobs)
        for (rho, epochs), of in cells.items():
            reach = (level - _BELOW) / 100
            found = {arm: [cell.figures(reach) for cell in of[arm]] for arm in of}
            for arm, runs in found.items():
                key = f"pretrained.{config.set}.rho{rho:g}.epochs{epochs}.{arm}"
                accuracies = [100 * figures["accuracy"] for figures in runs]
                costs = ("train_flops", "teacher_flops", "seconds")
                train, teacher, seconds = (fmean(figures[k] for figures in runs) for k in costs)
                ratios |= {f"{key}.accuracy": fmean(accuracies), f"{key}.spread": spread(accuracies)}
                raw[key] = runs
                steps = [str(figures["steps_to"] or "-") for figures in runs]
                numbers = [f"{fmean(accuracies):.2f}", f"{spread(accuracies):.2f}", " ".join(steps)]
                numbers += [f"{train / 1e9:.0f}", f"{teacher / 1e9:.0f}", f"{seconds:.0f}"]
                rows.append([rho, epochs, arm, *numbers])
            ratios |= _won(f"pretrained.{config.set}.rho{rho:g}.epochs{epochs}", found)
    return BenchResult(ratios, raw, _HEADER, rows)


def _won(key: str, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Percentage points by which the search is better than the best one-shot cut, with the larger spread."""
    cuts = {arm: [100 * r["accuracy"] for r in found[arm]] for arm in _CUTS if arm in found}
    if "forward" not in found or not cuts:
        return {}
    searched = [100 * r["accuracy"] for r in found["forward"]]
    best = max(cuts.values(), key=fmean)
    return {
        f"{key}.search_vs_cut": fmean(searched) - fmean(best),
        f"{key}.search_vs_cut_spread": max(spread(searched), spread(best)),
    }


@dataclass(frozen=True)
class Cell:
    """One run: of ``arm``, or of the dense network."""

    config: PretrainedConfig
    folder: Path
    quick: bool
    arm: str = "dense"
    rho: float = 1.0
    epochs: int = 0
    seed: int = 0

    @property
    def dense_epochs(self) -> int:
        return self.config.dense_epochs or (1 if self.quick else _DENSE_EPOCHS)

    @property
    def run_dir(self) -> Path:
        data, length = self.config.images_name, f"dense{self.dense_epochs}"
        if self.arm == "dense":
            return self.folder / f"{self.config.set}-{length}-{data}"
        name = f"{self.arm}-rho{self.rho:g}-epochs{self.epochs}-seed{self.seed}"
        return self.folder / f"{self.config.set}-{length}-{name}{'-quick' if self.quick else ''}-{data}"

    @property
    def run(self) -> Run:
        return Run(self.run_dir, self.options)

    def options(self) -> dict[str, Any]:
        """Of the run. Raises ValueError: there are no images."""
        options = options_on(self.config.set, self.config) | {"train.eval_every": 1}
        if self.arm == "dense":
            return options | {"method": "dense", "optim.lr": 0.1, "train.epochs": self.dense_epochs}
        if self.arm != "scratch":
            dense = Cell(self.config, self.folder, self.quick).run_dir
            options |= {"model.weights": dense, "optim.lr": 0.02}
        else:
            options |= {"optim.lr": 0.1}
        options |= {"policy.rho": self.rho, "train.seed": self.seed, "train.epochs": self.epochs}
        options |= {"train.max_steps": 30} if self.quick else {}
        return options | ARMS[self.arm]

    def figures(self, level: float = 1.0) -> dict[str, Any]:
        """Of the finished run, which is started, or resumed, if it is not there; ``steps_to`` counts to the
        accuracy ``level``, in [0, 1]."""
        summary, lines = finished_run(self.run)
        reached = [(line["step"], line["test_accuracy"]) for line in lines if "test_accuracy" in line]
        reached.append((summary["steps"], summary["test_accuracy"]))
        flops = last(lines, "train_flops")
        dense = flops * summary["train_cost_saving"] / (3 * summary["steps"] * BATCH)  # of an image, forward
        taught = SETS[self.config.set][1] * dense if self.arm.startswith("distilled") else 0.0
        return {
            "accuracy": summary["test_accuracy"],
            "steps_to": next((step for step, accuracy in sorted(reached) if accuracy >= level), 0),
            "train_flops": flops,
            "teacher_flops": taught,
            **{name: summary[name] for name in ("flops_ratio", "params_ratio", "steps", "seconds")},
        }


# --- loading ---


def loading(quick: bool) -> dict[str, float]:
    """The largest figures of two ranks that fill their rows of a store from one file."""
    arguments = {"stream": 1024, "hidden": 16384, "depth": 1} if quick else {"stream": 4096, "hidden": 16384}
    with tempfile.TemporaryDirectory() as folder:
        path, tensors = Path(folder) / "w.safetensors", dict[str, Tensor]()
        for name, tensor in _network(arguments).state_dict().items():
            tensors[name] = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)  # takes no memory
        with path.open("wb") as file:
            for block in blocks_of(tensors):
                file.write(block)
        found = on_ranks(2, load, str(path), arguments)
    return {f"pretrained.{name}": max(rank[name] for rank in found) for name in ("read", "rss")}


def load(path: str, arguments: Mapping[str, int]) -> dict[str, float]:
    """On this rank: bytes read over bytes of its rows, and the peak of memory above the store."""
    network = _network(arguments)
    buffers = tuple(name for name, b in network.named_buffers() if b.is_floating_point())
    names = tuple(name for name, _ in network.named_parameters())
    store = WeightStore(undivided_map(network), names, buffers, ranks=Ranks.current())
    reset_peak()  # the rows have been touched when they were allocated
    idle = peak_resident()
    read = WeightSource(path).fitted(network).fill(store)
    return {"read": read / store.nbytes, "rss": peak_resident() - idle}


def _network(arguments: Mapping[str, int]) -> torch.nn.Module:
    return build_on_meta(partial(build_model, "offload_sparse/mlp", **arguments))
