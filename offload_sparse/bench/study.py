"""Learned structure against its controls: accuracy, train cost and time of every method, over seeds.

Every method trains the same steps on the same batches. ``static`` is a network narrowed evenly to ρ, which
fixes the FLOPs of a subnet for all others:

    dense          the full network
    static         narrowed evenly, fixed from the start
    static_longer  the same, for as many steps as the train FLOPs of ``recipe`` pay for
    static_learned fixed from the start, with the widths that ``recipe`` ended with
    random         new masks every K steps, nothing learned
    vr_pge         the paper's estimator, compared at every step while one subnet is trained for K steps
    rloo           two subnets trained in turns
    recipe         the default search, the best that validation images have found, on the FLOPs of ``static``
                   as its budget, with room for masks of other widths, and nothing fetched ahead

The accuracy is that on the test images after the last step. With ``cache``, finished cells are kept and not
run again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from offload_sparse.bench.cells import Images, batches, in_parts, kept, on_device, read_images, spread
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.options import StudyConfig
from offload_sparse.config.methods import StaticConfig
from offload_sparse.config.run import MethodName, RunConfig, TrainConfig
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.engine.forward import Forward
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.methods.method import Method, Task, build_method
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.run.evaluation import evaluate
from offload_sparse.run.schedule import learning_rate
from offload_sparse.run.trainer import classification_loss
from offload_sparse.workloads.config import DataConfig
from offload_sparse.workloads.data.normalise import Normalise
from offload_sparse.workloads.data.order import steps_per_epoch
from offload_sparse.workloads.models import build_model

_BN_BATCHES = 20


@dataclass(frozen=True)
class Setting:
    """A data set and the network that is trained on it.

    Attributes:
        model: the network.
        data: how its images are read and augmented.
        epochs: passes over the images of a full run.
        optim: how weights are trained.
    """

    model: str
    data: DataConfig
    epochs: int
    optim: OptimConfig


SETTINGS = {
    "fashion_mnist": Setting(
        "offload_sparse/vgg_small",
        DataConfig(image_size=14, batch_size=128, random_flip=True),
        4,
        OptimConfig(lr=0.1, warmup_epochs=0.5),
    ),
    "cifar10": Setting(
        "offload_sparse/resnet20_cifar",
        DataConfig(splits=["train", "validation"], batch_size=128, random_flip=True, random_crop=4),
        10,
        OptimConfig(lr=0.1, warmup_epochs=0.5),
    ),
}
"""By the name of the set."""


@dataclass(frozen=True)
class Recipe:
    """How a method is run.

    Attributes:
        method: what a training step is.
        policy: fields of ``PolicyConfig`` that differ from the defaults.
        round: the same of ``RoundConfig``.
        flops: the budget is the FLOPs of ``static`` instead of a share ρ of the channels.
        paper: ``policy`` differs from the paper's settings instead.
    """

    method: MethodName
    policy: Mapping[str, Any] = field(default_factory=dict)
    round: Mapping[str, Any] = field(default_factory=dict)
    flops: bool = False
    paper: bool = False


_SEARCH = {"k": 50, "prefetch": False, "freeze_at": 0.8}
METHODS = {
    "dense": Recipe("dense"),
    "static": Recipe("static"),
    "random": Recipe("sparse_offload", {"lr": 0.0}, _SEARCH | {"reference": "turns"}, paper=True),
    "vr_pge": Recipe(
        "sparse_offload", {"estimator": "vr_pge"}, _SEARCH | {"reference": "every_step"}, paper=True
    ),
    "rloo": Recipe("sparse_offload", {"estimator": "rloo"}, _SEARCH | {"reference": "turns"}, paper=True),
    "recipe": Recipe("sparse_offload", {"hard_cap": 2.0}, {"prefetch": False}, flops=True),
    "static_longer": Recipe("static"),
    "static_learned": Recipe("static"),
}
"""In the order in which they are run: the last two depend on ``recipe``."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        setting: name of the data set.
        method: name of the recipe.
        rho: remaining ratio of the channels.
        seed: of weights, masks and batches.
        steps: optimizer steps.
        recipe: how it is run.
        flops_ratio: share of the dense network's FLOPs that a subnet may have; 0 where ρ decides.
        widths: of the groups of a static network; empty where ρ decides.
    """

    setting: str
    method: str
    rho: float
    seed: int
    steps: int
    recipe: Recipe
    flops_ratio: float = 0.0
    widths: tuple[int, ...] = ()

    def file_name(self, images: Images) -> str:
        """Where its figures are kept."""
        data = f"{Path(images.name).name}-{len(images.train.labels)}x{images.shape[1]}"
        return f"{self.setting}-{self.method}-rho{self.rho:g}-seed{self.seed}-steps{self.steps}-{data}.json"


def run(quick: bool, config: StudyConfig) -> BenchResult:
    """3 seeds of every method; ``quick`` takes one seed and 60 steps of each on the embedded images."""
    setting = SETTINGS[config.set]
    study = Study(config, *_images(setting, config.data, held_out=False))
    per_epoch = steps_per_epoch(len(study.images.train.labels), setting.data.batch_size)
    steps = 60 if quick and not config.epochs else (config.epochs or setting.epochs) * per_epoch
    seeds = config.seeds or (1 if quick else 3)
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for rho in config.rhos:
            for method, figures in study.row(rho, seed, steps).items():
                found.setdefault((rho, method), []).append(figures)
    ratios: dict[str, float] = {}
    rows = []
    for (rho, method), runs in found.items():
        key = f"study.{config.set}.rho{rho:g}.{method}"
        ratios |= _ratios(key, runs)
        rows.append(_row(rho, method, key, ratios, runs))
    raw = {
        "set": config.set,
        "images": len(study.images.train.labels),
        "image_shape": list(study.images.shape),
        "setting": {"model": setting.model, "optim": asdict(setting.optim), "data": asdict(setting.data)},
        "recipes": {name: asdict(recipe) for name, recipe in METHODS.items()},
        "seeds": seeds,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "runs": {f"rho{rho:g}.{method}": runs for (rho, method), runs in found.items()},
    }
    if config.plot:
        draw(found, config.set, Path(config.plot))
    header = ["ρ", "method", "accuracy %", "±", "FLOPs %", "params %", "train cost", "steps", "s"]
    return BenchResult(ratios, raw, header, rows)


class Study:
    """The cells of one data set.

    Args:
        config: which set, and where cells are kept.
        images: what is trained and tested on.
        normalise: of the images.
    """

    def __init__(self, config: StudyConfig, images: Images, normalise: Normalise) -> None:
        self._config = config
        self.images = images
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._normalise = normalise.to(self.device)

    def row(self, rho: float, seed: int, steps: int) -> dict[str, dict[str, Any]]:
        """All methods at one ratio with one seed."""
        wanted = self._config.methods or list(METHODS)
        found: dict[str, dict[str, Any]] = {}
        for name in METHODS:
            if name not in wanted:
                continue
            cell = Cell(self._config.set, name, rho, seed, steps, METHODS[name])
            if name == "dense":
                cell = replace(cell, rho=1.0)
            elif name == "static_longer":
                share = found["recipe"]["train_cost"] / found["static"]["train_cost"]
                cell = replace(cell, steps=round(share * steps))
            elif name == "static_learned":
                cell = replace(cell, widths=tuple(found["recipe"]["widths"]))
            elif METHODS[name].flops:
                cell = replace(cell, flops_ratio=found["static"]["flops_ratio"])
            found[name] = self.kept(cell)
        return found

    def kept(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell, from the cache if it has them."""
        return kept(self._config.cache, cell.file_name(self.images), partial(self.train, cell))

    def train(self, cell: Cell) -> dict[str, Any]:
        """Train one network and measure it."""
        task = self._task(cell)
        method = build_method(task)
        data, start = task.config.data, time.perf_counter()
        per_epoch = steps_per_epoch(len(self.images.train.labels), data.batch_size)
        losses: list[float] = []
        stream = batches(
            self.images, data.batch_size, cell.seed, cell.steps, data.random_crop, data.random_flip
        )
        dynamics: list[dict[str, Any]] = []
        for step, batch in enumerate(stream):
            lr = learning_rate(task.config.optim, step, cell.steps, per_epoch)
            method.train_step(on_device(batch, self._normalise), lr)
            if (step + 1) % per_epoch == 0 or step + 1 == cell.steps:
                losses.append(fmean(record.loss for record in method.records()))
                dynamics.append(method.dynamics())
        seconds = time.perf_counter() - start
        parts = (
            self._normalise(batch.images)
            for batch in batches(self.images, data.batch_size, cell.seed, _BN_BATCHES)
        )
        network = method.finalize(parts)
        result = evaluate(network.module, in_parts(self.images.test, 500), self._normalise, self.device)
        figures = {"accuracy": 100 * result.accuracy, "test_loss": result.loss, "seconds": seconds}
        return figures | self._structure(cell, method, network) | {"losses": losses, "dynamics": dynamics}

    def _structure(self, cell: Cell, method: Method, network: FinalNetwork) -> dict[str, Any]:
        """What the final network has, and what training it took."""
        costs, groups = method.costs(), network.channel_map.groups
        ratios = method.dynamics()
        return {
            "params_ratio": ratios["params_ratio"],
            "flops_ratio": ratios["flops_ratio"],
            "train_cost": costs.spent_flops / (3 * costs.dense_flops * cell.steps),
            "steps": cell.steps,
            "groups": [group.name for group in groups],
            "widths": [int(network.mask[group.start : group.stop].sum()) for group in groups],
        }

    def _task(self, cell: Cell) -> Task:
        setting, recipe = SETTINGS[cell.setting], cell.recipe
        policy = dict(recipe.policy) | {"rho": cell.rho}
        if recipe.flops:
            policy |= {"rho": cell.flops_ratio, "budget": "flops"}
        config = RunConfig(
            method=recipe.method,
            data=replace(setting.data, name=self.images.name),
            policy=(PolicyConfig.paper if recipe.paper else PolicyConfig)(**policy),
            round=RoundConfig(**recipe.round),
            optim=setting.optim,
            static=StaticConfig(" ".join(map(str, cell.widths))),
            train=TrainConfig(seed=cell.seed),
        )
        channels, height, _ = self.images.shape
        return Task(
            config,
            partial(_network, setting.model, self.images.classes, channels, height),
            (torch.empty(1, *self.images.shape, device="meta"),),
            classification_loss,
            cell.steps,
            self.device,
            torch.float32,
            Forward(),
        )


def draw(found: Mapping[tuple[float, str], list[dict[str, Any]]], name: str, path: Path) -> None:
    """Accuracy over train cost, one point per method and ratio with the spread over seeds, as an image."""
    from matplotlib.figure import Figure  # only a plot needs it, and it takes a second to load
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", title=name)
    axes.set_xlabel("train FLOPs, in steps of dense training")
    axes.set_ylabel("test accuracy, %")
    markers = dict(zip(METHODS, "osD^v<*PX", strict=False))
    ratios = sorted({rho for rho, _ in found})
    for (rho, method), runs in found.items():
        accuracies = [r["accuracy"] for r in runs]
        axes.errorbar(
            fmean(r["train_cost"] * r["steps"] for r in runs),
            fmean(accuracies),
            spread(accuracies),
            fmt=markers[method],
            color=f"C{ratios.index(rho)}",
            capsize=3,
            label=f"{method}, ρ = {rho:g}",
        )
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", which="both", labelsize="small")
    axes.legend(fontsize="x-small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _images(setting: Setting, data: str, held_out: bool) -> tuple[Images, Normalise]:
    config = replace(setting.data, name=data or setting.data.name)
    if not data:
        config = replace(config, splits=["train", "test"])  # that of the embedded images
    if held_out:
        config = replace(config, validation=1 / 6)
    return read_images(config, held_out)


def _network(model: str, classes: int, channels: int, size: int) -> nn.Module:
    # Convolutions of few channels are a third faster in this layout on a CPU; the values are the same.
    return build_model(model, classes, channels, size).to(memory_format=torch.channels_last)


def _ratios(key: str, runs: list[dict[str, Any]]) -> dict[str, float]:
    accuracies = [figures["accuracy"] for figures in runs]
    return {
        f"{key}.accuracy": fmean(accuracies),
        f"{key}.spread": spread(accuracies),
        f"{key}.flops_ratio": fmean(figures["flops_ratio"] for figures in runs),
        f"{key}.train_cost": fmean(figures["train_cost"] for figures in runs),
    }


def _row(
    rho: float, method: str, key: str, ratios: dict[str, float], runs: list[dict[str, Any]]
) -> list[Any]:
    return [
        "-" if method == "dense" else f"{rho:g}",
        method,
        f"{ratios[f'{key}.accuracy']:.2f}",
        f"{ratios[f'{key}.spread']:.2f}",
        f"{100 * ratios[f'{key}.flops_ratio']:.2f}",
        f"{100 * fmean(figures['params_ratio'] for figures in runs):.2f}",
        f"{ratios[f'{key}.train_cost']:.4f}",
        round(fmean(figures["steps"] for figures in runs)),
        f"{fmean(figures['seconds'] for figures in runs):.0f}",
    ]
