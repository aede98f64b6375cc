"""Accuracy and remaining weights of the LeNets trained dense, by DST and by DFBST.

The settings are those of Pote et al. 2023, section 4.4.1, and of Dynamic Sparse Training, which it follows:
SGD with learning rate 0.01 and momentum 0.9, no weight decay, batches of 64, 20 epochs, alpha 5e-4, beta
0.01, pixels in [0, 1]. The accuracy is that on the test images after the last epoch, never the best one.

A layer of which 1 % is left is whole again at once, and then falls anew: what is left at the end depends on
where in such a cycle that is, so that the median over seeds says more than the mean.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from offload_sparse.bench.cells import Run, accuracy, finish, kept, last, outcome
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.measure import median_ratio
from offload_sparse.bench.options import DFBSTBenchConfig

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
_OPTIONS: dict[str, Any] = {
    "data.batch_size": 64,
    "data.mean": "[0.0]",
    "data.std": "[1.0]",
    "optim.lr": 0.01,
    "optim.weight_decay": 0.0,
    "optim.schedule": "constant",
    "train.eval_every": 0,
}
_HEADER = (
    *("network", "method", "accuracy %", "±", "paper %"),
    *("forward %", "median", "backward %", "step/dense", "s"),
)


def run(config: DFBSTBenchConfig) -> BenchResult:
    """5 seeds and 20 epochs; ``quick`` takes LeNet-300-100 only, one seed and 150 steps."""
    seeds = range(config.seeds or (1 if config.quick else 5))
    models = ("lenet300",) if config.quick else tuple(MODELS)
    raw: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    rows = []
    with kept(config) as folder:
        runs = {
            f"{model}.{method}": [cell(config, folder, model, method, seed) for seed in seeds]
            for model, method in product(models, METHODS)
        }
        finish([run for of in runs.values() for run in of], config.jobs)
        for name, of in runs.items():
            model, method = name.split(".")
            key = f"dfbst.{name}"
            raw[key] = [figures(run) for run in of]
            found = {figure: [cell[figure] for cell in raw[key]] for figure in raw[key][0]}
            dense = [cell["step"] for cell in raw[f"dfbst.{model}.dense"]]
            shares = {
                "remaining": fmean(found["forward"]),
                "remaining_median": median(found["forward"]),
                "backward_remaining": fmean(found["backward"]),
            }
            step = median_ratio(found["step"], dense)
            ratios |= accuracy(key, found["accuracy"]) | {f"{key}.{s}": share for s, share in shares.items()}
            ratios[f"{key}.step_vs_dense"] = step
            values = [f"{ratios[f'{key}.{figure}']:.2f}" for figure in ("accuracy", "spread")]
            values += [str(PAPER[name]), *(f"{100 * share:.2f}" for share in shares.values())]
            rows.append([model, method, *values, f"{step:.2f}", f"{fmean(found['seconds']):.0f}"])
    return BenchResult(ratios, raw, _HEADER, rows)


def cell(config: DFBSTBenchConfig, folder: Path, model: str, method: str, seed: int) -> Run:
    """One run, in a folder below ``folder``."""
    options = _OPTIONS | {"method": method, "model.name": MODELS[model], "train.seed": seed}
    options |= {"data.name": config.data} if config.data else {}
    options |= {"train.epochs": config.epochs or 20}
    few = {"train.max_steps": 150} if config.quick and not config.epochs else {}
    name = f"{model}-{method}-epochs{config.epochs}-seed{seed}{'-quick' if few else ''}"
    return Run(folder / f"{name}-{config.images_name}", options | few)


def figures(run: Run) -> dict[str, float]:
    """Of a finished run: accuracy in %, shares of the weights left in both passes, seconds in all and of a
    step."""
    summary, lines = outcome(run)
    return {
        "accuracy": 100 * summary["test_accuracy"],
        "forward": last(lines, "forward_remaining", 1.0),
        "backward": last(lines, "backward_remaining", 1.0),
        "seconds": summary["seconds"],
        "step": summary["step_seconds_median"],
    }
