"""Parameters, FLOPs and training cost of a network and of the subnetworks that masks select from it.

FLOPs are those of ``torch.utils.flop_counter``: two per multiply-add of convolutions and matrix products,
forward only.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.model_call import Inputs, attention_in_products
from offload_sparse.channels.subnet import meta_copy, narrow_module, on_copy


def count_parameters(module: nn.Module) -> int:
    """Entries of all parameters; a parameter shared by two layers counts once."""
    return sum(p.numel() for p in module.parameters())


def count_flops(module: nn.Module, example_inputs: Inputs) -> int:
    """FLOPs of one forward pass (evaluation mode) over the whole batch, counted without computing."""
    return _count(module, example_inputs).total


def flops_by_weight(module: nn.Module, example_inputs: Inputs) -> dict[str, int]:
    """FLOPs of the products with each weight, by each of its names: those of a layer that is called twice, or
    that shares its weight, are added up."""
    found = _count(module, example_inputs).flops
    first = {parameter: name for name, parameter in module.named_parameters()}
    return {name: found[first[p]] for name, p in module.named_parameters(remove_duplicate=False)}


class _Products(TorchDispatchMode):
    """Counts FLOPs by the weight that is multiplied, the last of two; what a forward multiplies without one,
    as attention does, by the module that runs.

    Attributes:
        flops: of the products with each weight, by its first name.
        outputs: how many numbers these products put out.
        others: FLOPs of each other product, in order, with the first name of the module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.flops, self.outputs = Counter[str](), Counter[str]()
        self.others: list[tuple[str, int]] = []
        self.counter = FlopCounterMode(display=False)
        self._names = {id(p): name for name, p in network.named_parameters() if p.dim() > 1}
        self._running = [""]
        for name, module in network.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    @property
    def total(self) -> int:
        """FLOPs of everything."""
        return self.counter.get_total_flops()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.total
        out = func(*args, **(kwargs or {}))
        spent = self.total - before
        if spent:
            whole = [x if x._base is None else x._base for x in args if isinstance(x, Tensor)]
            weights = [self._names[id(x)] for x in whole if id(x) in self._names]
            if weights:
                self.flops[weights[-1]] += spent
                self.outputs[weights[-1]] += out.numel()
            else:
                self.others.append((self._running[-1], spent))
        return out


def _count(module: nn.Module, example_inputs: Inputs) -> _Products:
    def counted(network: nn.Module, inputs: Inputs) -> _Products:
        products = _Products(network.eval())
        with products.counter, products, torch.no_grad(), attention_in_products():
            network(*inputs)
        return products

    return on_copy(module, example_inputs, counted)


@dataclass(frozen=True)
class _Term:
    """What is counted for each kept position of a product of axes: parameters and FLOPs.

    Attributes:
        module: name of the one whose forward multiplies, where that is not a weight."""

    axes: list[int]
    entries: int
    flops: Fraction
    module: str = ""


class CostModel:
    """FLOPs and parameters of every subnetwork in closed form.

    The FLOPs of a product with a weight are proportional to the entries of the weight that are kept, and the
    kept entries of a tensor are the product of the kept positions of its dimensions:

        flops(mask) = constant + Σ_weights flops_per_entry · Π_dims kept positions

    Those of other products, as an attention's between its projections, grow as one width of them. Raises
    ValueError: FLOPs depend on the mask in another way.

    Args:
        model: the full network, best on the meta device; not changed.
        example_inputs: the batch that FLOPs are counted for (give one image for FLOPs per image)."""

    def __init__(self, model: nn.Module, channel_map: ChannelMap, example_inputs: Inputs) -> None:
        self._channel_map = channel_map
        distinct = self._distinct = channel_map.distinct_axes
        axes, atoms = len(distinct.numbers), torch.from_numpy(distinct.atoms)
        segment = torch.from_numpy(np.arange(axes).repeat(np.diff(distinct.starts)))
        self._always = torch.ones(axes + 1, dtype=torch.int64)
        self._always[:-1] = segment[atoms < 0].bincount(minlength=axes)
        self._atoms, self._segment = atoms[atoms >= 0], segment[atoms >= 0]
        masks, counts = [channel_map.full_mask()], [_count(model, example_inputs)]
        for mask in _telling_masks(channel_map):
            masks.append(mask)
            counts.append(_count(narrow_module(meta_copy(model), channel_map, mask), example_inputs))
            if counts[1].others == counts[0].others:  # all that shrink are products with weights
                break
        spent, fitted = counts[0], counts[: max(2, len(counts) - 1)]
        sizes = list(zip(*(self._kept(m).tolist() for m in masks[: len(fitted)]), strict=True))
        # Numbers of the axes of every tensor; the last one stands for dimensions that never shrink, whose
        # size is a factor elsewhere: it counts 1.
        axes_of = {
            name: [distinct.numbers.get(id(axis), -1) for axis in channel_map.axes[name]]
            for name, _ in model.named_parameters()
            if name in channel_map.shapes
        }
        others = _terms_of_others(model, axes_of, sizes, fitted)
        self._hold([*_terms_of_weights(channel_map, axes_of, spent), *others])
        self._hold_outputs(axes_of, sizes, fitted)
        self._constant = 0
        self._constant = spent.total - self.flops(channel_map.full_mask())
        self.dense_flops = spent.total
        self.dense_parameters = self.parameters(channel_map.full_mask())
        if counts[-1].total != self.flops(masks[-1]):
            lost = next((term.module for term in others if term.axes == [-1]), "the network")
            raise ValueError(
                f"FLOPs of {lost} in a {type(model).__name__} depend on the mask, but grow as no width does "
                f"({counts[-1].total} counted, {self.flops(masks[-1])} predicted); keep those channels by a "
                "channel map of your own"
            )

    def _hold(self, terms: Sequence[_Term]) -> None:
        rank = max((len(term.axes) for term in terms), default=0)
        dims = [term.axes + [-1] * (rank - len(term.axes)) for term in terms]
        self._dims = torch.tensor(dims, dtype=torch.int64).view(len(terms), rank)
        self._entries = torch.tensor([term.entries for term in terms], dtype=torch.int64)
        self._flops = torch.tensor([term.flops.numerator for term in terms], dtype=torch.int64)
        self._per = torch.tensor([term.flops.denominator for term in terms], dtype=torch.int64)

    def _hold_outputs(
        self,
        axes_of: Mapping[str, list[int]],
        sizes: Sequence[tuple[int, ...]],
        counts: Sequence[_Products],
    ) -> None:
        """Which axis counts what a weight puts out, and how many numbers that are for each position."""
        made = [[count.outputs[name] for count in counts] for name in axes_of]
        rows = zip(axes_of.values(), made, strict=True)
        out = [axis for row, n in rows for axis in _growing(([a] for a in row), sizes, n)]
        self._out = torch.tensor(out, dtype=torch.int64)
        per_row = [n[0] / sizes[axis][0] for n, axis in zip(made, out, strict=True)]
        self._per_row = torch.tensor(per_row, dtype=torch.float64)

    def flops(self, mask: Tensor) -> int:
        """Forward FLOPs of the subnetwork of ``mask`` (bool[C]) for the batch of ``example_inputs``."""
        return self._constant + int((self._flops * self._kept_products(mask) // self._per).sum())

    def parameters(self, mask: Tensor) -> int:
        """Parameters of the subnetwork of ``mask`` (bool[C])."""
        return int((self._entries * self._kept_products(mask)).sum())

    def outputs(self, mask: Tensor) -> float:
        """Numbers that the products with weights put out in the subnetwork, for the batch of
        ``example_inputs``: what a training step holds for its backward pass goes with them."""
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


def _terms_of_weights(
    channel_map: ChannelMap, axes_of: Mapping[str, list[int]], spent: _Products
) -> Iterator[_Term]:
    for name, row in axes_of.items():
        shape = channel_map.shapes[name]
        free = prod(size for size, axis in zip(shape, channel_map.axes[name], strict=True) if axis is None)
        yield _Term(row, free, Fraction(free * spent.flops[name], max(prod(shape), 1)))


def _terms_of_others(
    model: nn.Module,
    axes_of: Mapping[str, list[int]],
    sizes: Sequence[tuple[int, ...]],
    counts: Sequence[_Products],
) -> list[_Term]:
    """Those of products of which a part is left in a narrow network."""
    terms = []
    for products in zip(*(count.others for count in counts), strict=False):
        module, spent = products[0][0], [flops for _, flops in products]
        if len({*spent}) > 1:
            row = _growing(_rows_around(model, module, axes_of), sizes, spent)
            full = prod(sizes[axis][0] for axis in row)
            terms.append(_Term(row, 0, Fraction(spent[0], full), module or "the network"))
    return terms


def _telling_masks(channel_map: ChannelMap) -> Iterator[Tensor]:
    """Masks bool[C] of random channels until no two groups have kept the same shares in all of them, and one
    more; the first and the last leave something of every group out."""
    draw = random.Random(0)
    groups = [group for group in channel_map.groups if group.size > 1]
    shares: list[tuple[Fraction, ...]] = [() for _ in groups]
    told = False
    while not told:
        told = len({*shares}) == len(groups) and () not in shares
        mask, used = channel_map.full_mask(), set[tuple[Fraction, ...]]()
        for number, group in enumerate(groups):
            most = group.size - (told or not shares[number])
            kept = draw.sample(range(1, most + 1), most)
            new = [(*shares[number], Fraction(n, group.size)) for n in kept]
            shares[number] = next((s for s in new if s not in used), new[0])
            used.add(shares[number])
            dropped = draw.sample(range(group.size), group.size - kept[new.index(shares[number])])
            mask[group.start : group.stop][dropped] = False
        yield mask


def _growing(
    rows: Iterable[list[int]], sizes: Sequence[tuple[int, ...]], numbers: Sequence[int]
) -> list[int]:
    """The first row of axes whose positions shrink as a number does; else the axis that never shrinks.

    Args:
        sizes: positions of each axis in the full network and in narrow ones.
        numbers: the number in each of these."""
    for row in rows:
        full, *narrow = (prod(sizes[axis][n] for axis in row) for n in range(len(numbers)))
        if all(full * m == n * numbers[0] for n, m in zip(narrow, numbers[1:], strict=True)):
            return row
    return [-1]


def _rows_around(model: nn.Module, module: str, axes_of: Mapping[str, list[int]]) -> Iterator[list[int]]:
    """The axes of each parameter of ``module``, then of what it is part of, together and one by one: an
    attention goes with its heads or values, a product with a computed weight with both of its widths."""
    for name, _ in model.get_submodule(module).named_parameters(prefix=module):
        row = axes_of.get(name, [])
        yield from (row, *([axis] for axis in row))
    if module:
        yield from _rows_around(model, module.rpartition(".")[0], axes_of)


def train_cost_saving(dense_flops: float, passes: Iterable[tuple[float, int, int]], steps: int) -> float:
    """How many times cheaper ``passes`` (forward FLOPs f of the network that ran, forwards, backwards) were
    than dense training with f_D FLOPs: 3 f_D · steps / Σ f · (forwards + 2 · backwards).

    A backward pass counts as two forward passes (Zhou et al. 2021, Appendix C): one backward and two forwards
    of a subnet per step give 3 / (4 f_S / f_D). Raises ValueError: nothing was run.
    """
    cost = 0.0
    for flops, forwards, backwards in passes:
        cost += flops * (forwards + 2 * backwards)
    if cost <= 0 or steps < 1:
        raise ValueError("no training step was run; give the passes of at least one step")
    return 3 * dense_flops * steps / cost
