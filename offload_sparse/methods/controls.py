"""The controls: the full network on the device, and a narrow network, fixed from the start.

A learner of structure that does not beat ``static`` has learned nothing. Unless it is given its widths, every
group keeps the same share of its channels there: the one that the budget allows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.config import chosen_block
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.stream_add import set_additions
from offload_sparse.channels.subnet import fit_attributes, meta_copy, tensor_setter
from offload_sparse.engine.importance import Importance
from offload_sparse.engine.preparation import PreparedModel, prepare
from offload_sparse.methods.method import Method, Task
from offload_sparse.methods.network_method import FixedNetwork
from offload_sparse.policy.published_widths import static_mask
from offload_sparse.store.initialisation import initial_tensors, named_tensors


def build_dense(task: Task) -> Method:
    """The full network, initialised as the seed says. It needs no discovery: nothing is ever dropped."""
    module = task.network()
    channel_map = undivided_map(module)
    cost = CostModel(meta_copy(module), channel_map, task.example_inputs)
    return FixedNetwork(task, module, channel_map, channel_map.full_mask(), cost)


def build_static(task: Task) -> Method:
    """The narrow network that keeps the same share of every group, as large as ``policy.budget`` and
    ``policy.rho`` allow, or that of ``static.widths``; with ``policy.start`` the cut of the start that it
    names."""
    config, prepared = task.config, prepared_model(task)
    channel_map, meta_model = prepared.channel_map, prepared.meta_model
    cost = CostModel(meta_model, channel_map, task.example_inputs)
    recording, seed = prepared.recording, config.train.seed
    assert recording is not None, "a task has a function that builds its network"
    start = config.policy.resolved(config.compile, task.weights is not None).start

    def tensors() -> Iterable[tuple[str, Tensor]]:
        own = initial_tensors(recording, task.factory, seed)
        return own if task.weights is None else task.weights.overlaid(own)

    margin = None
    if start != "uniform":
        margin = -Importance.of_tensors(start, channel_map, meta_model, tensors(), seed)
    mask = static_mask(str(config.static.widths), config.policy, channel_map, cost, margin)
    laws = scale_laws(recording.draws(), channel_map.shapes) if task.weights is None else None
    module = narrow_initialised(meta_model, tensors(), Selection(channel_map, mask), laws)
    return FixedNetwork(task, module, channel_map, mask, cost)


def prepared_model(task: Task) -> PreparedModel:
    """The network of ``task`` with its channels, as the configuration wants them."""
    config = task.config
    residual, block = config.model.residual, chosen_block(config.atoms.block, task.device.type)
    return prepare(task.factory, task.example_inputs, residual, verify=config.train.check, block=block)


def undivided_map(module: nn.Module) -> ChannelMap:
    """The map of a network of which no channel can be dropped."""
    shapes = {name: tuple(t.shape) for name, t in named_tensors(module).items() if t.is_floating_point()}
    return ChannelMap((), shapes, {name: (None,) * len(shape) for name, shape in shapes.items()})


def _fans(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """What the scale of a weight may go by: how many it reads, how many read it, both, or neither."""
    reads, read = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    return reads, read, reads + read, 1


def scale_laws(
    draws: Mapping[str, tuple[tuple[str, ...], tuple[float, ...]]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """By name of a weight, by which of its ``_fans`` the scale of its initial values goes.

    Of the weights that are drawn in the same way those with the same numbers have the same fan, and others
    another one; where that is so of no kind, each set of weights with the same numbers is looked at by
    itself.

    Args:
        draws: how tensors get their values, see ``Recording.draws``."""
    sets: dict[tuple[str, ...], dict[tuple[float, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, (operations, numbers) in draws.items():
        if len(shapes.get(name, ())) > 1:
            sets[operations][numbers].append(name)

    def law(alike: Collection[Sequence[str]]) -> int:
        for kind in range(3):
            fans = [{_fans(shapes[name])[kind] for name in names} for names in alike]
            if all(len(fan) == 1 for fan in fans) and len(set.union(*fans)) == len(fans):
                return kind
        return 3

    found: dict[str, int] = {}
    for alike in sets.values():
        together = law(alike.values())
        for names in alike.values():
            found |= dict.fromkeys(names, law([names]) if together == 3 else together)
    return found


def narrow_initialised(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    selection: Selection,
    laws: Mapping[str, int] | None = None,
) -> nn.Module:
    """The narrow network of ``model`` (its additions exposed) and its initial tensors, with the scale of
    weights that its own initialisation would have.

    The initial standard deviation of a layer falls with the square root of a fan, so the kept entries of
    the full network are scaled up by the square root of the ratio of the fans; without ``laws`` (see
    ``scale_laws``) values, such as trained ones, stay as they are."""
    module = meta_copy(model)
    set_tensor = tensor_setter(module)
    parameters = dict(module.named_parameters())
    for name, full in tensors:
        value = selection.take(name, full) if name in selection.shapes else full.clone()
        if laws is not None and name in parameters and value.dim() > 1:
            kind = laws.get(name, 0)
            value *= math.sqrt(_fans(full.shape)[kind] / _fans(value.shape)[kind])
        if name in parameters:
            set_tensor(name, nn.Parameter(value, requires_grad=parameters[name].requires_grad))
        else:
            set_tensor(name, value)
    fit_attributes(module)
    set_additions(module, selection, torch.device("cpu"))
    assert not any(p.device.type == "meta" for p in module.parameters()), "a parameter has no initial value"
    return module
