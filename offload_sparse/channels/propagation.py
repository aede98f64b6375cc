"""Which positions of which tensors go together: labels that follow the data through every operation.

    weight of q [H·D, C]     rows 0 … H·D-1 get labels, columns get others
    x @ weight.T             columns meet the channels of x: tied; the result carries the labels of the rows
    view(B, T, H, D)         the same view of the labels: (h, d) carries the label of row h·D + d
    q @ k.transpose(2, 3)    two activations: all of head h of q and k becomes one label, that of its scores
    view(B, T, H·D)          the same view: every column that reads head h meets its one label
    layer_norm, mean, …      channels are mixed: their labels are dense, nothing of them can be dropped

Nothing is matched by class or name: an attention is where two activations are multiplied, so fused and
separate projections, grouped queries, rotary positions and gated units are all followed. An operation that is
not known makes the labels that reach it dense; slice = mask is tested all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from offload_sparse.channels.channel_labels import (
    beside,
    compact,
    connected_components,
    dimensions,
    first,
    joined,
    lowest,
    padded,
    spread,
    varying,
    viewed,
)
from offload_sparse.channels.remainders import Remainders

Labels = tuple[Tensor, ...]
"""int64, each of the shape of the labelled tensor: an element lives if all of its labels do; -1: none."""

_SAME = re.compile(
    r"(clone|_to_copy|detach|alias|lift_fresh|native_dropout|bernoulli_?|(zeros|ones|empty|rand|randn|"
    r"full)_like|fill_|zero_)"
)
_MOVED = re.compile(
    r"(view|_unsafe_view|permute|transpose|t|slice|select|(un)?squeeze|split|split_with_sizes|unbind|flip|"
    r"roll|repeat|diagonal|index_select|unfold)"
)
_PLACED = {"select": 1, "index_select": 1, "roll": 2}
"""Operations at positions that the code counts, and which of their arguments has the dimensions."""
_REDUCED = re.compile(r"(sum|mean|amax|amin|var|std|prod|any|all|max|min|logsumexp|argmax)")
_MIXED = re.compile(r"(_(safe_|log_)?softmax|cumsum)")
_SPATIAL = re.compile(
    r"_?((adaptive_)?(avg|max)_pool[123]d(_with_indices)?|upsample_\w+|(reflection|replication)_pad[123]d)"
)
_POINTWISE = re.compile(r"(masked_fill|copy|add|mul|hardswish|_prelu_kernel|rsub|log_sigmoid_forward)_?")


class Propagation(TorchDispatchMode):
    """Follows the labels of parameters through whatever is computed inside; under ``torch.inference_mode``.

    Args:
        parameters: the tensors whose dimensions are labelled, by name.
        inputs: tensors of the network's inputs, which are not.
        place: says which module runs.
        repeats: says whether copies are made now whose number cannot be changed (see ``written_sizes``).
        group_norms: names of the modules whose number of norm groups follows their channels.

    Attributes:
        edges: pairs of equally many labels that are tied.
        dense: labels that must be kept, each with the operation that says so.
        consumed: labels that some product sums over.
        streams: labels of sums of what different layers give, and the module that adds.
        sums: by name of an addition whose operands stay apart (see ``add``), the labels of the channels of
            its operands and of its result.
        constants: tensors that depend on no input and meet labels along one dimension, as the slopes of ALiBi
            meet heads: the tensor, its dimension, the labels along it, the module that runs.
        shared: labels of heads that share their values.
        operations: names of what was computed.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Collection[Tensor],
        place: Callable[[], str],
        repeats: Callable[[], bool],
        group_norms: Collection[str],
    ) -> None:
        super().__init__()
        self._place, self._repeats, self._group_norms = place, repeats, group_norms
        self._merged, self._collapsed = 0, False
        self._seen: dict[int, int] = {}  # how many edges the labels of a tensor know
        self.starts: list[tuple[int, str, int]] = []
        self.size = 0
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.dense: list[tuple[Tensor, str]] = []
        self.consumed: list[Tensor] = []
        self.streams: list[tuple[Tensor, str]] = []
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.added: set[str] = set()
        self.constants: list[tuple[Tensor, int, Tensor, str]] = []
        self.shared: list[Tensor] = []
        self.operations: set[str] = set()
        self._labels: dict[int, Labels] = {}
        self._activations = {id(tensor) for tensor in inputs}
        self._remainders = Remainders(self._varies)
        self._alive = [*parameters.values(), *inputs]  # an id is that of one tensor as long as this lives
        for name, tensor in parameters.items():
            self._labels[id(tensor)] = tuple(self._new(name, tensor, d) for d in range(tensor.dim()))
        self._root = torch.cat([torch.arange(self.size), torch.tensor([-1])])

    def _new(self, name: str, tensor: Tensor, dim: int) -> Tensor:
        """New labels along one dimension of a tensor."""
        self.starts.append((self.size, name, dim))
        labels = torch.arange(self.size, self.size + tensor.shape[dim], device="cpu")
        self.size += tensor.shape[dim]
        if hasattr(self, "_root"):
            self._root = torch.cat([self._root[:-1], labels, torch.tensor([-1])])
        return spread(labels, dim, tensor.shape)

    def of(self, tensor: Any) -> Labels:
        """The labels of a tensor that was computed inside; none for anything else."""
        if self._collapsed:
            self._collapsed = False
            self.roots()
        labels = self._labels.get(id(tensor), ())
        if labels and self._seen.get(id(tensor)) != self._merged:
            labels = tuple(self._root[compact(x)].expand(x.shape) for x in labels)
            self._labels[id(tensor)], self._seen[id(tensor)] = labels, self._merged
        return labels

    def _varies(self, tensor: Tensor) -> bool:
        return any(varying(labels) for labels in self.of(tensor))

    def roots(self) -> Tensor:
        """int64[size + 1], the smallest label that each label is tied to; the last serves -1."""
        if self._merged < len(self.edges):
            pending = self.edges[self._merged :]
            u, v = (self._root[torch.cat([pair[side] for pair in pending])] for side in (0, 1))
            touched, place = torch.unique(torch.cat([u, v]), return_inverse=True)
            merged = torch.arange(self.size + 1)
            merged[touched] = touched[connected_components(len(touched), *place.chunk(2))]
            merged[-1] = -1
            self._root, self._merged = merged[self._root], len(self.edges)
        return self._root

    def keep(self, tensor: Any, reason: str) -> None:
        """Make every label of ``tensor`` dense."""
        for labels in self.of(tensor):
            self._keep(labels, reason)

    def add(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """``left + right`` with channels (dimension 1) that are not tied: the sum has labels of its own.

        An addition that runs twice, or whose operands are not alike, is an ordinary one.
        """
        with torch._C.DisableTorchFunction():  # what is done with labels is none of the network's calls
            known = [side for side in map(self._channels, (left, right)) if side is not None]
        if left.shape != right.shape or len(known) < 2 or name in self.added:
            self.streams += [(labels, self._place()) for labels in self.of(left) + self.of(right)]
            return left + right
        self.added.add(name)
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            out = left + right
            if name not in self.sums:
                self.sums[name] = (known[0], known[1], first(self._new(name, out, 1), 1))
            for before, side in zip(self.sums[name], known, strict=False):
                self._tie(before, side)
                self.consumed.append(side[side >= 0])
            self._labels[id(out)] = (spread(self.sums[name][2], 1, out.shape),)
            self._remainders.note([out], self._remainders.of(left) + self._remainders.of(right))
        self._alive.append(out)
        self._activations.add(id(out))
        return out

    def _channels(self, x: Tensor) -> Tensor | None:
        """int64[channels], the labels along dimension 1 (-1: none) if they depend on no other; else None."""
        comps = self.of(x)
        if x.dim() < 2 or len(comps) > 1 or any(varying(c) - {1} for c in comps):
            return None
        return first(comps[0], 1) if comps else torch.full((x.shape[1],), -1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        if args and getattr(args[0], "is_meta", False) and "batch_norm" in func.name():
            x = args[0]  # torch's own computation of these sizes takes long
            out = (torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1]))
        else:
            out = func(*args, **kwargs)
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self._alive += results
        if any(id(x) in self._activations for x in given):
            self._activations |= {id(x) for x in results}
        if any(self.of(x) for x in given):
            with torch.utils._python_dispatch._disable_current_modes():
                left = self._remainders.behind(func, args, kwargs)
                found = self._follow(func, args, kwargs, out, given)
            for result, labels in zip(results, found, strict=False):
                self._labels[id(result)] = labels
                self._seen.pop(id(result), None)
            self._remainders.note(filter(self._varies, results), left)
        elif "zeros" in func.name():
            self._remainders.note(results, 0.0)
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor]) -> list[Labels]:
        """Labels of the results, in order; those of further results are none."""
        name = func.overloadpacket.__name__
        self.operations.add(name)
        rule: Callable[..., Labels] | None = getattr(self, f"_{name.strip('_')}_rule", None)
        if rule is not None:
            return [rule(out, *args, **kwargs)]
        if name.startswith("new_"):
            return []
        if _SAME.fullmatch(name):
            return [self.of(given[0])]
        if _MOVED.fullmatch(name):
            return self._moved(func, args, kwargs, out)
        if _REDUCED.fullmatch(name):
            return [self._reduced(name, out, *args, **kwargs)]
        if _MIXED.fullmatch(name):
            return [self._mix(self.of(args[0]), {args[1] % max(args[0].dim(), 1)}, name)]
        if _SPATIAL.fullmatch(name):
            return [tuple(self._spread(labels, out, name) for labels in self.of(args[0]))]
        if torch.Tag.pointwise in func.tags or _POINTWISE.fullmatch(name):
            result = out[0] if isinstance(out, tuple) else out
            return [self._pointwise(result.shape, given, residual=name in ("add", "add_", "sub", "sub_"))]
        for x in given:
            self.keep(x, name)
        return []

    def _keep(self, labels: Tensor, reason: str) -> None:
        small = compact(labels).flatten().unique()
        self.dense.append((small[small >= 0], f"{reason} in {self._place() or 'the network'}"))

    def _tie(self, a: Tensor, b: Tensor) -> Tensor:
        """Tie labels element by element (of one shape, after broadcasting); the labels of both."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = (compact(x.expand(shape)) for x in (a, b))
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0)
        self.edges.append((a[both], b[both]))
        if not bool(both.all()):  # a channel meets a position that is always there
            self._keep(torch.where(both, -1, torch.maximum(a, b)), "a constant")
        return torch.where(both, torch.minimum(a, b), torch.maximum(a, b)).expand(shape)

    def _tie_all(self, vectors: list[Tensor]) -> Tensor:
        """Tie vectors of one length position by position; the labels of all, -1 where one is always there."""
        found = torch.stack(vectors)
        low = found.amin(0)
        self._tie(found, low)
        return low

    def _collapse(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Tie all labels along ``dims``."""
        low = lowest(labels, set(dims))
        self._tie(labels, low)
        self._collapsed = True
        return low

    def _mix(self, comps: Labels, dims: Iterable[int], reason: str) -> Labels:
        """Positions along ``dims`` depend on each other: within an outer one (a head) they become one."""
        found, dims = [], set(dims)
        for labels in comps:
            along = varying(labels)
            if along & dims and (along - dims) and min(along - dims) < min(along & dims):
                labels = self._collapse(labels, along & dims)
            elif along & dims:
                self._keep(labels, reason)
            found.append(labels)
        return tuple(found)

    def _pointwise(self, shape: torch.Size, given: list[Tensor], residual: bool = False) -> Labels:
        """Elements that meet are tied; what meets a constant, or several labels, is not free."""
        found: list[tuple[Tensor, set[int]]] = []  # labels, and the dimensions that their tensors really have
        residual &= len(given) == 2 and all(id(x) in self._activations for x in given)
        own = [{len(shape) - x.dim() + d for d in range(x.dim()) if x.shape[d] > 1} for x in given]
        for x, dims in zip(given, own, strict=True):
            for labels in self.of(x):
                self._join(found, labels.expand(shape), dims, residual)
        for x, dims in zip(given, own, strict=True):
            has = {d for labels in self.of(x) for d in varying(labels.expand(shape))}
            for i, (labels, known) in enumerate(found):
                conflict = (varying(labels) & dims) - has
                fixed = not self.of(x) and id(x) not in self._activations
                if fixed and conflict and conflict == varying(labels) and len(conflict) == 1:
                    (dim,) = conflict
                    met = first(labels, dim)
                    self.constants.append((x, dim - len(shape) + x.dim(), met, self._place()))
                elif conflict:
                    found[i] = (self._mix((labels,), conflict, "a constant")[0], known)
        return tuple(labels for labels, _ in found)

    def _join(
        self, found: list[tuple[Tensor, set[int]]], labels: Tensor, dims: set[int], residual: bool
    ) -> None:
        along = varying(labels)
        for i, (other, known) in enumerate(found):
            beside = varying(other)
            if not along & beside:
                continue
            if beside - dims:  # one element meets several labels
                self._keep(labels, "a broadcast")
                found[i] = (self._mix((other,), along & beside, "a broadcast")[0], known)
            elif along - known:
                self._keep(other, "a broadcast")
                found[i] = (self._mix((labels,), along & beside, "a broadcast")[0], dims)
            else:
                if residual and self._owners(labels) != self._owners(other):
                    self.streams.append((labels, self._place()))
                found[i] = (self._tie(labels, other), known | dims)
            return
        if along:
            found.append((labels, dims))
        elif bool((compact(labels) >= 0).any()):
            self._keep(labels, "a single channel")

    def _owners(self, labels: Tensor) -> set[int]:
        starts = torch.tensor([start for start, _, _ in self.starts])
        small = self.roots()[compact(labels).flatten()]
        return set((torch.searchsorted(starts, small[small >= 0], right=True) - 1).unique().tolist())

    def _moved(self, func: Any, args: Any, kwargs: Any, out: Any) -> list[Labels]:
        """The same operation on the labels; leading dimensions that it leaves alone are not touched."""
        per_comp = []
        name = func.overloadpacket.__name__
        view = name in ("view", "_unsafe_view")
        if name in _PLACED:
            dims = dimensions(args[0], *args[_PLACED[name] :][:1])
            for labels in self.of(args[0]):
                if varying(labels) and varying(labels) <= dims:  # another channel is there when some are gone
                    self._keep(labels, name)
        for labels in self.of(args[0]):
            if view:
                per_comp.append([viewed(labels, out.shape)])
            else:
                moved = func(labels, *args[1:], **kwargs)
                per_comp.append([moved] if isinstance(moved, Tensor) else list(moved))
        return [tuple(comps) for comps in zip(*per_comp, strict=True)]

    def _reduced(self, name: str, out: Any, x: Tensor, dims: Any = None, *_: Any, **__: Any) -> Labels:
        result = out[0] if isinstance(out, (tuple, list)) else out
        over = dimensions(x, dims)
        kept = []
        for labels in self._mix(self.of(x), over, name):
            if varying(labels) - over and not varying(labels) & over:
                one = tuple(slice(1 if d in over else None) for d in range(x.dim()))
                kept.append(labels[one].reshape(result.shape))
            else:
                self._keep(labels, name)
        return tuple(kept)

    def _norm_rule(self, out: Any, x: Tensor, _p: Any = 2, dims: Any = None, *_: Any, **__: Any) -> Labels:
        return self._reduced("norm", out, x, dims)

    _linalg_vector_norm_rule = _norm_rule

    def _spread(self, labels: Tensor, out: Any, name: str) -> Tensor:
        """Channels of an operation over the last dimensions of images."""
        result = out[0] if isinstance(out, (tuple, list)) else out
        (labels,) = self._mix((labels,), range(2, labels.dim()), name)
        return labels[(slice(None),) * 2 + (slice(1),) * (labels.dim() - 2)].expand(result.shape)

    def _cat_rule(self, out: Tensor, tensors: list[Tensor], dim: int = 0) -> Labels:
        given = [x for x in tensors if x.dim() == out.dim()]  # others are empty
        return tuple(joined(parts, dim) for parts in beside(map(self.of, given), given))

    def _stack_rule(self, _: Any, tensors: list[Tensor], dim: int = 0) -> Labels:
        found = beside(map(self.of, tensors), tensors)
        return tuple(joined([x.unsqueeze(dim) for x in parts], dim) for parts in found)

    def _expand_rule(self, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
        """Copies of the only key-value head for each query head come and go with these."""
        comps = [labels.expand(out.shape) for labels in self.of(x)]
        inner = all(varying(c) <= {out.dim() - 2, out.dim() - 1} for c in comps)
        if inner and out.dim() > 3 and id(x) in self._activations and not self._repeats():
            had = (1,) * (out.dim() - x.dim()) + tuple(x.shape)
            wider = [d for d in range(1, out.dim() - 2) if had[d] < out.shape[d]]
            comps += [self._new(f"copies in {self._place()}", out, d) for d in wider]
        return tuple(comps)

    def _constant_pad_nd_rule(self, out: Tensor, x: Tensor, pad: list[int], *_: Any) -> Labels:
        return tuple(padded(labels, pad, out.shape) for labels in self.of(x))

    def _glu_rule(self, _: Any, x: Tensor, dim: int = -1) -> Labels:
        return tuple(self._tie(*labels.chunk(2, dim)) for labels in self.of(x))

    def _embedding_rule(self, out: Tensor, weight: Tensor, indices: Tensor, *_: Any) -> Labels:
        return self._rows(self.of(weight), indices, out)

    def _index_rule(self, out: Tensor, x: Tensor, indices: list[Tensor | None]) -> Labels:
        if len(indices) == 1 and indices[0] is not None and indices[0].dtype != torch.bool:
            return self._rows(self.of(x), indices[0], out)
        if not any(i is not None and (i.is_meta or id(i) in self._activations) for i in indices):
            return tuple(torch.ops.aten.index(labels, indices) for labels in self.of(x))
        places = [dim for dim, i in enumerate(indices) if i is not None]
        masks = any(i is not None and i.dtype == torch.bool for i in indices)
        if masks or places[-1] - places[0] >= len(places):
            places = list(range(x.dim()))
        found = []
        for labels in self.of(x):
            if varying(labels) & set(places):
                self._keep(labels, "index")
            else:  # positions of images are picked, as upsampling does: channels go on
                rest = labels[tuple(0 if dim in places else slice(None) for dim in range(x.dim()))]
                inner = (None,) * (out.dim() - rest.dim())
                found.append(rest[(slice(None),) * places[0] + inner].expand(out.shape))
        return tuple(found)

    _unsafe_index_rule = _index_rule

    def _rows(self, comps: Labels, indices: Tensor, out: Tensor) -> Labels:
        """Rows of a table: which of them exist is fixed, its other dimensions go on."""
        found = []
        for labels in comps:
            if 0 in varying(labels):
                self._keep(labels, "a table")
            else:
                row = labels[0].view((1,) * indices.dim() + tuple(labels.shape[1:]))
                found.append(row.expand(out.shape))
        return tuple(found)

    def _native_layer_norm_rule(self, _: Any, x: Tensor, shape: list[int], *rest: Any) -> Labels:
        self._labels[id(x)] = self._mix(self.of(x), range(x.dim() - len(shape), x.dim()), "a layer norm")
        return self._pointwise(x.shape, [x, *(t for t in rest if isinstance(t, Tensor))])

    _fused_rms_norm_rule = _native_layer_norm_rule

    def _native_group_norm_rule(self, out: Any, x: Tensor, *rest: Any) -> Labels:
        """Each norm group is kept or dropped whole, so that the others keep their mean and variance."""
        if self._place() not in self._group_norms:
            for given in (x, *rest):
                self.keep(given, "a group norm")
        groups = [first(c, 1).view(rest[-2], -1) for c in self._native_batch_norm_rule(out, x, *rest)]
        return tuple(spread(self._collapse(labels, {1}).flatten(), 1, x.shape) for labels in groups)

    def _native_batch_norm_rule(self, _: Any, x: Tensor, *rest: Any) -> Labels:
        mixed = self._mix(self.of(x), set(range(x.dim())) - {1}, "a batch norm")
        vectors = [first(c, 1) for c in mixed if varying(c) == {1}]
        alone = [] if vectors else [torch.full((x.shape[1],), -1)]
        self._tie_all([*vectors, *alone, *(self.of(t)[0] for t in rest if self.of(t))])
        return tuple(spread(vector, 1, x.shape) for vector in vectors)

    _native_batch_norm_legit_rule = _native_batch_norm_legit_no_training_rule = _native_batch_norm_rule
    _cudnn_batch_norm_rule = _native_batch_norm_rule

    def _convolution_rule(self, out: Tensor, x: Tensor, w: Tensor, bias: Any, *rest: Any) -> Labels:
        transposed, groups = rest[3], rest[5]
        outer, inner = (self._vector(w, dim, "a weight") for dim in (0, 1))
        comps = self._mix(self.of(x), range(2, x.dim()), "a convolution")
        incoming = [first(c, 1) for c in comps if varying(c) == {1}]
        for labels in comps:
            if varying(labels) != {1}:
                self._keep(labels, "a convolution")
        if groups == 1:
            rows, columns = (inner, outer) if transposed else (outer, inner)
            self._contract(incoming, [columns], x)
        else:  # its weight has no entry between two groups: each is dropped whole
            sides = (outer, *(incoming or [torch.full_like(outer, -1)]))
            group = self._tie_all([*torch.cat([side.view(groups, -1) for side in sides], 1).T])
            rows = group.repeat_interleave(out.shape[1] // groups)
        if bias is not None:
            rows = self._tie(rows, self._vector(bias, 0, "a bias"))
        return (spread(rows, 1, out.shape),) if bool((rows >= 0).any()) else ()

    def _vector(self, x: Tensor, dim: int, reason: str) -> Tensor:
        """int64[positions of ``dim``], the labels along it (-1: none); those along others too are kept."""
        found = torch.full((x.shape[dim],), -1)
        for labels in self.of(x):
            along = varying(labels)
            if along == {dim}:
                found = first(labels, dim)
            elif dim in along:
                self._keep(labels, reason)
        return found

    def _bmm_rule(self, out: Tensor, a: Tensor, b: Tensor) -> Labels:
        one = (None,) * (3 - out.dim())  # two matrices are a batch of one
        left, right = ([labels[one] for labels in self.of(x)] for x in (a, b))
        found = self._product(left, right, a, b, out[one].shape)
        return tuple(labels[(0,) * len(one)] for labels in found)

    _mm_rule = _bmm_rule

    def _addmm_rule(self, out: Tensor, added: Tensor, a: Tensor, b: Tensor, **_: Any) -> Labels:
        self._labels[id(out)] = self._bmm_rule(out, a, b)
        return self._pointwise(out.shape, [out, added])

    _baddbmm_rule = _addmm_rule

    def _product(
        self, left: list[Tensor], right: list[Tensor], a: Tensor, b: Tensor, shape: torch.Size
    ) -> Labels:
        """Labels of a [n, i, k] times b [n, k, j], which is [n, i, j]."""
        activations = id(a) in self._activations and id(b) in self._activations
        found: list[Tensor] = []
        heads = [c for c in (*left, *right) if 0 in varying(c)]
        if heads:
            one = torch.stack([lowest(c, {1, 2})[:, 0, 0] for c in heads]).amin(0)
            for c in heads:
                self._tie(c, one[:, None, None].expand(c.shape))
            if not (any(0 in varying(c) for c in left) and any(0 in varying(c) for c in right)):
                self._keep(one, "a product with a constant")
            self._collapsed = True
            found.append(one[:, None, None].expand(shape))
        left, right = ([c for c in side if 0 not in varying(c)] for side in (left, right))
        if heads and activations:
            for c in (*left, *right):
                self._keep(c, "a width that all heads share")
            if any(varying(c) == {1} for c in left) or any(varying(c) == {2} for c in right):
                self.shared.append(one)
            return tuple(found)
        rows, columns = (
            [lowest(c, {0, 3 - k})[0].select(2 - k, 0) for c in s if k in varying(c)]
            for s, k in ((left, 2), (right, 1))
        )
        self._contract(rows, columns, a, b)
        if activations:  # the width of a single head, which its scale depends on
            for labels in (*rows, *columns):
                self._keep(labels, "a product of activations")
        found += [c[:, :, :1].expand(shape) for c in left if varying(c) == {1}]
        found += [c[:, :1, :].expand(shape) for c in right if varying(c) == {2}]
        for c in (*left, *right):
            if not varying(c):
                self._keep(c, "a single channel")
        return tuple(found)

    def _contract(self, left: list[Tensor], right: list[Tensor], *given: Tensor) -> None:
        """Labels (int64[k] each) that a product of the tensors ``given`` sums over."""
        for x, ends in zip(given, (left, right), strict=False):
            for labels in ends if id(x) in self._activations and self._remainders.of(x) else ():
                self._keep(labels, "a function with f(0) != 0")
        self.consumed += [labels[labels >= 0] for labels in (*left, *right)]
        if left and right:
            for labels in (*left[1:], *right):
                self._tie(left[0], labels)
        else:
            for labels in (*left, *right):
                self._keep(labels, "a constant")
