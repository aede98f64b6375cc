"""Weights that training starts from: found in files, matched with a network, read row by row."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from offload_sparse.engine.distributed import (
    everyones,
    first_word,
    on_every_rank,
    on_first_rank,
    rank_and_world_size,
    require_equal,
)
from offload_sparse.export import json_values
from offload_sparse.export.description import Preprocessing, file_digest
from offload_sparse.export.network_file import STRUCTURE_FILE, WEIGHTS_FILE, read_structure
from offload_sparse.store.initialisation import named_tensors
from offload_sparse.store.partition import row_shape
from offload_sparse.store.weight_files import Stored, check_whole, read_rows, read_whole, tensors_in
from offload_sparse.store.weight_store import WeightStore

NEW_HEAD = "+new_head"
"""Behind a path: the tensors of the last layer start afresh, whether or not the network has other classes."""

_WRAPPER = re.compile(r"(module|model|net|network|backbone|_orig_mod)\.")
"""What wrappers put before the names of a network's own tensors, any number of them."""

_DOTTED = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")
"""Names of modules in the published weights of DenseNets, from before names could hold no dots."""


@dataclass(frozen=True)
class FittedWeights:
    """Weights that are known to fit a network.

    Attributes:
        stored: by the name of a parameter or buffer, where its values are.
        parameters: names of the parameters, whose values have to be finite.
        lines: what was found, for people.
        preprocessing: of the images that the weights were trained on, as far as it is known."""

    stored: Mapping[str, Stored]
    parameters: frozenset[str]
    lines: tuple[str, ...] = ()
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def fill(self, store: WeightStore) -> int:
        """Read this rank's rows into ``store``, of every tensor that the files have. Returns bytes read.
        Raises ValueError: weights are not finite; one line, on every rank."""
        count, odd = 0, ""
        for name, stored in self.stored.items():
            if not store.has_rows(name):
                store.integer_buffers[name] = value = read_whole(stored)
                count += value.nbytes
                continue
            rows = store.own_rows(name)
            count += read_rows(stored, *store.own_range(name), rows)
            odd = odd or self._not_finite(name, rows)
        if odd := first_word(odd, rank_and_world_size()[1]):
            raise ValueError(odd)
        return count

    def overlaid(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same parameters and buffers, whole, with the values of the files in those that they have.
        Raises ValueError: weights are not finite."""
        for name, tensor in tensors:
            if name in self.stored:
                tensor = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                read_rows(self.stored[name], 0, row_shape(tuple(tensor.shape))[0], tensor)
                if odd := self._not_finite(name, tensor):
                    raise ValueError(odd)
            yield name, tensor

    def into(self, network: nn.Module) -> None:
        """Read them into a whole network on the CPU."""
        own = named_tensors(network)
        for name, tensor in self.overlaid(own.items()):
            if tensor is not own[name]:
                own[name].copy_(tensor)

    def _not_finite(self, name: str, values: Tensor) -> str:
        """What is wrong with the values of a parameter; found without a mask in memory beside them."""
        if name not in self.parameters or not values.numel():
            return ""
        finite = all(bool(bound.isfinite()) for bound in values.detach().aminmax())
        advice = "holds values that are not finite; take an earlier checkpoint of its training"
        return "" if finite else f"{name} in {self.stored[name].path} {advice}"


class WeightSource:
    """Weights in files, whatever network they are of. Raises ValueError: there are none, they are damaged, of
    a narrow network, or others on another rank; one line, on every rank.

    Args:
        source: a file (safetensors, or a state_dict of ``torch.save``), a folder of such files with an index,
            a run's folder or its ``model/``; ``NEW_HEAD`` may stand behind it."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        text = os.fspath(source)
        self.new_head = text.endswith(NEW_HEAD)
        self.path = Path(text.removesuffix(NEW_HEAD)).expanduser()
        self.preprocessing = Preprocessing()
        inner = self.path / "model"
        exported = inner if (inner / STRUCTURE_FILE).is_file() else self.path
        digest = on_every_rank(lambda: self._described(exported))
        weights = exported / WEIGHTS_FILE

        def check() -> None:
            if digest and (not weights.is_file() or file_digest(weights) != digest):
                raise ValueError(f"{weights} is missing or damaged; export the network again")

        # Where there are checksums, the first rank alone reads all, once, to be sure that it is whole.
        on_first_rank(check)
        found = on_every_rank(lambda: tensors_in(weights if exported != self.path else self.path))
        held = digest or [(name, each.shape, each.offset, str(each.dtype)) for name, each in found.items()]
        every = everyones({"the digest of the weights": json_values.digest(held)}, rank_and_world_size()[1])
        require_equal(dict(enumerate(every)), f"give every machine the same {self.path}")
        self.tensors = {_DOTTED.sub(r"\1", name): stored for name, stored in found.items()}
        self._whole = bool(digest)  # with the buffers that no state_dict has
        files = {stored.path for stored in self.tensors.values()}
        on_first_rank(lambda: check_whole(files))

    def _described(self, folder: Path) -> str:
        """Take in what an exported network says of itself, if ``folder`` holds one; the digest of its
        weights."""
        if not (folder / STRUCTURE_FILE).is_file():
            if (self.path / "checkpoints").is_dir():
                raise ValueError(f"the run in {self.path} has not ended; let it, or give a file of weights")
            return ""
        structure = read_structure(folder)
        self.preprocessing = structure.preprocessing
        narrow = next((name for name, group in structure.groups.items() if len(group.kept) < group.size), "")
        if narrow:
            kept, size = len(structure.groups[narrow].kept), structure.groups[narrow].size
            raise ValueError(
                f"{folder} is a narrow network ({kept} of {size} channels of {narrow}); start from the full "
                "one, as method dense leaves it"
            )
        return structure.weights_digest

    def fitted(self, network: nn.Module) -> FittedWeights:
        """The same, known to fit ``network`` (on any device; only names and shapes matter). Raises
        ValueError: tensors are missing or of other shapes; one line that counts and names them."""
        own, names = named_tensors(network), dict[Tensor, str]()
        aliases = dict(network.named_parameters(remove_duplicate=False))
        tensors = chain(aliases.items(), network.named_buffers(remove_duplicate=False))
        own_name = {name: names.setdefault(tensor, name) for name, tensor in tensors}
        prefixes = _prefixes(self.tensors)
        prefix = max(prefixes, key=lambda p: sum(p + name in self.tensors for name in own_name))
        found: dict[str, Stored] = {}
        unexpected = []
        state = network.state_dict()
        for key, stored in self.tensors.items():
            name = own_name.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
            if name is None:
                unexpected.append(key)
            elif self._whole or key.removeprefix(prefix) in state:
                found.setdefault(name, stored)
        odd = [name for name, stored in found.items() if not _alike(stored, own[name])]
        head = self._head(odd, found, own) if odd else [own_name[alias] for alias in _last_layer(aliases)]
        if self.new_head:
            found = {name: stored for name, stored in found.items() if name not in head}
            odd = [name for name in odd if name not in head]
        # What no state_dict has keeps the values that the constructor gives it, and so do counters.
        wanted = [n for n in state if n in own and own[n].is_floating_point()]
        missing = [n for n in wanted if n not in found and not (self.new_head and n in head)]
        faults = []
        if missing:
            faults.append(f"lacks {_listed(missing)} of {len(wanted)} tensors")
        if odd:
            theirs, ours = found[odd[0]], own[odd[0]]
            what, differ = "shapes", f"{list(theirs.shape)} instead of {list(ours.shape)}"
            if theirs.shape == tuple(ours.shape):
                what, differ = "types", f"{theirs.dtype} instead of {ours.dtype}"
            advice = f"; other classes? {NEW_HEAD} behind the path starts the last layer afresh"
            faults.append(f"has {_listed(odd)} of other {what} ({odd[0]}: {differ}){advice if head else ''}")
        if faults:
            strange = f", and has {_listed(unexpected)} that the network lacks" if unexpected else ""
            raise ValueError(f"{self.path} does not fit the network: it {' and '.join(faults)}{strange}")
        notes = [f"weights: {self.path}, {len(found)} tensors"]
        notes += [f"  names begin with {prefix!r} there"] if prefix else []
        notes += [f"  not taken, unknown to the network: {_listed(unexpected)}"] if unexpected else []
        notes += [f"  started afresh: {_listed(head)}"] if self.new_head and head else []
        parameters = frozenset(name for name, _ in network.named_parameters())
        return FittedWeights(found, parameters, tuple(notes), self.preprocessing)

    @staticmethod
    def _head(odd: Sequence[str], found: Mapping[str, Stored], own: Mapping[str, Tensor]) -> list[str]:
        """Tensors that differ in the number of classes alone: in the first dimension, all by the same."""
        pairs = {(found[name].shape[:1], tuple(own[name].shape[:1])) for name in odd}
        alike = all(own[name].dim() and _alike(found[name], own[name], 1) for name in odd)
        return list(odd) if len(pairs) == 1 and alike else []


def _prefixes(names: Iterable[str]) -> list[str]:
    """What may stand before the names of all tensors: nothing, or wrappers that stand before some."""
    found = {"": None}
    for name in names:
        end = 0
        while match := _WRAPPER.match(name, end):
            end = match.end()
            found[name[:end]] = None
    return list(found)


def _last_layer(parameters: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters beside the last weight: networks have their layers in the order in which they
    run."""
    weights = [name for name, parameter in parameters.items() if parameter.dim() > 1]
    layer = weights[-1].rpartition(".")[0] if weights else None
    return [name for name in parameters if name.rpartition(".")[0] == layer]


def _alike(stored: Stored, tensor: Tensor, first: int = 0) -> bool:
    """Whether ``tensor`` can have these values, which are not integers where it has real numbers, and the
    shape of both is the same from dimension ``first`` on. Counters may have been cast with the weights."""
    kinds = stored.dtype.is_floating_point or not tensor.is_floating_point()
    return kinds and stored.shape[first:] == tuple(tensor.shape[first:]) and len(stored.shape) == tensor.dim()


def _listed(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
