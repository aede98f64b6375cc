"""Parameters, FLOPs and training cost of a network and of the subnetworks that masks select from it.

FLOPs are those of ``torch.utils.flop_counter``: two per multiply-add of convolutions and matrix products,
forward only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.model_call import Inputs, move_inputs
from offload_sparse.channels.subnet import hollow_copy, meta_copy, narrow_module


def count_parameters(module: nn.Module) -> int:
    """Entries of all parameters; a parameter shared by two layers counts once."""
    return sum(p.numel() for p in module.parameters())


def count_flops(module: nn.Module, example_inputs: Inputs) -> int:
    """FLOPs of one forward pass (evaluation mode) over the whole batch, counted without computing."""
    return flops_by_module(module, example_inputs)[""]


def flops_by_module(module: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """FLOPs spent inside each module, by qualified name; the empty name is the whole network."""
    return _flops_and_outputs(module, example_inputs)[0]


def _flops_and_outputs(module: nn.Module, example_inputs: Inputs) -> tuple[dict[str, int], Counter[str]]:
    """FLOPs by module, and how many numbers each layer puts out, by the name of its weight."""
    try:
        return _counted(meta_copy(module, other=True).eval(), move_inputs(example_inputs, "meta"))
    except RuntimeError:  # a model that looks at values of its inputs
        return _counted(hollow_copy(module).eval(), move_inputs(example_inputs, "cpu"))


def _counted(network: nn.Module, inputs: Inputs) -> tuple[dict[str, int], Counter[str]]:
    made: Counter[str] = Counter()

    def count(prefix: str, layer: nn.Module, given: Any, output: Any) -> None:  # noqa: ARG001
        if isinstance(layer, nn.MultiheadAttention):  # its layers are not called
            size = output[0].numel()
            made.update({prefix + "in_proj_weight": 3 * size, prefix + "out_proj.weight": size})
        else:
            made.update({prefix + "weight": output.numel()})

    for name, layer in network.named_modules():
        if isinstance(layer, (_ConvNd, nn.Linear, nn.MultiheadAttention)):
            layer.register_forward_hook(partial(count, f"{name}." if name else ""))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(*inputs)
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    prefix = type(network).__name__ + "."
    flops = {name.removeprefix(prefix): n for name, n in counts.items() if name.startswith(prefix)}
    return flops | {"": counter.get_total_flops()}, made


class CostModel:
    """FLOPs and parameters of every subnetwork in closed form.

    The FLOPs of a convolution or linear layer are proportional to the entries of its weight that are kept,
    and the kept entries of a tensor are the product of the kept positions of its dimensions:

        flops(mask) = constant + Σ_layers flops_per_entry · Π_dims kept positions

    So are those that an attention spends between its projections, by the entries of one of these. Raises
    ValueError: FLOPs are spent outside convolutions and linear layers and depend on the mask.

    Args:
        model: the full network, best on the meta device; not changed.
        example_inputs: the batch that FLOPs are counted for (give one image for FLOPs per image)."""

    def __init__(self, model: nn.Module, channel_map: ChannelMap, example_inputs: Inputs) -> None:
        self._channel_map = channel_map
        distinct = self._distinct = channel_map.distinct_axes
        names = [name for name, _ in model.named_parameters() if name in channel_map.shapes]
        # Numbers of the axes of every tensor; the last one stands for dimensions that never shrink, whose
        # size is a factor elsewhere: it counts 1.
        own = [[distinct.numbers.get(id(axis), -1) for axis in channel_map.axes[name]] for name in names]
        rank = max(map(len, own), default=0)
        dims = [row + [-1] * (rank - len(row)) for row in own]
        self._dims = torch.tensor(dims, dtype=torch.int64).view(len(own), rank)
        axes, atoms = len(distinct.numbers), torch.from_numpy(distinct.atoms)
        segment = torch.from_numpy(np.arange(axes).repeat(np.diff(distinct.starts)))
        self._always = torch.ones(axes + 1, dtype=torch.int64)
        self._always[:-1] = segment[atoms < 0].bincount(minlength=axes)
        self._atoms, self._segment = atoms[atoms >= 0], segment[atoms >= 0]
        free = [
            prod(s for s, a in zip(channel_map.shapes[n], channel_map.axes[n], strict=True) if a is None)
            for n in names
        ]
        flops, made = _flops_and_outputs(model, example_inputs)
        # The dimension of each weight that counts the outputs: a transposed convolution has inputs first.
        transposed = {f"{n}.weight" for n, m in model.named_modules() if getattr(m, "transposed", False)}
        out = {n: row[int(n in transposed)] if row else -1 for n, row in zip(names, own, strict=True)}
        self._out = torch.tensor(list(out.values()), dtype=torch.int64)
        sizes = [channel_map.shapes[n][int(n in transposed)] if a >= 0 else 1 for n, a in out.items()]
        per_row = [made[name] / size for name, size in zip(names, sizes, strict=True)]
        self._per_row = torch.tensor(per_row, dtype=torch.float64)
        per_entry = _flops_per_entry(model, channel_map, flops)
        self._entries = torch.tensor(free, dtype=torch.int64)
        ratios = [per_entry.get(n, Fraction(0)) for n in names]
        self._flops = self._entries * torch.tensor([r.numerator for r in ratios], dtype=torch.int64)
        self._per = torch.tensor([r.denominator for r in ratios], dtype=torch.int64)
        self._constant = 0
        self._constant = flops[""] - self.flops(channel_map.full_mask())
        self.dense_flops = flops[""]
        self.dense_parameters = self.parameters(channel_map.full_mask())
        self._refuse_other_costs(model, example_inputs)

    def flops(self, mask: Tensor) -> int:
        """Forward FLOPs of the subnetwork of ``mask`` (bool[C]) for the batch of ``example_inputs``."""
        return self._constant + int((self._flops * self._kept_products(mask) // self._per).sum())

    def parameters(self, mask: Tensor) -> int:
        """Parameters of the subnetwork of ``mask`` (bool[C])."""
        return int((self._entries * self._kept_products(mask)).sum())

    def outputs(self, mask: Tensor) -> float:
        """Numbers that the convolutions and linear layers of the subnetwork put out, those of torch's
        ``MultiheadAttention`` among them, for the batch of ``example_inputs``: what a training step holds for
        its backward pass goes with them."""
        return float((self._per_row * torch.from_numpy(self._kept(mask))[self._out]).sum())

    def expected_flops(self, s: Tensor) -> Tensor:
        """Expected forward FLOPs by the keep probabilities s, float64[C], of independent atoms: a scalar that
        is differentiable in s. A tensor that has the same atoms in two dimensions is counted by the product
        of expected widths."""
        return self._constant + (self._flops / self._per * self._expected_products(s)).sum()

    def expected_parameters(self, s: Tensor) -> Tensor:
        """Expected parameters, a scalar that is differentiable in s; see ``expected_flops``."""
        return (self._entries * self._expected_products(s)).sum()

    def _expected_products(self, s: Tensor) -> Tensor:
        """float64[tensors]: product of the expected kept positions over the dimensions that can shrink."""
        alive = self._channel_map.alive_probability(s)
        kept = self._always.to(s.dtype).index_add(0, self._segment, alive[self._atoms])
        return kept[self._dims].prod(1)

    def _kept_products(self, mask: Tensor) -> Tensor:
        """int64[tensors]: product of the kept positions over the dimensions that can shrink."""
        return torch.from_numpy(self._kept(mask)[self._dims.numpy()].prod(1))

    def _kept(self, mask: Tensor) -> NDArray[np.int64]:
        """Kept positions of every axis; behind them a 1, for dimensions that never shrink."""
        _, counts = self._distinct.kept(self._channel_map.alive(mask))
        return np.append(counts, 1)

    def _refuse_other_costs(self, model: nn.Module, example_inputs: Inputs) -> None:
        mask = self._channel_map.uniform_mask(0.5)
        counted = count_flops(narrow_module(meta_copy(model), self._channel_map, mask), example_inputs)
        if counted != self.flops(mask):
            raise ValueError(
                f"a {type(model).__name__} spends FLOPs outside its convolutions and linear layers that "
                f"depend on the mask "
                f"({counted} counted, {self.flops(mask)} predicted); budget it by channels instead"
            )


def _flops_per_entry(model: nn.Module, channel_map: ChannelMap, flops: dict[str, int]) -> dict[str, Fraction]:
    """FLOPs per weight entry of each convolution, linear layer and attention, by weight name.

    What an attention spends outside its layers grows with its heads, and so does the weight of its queries.
    """
    per_entry: dict[str, Fraction] = {}
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, (_ConvNd, nn.Linear)):
            weight, spent = prefix + "weight", flops.get(name, 0)
        else:
            spent = flops.get(name, 0) - sum(flops.get(prefix + n, 0) for n, _ in layer.named_children())
            weight = _sampled_matrix(layer, prefix, channel_map) if spent else ""
        if weight in channel_map.shapes:
            share = Fraction(spent, prod(channel_map.shapes[weight]))
            per_entry[weight] = per_entry.get(weight, Fraction(0)) + share
    return per_entry


def _sampled_matrix(layer: nn.Module, prefix: str, channel_map: ChannelMap) -> str:
    """The first matrix of a module with an axis of atoms; empty if there is none."""
    for name, parameter in layer.named_parameters():
        axes = channel_map.axes.get(prefix + name, ())
        if parameter.dim() == 2 and any(axis is not None for axis in axes):
            return prefix + name
    return ""


def train_cost_saving(
    dense_flops: float, passes: Iterable[tuple[float, int, int]], steps: int | None = None
) -> float:
    """How many times cheaper ``passes`` (forward FLOPs f of the network that ran, forwards, backwards) were
    than dense training with f_D FLOPs: 3 f_D · steps / Σ f · (forwards + 2 · backwards); by default one step
    per backward pass.

    A backward pass counts as two forward passes (Zhou et al. 2021, Appendix C): one backward and two forwards
    of a subnet per step give 3 / (4 f_S / f_D). Raises ValueError: nothing was run.
    """
    cost, backward_passes = 0.0, 0
    for flops, forwards, backwards in passes:
        cost += flops * (forwards + 2 * backwards)
        backward_passes += backwards
    steps = backward_passes if steps is None else steps
    if cost <= 0 or steps < 1:
        raise ValueError("no training step was run; give the passes of at least one step")
    return 3 * dense_flops * steps / cost
