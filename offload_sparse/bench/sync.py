"""Accuracy of ranks that talk once per round beside that of ranks that talk at every step, over seeds.

Two ranks on CPUs train a small VGG on equally many images of 16×16 pixels.

    step             gradients averaged at every step, K = 50
    round10, round50 K steps of each rank by itself, then the average
    outer50          the same with outer momentum 0.5
    per_rank         a subnet of its own on every rank, K = 50
    partition        the same, disjoint
    alone            one rank with half of the images, of those for testing, too, where there are as many:
                     what the others are worth
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from offload_sparse.bench.cells import Run, accuracy, finish, kept, outcome, spread
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.options import SyncBenchConfig, chosen

RANKS = 2

_COMMON: dict[str, Any] = {
    "model.name": "offload_sparse/vgg_small",
    "data.batch_size": 64,
    "data.image_size": 16,
    "data.random_flip": "true",
    "optim.lr": 0.05,
    "optim.warmup_epochs": 0.2,
    "policy.rho": 0.5,
    "policy.sampler": "bernoulli",
    "policy.estimator": "rloo",
    "round.freeze_at": 0.5,
    "round.prefetch": "false",
    "train.eval_every": 0,
    "train.check": "false",
}
_LOCAL: dict[str, Any] = {"round.sync": "round", "round.k": 50}

MODES: Mapping[str, dict[str, Any]] = {
    "step": {"round.k": 50},
    "round10": _LOCAL | {"round.k": 10},
    "round50": _LOCAL,
    "outer50": _LOCAL | {"round.outer": "[1, 0.5]"},
    "per_rank": _LOCAL | {"round.subnets": "per_rank"},
    "partition": _LOCAL | {"round.subnets": "partition"},
    "alone": {"round.k": 50},
}

_HEADER = ("mode", "runs", "test accuracy %", "spread", "difference from step", "its spread")


def run(config: SyncBenchConfig) -> BenchResult:
    """Every mode over the same seeds; ``quick`` makes few steps of one seed. Raises ValueError: there is no
    mode of a name."""
    modes = chosen("modes", config.modes, MODES, ["step", "round10"] if config.quick else MODES)
    seeds, epochs = config.seeds or (1 if config.quick else 2), config.epochs or 8
    options = _COMMON | {"data.limit": 512 if config.quick else config.images, "train.epochs": epochs}
    options |= {"train.max_steps": 40} if config.quick else {}
    options |= {"data.name": config.data, "data.splits": "[train, validation]"} if config.data else {}
    runs: dict[str, list[Run]] = {}
    with kept(config) as folder:
        for seed in range(seeds):
            for mode in modes:
                size = f"{options['data.limit']}x{epochs}{'-quick' if config.quick else ''}"
                name = f"sync-{mode}-{size}-seed{seed}"
                given, ranks = options | MODES[mode] | {"train.seed": seed}, RANKS
                if mode == "alone":
                    given |= {key: given[key] // RANKS for key in ("data.limit", "data.batch_size")}
                    ranks = 1
                runs.setdefault(mode, []).append(Run(folder / name, given, ranks))
        finish([of[seed] for seed in range(seeds) for of in runs.values()], config.jobs)
        found = {
            mode: [100 * outcome(run)[0]["test_accuracy"] for run in of] for mode, of in runs.items()
        }
    ratios: dict[str, float] = {}
    rows: list[list[Any]] = []
    for mode, percents in found.items():
        ratios |= accuracy(f"sync.{mode}", percents)
        beside: list[Any] = ["", ""]
        if mode != "step" and "step" in found:
            apart = [a - b for a, b in zip(percents, found["step"], strict=True)]
            beside = [fmean(apart), spread(apart)]
            ratios |= {f"sync.{mode}.vs_step": beside[0], f"sync.{mode}.vs_step_spread": beside[1]}
        rows.append([mode, len(percents), fmean(percents), spread(percents), *beside])
    return BenchResult(ratios, {"accuracy": found, "options": options}, _HEADER, rows)
