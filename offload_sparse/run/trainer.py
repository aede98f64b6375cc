"""A run from its configuration to its summary: data, method, loop, final network."""

from __future__ import annotations

import copy
import math
import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_sparse.channels.accounting import count_flops, count_parameters, train_cost_saving
from offload_sparse.config.run import RunConfig, resolve
from offload_sparse.engine.config import FinalConfig
from offload_sparse.engine.distributed import (
    agreed,
    attempt,
    everyones,
    on_every_rank,
    on_first_rank,
    require_equal,
)
from offload_sparse.engine.forward import Forward
from offload_sparse.engine.pretrained import FittedWeights
from offload_sparse.export.network_file import FinalNetwork
from offload_sparse.methods.catalogue import build_method
from offload_sparse.methods.method import Method, Task
from offload_sparse.policy.width_search import cycles_and_pairs
from offload_sparse.run.errors import RunError
from offload_sparse.run.evaluation import Evaluation, evaluate
from offload_sparse.run.launch import as_launched, launched, parent_command, sole_job, start_trackers
from offload_sparse.run.log import MEMBERS_FOLDER, MODEL_FOLDER, Recorder
from offload_sparse.run.plan.dry_run import Structure, knob, model_arguments, model_on_meta
from offload_sparse.run.plan.fit import beside_dense, check, out_of_memory
from offload_sparse.run.plan.machine import process_bytes, this_machine
from offload_sparse.run.plan.plan import Planner
from offload_sparse.run.position import Progress
from offload_sparse.run.process import bound_memory, return_freed_memory
from offload_sparse.run.resume import Start, finished_summary, start_of
from offload_sparse.run.schedule import learning_rate
from offload_sparse.run.start_weights import fitted_weights, prepared_images, weight_source
from offload_sparse.run.teacher import TEACHER_FOLDER, Teacher, distilled
from offload_sparse.run.terminal import fitted, tell, warn_of_collapse
from offload_sparse.store.files import write_file
from offload_sparse.store.tiers import Mode
from offload_sparse.workloads.data.corrupt import CORRUPT_LOG, CorruptImages
from offload_sparse.workloads.data.loader import Batch, DeclaredData, EvalLoader, TrainLoader
from offload_sparse.workloads.data.normalise import normalise_for, takes_channels_last
from offload_sparse.workloads.data.source import Splits, load_splits
from offload_sparse.workloads.models import build_model

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(config: RunConfig) -> dict[str, Any]:
    """Run ``config`` to its end, from where its folder says it stands. Returns the contents of
    ``summary.json`` (on every rank); {"stopped_at": step} if the run was asked to stop. Raises ValueError:
    something in the configuration, the data or the launch has to be changed; says what; FloatingPointError: a
    loss or gradient was not finite; RunError: memory or the disk is too small, or another process has died.
    """
    config = as_launched(config, os.environ, parent_command())
    with launched(config) as accelerator, sole_job(config.run_dir):
        config = resolve(config, accelerator.device.type)
        start = start_of(config)
        if start.status == "finished":
            if accelerator.is_main_process:
                more = "--overwrite true trains it anew, a larger train.epochs trains it on"
                print(fitted(f"run folder: {config.run_dir} holds this run, finished; {more}"))
            return finished_summary(config)
        run = Run(config, accelerator, start)
        done = False
        try:
            result, done = _loop(run), True
            return result
        except torch.OutOfMemoryError as error:
            raise RunError(run.out_of_memory()) from error
        finally:  # before the process groups are destroyed, which might wait for a transfer for ever
            run.method.close(abandon=not done)


def _loop(run: Run) -> dict[str, Any]:
    with run.recorder as recorder, run.progress as progress:
        for step, batch in run.batches():
            with progress.rolling_back():
                run.train_step(step, batch)
                if run.log_due(step):
                    recorder.log(step + 1, **run.read_metrics(step))
                if run.epoch_done(step):
                    recorder.log(step + 1, **run.epoch_metrics(step))
                progress.save_when_due()
            if progress.stopped:
                break
        if progress.stopped:
            return progress.tell_stopped()
        progress.save_the_end()
        network = run.finalize()
        summary = run.summary(network)
        recorder.finish(summary)
    return summary


class Run:
    """Everything that one run holds; the loop itself is ``train``."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, start: Start) -> None:
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        main, resumes = accelerator.is_main_process, start.status == "started"
        self.recorder = on_every_rank(lambda: Recorder(config, main, accelerator.log, resumes))
        source = weight_source(config)
        log = config.run_dir / CORRUPT_LOG
        if not resumes:  # an earlier run's
            log.unlink(missing_ok=True)
        self.corrupt = CorruptImages(config.data.corrupt_limit, log)
        with accelerator.local_main_process_first():  # which fills the cache that the others then read
            loaded = attempt(lambda: load_splits(config.data))
        self.splits: Splits = agreed(loaded)
        splits, data = self.splits, config.data
        identity = splits.identity()
        every = everyones({"the data set": identity}, accelerator.num_processes)
        require_equal(dict(enumerate(every)), "give every machine the same files")
        shape, number = splits.image_shape, len(splits.train)
        self.data = DeclaredData(splits.num_classes, splits.in_channels, shape, number)
        self.model_arguments = model_arguments(config, self.data)
        self.image_shape = (self.model_arguments["in_channels"], *shape)
        loading: dict[str, Any] = {
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "channels": self.image_shape[0],
            "progress": not config.quiet,
            "corrupt": self.corrupt,
            "write": write_file,
        }
        seed = config.train.seed
        self.train_loader = TrainLoader(splits.train, data, seed=seed, device=self.device, **loading)
        self.test_loader = self.watch_loader = EvalLoader(splits.test, data, **loading)
        if splits.validation:
            self.watch_loader = EvalLoader(splits.validation, data, **loading)
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.total_steps = config.train.steps(self.steps_per_epoch)
        self.dtype: torch.dtype = getattr(torch, config.train.dtype)
        self.machine = this_machine(self.device, accelerator.num_processes)
        model = self._model = model_on_meta(config, self.data)  # which says what does not fit together
        weights = fitted_weights(source, model, splits.class_names, begins=start.status == "new")
        images, self.lines = prepared_images(config, weights, self.image_shape)
        last = takes_channels_last(model, self.image_shape)
        self.normalise = normalise_for(self.train_loader.images, images, self.dtype, last).to(self.device)
        self.teacher = self._teacher(weights) if config.train.distill else None
        mode: Mode = "look" if start.status == "look" else "resume" if resumes else "replace"
        self.task = self._task(mode, weights if config.model.trained else None)
        if config.train.check:
            on_first_rank(lambda: check(config, self.data, self.machine))  # whose machine decides for all
        bound_memory(self.task.factory)
        self.method: Method = build_method(self.task)
        return_freed_memory()
        self.progress = Progress(config, self.method, self.recorder, start, self._batches_at, identity)

    # --- the loop ---

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """(step, this rank's part of the batch on the device) for every optimizer step that is left."""
        progress = self.progress
        if self.accelerator.is_main_process and not self.config.quiet:
            tell(*self.start_lines())
        progress.begin(self.total_steps, self.steps_per_epoch)
        if not self._teach():
            return
        start_trackers(self.accelerator, self.config)
        if progress.taken_up:
            self._complete_log()
        while progress.step < self.total_steps:
            rollbacks = progress.rollbacks
            for batch in self.train_loader.batches(progress.data_position):
                yield progress.step, self._to_device(batch)
                if progress.rollbacks > rollbacks or progress.step >= self.total_steps:
                    break

    def _complete_log(self) -> None:
        """The lines of the last step, which the process may have died before; every rank takes part."""
        step = self.progress.step - 1
        logged = on_first_rank(lambda: self.recorder.logged_at(step + 1))
        if self.log_due(step):
            metrics = self.read_metrics(step)
            if "loss" not in logged:
                self.recorder.log(step + 1, **metrics)
        if self.epoch_done(step) and "params_ratio" not in logged:
            self.recorder.log(step + 1, **self.epoch_metrics(step))
        self.progress.save_when_due()

    def train_step(self, step: int, batch: Batch) -> None:
        self.method.train_step(batch, self.learning_rate(step))
        self.progress.advance()
        self.recorder.advance()

    def learning_rate(self, step: int) -> float:
        first, last = self.method.span(step)
        cycle, per_epoch = last < self.total_steps, self.steps_per_epoch
        return learning_rate(self.config.optim, step - first, last - first, per_epoch, cycle, first)

    def log_due(self, step: int) -> bool:
        every = min(self.config.train.log_every, self.steps_per_epoch)  # each epoch has figures of its own
        return (step + 1) % every == 0 or step + 1 == self.total_steps

    def epoch_done(self, step: int) -> bool:
        return (step + 1) % self.steps_per_epoch == 0

    def evaluation_due(self, step: int) -> bool:
        every = self.config.train.eval_every * self.steps_per_epoch
        return bool(every) and (step + 1) % every == 0 and step + 1 < self.total_steps

    def read_metrics(self, step: int) -> dict[str, float]:
        """Means over the steps since the last line. Waits for the device."""
        records = self.progress.take_records()
        differences = [r.difference for r in records if r.difference is not None]
        values = {
            "loss": fmean(r.loss for r in records) if records else math.nan,  # every step was left out
            "accuracy": fmean(r.metrics["accuracy"] for r in records) if records else math.nan,
            "lr": self.learning_rate(step),
            "train_cost_saving": self._saving(step + 1),
            "train_flops": self.method.spent_flops * self.config.data.batch_size,
            **self.method.status(),
        }
        if differences:
            values["loss_difference"] = fmean(differences)
        return values

    def epoch_metrics(self, step: int) -> dict[str, Any]:
        """How costly the structure is after this epoch (Zhou et al. 2021, Figure 3), how good it is, and what
        this process holds in memory."""
        on_cuda = self.device.type == "cuda"
        memory = {
            "host_bytes": process_bytes(),
            "device_bytes": torch.cuda.memory_allocated(self.device) if on_cuda else 0,
        }
        dynamics = self.method.dynamics() | {"train_cost_saving": self._saving(step + 1)} | memory
        return dynamics | (self.evaluate_now() if self.evaluation_due(step) else {})

    def evaluate_now(self) -> dict[str, float]:
        """Loss and accuracy of the network as it is now, on the validation split if there is one."""
        with self.method.evaluation(self._statistics_batches()) as module:
            result = self._evaluate(module, self.watch_loader)
        self.progress.evaluated(result.accuracy)
        name = "validation" if self.splits.validation else "test"
        return {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}

    def start_lines(self) -> tuple[str, ...]:
        """Device, model, data (in detail) and method, with what the run is expected to take."""
        config, splits, method = self.config, self.splits, self.method
        ranks = self.accelerator.num_processes
        precision = config.train.dtype if config.train.autocast == "no" else config.train.autocast
        groups = len(method.channel_map.groups)
        channels = f", {method.channel_map.num_atoms:,} channels in {groups} groups" if groups else ""
        return (
            f"device: {self._device_name}{f', {ranks} ranks' if ranks > 1 else ''}, {precision}",
            f"model: {config.model.name}, {method.cost.dense_parameters:,} parameters{channels}",
            f"data: {config.data.name}, {splits.num_classes} classes, {splits.counts}, "
            f"{'x'.join(map(str, self.image_shape))}",
            *(f"  {line}" for line in splits.describe()),
            *self.lines,
            f"train: {config.method}, {knob(config)}, {self.total_steps:,} steps, {self._expected()}",
            *self._search(groups),
        )

    def _search(self, groups: int) -> Iterator[str]:
        """When widths will move, if at all."""
        policy, steps = self.config.policy, self.config.round.freeze_step("probe", self.total_steps)
        if self.config.method != "sparse_offload" or policy.rho == 1:
            return
        if policy.search == "none" and self.config.model.trained:
            yield f"search: none, the cut by {policy.start} stays; --policy.search sampled exchanges channels"
        if policy.search == "probe":
            cycles, _ = cycles_and_pairs(groups, steps, self.total_steps)
            if cycles:
                number = f"each of {cycles} cycles" if cycles > 1 else "one cycle"
                yield f"search: widths move after {number}, in the first {steps:,} steps"
            elif groups < 2:
                yield "search: none, no other group of channels could become narrower for this one to grow"
            elif steps >= policy.least_steps:
                total = f"{self.total_steps:,} steps"
                yield f"search: none, {total} are too few to compare {groups} groups; widths stay"
            elif steps or self.config.round.freeze_at != "auto":
                least = f"{policy.least_steps} steps"
                yield f"search: none, a cycle takes {least} and there are {steps:,}; widths stay"
            else:
                yield "search: none, too short a run for one to pay; --round.freeze_at 0.25 forces one"

    def _expected(self) -> str:
        """FLOPs and memory beside those of dense training, by the plan."""
        method = self.method
        structure = Structure(method.channel_map, method.cost, self._model, self.task.example_inputs)
        return beside_dense(Planner(self.config, self.data, structure), self.machine)

    # --- the end ---

    def finalize(self) -> FinalNetwork:
        """The final network, written to ``model/``."""
        network = self.method.finalize(self._statistics_batches())
        if self.accelerator.is_main_process:
            model = {"name": self.config.model.name, "arguments": self.model_arguments}
            preprocessing = {
                "mean": self.normalise.mean.flatten().tolist(),
                "std": self.normalise.std.flatten().tolist(),
                "shape": list(self.image_shape),
                "class_names": list(self.splits.class_names),
            }
            for share, member in network.members.items():
                member.save(self.config.run_dir / MEMBERS_FOLDER / f"{share:g}", model, preprocessing)
            network.save(self.config.run_dir / MODEL_FOLDER, model, preprocessing)
        return network

    def summary(self, network: FinalNetwork) -> dict[str, Any]:
        """The figures that a reader judges the run by."""
        result = self._evaluate(network.module, self.test_loader)
        cuda = self.device.type == "cuda"
        sizes = self._sizes(network.module)
        members = {
            f"{share:g}": {"test_accuracy": self._evaluate(member.module, self.test_loader).accuracy}
            | self._sizes(member.module)
            for share, member in network.members.items()
        }
        report = self.method.report()
        if self.accelerator.is_main_process:
            kept = report.get("params_ratio", sizes["params_ratio"])
            warn_of_collapse(self.config.method, kept, result.one_class)
        return {
            "method": self.config.method,
            "model": self.config.model.name,
            "dataset": self.config.data.name,
            "rho": self.config.policy.rho,
            "knob": knob(self.config),
            "steps": self.total_steps,
            "world_size": self.accelerator.num_processes,
            "device": self._device_name,
            "test_accuracy": result.accuracy,
            "test_loss": result.loss,
            **sizes,
            "train_cost_saving": self._saving(self.total_steps),
            "seconds": self.recorder.seconds,
            "step_seconds_median": self.progress.step_seconds_median,
            "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else 0,
            "corrupt_images": len(self.corrupt),
            **({"members": members} if members else {}),
        } | report

    # --- parts ---

    @property
    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def _sizes(self, module: nn.Module) -> dict[str, float]:
        """Parameters and FLOPs of a network as shares of the full one's."""
        cost = self.method.cost
        return {
            "params_ratio": count_parameters(module) / cost.dense_parameters,
            "flops_ratio": count_flops(module, self.task.example_inputs) / cost.dense_flops,
        }

    def _task(self, store_mode: Mode, weights: FittedWeights | None) -> Task:
        config = self.config
        factory = partial(build_model, config.model.name, **self.model_arguments)
        frozen, scaler = config.train.batch_norm == "frozen", self.accelerator.scaler
        forward = Forward(self.accelerator.autocast, frozen, scaler)
        return Task(
            config,
            factory,
            (torch.empty(1, *self.image_shape, device="meta"),),
            partial(
                classification_loss,
                label_smoothing=config.optim.label_smoothing,
                teacher=self.teacher,
            ),
            self.total_steps,
            self.device,
            self.dtype,
            forward,
            store_mode,
            weights,
            round(config.optim.warmup_epochs * self.steps_per_epoch),
        )

    def _teacher(self, weights: FittedWeights | None) -> Teacher:
        """The full network with these weights, to be learned from."""
        folder, classes = self.config.run_dir / TEACHER_FOLDER, self.model_arguments["num_classes"]
        images, normalise = self.train_loader.images, copy.deepcopy(self.normalise).cpu()

        def network() -> nn.Module:
            return replace(self.task, weights=weights).network().to(self.dtype)

        return Teacher(network, images, normalise, folder, classes)

    def _teach(self) -> bool:
        """The logits of the teacher, as far as they are not there; every rank takes part. False if the run
        was asked to stop meanwhile."""
        if self.teacher is None:
            return True
        ranks, stop = self.accelerator, self.progress.asked_to_stop
        ranks.wait_for_everyone()  # the first removes what an earlier run has left there
        if not self.teacher.compute(ranks.process_index, ranks.num_processes, self.config.quiet, stop):
            return False
        ranks.wait_for_everyone()
        self.teacher.open()
        return_freed_memory()
        return True

    def out_of_memory(self) -> str:
        """What to change after the device's memory has not been enough, in one line."""
        machine = this_machine(self.device, self.accelerator.num_processes)
        if machine.device is not None:  # free is what the run itself does not hold already
            machine = replace(machine, device=machine.device + torch.cuda.memory_reserved(self.device))
        return out_of_memory(self.config, self.data, machine)

    def _to_device(self, batch: Batch) -> Batch:
        labels = batch.labels.to(self.device, non_blocking=True)
        return Batch(self.normalise(batch.images), labels, batch.indices)

    def _batches_at(self, positions: list[int]) -> Iterator[Batch]:
        """The batches at these places in the order of the data."""
        return map(self._to_device, self.train_loader.at(positions))

    def _statistics_batches(self) -> Iterator[Tensor]:
        """Training images for BatchNorm statistics, the same whenever they are asked for."""
        for batch in islice(self.train_loader.batches(), FinalConfig.bn_batches):
            yield self._to_device(batch).images

    def _evaluate(self, module: nn.Module, loader: EvalLoader) -> Evaluation:
        total = partial(self.accelerator.reduce, reduction="sum")
        return evaluate(module, loader, self.normalise, self.device, total)

    def _saving(self, steps: int) -> float:
        return train_cost_saving(self.method.cost.dense_flops, [(self.method.spent_flops, 1, 0)], steps)


def classification_loss(
    module: nn.Module, batch: Batch, label_smoothing: float = 0.0, teacher: Teacher | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy, or what ``distilled`` makes of it, with the accuracy of the batch beside it."""
    logits = module(batch.images)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
    if teacher is not None:
        loss = distilled(loss, logits, teacher(batch.indices))
    return loss, {"accuracy": (logits.argmax(1) == batch.labels).to(loss.dtype).mean()}
