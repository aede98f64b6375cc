"""Searched widths against their controls: accuracy of every method at equal train FLOPs, over seeds.

A cell is a run of ``offload-sparse train`` as a user would start it, on one thread, in a folder of its own
under ``--cache``, two at a time (``--jobs``): cut short, it resumes from its checkpoints; finished, it is not
run again. All have the same share of the dense FLOPs, and as many steps as give a row the same train FLOPs,
probes included:

    even        one width everywhere, fixed from the start (method static)
    published   widths from a paper, scaled (VGG-19 only)
    taper       by hand: late layers narrower (VGG-19 only)
    none        one even mask of the full network's initial values
    probe       the default search: widths that probes move, in cycles (in the first quarter of a short run)
    family      one run with a member for each of ``--flops``, of the train FLOPs of ``even`` at all of them
    found       fixed from the start, with the widths that ``probe`` ended with
    persistent  masks that persist and a keep rate per group, frozen after a twentieth of the steps
    sampled     the paper's masks, K = 50, frozen after four fifths of the steps
    algorithm1  the paper to the letter: K = 1, VR-PGE, frozen after four fifths of the steps
    dense       the full network (for as many steps as ``even``)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from offload_sparse.bench.cells import BATCH, SETS, Run, finish, finished_run, last, options_on, spread
from offload_sparse.bench.contract import BenchResult
from offload_sparse.bench.options import StudyConfig, check_names
from offload_sparse.engine.config import SEARCHED, RoundConfig
from offload_sparse.policy.width_search import cycles_and_pairs

_COMMON = {"optim.lr": 0.1, "policy.budget": "flops", "train.eval_every": 0}
GROUPS = {"fashion_mnist": 6, "resnet20": 12, "mobilenetv1": 14, "vgg19": 16}
EPOCHS = {"fashion_mnist": 4, "resnet20": 15, "mobilenetv1": 15, "vgg19": 40}
WIDTHS = {
    "vgg19": {
        "taper": "10 10 20 20 40 40 40 40 57 40 28 20 16 16 16 24",
        "published": "vgg19_cifar_slimming",
    }
}
"""Of the shapes by hand, by set and method."""

_PAPER = {
    "policy.sampler": "bernoulli",
    "policy.parametrisation": "atom",
    "policy.optimizer": "adam",
    "policy.lr": 0.012,
    "policy.hard_cap": 2,
    "round.freeze_at": 0.8,
}
METHODS: dict[str, dict[str, Any]] = {
    "even": {"method": "static"},
    "published": {"method": "static"},
    "taper": {"method": "static"},
    "none": {"policy.search": "none"},
    "probe": {"policy.search": "probe"},
    "family": {"policy.search": "none"},
    "found": {"method": "static"},
    "persistent": {"policy.search": "sampled", "policy.hard_cap": 2},
    "sampled": _PAPER | {"policy.estimator": "rloo"},
    "algorithm1": _PAPER | {"policy.estimator": "vr_pge", "round.k": 1, "round.reference": "every_step"},
    "dense": {"method": "dense"},
}
"""In the order in which they are run: ``found`` depends on ``probe``."""

_HEADER = ("set", "FLOPs", "method", "accuracy %", "±", "FLOPs %", "params %", "train cost", "steps", "s")


def run(quick: bool, config: StudyConfig) -> BenchResult:
    """Every cell that is not in the cache yet; ``quick`` takes one seed and 40 steps of three methods. Raises
    ValueError: there is no method of a name, or not in this setting."""
    possible = [name for name in METHODS if Cell(config, name, 0.0, 0, 0, Path()).possible()]
    check_names("methods", config.methods, possible)
    methods = config.methods or (["even", "probe", "persistent"] if quick else list(METHODS))
    epochs = config.epochs or EPOCHS[config.set]
    steps = 40 if quick and not config.epochs else epochs * (SETS[config.set][1] // BATCH)
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            Cell(config, name, share, seed, steps, Path(config.cache or folder))
            for seed in range(config.seeds or (1 if quick else 3))
            for share in config.flops
            for name in (name for name in possible if name in methods)
        ]
        finish([cell.before().run for cell in cells], config.jobs)
        finish([cell.run for cell in cells], config.jobs)
        for cell in cells:
            found.setdefault((cell.flops, cell.name), []).append(cell.figures())
    ratios: dict[str, float] = {}
    rows = []
    for (share, name), runs in found.items():
        prefix, even = f"study.{config.set}.flops{share:g}.{name}", found.get((share, "even"), runs)
        accuracies = [figures["accuracy"] for figures in runs]
        keys = ("flops_ratio", "params_ratio", "train_flops", "seconds")
        means = {key: fmean(figures[key] for figures in runs) for key in keys}
        cost = means["train_flops"] / fmean(r["train_flops"] for r in even)
        ratios |= {f"{prefix}.accuracy": fmean(accuracies), f"{prefix}.spread": spread(accuracies)}
        ratios |= {f"{prefix}.params_ratio": means["params_ratio"], f"{prefix}.train_cost_vs_even": cost}
        shares = (100 * means["flops_ratio"], 100 * means["params_ratio"])
        numbers = [*(f"{n:.2f}" for n in (fmean(accuracies), spread(accuracies), *shares)), f"{cost:.3f}"]
        rows.append([config.set, f"{share:g}", name, *numbers, runs[0]["steps"], f"{means['seconds']:.0f}"])
    gains = [
        fmean(run["accuracy"] for run in runs) - fmean(run["accuracy"] for run in found[share, "even"])
        for (share, name), runs in found.items()
        if name == "family" and (share, "even") in found
    ]
    ratios |= {f"study.{config.set}.family.gain": fmean(gains)} if gains else {}
    raw = {f"flops{share:g}.{name}": runs for (share, name), runs in found.items()}
    return BenchResult(ratios, {"runs": raw, "steps": steps}, _HEADER, rows)


@dataclass(frozen=True)
class Cell:
    """One run, in a folder below ``folder``; ``steps`` are the optimizer steps of ``even``."""

    config: StudyConfig
    name: str
    flops: float
    seed: int
    steps: int
    folder: Path

    @property
    def run_dir(self) -> Path:
        flops = "_".join(f"{share:g}" for share in (self._members if self.name == "family" else [self.flops]))
        name = f"{self.config.set}-{self.name}-flops{flops}-steps{self.steps}-seed{self.seed}"
        return self.folder / f"{name}-{self.config.images_name}"

    @property
    def _members(self) -> list[float]:
        return sorted(self.config.flops)

    def possible(self) -> bool:
        """Whether the setting has what the method needs."""
        if self.name == "family":
            return len(self._members) > 1
        return self.name not in ("published", "taper") or self.name in WIDTHS.get(self.config.set, {})

    @property
    def run(self) -> Run:
        return Run(self.run_dir, self.options)

    def before(self) -> Cell:
        """The cell that has to have finished before this one begins, or this one."""
        return replace(self, name="probe") if self.name == "found" else self

    def options(self) -> dict[str, Any]:
        """Of the run; the widths of ``found`` are those that ``probe`` has left. Raises ValueError: there are
        no images."""
        widths = WIDTHS.get(self.config.set, {}).get(self.name, "")
        if self.name == "found":
            widths = " ".join(map(str, self.before().figures()["widths"]))
        options = options_on(self.config.set, self.config) | _COMMON | METHODS[self.name]
        options |= {"static.widths": widths} if widths else {}
        options |= {"policy.budgets": self._members} if self.name == "family" else {}
        share = round(searched(self.steps) / self.steps, 3)
        options |= {"round.freeze_at": share} if self.name == "probe" else {}
        return options | {
            "policy.rho": self._members[0] if self.name == "family" else self.flops,
            "train.seed": self.seed,
            "train.epochs": 1 + self.steps * BATCH // SETS[self.config.set][1],
            "train.max_steps": equal_steps(self.name, self.steps, GROUPS[self.config.set], self._members),
        }

    def figures(self) -> dict[str, Any]:
        """Of the finished run, which is started, or resumed, if it is not there."""
        summary, lines = finished_run(self.run)
        structure = json.loads((self.run_dir / "model" / "structure.json").read_text())
        member = summary.get("members", {}).get(f"{self.flops:g}", summary)
        part = self.flops / sum(self._members) if self.name == "family" else 1
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
    learned = {"sampled": 0.8, "algorithm1": 0.8, "persistent": 0.05}.get(name, 0.0)
    return round(steps * 3 / (3 + learned))
