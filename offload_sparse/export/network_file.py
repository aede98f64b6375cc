"""The final network on disk: written, and read back.

model/
  weights.safetensors   the narrow tensors
  structure.json        how to build the module, the shape of every tensor, the kept channels of every group,
                        the positions of the operands in every sum whose operands hold different channels
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map_only

from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.model_call import Inputs
from offload_sparse.channels.require import Explained
from offload_sparse.channels.stream_add import StreamAdd, additions, expose_additions
from offload_sparse.channels.subnet import build_on_meta, fit_attributes, require_places, tensor_setter
from offload_sparse.channels.views import Fit, fit_views, fitted_views
from offload_sparse.export import json_values
from offload_sparse.export.description import Preprocessing, file_digest
from offload_sparse.export.json_values import Count
from offload_sparse.export.read_back import compare
from offload_sparse.store.files import make_folder, write_file
from offload_sparse.store.lock import lock_folder
from offload_sparse.store.tensor_file import blocks_of

FORMAT = 1
WEIGHTS_FILE = "weights.safetensors"
STRUCTURE_FILE = "structure.json"

_MAX_ELEMENTS = 1 << 40  # of one tensor
_MAX_NAME = 200
_MAX_ARGUMENTS = 1 << 22  # the numbers among the arguments of a model add up to less

_Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Kept:
    """Channels of a layer, and which of them are kept."""

    size: Count
    kept: tuple[Count, ...]

    def __post_init__(self) -> None:
        if max(self.kept, default=-1) >= self.size:
            raise ValueError("a group keeps a channel that it does not have")


@dataclass(frozen=True)
class Addition:
    """Width of a sum, and the positions in it of the channels of each operand."""

    width: Count
    left: tuple[Count, ...]
    right: tuple[Count, ...]

    def __post_init__(self) -> None:
        ordered = all(list(side) == sorted(set(side)) for side in (self.left, self.right))
        covered = {*self.left, *self.right}
        if not ordered or len(covered) != self.width or max(covered, default=-1) != self.width - 1:
            raise ValueError("the operands of an addition do not cover it in order")


@dataclass(frozen=True)
class Structure:
    """The contents of ``structure.json``.

    Attributes:
        model: ``name`` and ``arguments`` of the full network; anything else when readers bring the model.
        groups: the kept channels of every group.
        tensors: shape of every parameter, buffer and other tensor.
        views: by module and number of a call, sizes that are written in its code with what each becomes,
            nothing for a size that stays; negative where places are counted from the end; see
            ``channels.views``.
        sparse: tensors that earlier versions stored without their zeros, which this one does not read.
        weights_digest: of the other file; an export that was written by hand may leave it out, and then
            needs no digest of its own either."""

    format: Count
    model: dict[str, Any]
    preprocessing: Preprocessing
    groups: dict[str, Kept]
    tensors: dict[str, tuple[Count, ...]]
    additions: dict[str, Addition] = field(default_factory=dict)
    views: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()
    weights_digest: str = ""

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"it is of format {self.format}, this version reads {FORMAT}")
        if self.sparse:
            raise ValueError("its tensors are stored without their zeros, as by earlier versions")
        if any(prod(shape) > _MAX_ELEMENTS for shape in self.tensors.values()):
            raise ValueError(f"a tensor has more than {_MAX_ELEMENTS:,} elements")
        if any(
            len(fit) not in (0, 2) for calls in self.views.values() for fits in calls.values() for fit in fits
        ):
            raise ValueError("a size of views is not a pair of what is written and what it becomes")


@dataclass(frozen=True)
class FinalNetwork:
    """A network that training ends with.

    Attributes:
        module: an ordinary module with memory of its own, in evaluation mode.
        mask: bool[C], the atoms of ``channel_map``, that of the full network, that it keeps.
        factory: builds the full network, for reading back what is written; None if that is not known.
        members: by their share of the budget, the smaller networks of a family that are parts of this one."""

    module: nn.Module
    mask: Tensor
    channel_map: ChannelMap
    factory: _Build | None = None
    example_inputs: Inputs = ()
    members: Mapping[float, FinalNetwork] = field(default_factory=dict)

    def kept_channels(self) -> dict[str, Kept]:
        """Per group the channels of the layer that it is named after, and which of them are kept."""
        kept_or_always = torch.cat([self.mask, torch.ones(1, dtype=torch.bool)])  # -1 means always
        kept = {}
        for group in self.channel_map.groups:
            channels = self.channel_map.channels_of(group)
            positions = kept_or_always[channels].nonzero().flatten().tolist()
            kept[group.name] = Kept(Count(len(channels)), tuple(positions))
        return kept

    def save(
        self,
        path: str | os.PathLike[str],
        model: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
    ) -> float:
        """Write ``weights.safetensors`` and ``structure.json``, each complete or not at all, then read them
        in a fresh process and compare the outputs of both networks. Ranks that save to one folder do so in
        turns. Returns the largest relative difference between the outputs; 0 if nothing is known to call it
        with. Raises ValueError: what is read back is not this network (and is made unreadable), or
        ``preprocessing`` has other fields.

        Args:
            model: how the full network is built: ``name`` and ``arguments`` of
                ``workloads.models.build_model``; None when ``load_pruned`` will be given the model.
            preprocessing: fields of ``export.description.Preprocessing``, for the reader."""
        # Safetensors refuses views of one storage, and a module may have been extracted as such.
        own = tensors_of(self.module)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in own.items()}
        folder = Path(path)
        structure = Structure(
            Count(FORMAT),
            json_values.json_value(model or {}),
            json_values.convert(json_values.json_value(preprocessing or {}), Preprocessing),
            self.kept_channels(),
            {name: _counts(tensor.shape) for name, tensor in tensors.items()},
            {name: _held(add) for name, add in additions(self.module) if add.width},
            {name: _fitted(calls) for name, calls in fitted_views(self.module)},
        )
        with lock_folder(folder, wait=True):
            _write(folder, structure, tensors)
            return self._read_back(folder, structure.preprocessing.shape, "name" in structure.model)

    def _read_back(self, folder: Path, shape: tuple[int, ...], by_name: bool) -> float:
        dtype = next((p.dtype for p in self.module.parameters()), torch.float32)
        batch = (torch.empty(3, *shape, dtype=dtype, device="meta"),)
        inputs: Inputs = self.example_inputs or (batch if shape else ())
        inputs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
        read = functools.partial(load_pruned, folder, None if by_name else self.factory)
        try:
            if not (by_name or self.factory):
                _read(folder)
            elif inputs:
                return compare(read, self.module, [inputs], folder)
            else:
                read()
            return 0.0
        except ValueError:
            (folder / STRUCTURE_FILE).unlink(missing_ok=True)
            raise


def copy_network(source: Path, target: Path) -> None:
    """Write an exported network once more. Raises ValueError: a file is missing or damaged, or the files do
    not belong together."""
    _write(target, *_read(source))


def read_structure(folder: Path) -> Structure:
    """The checked contents of ``structure.json``. Raises ValueError: there is none, or it is damaged."""
    try:
        return json_values.read(folder / STRUCTURE_FILE, Structure, sealed_by="weights_digest")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {STRUCTURE_FILE}; give the folder `model/` of a finished run"
        ) from None


def load_pruned(path: str | os.PathLike[str], model: _Build | None = None) -> nn.Module:
    """The narrow network of a folder with ``weights.safetensors`` and ``structure.json``, in evaluation mode,
    on the CPU, with a value for every tensor. No code of the files is run. ``model`` builds the full network,
    where the package cannot build it by name. Raises ValueError: a file is missing or damaged, or the files
    do not belong together."""
    folder = Path(path)
    structure, tensors = _read(folder)
    module = build_on_meta(model) if model is not None else _build_named(structure)
    with Explained(f"{folder}: ", "; was it exported from another model?", (ValueError,)):
        _restore_additions(module, structure.additions)
        _restore_views(module, structure.views)
        own, set_tensor = tensors_of(module), tensor_setter(module)
        for name in [*own, *tensors]:  # a network that lacks one comes first
            _place(module, set_tensor, name, own.get(name), tensors.get(name))
    fit_attributes(module)
    with Explained(f"{folder}: "):
        require_places(module)
    return module.eval()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All that a network's values are in: parameters, buffers, those that ``state_dict`` leaves out too, and
    tensors that are plain attributes of a module. The positions of exposed additions are not among them."""
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        own = {} if isinstance(part, StreamAdd) else {**part._parameters, **part._buffers, **vars(part)}
        prefix = f"{path}." if path else ""
        found |= {f"{prefix}{name}": value for name, value in own.items() if isinstance(value, Tensor)}
    return found


def _place(
    module: nn.Module,
    set_tensor: Callable[[str, Tensor], None],
    name: str,
    own: Tensor | None,
    value: Tensor | None,
) -> None:
    """Give a tensor its value; one that the constructor leaves out, and training has made, too."""
    path, _, leaf = name.rpartition(".")
    if value is None:
        raise ValueError(f"the network has {name!r}, the file does not")
    if own is None:
        owner = dict(module.named_modules()).get(path)
        if owner is None or leaf in owner._parameters or getattr(owner, leaf, None) is not None:
            raise ValueError(f"the network has no place for {name!r}")
        setattr(owner, leaf, value)
        return
    fits = own.dim() == value.dim() and own.is_floating_point() == value.is_floating_point()
    if isinstance(own, nn.Parameter):
        fits = fits and all(n <= full for n, full in zip(value.shape, own.shape, strict=True))
    if not fits or (own.dtype != value.dtype and not own.is_floating_point()):
        raise ValueError(f"{name!r} is {_form(value)}, in the network {_form(own)}")
    owner = module.get_submodule(path)
    set_tensor(name, value) if leaf not in vars(owner) else setattr(owner, leaf, value)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _held(add: StreamAdd) -> Addition:
    left, right = add.left_index.tolist(), add.right_index.tolist()
    return Addition(Count(add.width), _counts(left), _counts(right))


def _counts(numbers: Iterable[int]) -> tuple[Count, ...]:
    return tuple(Count(number) for number in numbers)


def _restore_additions(module: nn.Module, held: dict[str, Addition]) -> None:
    expose_additions(module, held)
    for name, add in additions(module):
        sides = torch.zeros(2, held[name].width, dtype=torch.bool)
        sides[0, list(held[name].left)] = True
        sides[1, list(held[name].right)] = True
        add.hold(sides[0], sides[1], torch.device("cpu"))


def _fitted(calls: dict[int, tuple[Fit, ...]]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {str(call): tuple(tuple(map(int, fit or ())) for fit in fits) for call, fits in calls.items()}


def _restore_views(module: nn.Module, views: dict[str, dict[str, tuple[tuple[int, ...], ...]]]) -> None:
    missing = sorted(views.keys() - dict(module.named_modules()).keys())
    if missing:
        raise ValueError(f"the network has no module {json_values.shown(missing[0])}")
    for name, calls in views.items():
        fits = {int(call): tuple((f[0], f[1]) if f else None for f in sizes) for call, sizes in calls.items()}
        fit_views(module, {name: fits})


def _write(folder: Path, structure: Structure, tensors: dict[str, Tensor]) -> None:
    make_folder(folder)
    write_file(folder / WEIGHTS_FILE, blocks_of(tensors))
    body = asdict(replace(structure, weights_digest=file_digest(folder / WEIGHTS_FILE)))
    write_file(folder / STRUCTURE_FILE, json_values.sealed(body))


def _read(folder: Path) -> tuple[Structure, dict[str, Tensor]]:
    """The structure, and every tensor as it is declared there."""
    from safetensors.torch import load_file

    structure = read_structure(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder `model/` of a finished run")
    with Explained(f"{path} is damaged: ", "; export it again"):
        if structure.weights_digest not in ("", file_digest(path)):
            raise ValueError("its digest does not fit")
        tensors = load_file(path)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != structure.tensors:
            odd = next(n for n in (*found, *structure.tensors) if found.get(n) != structure.tensors.get(n))
            raise ValueError(f"it disagrees with {STRUCTURE_FILE} about {json_values.shown(odd)}")
    return structure, tensors


@dataclass(frozen=True)
class _Named:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def _build_named(structure: Structure) -> nn.Module:
    """The full network on meta, by the name in the file; a constructor that gets out of hand is stopped."""
    from offload_sparse.workloads.models import build_model

    if "name" not in structure.model:
        raise ValueError(
            f"{STRUCTURE_FILE} names no model; pass `model`, a function that builds the full network"
        )
    with Explained(f"the model in {STRUCTURE_FILE} cannot be built: "):
        named = json_values.convert(structure.model, _Named)
        if len(named.name) > _MAX_NAME or _total(named.arguments) > _MAX_ARGUMENTS:
            raise ValueError("its name or its arguments are too large")
        with _bounded(modules=1000 + 50 * len(structure.tensors)):
            return build_on_meta(lambda: build_model(named.name, **named.arguments), whole=False)


def _total(value: Any) -> float:
    """The sum of the absolute values of all numbers in a JSON value."""
    if isinstance(value, dict | list):
        return sum(_total(entry) for entry in (value.values() if isinstance(value, dict) else value))
    return abs(value) if isinstance(value, int | float) else 0.0


@contextmanager
def _bounded(modules: int) -> Iterator[None]:
    """Inside, no more than so many modules can be put into others."""
    left = modules

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it has more than {modules:,} layers, far more than tensors in the file")

    handle = torch_module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
