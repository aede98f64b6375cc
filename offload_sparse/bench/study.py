"""Searched widths against their controls: accuracy of every method at equal train FLOPs, over seeds.

All cells of a row have the same share of the dense FLOPs, and as many steps as give the row the same train
FLOPs, probes included; where a budget counts channels both hold of the first step:

    even        one width everywhere, fixed from the start (method static)
    published   widths from a paper, scaled (VGG-19 only)
    taper       by hand: late layers narrower (VGG-19 only)
    none        one even mask of the full network's initial values
    probe       the default search: widths that probes move, in cycles (in the first quarter of a short run)
    family      one run with a member for each of ``--flops``, of the train FLOPs of ``even`` at all of them
    found       fixed from the start, with the widths that ``probe`` ended with
    persistent  masks that persist and a keep rate per group, frozen after a twentieth of the steps
    sampled     the paper's masks, K = 50, frozen after four fifths of the steps
    counted     as ``sampled``, but with the paper's budget: of all channels the square root of that share
    algorithm1  as ``counted``, but with the paper's K = 1 and VR-PGE
    dense       the full network (for as many steps as ``even``)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from offload_sparse.bench.cells import BATCH, SETS, Run, accuracy, finish, kept, last, options_on, outcome
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.options import StudyConfig, chosen
from offload_sparse.engine.config import SEARCHED, RoundConfig
from offload_sparse.policy.width_search import cycles_and_pairs

_COMMON = {"optim.lr": 0.1, "policy.budget": "flops", "train.eval_every": 0}
GROUPS = {"fashion_mnist": 6, "resnet20": 12, "mobilenetv1": 14, "vgg19": 16}
EPOCHS = {"fashion_mnist": 4, "resnet20": 15, "mobilenetv1": 15, "vgg19": 40}
_PAPER = {
    "policy.sampler": "bernoulli",
    "policy.parametrisation": "atom",
    "policy.optimizer": "adam",
    "policy.lr": 0.012,
    "policy.hard_cap": 2,
    "round.freeze_at": 0.8,
}
_CHANNELS = {"policy.budget": "count"}
METHODS: dict[str, dict[str, Any]] = {
    "even": {"method": "static"},
    "published": {"method": "static", "static.widths": "vgg19_cifar_slimming"},
    "taper": {"method": "static", "static.widths": "10 10 20 20 40 40 40 40 57 40 28 20 16 16 16 24"},
    "none": {"policy.search": "none"},
    "probe": {"policy.search": "probe"},
    "family": {"policy.search": "none"},
    "found": {"method": "static"},
    "persistent": {"policy.search": "sampled", "policy.hard_cap": 2},
    "sampled": _PAPER | {"policy.estimator": "rloo"},
    "counted": _PAPER | _CHANNELS | {"policy.estimator": "rloo"},
    "algorithm1": _PAPER
    | _CHANNELS
    | {"policy.estimator": "vr_pge", "round.k": 1, "round.reference": "every_step"},
    "dense": {"method": "dense"},
}
"""In the order in which they are run: ``found`` depends on ``probe``."""

_HEADER = ("set", "FLOPs", "method", "accuracy %", "±", "FLOPs %", "params %", "train cost", "steps", "s")


def run(config: StudyConfig) -> BenchResult:
    """Every cell that is not in the cache yet; ``quick`` takes one seed and 40 steps of three methods. Raises
    ValueError: there is no method of a name, or not in this setting."""
    names = [name for name in METHODS if possible(config, name)]
    usual = ["even", "probe", "persistent"] if config.quick else names
    names = chosen("methods", config.methods, names, usual)
    epochs = config.epochs or EPOCHS[config.set]
    steps = 40 if config.quick and not config.epochs else epochs * (SETS[config.set][1] // BATCH)
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    with kept(config) as folder:
        cells = [
            (name, share, seed)
            for seed in range(config.seeds or (1 if config.quick else 3))
            for share in config.flops
            for name in names
        ]
        run_of = partial(cell, config, folder, steps)
        before = [("probe" if name == "found" else name, share, seed) for name, share, seed in cells]
        finish([run_of(*at) for at in before], config.jobs)
        finish([run_of(*at) for at in cells], config.jobs)
        for name, share, seed in cells:
            of = figures(config, name, share, run_of(name, share, seed))
            found.setdefault((share, name), []).append(of)
    ratios: dict[str, float] = {}
    rows = []
    for (share, name), runs in found.items():
        prefix, even = f"study.{config.set}.flops{share:g}.{name}", found.get((share, "even"))
        keys = ("flops_ratio", "params_ratio", "train_flops", "seconds")
        means = {key: fmean(run[key] for run in runs) for key in keys}
        percents = accuracy(prefix, [run["accuracy"] for run in runs])
        ratios |= percents
        ratios[f"{prefix}.params_ratio"] = means["params_ratio"]
        cost = "-"
        if even is not None:
            ratio = means["train_flops"] / fmean(run["train_flops"] for run in even)
            ratios[f"{prefix}.train_cost_vs_even"], cost = ratio, f"{ratio:.3f}"
        numbers = (*percents.values(), 100 * means["flops_ratio"], 100 * means["params_ratio"])
        costs = (cost, runs[0]["steps"], f"{means['seconds']:.0f}")
        rows.append([config.set, f"{share:g}", name, *(f"{number:.2f}" for number in numbers), *costs])
    gains = [
        fmean(run["accuracy"] for run in runs) - fmean(run["accuracy"] for run in found[share, "even"])
        for (share, name), runs in found.items()
        if name == "family" and (share, "even") in found
    ]
    ratios |= {f"study.{config.set}.family.gain": fmean(gains)} if gains else {}
    raw = {f"flops{share:g}.{name}": runs for (share, name), runs in found.items()}
    return BenchResult(ratios, {"runs": raw, "steps": steps}, _HEADER, rows)


def possible(config: StudyConfig, name: str) -> bool:
    """Whether the setting has what a method needs."""
    if name == "family":
        return len(config.flops) > 1
    return name not in ("published", "taper") or config.set == "vgg19"


def cell(config: StudyConfig, folder: Path, steps: int, name: str, share: float, seed: int) -> Run:
    """One run, in a folder below ``folder``; ``steps`` are the optimizer steps of ``even``. What ``found``
    takes from ``probe`` has to have finished."""
    members, images = sorted(config.flops), SETS[config.set][1]
    options = options_on(config) | _COMMON | METHODS[name]
    options |= {"policy.rho": share, "train.seed": seed, "train.epochs": 1 + steps * BATCH // images}
    options["train.max_steps"] = equal_steps(name, steps, GROUPS[config.set], members)
    if name == "found":
        probe = cell(config, folder, steps, "probe", share, seed)
        options["static.widths"] = " ".join(map(str, figures(config, "probe", share, probe)["widths"]))
    if name == "family":
        options |= {"policy.rho": members[0], "policy.budgets": members}
    if options["policy.budget"] == "count":
        options["policy.rho"] = round(share**0.5, 6)
    if name == "probe":
        options["round.freeze_at"] = round(searched(steps) / steps, 3)
    flops = "_".join(f"{share:g}" for share in (members if name == "family" else [share]))
    place = f"{config.set}-{name}-flops{flops}-steps{steps}-seed{seed}-{config.images_name}"
    return Run(folder / place, options)


def figures(config: StudyConfig, name: str, share: float, run: Run) -> dict[str, Any]:
    """Of a finished run; of a family, those of one member."""
    summary, lines = outcome(run)
    structure = json.loads((run.folder / "model" / "structure.json").read_text())
    member = summary.get("members", {}).get(f"{share:g}", summary)
    part = share / sum(config.flops) if name == "family" else 1
    return {
        "accuracy": 100 * member["test_accuracy"],
        "params_ratio": member["params_ratio"],
        "flops_ratio": member["flops_ratio"],
        "train_flops": part * last(lines, "train_flops"),
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "widths": [len(group["kept"]) for group in structure["groups"].values()],
        "probes": last(lines, "probes", []),
    }


def searched(steps: int) -> int:
    """Of a run of so many steps those in which ``probe`` searches: those of the default, or a quarter."""
    return RoundConfig().freeze_step("probe", steps) or round(SEARCHED["probe"] * steps)


def equal_steps(name: str, steps: int, groups: int, members: Sequence[float] = ()) -> int:
    """Steps that take the train FLOPs of so many steps of ``even``: a forward and a backward pass each.

    A step of a sampled search evaluates a second subnet. A pair of a probe is two forward passes. A step of a
    family trains the largest of ``members`` (shares of the FLOPs), the smallest, and one of those between."""
    if name == "family":
        trained = members[0] + members[-1] + (fmean(members[1:-1]) if len(members) > 2 else 0)
        return round(steps * sum(members) / trained)
    if name == "probe":
        cycles, pairs = cycles_and_pairs(groups, searched(steps), steps)
        return round(steps - 2 * cycles * pairs / 3)
    learned = {"sampled": 0.8, "counted": 0.8, "algorithm1": 0.8, "persistent": 0.05}.get(name, 0.0)
    return round(steps * 3 / (3 + learned))
