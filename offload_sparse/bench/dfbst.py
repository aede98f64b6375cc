"""Accuracy and remaining weights of the LeNets trained dense, by DST and by DFBST.

The settings are those of Pote et al. 2023, section 4.4.1, and of Dynamic Sparse Training, which it follows:
SGD with learning rate 0.01 and momentum 0.9, no weight decay, batches of 64, 20 epochs, alpha 5e-4, beta
0.01, pixels in [0, 1]. The accuracy is that on the test images after the last epoch, never the best one.

A layer that falls to ``reset_at`` is whole again at once, and then falls anew: what is left at the end
depends on where in such a cycle that is, so that the median over seeds says more than the mean.

With ``cache``, every finished run is kept as one JSON file and not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.bench.cells import Images, batches, in_parts, kept, on_device, read_images, spread
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import default_device, take_turns
from offload_sparse.bench.options import DFBSTBenchConfig
from offload_sparse.config.methods import DFBSTConfig, DSTConfig
from offload_sparse.config.run import RunConfig, TrainConfig
from offload_sparse.engine.config import FinalConfig, OptimConfig
from offload_sparse.engine.forward import Forward
from offload_sparse.methods.method import Method, Task, build_method
from offload_sparse.run.evaluation import evaluate
from offload_sparse.run.trainer import classification_loss
from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.loader import Batch
from offload_sparse.workloads.data.normalise import Normalise
from offload_sparse.workloads.data.order import steps_per_epoch
from offload_sparse.workloads.data.source import EMBEDDED
from offload_sparse.workloads.models import build_model

MODELS = {"lenet300": "offload_sparse/lenet_300_100", "lenet5": "offload_sparse/lenet5_caffe"}
METHODS = ("dense", "dst", "dfbst")
PAPER = {  # Tables 1 and 2: accuracy in %
    "lenet300.dense": 98.08,
    "lenet300.dst": 97.6,
    "lenet300.dfbst": 98.06,
    "lenet5.dense": 99.18,
    "lenet5.dst": 99.08,
    "lenet5.dfbst": 99.06,
}
_BATCH = 64
RESET_AT = DSTConfig.reset_at


@dataclass(frozen=True)
class Cell:
    """One run."""

    model: str
    method: str
    seed: int
    steps: int
    reset_at: float

    def file_name(self, images: Images) -> str:
        """Where its figures are kept: whatever they depend on is in the name."""
        data = f"{Path(images.name).name}-{len(images.train.labels)}"
        reset = f"-reset{self.reset_at:g}" if self.method != "dense" and self.reset_at != RESET_AT else ""
        return f"{self.model}-{self.method}-seed{self.seed}-steps{self.steps}{reset}-{data}.json"


def run(quick: bool, config: DFBSTBenchConfig) -> BenchResult:
    """5 seeds and 20 epochs; ``quick`` takes one seed and 150 steps of each run."""
    images = _images(config.data or EMBEDDED)
    per_epoch = steps_per_epoch(len(images.train.labels), _BATCH)
    steps = 150 if quick and not config.epochs else (config.epochs or 20) * per_epoch
    seeds = config.seeds or (1 if quick else 5)
    device = default_device()
    raw: dict[str, Any] = {"device": str(device), "threads": torch.get_num_threads(), "steps": steps}
    raw["batch_size"], raw["images"] = _BATCH, len(images.train.labels)
    ratios: dict[str, float] = {}
    rows: list[list[Any]] = []
    for model in MODELS:
        times = _step_seconds(model, images, device)
        cells = [
            Cell(model, method, seed, steps, config.reset_at) for seed in range(seeds) for method in METHODS
        ]
        results = [(cell, _kept(cell, images, device, config.cache)) for cell in cells]
        for method in METHODS:
            found = [figures for cell, figures in results if cell.method == method]
            key = f"dfbst.{model}.{method}"
            ratios |= _ratios(key, found, times[method] / times["dense"])
            raw[key] = {"runs": found, "step_seconds_median": times[method]}
            rows.append(_row(model, method, key, ratios, found))
    return BenchResult(ratios, raw, HEADER, rows)


HEADER = (
    *("network", "method", "accuracy %", "±", "paper %"),
    *("forward %", "median", "backward %", "step/dense", "s"),
)


def _ratios(key: str, found: list[dict[str, Any]], step_vs_dense: float) -> dict[str, float]:
    accuracies = [figures["accuracy"] for figures in found]
    return {
        f"{key}.accuracy": fmean(accuracies),
        f"{key}.spread": spread(accuracies),
        f"{key}.remaining": fmean(figures["forward_remaining"] for figures in found),
        f"{key}.remaining_median": median(figures["forward_remaining"] for figures in found),
        f"{key}.backward_remaining": fmean(figures["backward_remaining"] for figures in found),
        f"{key}.step_vs_dense": step_vs_dense,
    }


def _row(
    model: str, method: str, key: str, ratios: dict[str, float], found: list[dict[str, Any]]
) -> list[Any]:
    return [
        model,
        method,
        f"{ratios[f'{key}.accuracy']:.2f}",
        f"{ratios[f'{key}.spread']:.2f}",
        PAPER[f"{model}.{method}"],
        f"{100 * ratios[f'{key}.remaining']:.2f}",
        f"{100 * ratios[f'{key}.remaining_median']:.2f}",
        f"{100 * ratios[f'{key}.backward_remaining']:.2f}",
        f"{ratios[f'{key}.step_vs_dense']:.2f}",
        f"{fmean(figures['seconds'] for figures in found):.0f}",
    ]


def _images(name: str) -> Images:
    images, _ = read_images(DataConfig(name=name))
    if images.shape != (1, 28, 28):
        raise ValueError(f"the LeNets take grey images of 28×28 pixels, which {name} has not; correct --data")
    return images


def _task(cell: Cell, images: Images, device: torch.device) -> Task:
    DSTConfig.reset_at = DFBSTConfig.reset_at = cell.reset_at
    config = RunConfig(
        method=cell.method,  # type: ignore[arg-type]
        data=DataConfig(name=images.name, batch_size=_BATCH),
        optim=OptimConfig(lr=0.01, momentum=0.9, weight_decay=0.0, schedule="constant"),
        train=TrainConfig(seed=cell.seed),
        final=FinalConfig(),
    )
    return Task(
        config,
        partial(_network, MODELS[cell.model], images.classes),
        (torch.empty(1, 1, 28, 28, device="meta"),),
        classification_loss,
        cell.steps,
        device,
        torch.float32,
        Forward(),
    )


def _network(name: str, classes: int) -> nn.Module:
    # Convolutions of few channels are a third faster in this layout on a CPU; the values are the same.
    network = build_model(name, classes, 1, 28)
    return network.to(memory_format=torch.channels_last)


def _batches(images: Images, seed: int, steps: int, normalise: Normalise) -> Iterator[Batch]:
    for batch in batches(images, _BATCH, seed, steps):
        yield on_device(batch, normalise)


def _kept(cell: Cell, images: Images, device: torch.device, cache: str) -> dict[str, Any]:
    """The figures of ``cell``, from the cache if it has them."""
    return kept(cache, cell.file_name(images), partial(_train, cell, images, device))


def _train(cell: Cell, images: Images, device: torch.device) -> dict[str, Any]:
    """Train one network and measure it."""
    normalise = Normalise([0.0], [1.0]).to(device)
    method = build_method(_task(cell, images, device))
    per_epoch = steps_per_epoch(len(images.train.labels), _BATCH)
    history: list[dict[str, float]] = []
    times: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(_batches(images, cell.seed, cell.steps, normalise), start=1):
        begun = time.perf_counter()
        method.train_step(batch, 0.01)
        times.append(time.perf_counter() - begun)
        if step % per_epoch == 0 or step == cell.steps:
            loss = fmean(record.loss for record in method.records())
            history.append({"epoch": step / per_epoch, "loss": loss} | _remaining(method))
    seconds = time.perf_counter() - start
    module = method.finalize([images_of(images.train, normalise)]).module
    figures = {
        "accuracy": 100 * evaluate(module, in_parts(images.test, 500), normalise, device).accuracy,
        "seconds": seconds,
        "step_seconds_median": median(times),
        "threads": torch.get_num_threads(),
        "history": history,
    }
    return figures | _remaining(method) | method.report()


def images_of(batch: Batch, normalise: Normalise) -> Tensor:
    """The first images of a split, for statistics of a network that has any."""
    return normalise(batch.images[:_BATCH])


def _remaining(method: Method) -> dict[str, float]:
    dense = {"forward_remaining": 1.0, "backward_remaining": 1.0}
    return dense | {name: value for name, value in method.status().items() if name in dense}


def _step_seconds(model: str, images: Images, device: torch.device) -> dict[str, float]:
    """Median seconds of a step of each method, taken in turns."""
    normalise = Normalise([0.0], [1.0]).to(device)
    batch = next(_batches(images, 0, 1, normalise))
    methods = {
        name: build_method(_task(Cell(model, name, 0, 100, RESET_AT), images, device)) for name in METHODS
    }

    def step_of(method: Method) -> Callable[[], None]:
        return partial(method.train_step, batch, 0.01)

    seconds = take_turns({name: step_of(method) for name, method in methods.items()}, 20)
    return {name: median(values) for name, values in seconds.items()}
