"""Slice = mask: the self-test that a channel map must pass before a network trains on it.

    full network ── narrow_module ──▶ narrow network ───────────▶ outputs, gradients ─┐
    └── zero what the dropped atoms produce ──▶ masked net ──▶ outputs, gradients ─┴─▶ difference

Zeroed are the rows (filters, biases) that produce a dropped channel, and the scale and shift of its norm.
The columns that read a dropped channel keep their random values: if the channel were not absent, they would
carry it on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from offload_sparse.channels.accounting import count_parameters
from offload_sparse.channels.channel_map import Axis, ChannelMap
from offload_sparse.channels.model_call import Inputs, NoDropout, enlarge_inputs, output_tensors, seeded
from offload_sparse.channels.require import Explained, require
from offload_sparse.channels.selection import Selection, restrict
from offload_sparse.channels.stream_add import set_additions
from offload_sparse.channels.subnet import (
    is_norm,
    meta_copy,
    narrow_module,
    output_dimension,
    tensor_setter,
)

TOLERANCE = 1e-8
"""Largest relative error that ``check`` accepts in float64; a right map stays some orders of magnitude
below."""

MAX_PARAMETERS = 2_000_000
"""Larger networks are tested as a narrow twin: 16 MB of float64 weights, whatever the size of the model."""

_MIN_BATCH = 4  # batch statistics of fewer values are too ill-conditioned to compare
_FAILURES = (RuntimeError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What a network may raise where it cannot be called; a ValueError says itself what to do."""

_Key = tuple[str, str, str]  # ("output" or "gradient", mode, tensor)


@dataclass(frozen=True)
class Verification:
    """What ``verify`` measured; errors are largest absolute differences relative to the largest entry of the
    tensor.

    Attributes:
        output_error: outputs in both modes, and updated running statistics.
        gradient_error: gradients of a random linear functional of the outputs, in both modes, by every kept
            parameter entry and by the inputs.
        worst: the tensor that has the largest of these errors.
        kept: atoms that the random mask keeps."""

    output_error: float
    gradient_error: float
    worst: str
    kept: int

    @property
    def error(self) -> float:
        """The largest of all errors; NaN if one of them is."""
        return _largest([self.output_error, self.gradient_error])


def verify(
    model: nn.Module, example_inputs: Inputs, channel_map: ChannelMap, rho: float = 0.5, seed: int = 0
) -> Verification:
    """Compare narrow networks with the masked full network, in float64 on the CPU: of a random mask outputs
    and gradients in both modes, of some more (see ``_telling``) outputs in evaluation mode. Raises
    ValueError: a narrow network does not run, or gives outputs of other shapes.

    Args:
        model: left untouched. Networks on the meta device are given random values.
        example_inputs: inputs that the network accepts, nested as it likes. Floating ones are replaced by
            random ones or, where these give NaN, as behind a logarithm, by their own values times random
            factors; all others keep their values. A batch of fewer than 4 samples is repeated.
        rho: keep probability of an atom; see ``random_mask``.
        seed: of the masks, parameters and inputs."""
    found = _verified(model, example_inputs, channel_map, rho, seed, False)
    if found.error != found.error:
        found = _verified(model, example_inputs, channel_map, rho, seed, True)
    return found


def _verified(
    model: nn.Module, example_inputs: Inputs, channel_map: ChannelMap, rho: float, seed: int, own: bool
) -> Verification:
    """The same; ``own``: of values near those of the example."""
    generator = torch.Generator().manual_seed(seed)
    full = _double_copy(model, generator)
    inputs = _random_inputs(example_inputs, generator, _MIN_BATCH, own)
    mask = random_mask(channel_map, rho, generator)
    few = _random_inputs(example_inputs, generator, 2, own)
    found: dict[_Key, float] = {}
    for other in _telling(channel_map, generator):
        masked = copy.deepcopy(full)
        narrow = _masked_pair(masked, channel_map, other)
        with torch.no_grad():
            errors = _compare(masked, narrow, few, Selection(channel_map, other), False, seed)
        found = _worse(found, errors)
    narrow = _masked_pair(full, channel_map, mask)
    for train in (False, True):  # training moves the running statistics
        errors = _compare(full, narrow, inputs, Selection(channel_map, mask), train, seed)
        found = _worse(found, errors)
    kind, mode, worst = max(found, key=lambda key: (found[key] != found[key], found[key]))
    return Verification(
        output_error=_largest([e for key, e in found.items() if key[0] == "output"]),
        gradient_error=_largest([e for key, e in found.items() if key[0] == "gradient"]),
        worst=f"{'gradient of ' if kind == 'gradient' else ''}{worst} ({mode} mode)",
        kept=int(mask.sum()),
    )


def check(
    model: nn.Module, example_inputs: Inputs, channel_map: ChannelMap, rho: float = 0.5, seed: int = 0
) -> Verification:
    """``verify`` that refuses: the arguments and the result are the same. Raises ValueError: an error exceeds
    ``TOLERANCE`` (the message names the worst tensor), or the narrow network does not run."""
    result = verify(model, example_inputs, channel_map, rho, seed)
    if not result.error <= TOLERANCE:  # NaN fails too
        raise ValueError(
            f"slice differs from mask: {result.worst} is off by {result.error:.1e} (at most {TOLERANCE:.0e} "
            "is allowed); the channel map is wrong, or a dropped channel does not vanish, as behind an "
            "activation with f(0) != 0: write a map by hand, or use other activations"
        )
    return result


def self_test(model: nn.Module, example_inputs: Inputs, channel_map: ChannelMap) -> Verification:
    """Check ``channel_map`` before a network (on any device, with any values) trains on it; see ``verify``.

    The twin keeps every layer and every tie between channels but fewer channels of each group, so a map that
    is wrong about the structure fails on it too, while neither memory nor time grow with the width of the
    model. Raises ValueError: slice and mask differ; names the worst tensor."""
    twin, twin_map = reduced(model, channel_map, MAX_PARAMETERS)
    return check(twin, example_inputs, twin_map)


def reduced(model: nn.Module, channel_map: ChannelMap, max_parameters: int) -> tuple[nn.Module, ChannelMap]:
    """A narrow twin of at most ``max_parameters`` (at least four channels per group), and its map."""
    twin, ratio = meta_copy(model), 1.0
    mask, size = channel_map.full_mask(), count_parameters(twin)
    while size > max_parameters and ratio > 1 / 64:
        ratio /= 2
        mask = channel_map.uniform_mask(ratio, min_width=4)
        shapes = Selection(channel_map, mask).shapes
        size = sum(prod(shapes.get(name, p.shape)) for name, p in twin.named_parameters())
    if ratio < 1:
        twin = narrow_module(twin, channel_map, mask)
        set_additions(twin, Selection(channel_map, mask), torch.device("cpu"))  # indices need values
    set_tensor = tensor_setter(twin)
    for name, buffer in _constants(model).items():
        if twin.get_buffer(name).shape == buffer.shape:
            set_tensor(name, buffer.clone())
    return twin, restrict(channel_map, mask)


def lacks_values(model: nn.Module) -> bool:
    """Whether a model on the meta device cannot be tested, since it reads buffers of unknown values."""
    return any(buffer.is_meta and buffer.numel() for buffer in _constants(model).values())


def _constants(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no random values can stand for, such as indices and masks."""
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[0] not in norms}


def random_mask(channel_map: ChannelMap, rho: float, generator: torch.Generator) -> Tensor:
    """bool[C], each atom with probability ``rho``, but never trivial in any group unless ``rho`` is 1.

    Every group keeps an atom and drops one, and a group of three or more keeps two with a dropped one between
    them: a run of neighbours would hide operations that look at neighbouring channels. Raises ValueError:
    ``rho`` is outside (0, 1]."""
    if not 0 < rho <= 1:
        raise ValueError(f"rho is {rho}; give a remaining ratio in (0, 1], such as 0.25")
    mask = torch.rand(channel_map.num_atoms, generator=generator) < rho
    if rho == 1:
        return channel_map.full_mask()
    for group in channel_map.groups:
        part = mask[group.start : group.stop]
        first = int(torch.randint(group.size, (), generator=generator))
        if group.size < 3:
            part[:] = torch.arange(group.size) == first
        elif not _has_gap(part):
            low = min(first, group.size - 3)
            part[low : low + 3] = torch.tensor([True, False, True])
    return mask


def _has_gap(part: Tensor) -> bool:
    kept = part.nonzero().flatten()
    return len(kept) > 1 and int(kept[-1] - kept[0]) >= len(kept)


def _telling(channel_map: ChannelMap, generator: torch.Generator) -> Iterator[Tensor]:
    """Masks bool[C] that tell any two atoms of a group apart: one of them keeps one atom and drops the other.
    The first keeps a single atom of each group; of the others the atoms of a group, in random order, are kept
    by the bits of their numbers."""
    one = ~channel_map.full_mask()
    for group in channel_map.groups:
        one[group.start + group.size // 4] = True
    yield one
    orders = [torch.randperm(group.size, generator=generator) for group in channel_map.groups]
    bits = [(group.size - 1).bit_length() for group in channel_map.groups]
    for number in range(max(bits, default=0)):
        mask = channel_map.full_mask()
        for group, order, known in zip(channel_map.groups, orders, bits, strict=True):
            if known:
                mask[group.start : group.stop] = (order >> number % known) % 2 == 1
        yield mask


def zero_dropped(model: nn.Module, channel_map: ChannelMap, mask: Tensor) -> None:
    """Set the parameters of ``model`` that produce dropped atoms to zero, in place.

    These are the rows of convolutions and linear layers with their biases, and the scale and shift of norms.
    Of a weight that another module owns nobody knows which dimension produces: it is zero along all of them.
    A norm without scale keeps nothing that could be zero, so there the running mean of a dropped channel is.
    """
    alive = channel_map.alive(mask)
    read = alive.clone()
    for group in channel_map.groups:
        read[group.start : group.stop] |= not group.shared
    for name, parameter in model.named_parameters():
        for dim, axis in enumerate(channel_map.axes.get(name, ())):
            _zero_along(parameter, axis, dim, read)
    for name, module in model.named_modules():
        for leaf, dim in _produced(module):
            full_name = f"{name}.{leaf}" if name else leaf
            if full_name in channel_map.axes:
                _zero_along(getattr(module, leaf), channel_map.axes[full_name][dim], dim, alive)


def _produced(module: nn.Module) -> list[tuple[str, int]]:
    if isinstance(module, (_ConvNd, nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D":
        return [("weight", output_dimension(module)), ("bias", 0)]
    if is_norm(module):
        return [("weight", 0), ("bias", 0)] if module.weight is not None else [("running_mean", 0)]
    if isinstance(module, nn.MultiheadAttention):
        return [("in_proj_bias", 0), *((f"{part}_proj_weight", 0) for part in ("in", "q", "k", "v"))]
    own = module.named_parameters(recurse=False)
    return [(leaf, dim) for leaf, p in own for dim in range(p.dim())]


def _zero_along(tensor: Tensor, axis: Axis, dim: int, alive: Tensor) -> None:
    if axis is not None:
        with torch.no_grad():
            tensor.index_fill_(dim, (~alive[axis]).nonzero().flatten(), 0)


def _double_copy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float64 copy on the CPU with random parameters and norm statistics and without dropout."""
    full = copy.deepcopy(model)
    set_tensor = tensor_setter(full)
    unknown: set[str] = set()  # values of tensors on the meta device
    for name, tensor in [*full.named_parameters(), *full.named_buffers()]:
        value = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().cpu()
        set_tensor(name, value.double() if value.is_floating_point() else value)
        unknown |= {name} if tensor.is_meta and tensor.numel() else set()
    norms = {id(m) for m in full.modules() if is_norm(m)}
    with torch.no_grad():
        for path, module in full.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                _randomise(parameter, leaf, generator)
            for leaf, tensor in module.named_buffers(recurse=False):
                if id(module) in norms and tensor.is_floating_point():
                    _randomise(tensor, leaf, generator)
                elif leaf == "num_batches_tracked":
                    tensor.zero_()
                elif (f"{path}.{leaf}" if path else leaf) in unknown:
                    raise ValueError(
                        f"the values of buffer {leaf} of a {type(module).__name__} are unknown on the meta "
                        "device; verify the real model, or pass a function that builds it"
                    )
    for parameter in full.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return full


def _randomise(tensor: Tensor, leaf: str, generator: torch.Generator) -> None:
    """Kaiming-like weights; scales and variances in [0.5, 1.5]; shifts and means around 0."""
    if tensor.dim() > 1:
        tensor.normal_(0, (2 / max(prod(tensor.shape[1:]), 1)) ** 0.5, generator=generator)
    elif leaf in ("weight", "running_var"):
        tensor.uniform_(0.5, 1.5, generator=generator)
    else:
        tensor.normal_(0, 0.2, generator=generator)


def _random_inputs(example_inputs: Inputs, generator: torch.Generator, least: int, own: bool) -> Inputs:
    """Random values, or random parts of its ``own``, where an input is floating; tokens, masks and lengths
    keep those of the example. Of at least ``least`` samples."""

    def value(x: Tensor) -> Tensor:
        if x.is_floating_point() and own and not x.is_meta:
            factors = 0.5 + torch.rand(x.shape, generator=generator, dtype=torch.float64)
            return (x.detach().cpu() * factors).requires_grad_()
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=torch.float64).requires_grad_()
        return torch.zeros_like(x, device="cpu") if x.is_meta else x.cpu()

    return pytree.tree_map_only(Tensor, value, enlarge_inputs(example_inputs, least))


def _masked_pair(full: nn.Module, channel_map: ChannelMap, mask: Tensor) -> nn.Module:
    """The narrow network of ``mask``; what it drops is zero in ``full`` from then on."""
    names = {name for name, t in [*full.named_parameters(), *full.named_buffers()] if t.is_floating_point()}
    if names != set(channel_map.shapes):
        raise ValueError(
            f"the channel map is of another network: it and the model differ in "
            f"{sorted(names ^ set(channel_map.shapes))[:3]}"
        )
    narrow = narrow_module(full, channel_map, mask)
    zero_dropped(full, channel_map, mask)
    return narrow


def _worse(found: dict[_Key, float], errors: dict[_Key, float]) -> dict[_Key, float]:
    """The larger error of each tensor."""
    return found | {name: _largest([e, found.get(name, 0.0)]) for name, e in errors.items()}


def _compare(
    full: nn.Module, narrow: nn.Module, inputs: Inputs, selection: Selection, train: bool, seed: int
) -> dict[_Key, float]:
    """Relative error of every output, gradient and (in training mode) running statistic."""
    mode = "train" if train else "eval"
    with Explained(
        f"the network does not run in float64 on inputs of {_shapes(inputs)} (",
        "); give example inputs that it accepts, write a channel map by hand if it is the narrow twin of a "
        "large network, or leave this check out (Setup(verify=False), --train.check false)",
        _FAILURES,
    ):
        expected, by_input = _run(full.train(train), inputs, seed)
    wrong = "the channel map is wrong: the narrow network"
    advice = "; correct the map or write one by hand"
    with Explained(f"{wrong} does not run (", f"){advice}", _FAILURES):
        found, narrow_by_input = _run(narrow.train(train), inputs, seed)
    narrow_shapes, shapes = _shapes(found), _shapes(expected)
    other = f"{wrong}'s outputs have shapes {narrow_shapes}, those of the full network {shapes}{advice}"
    require(narrow_shapes == shapes, other)
    errors: dict[_Key, float] = {
        ("output", mode, f"output {i}"): _relative(a, b)
        for i, (a, b) in enumerate(zip(expected, found, strict=True))
    }
    reference = {f"input {i}": g for i, g in by_input.items()}
    actual = {f"input {i}": g for i, g in narrow_by_input.items()}
    for (name, p), (_, q) in zip(full.named_parameters(), narrow.named_parameters(), strict=True):
        if p.grad is not None or q.grad is not None:
            reference[name], actual[name] = selection.take(name, _gradient(p)), _gradient(q)
    # A gradient that is zero but for rounding (a bias before a norm) has no scale of its own.
    floor = 1e-4 * max((float(g.abs().max()) for g in reference.values() if g.numel()), default=0.0)
    errors |= {
        ("gradient", mode, name): _relative(reference[name], actual[name], floor) for name in reference
    }
    if train:
        statistics = dict(narrow.named_buffers())
        errors |= {
            ("output", mode, name): _relative(selection.take(name, buffer), statistics[name])
            for name, buffer in full.named_buffers()
            if name in selection.shapes
        }
    return errors


def _shapes(values: Any) -> list[list[int]]:
    return [list(x.shape) for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


class _InDouble(TorchFunctionMode):
    """What the code of a network makes float32, as its own weights are, is float64 inside, too."""

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        given = args, kwargs or {}
        if func is not Tensor.view:  # of bits
            given = pytree.tree_map_only(torch.dtype, _doubled, given)
        return func(*given[0], **given[1])


def _doubled(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _leaves(network: nn.Module, arguments: Inputs, seed: int) -> list[Tensor]:
    """What a network returns, without dropout; what it draws by itself are the numbers of ``seed``."""
    with NoDropout(network), _InDouble(), seeded(seed):
        return output_tensors(network(*arguments))


def _run(network: nn.Module, inputs: Inputs, seed: int) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Outputs, and gradients by the inputs; gradients by parameters are left in ``grad``."""
    network.zero_grad(set_to_none=True)
    arguments = pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), inputs)
    try:
        leaves = _leaves(network, arguments, seed)
    except RuntimeError as error:
        if "requires_grad" not in str(error):
            raise
        # A network that says itself where gradients begin wants inputs without.
        arguments = pytree.tree_map_only(Tensor, Tensor.detach, inputs)
        leaves = _leaves(network, arguments, seed)
    outputs = [t for t in leaves if t.is_floating_point()]
    if not outputs:
        raise ValueError("the network returns no floating-point tensor; there is nothing to compare")
    if not torch.is_grad_enabled():
        return outputs, {}
    generator = torch.Generator().manual_seed(seed + 1)
    functional = [(t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs]
    total = torch.autograd.graph.get_gradient_edge(torch.stack(functional).sum())
    with NoDropout(network), _InDouble():  # for what is computed again; of a tensor it would leave both
        torch.autograd.backward(total, torch.ones(()))
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
    return [t.detach() for t in outputs], {i: x.grad for i, x in enumerate(tensors) if x.grad is not None}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _relative(reference: Tensor, found: Tensor, floor: float = 0.0) -> float:
    if reference.shape != found.shape:
        return float("inf")
    if not reference.numel():
        return 0.0
    scale = max(float(reference.abs().max()), floor, torch.finfo(torch.float64).tiny)
    return float((reference - found).abs().max()) / scale


def _largest(errors: list[float]) -> float:
    return max(errors, key=lambda e: (e != e, e), default=0.0)
