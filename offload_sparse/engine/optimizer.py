"""torch's own optimizers over the flat weights of a subnet, with their state in the store.

    store, subnet   weights | slots: state tensors with a value per weight, such as the momentum buffer
    session         scalars: all other state, such as the number of steps that Adam corrects its bias by

Which is which is found by stepping the optimizer on a tiny parameter. One whose step of a weight depends on
other weights, or whose state has another form, is refused: a weight that is absent for a while could not go
on where it stopped. Weights of one parameter group lie side by side in every flat buffer, frozen ones at its
end.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offload_sparse.channels.selection import Layout
from offload_sparse.engine.config import OptimConfig
from offload_sparse.engine.distributed import everyones
from offload_sparse.store.weight_store import WEIGHTS, Ranks

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""Parameters or parameter groups -> optimizer: ``functools.partial(torch.optim.SGD, lr=0.1,
momentum=0.9)``.
"""

Grouping = Callable[[str], Mapping[str, Any] | None]
"""Name of a parameter -> settings of its group (``{"lr": 0.01}``), or None for those of the factory."""

_ADVICE = "give one whose step of a weight depends on that weight alone, such as SGD, Adam, AdamW or RMSprop"
_SHAPE = (8, 8)  # of the matrix that an optimizer is tried on; some (timm's Muon) leave smaller ones alone
_COUNTS_AHEAD = 64


def optimizer_factory(config: OptimConfig) -> OptimizerFactory:
    """The torch optimizer that ``config`` describes; its schedule is the caller's."""
    if config.name == "adamw":
        return lambda parameters: torch.optim.AdamW(
            parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
    return lambda parameters: torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )


def slot_names(config: OptimConfig) -> tuple[str, ...]:
    """State tensors that the optimizer of ``config`` keeps per weight, under torch's names."""
    return tuple(probe(optimizer_factory(config)).slots)


# --- what an optimizer keeps ---


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps.

    Attributes:
        slots: state tensors with a value per weight, under the optimizer's own names, and the value that
            each begins with.
        scalars: all other state of a parameter, before the first step.
        group_scalars: settings of its groups that it changes by itself.
        fused: whether it leaves out a step by itself where it is told to, without a wait."""

    name: str
    slots: Mapping[str, float]
    scalars: Mapping[str, Any]
    group_scalars: tuple[str, ...]
    fused: bool


class _FirstValues(dict[str, Any]):
    """State of a parameter that remembers what every entry was first set to."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if value is not None:
            self.first.setdefault(key, value.clone() if isinstance(value, Tensor) else value)
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]


def probe(
    factory: OptimizerFactory, device: torch.device | None = None, settings: Mapping[str, Any] | None = None
) -> OptimizerState:
    """Find out what the optimizer of ``factory`` keeps of a group with ``settings``, by stepping it on a tiny
    parameter. Raises ValueError: it is no factory, or its optimizer cannot be used; names it."""
    own = Group((), settings or {})
    parameter = nn.Parameter(torch.zeros(prod(_SHAPE), dtype=torch.float32, device=device))
    optimizer = build_optimizer(factory, [own.of([parameter])])
    name, group = type(optimizer).__name__, optimizer.param_groups[0]
    before = dict(group)
    state = _FirstValues()
    for key, value in optimizer.state.get(parameter, {}).items():
        state[key] = value
    optimizer.state[parameter] = state
    # With weights and gradients of zero, whatever the first step makes of a slot is its initial value.
    _step(optimizer, [parameter], [torch.zeros_like(parameter)])
    slots = {k: v for k, v in state.first.items() if isinstance(v, Tensor) and v.shape == parameter.shape}
    scalars = {k: v for k, v in state.first.items() if k not in slots}
    odd = [
        k for k, v in scalars.items() if getattr(v, "shape", ()) or not isinstance(v, int | float | Tensor)
    ]
    odd += [k for k, v in slots.items() if v.dtype != parameter.dtype or not k.isidentifier()]
    if odd:
        raise ValueError(f"{name} keeps {odd[0]!r}, neither a value per weight nor a scalar; {_ADVICE}")
    changed = tuple(k for k, v in group.items() if k != "params" and (k not in before or v != before[k]))
    found = OptimizerState(
        name,
        {key: float(value[0]) for key, value in slots.items()},
        scalars,
        changed,
        group.get("fused") is True,
    )
    _check_entries(factory, own, found, device)
    return found


def build_optimizer(factory: OptimizerFactory, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of ``factory`` with these groups, in its fused form where it has one and no other was
    asked for. Raises ValueError: the factory is none."""
    example = "give a function of the parameters, such as functools.partial(torch.optim.SGD, lr=0.1)"
    if isinstance(factory, torch.optim.Optimizer):
        name = type(factory).__name__
        raise ValueError(f"the optimizer is an instance of {name}, over other parameters; {example}")
    if isinstance(factory, OptimConfig):
        raise ValueError(f"the optimizer is the settings of a run, which have a schedule; {example}")
    plain = len(groups) == 1 and len(groups[0]) == 1  # as most functions expect them
    try:
        optimizer = factory(groups[0]["params"] if plain else groups)
    except Exception as error:  # of whoever has written the function
        name = getattr(getattr(factory, "func", factory), "__name__", repr(factory))
        raise ValueError(f"the optimizer {name} cannot be made ({error}); {example}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"the optimizer function returns {type(optimizer).__name__}; {example}")
    if (found := len(optimizer.param_groups)) != len(groups):
        raise ValueError(
            f"the optimizer function makes {found} parameter groups of {len(groups)}; leave that to the "
            "arguments groups and no_decay"
        )
    for group in optimizer.param_groups:
        if "fused" in group and group["fused"] is None and not group.get("foreach"):
            group["fused"] = not group.get("differentiable")
    return optimizer


def _step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    try:
        optimizer.step()
    except Exception as error:  # whatever a third party's optimizer raises
        name = type(optimizer).__name__
        raise ValueError(f"{name} cannot step a flat parameter by itself ({error}); {_ADVICE}") from None


def _check_entries(
    factory: OptimizerFactory, own: Group, found: OptimizerState, device: torch.device | None
) -> None:
    """Three steps on a matrix equal those on parts of its entries, by optimizers that are given their
    state."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, *_SHAPE, generator=generator, dtype=torch.float32).to(device).unbind()
    whole, size = nn.Parameter(start.clone()), prod(_SHAPE) // 3
    optimizer = build_optimizer(factory, [own.of([whole])])
    parts = [part.clone() for part in start.flatten().split(size)]
    keeps = [{name: torch.full_like(part, value) for name, value in found.slots.items()} for part in parts]
    given = [SubnetOptimizer(factory, [own], [found], whole.device) for _ in parts]
    for steps_done, drawn in enumerate(gradients):
        # At right angles to the rows, as in front of a norm: some optimizers (AdamP) then do something else.
        rows = whole.detach()
        gradient = drawn - (drawn * rows).sum(1, True) / rows.square().sum(1, True) * rows
        _step(optimizer, [whole], [gradient])
        pieces = gradient.flatten().split(size)
        for part, keep, piece, session in zip(parts, keeps, pieces, given, strict=True):
            step = FlatOptimizer(session, {WEIGHTS: part, **keep}, piece.clone(), [slice(None)]).step
            step(torch.zeros((), dtype=torch.float32, device=device), steps_done)
    # How far they have come: with a small rate the weights are alike whatever the steps are. A rate
    # so large that weights overflow is not this check's concern: training stops with advice.
    moved, expected = torch.cat(parts) - start.flatten(), (whole.detach() - start).flatten()
    if not torch.allclose(moved, expected, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"the step that {found.name} makes of a weight depends on other weights, or on which step is its "
            f"first (norms, matrices, dampening); {_ADVICE}"
        )


# --- groups ---


@dataclass(frozen=True)
class Group:
    """Parameters with settings of their own.

    Attributes:
        names: in the order of the flat buffers.
        settings: those that differ from the factory's."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]

    def of(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """``parameters`` with these settings, as an optimizer takes them."""
        return {**self.settings, "params": parameters}


def group_parameters(model: nn.Module, grouping: Grouping | None, no_decay: bool) -> list[Group]:
    """The parameter groups of ``model`` (on any device): those with equal settings, ``grouping`` by name,
    together; no decay of vectors and scalars (biases, scales and shifts of norms) with ``no_decay``; frozen
    ones left out. Raises ValueError: no parameter is trained, or ``grouping`` returns something else."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        settings = {} if grouping is None else grouping(name)
        if not isinstance(settings, Mapping | None):
            raise ValueError(
                f"groups({name!r}) is {settings!r}; return a dict such as {{'lr': 0.01}}, or None"
            )
        own = dict(settings or {})
        if no_decay and parameter.dim() <= 1:
            own.setdefault("weight_decay", 0.0)
        names = next((names for known, names in groups if known == own), None)
        if names is None:
            groups.append((own, names := []))
        names.append(name)
    if not groups:
        raise ValueError("no parameter of the model has requires_grad; there is nothing to train")
    return [Group(tuple(names), settings) for settings, names in groups]


def numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group that schedulers change, and that are saved."""
    return {n: v for n, v in group.items() if isinstance(v, int | float | tuple | Tensor | np.generic)}


# --- steps ---


def first_scalars(state: OptimizerState, group: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The scalars of a parameter of ``group`` on ``device`` before its first step."""
    place = device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    return {
        name: value.to(place, copy=True) if isinstance(value, Tensor) else value
        for name, value in state.scalars.items()
    }


class SubnetOptimizer:
    """The optimizer of a session: its settings, and the scalars of its state; it clips gradients of a subnet
    to ``clip_norm`` (0: not at all). Raises ValueError: a setting of a group is unknown to the optimizer.

    Attributes:
        kept: what the optimizer keeps of each group.
        slots: those of all groups; each has room in the store for every weight.
        shown: an optimizer with the same groups over stand-ins, for learning-rate schedulers and for whoever
            sets ``param_groups``."""

    def __init__(
        self,
        factory: OptimizerFactory,
        groups: Sequence[Group],
        kept: Sequence[OptimizerState],
        device: torch.device,
        clip_norm: float = 0.0,
    ) -> None:
        self.factory, self.groups, self.kept, self.clip_norm = factory, groups, kept, clip_norm
        self.name, self.fused = kept[0].name, all(state.fused for state in kept)
        self.slots = tuple(dict.fromkeys(itertools.chain.from_iterable(state.slots for state in kept)))
        self.shown = build_optimizer(
            factory, [group.of([nn.Parameter(torch.zeros(1, device=device))]) for group in groups]
        )
        for group in groups:
            if unknown := group.settings.keys() - self.shown.defaults.keys():
                known = ", ".join(sorted(self.shown.defaults))
                raise ValueError(f"{self.name} has no setting {min(unknown)!r} of a group; it has {known}")
        self.scalars = [
            first_scalars(state, group, device)
            for state, group in zip(kept, self.shown.param_groups, strict=True)
        ]
        self._counts: deque[Tensor] = deque()
        self._counted = -1

    def count_step(self) -> None:
        """Let schedulers see a step of ``shown``; it moves nothing, and what its groups count stays."""
        before = copy.deepcopy(self.counted)
        self.shown.step()
        self.count_from(before)

    @property
    def counted(self) -> list[dict[str, Any]]:
        """What the optimizer has changed in its groups so far."""
        groups = zip(self.kept, self.shown.param_groups, strict=True)
        return [{n: group[n] for n in state.group_scalars if n in group} for state, group in groups]

    def count_from(self, counted: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what there was in ``counted``."""
        for state, group, values in zip(self.kept, self.shown.param_groups, counted, strict=False):
            for name in state.group_scalars:
                group.pop(name, None)
                group.update({name: values[name]} if name in values else {})

    def initial(self) -> Iterator[tuple[str, str, float]]:
        """Name of a parameter, slot, and the value that its entries begin with, if that is not 0."""
        for group, state in zip(self.groups, self.kept, strict=True):
            for slot, value in state.slots.items():
                yield from ((name, slot, value) for name in group.names if value)

    def settings(self) -> dict[str, Any]:
        """The numbers that whoever has ``shown`` can set, by a name for messages."""
        return {
            f"{name} of parameter group {i}": value if isinstance(value, tuple) else float(value)
            for i, group in enumerate(self.shown.param_groups)
            for name, value in numbers_of(group).items()
            if name in self.shown.defaults
        }

    def take_over(self, rank: int, ranks: Ranks) -> None:
        """Go on with what the optimizer of ``rank`` keeps beside its slots; every rank calls it."""
        own = [{name: float(value) for name, value in each.items()} for each in self.scalars]
        every = everyones((own, self.counted), ranks.world_size, ranks.host_group)
        scalars, changed = every[rank]
        for present, values in zip(self.scalars, scalars, strict=True):
            for name, old in present.items():
                new = values[name]
                present[name] = torch.full_like(old, new) if isinstance(old, Tensor) else type(old)(new)
        self.count_from(changed)

    def counts(self, steps_done: int, like: Tensor) -> Tensor:
        """[groups], each ``steps_done``, to be used once; made for many steps at once, since each would be an
        operation of the device."""
        if steps_done != self._counted or not self._counts:
            numbers = torch.arange(
                steps_done, steps_done + _COUNTS_AHEAD, dtype=like.dtype, device=like.device
            )
            self._counts = deque(numbers[:, None].repeat(1, len(self.groups)).unbind())
        self._counted = steps_done + 1
        return self._counts.popleft()

    def slices(self, layout: Layout) -> list[slice]:
        """Where the weights of each group lie in a flat buffer of ``layout``, whose tensors are in the order
        of the groups."""
        starts = [layout.offsets[group.names[0]] for group in self.groups]
        last = self.groups[-1].names[-1]
        end = layout.offsets[last] + prod(layout.shapes[last])
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], end], strict=True)]


class FlatOptimizer:
    """Steps of the flat ``arrays`` of one subnet, by kind, a part (of ``slices``) per group, until they are
    those of another; weights and slots are updated in place.

    A slot that has its initial value makes the first step equal to the optimizer's own first step, so absent
    channels that come back simply go on where they stopped. The bias correction of Adam counts the steps of
    the whole run, not of a channel."""

    def __init__(
        self,
        session: SubnetOptimizer,
        arrays: Mapping[str, Tensor],
        gradients: Tensor,
        slices: Sequence[slice],
    ) -> None:
        self._session = session
        self._flat = [nn.Parameter(arrays[WEIGHTS][part]) for part in slices]
        self._optimizer = build_optimizer(session.factory, [{"params": [p]} for p in self._flat])
        for parameter, part in zip(self._flat, slices, strict=True):
            parameter.grad = gradients[part]
            self._optimizer.state[parameter] = {name: arrays[name][part] for name in session.slots}

    def step(self, not_finite: Tensor, steps_done: int) -> None:
        """Clip (if configured) and apply the gradients.

        Args:
            not_finite: float32 scalar on the device; weights and slots stay as they are unless it is 0.
                Nothing on a device waits for its value.
            steps_done: optimizer steps of the run before this one, on whichever subnet."""
        if self._session.clip_norm > 0:
            nn.utils.clip_grad_norm_(self._flat, self._session.clip_norm)
        self._take_settings(steps_done)
        if self._session.fused:
            # torch's fused optimizers read this attribute, as they do for torch.amp.GradScaler.
            self._optimizer.found_inf = not_finite  # type: ignore[attr-defined]
            self._apply()
        elif not_finite.device.type == "cpu":
            if not bool(not_finite):
                self._apply()
        else:
            self._step_or_undo(not_finite)
        for parameter, scalars in zip(self._flat, self._session.scalars, strict=True):
            scalars.update({name: self._optimizer.state[parameter][name] for name in scalars})
        of_groups = zip(
            self._session.kept, self._optimizer.param_groups, self._session.shown.param_groups, strict=True
        )
        for kept, own, shown in of_groups:
            shown.update({name: own[name] for name in kept.group_scalars})

    def _apply(self) -> None:
        """The optimizer's step. Raises ValueError: its settings need state that it did not begin with, which
        the store has no room for."""
        try:
            self._optimizer.step()
            for parameter, scalars in zip(self._flat, self._session.scalars, strict=True):
                for key, value in self._optimizer.state[parameter].items():
                    if value is not None and key not in scalars and key not in self._session.slots:
                        raise KeyError(key)
        except KeyError as error:
            raise ValueError(
                f"{self._session.name} begins to keep {error} for a setting that has changed (as OneCycleLR "
                "changes momentum); give that to the optimizer function or to groups from the start"
            ) from error

    def _take_settings(self, steps_done: int) -> None:
        for own, shown in zip(self._optimizer.param_groups, self._session.shown.param_groups, strict=True):
            own.update({name: value for name, value in shown.items() if name != "params"})
        known = self._session.scalars[0].get("step")
        counts: Any = itertools.repeat(steps_done)
        if isinstance(known, Tensor):
            counts = self._session.counts(steps_done, known).unbind()
        for parameter, scalars, count in zip(self._flat, self._session.scalars, counts, strict=False):
            if "step" in scalars:
                scalars["step"] = count
            self._optimizer.state[parameter].update(scalars)

    def _step_or_undo(self, not_finite: Tensor) -> None:
        """For optimizers that are not fused: keep what was there, since nothing may wait for the device."""
        tensors = [t for p in self._flat for t in (p.data, *self._optimizer.state[p].values())]
        tensors = [t for t in tensors if isinstance(t, Tensor) and t.device == not_finite.device]
        before = [tensor.clone() for tensor in tensors]
        self._apply()
        for tensor, old in zip(tensors, before, strict=True):
            torch.where(not_finite > 0, old, tensor, out=tensor)


# --- fp16 ---


class LossScale:
    """The scale of fp16 losses, with the settings of ``scaler``: as that of ``torch.amp.GradScaler``, without
    a wait for the device."""

    def __init__(self, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        self._growth, self._backoff = scaler.get_growth_factor(), scaler.get_backoff_factor()
        self._interval = scaler.get_growth_interval()
        first = scaler.get_scale(), 0.0  # good steps in a row
        self.state = torch.tensor(first, dtype=torch.float32, device=device)

    @property
    def scale(self) -> Tensor:
        """float32 scalar: losses are multiplied by it, gradients divided."""
        return self.state[0].clone()

    def update(self, not_finite: Tensor) -> None:
        """Lower the scale after a step that was not finite, raise it after ``growth_interval`` good ones."""
        scale, good = self.state
        good = torch.where(not_finite > 0, 0.0, good + 1)
        full = good >= self._interval
        factor = torch.where(not_finite > 0, self._backoff, torch.where(full, self._growth, 1.0))
        changed = scale * factor
        changed = torch.where(changed.isfinite(), changed, scale)  # no step would ever count again
        self.state.copy_(torch.stack([changed, torch.where(full, 0.0, good)]))
