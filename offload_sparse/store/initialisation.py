"""A model's own initialisation, replayed tensor by tensor, so that no rank ever holds the whole model.

    record   factory() runs on the meta device; what creates or writes a tensor is noted, in program order
    plan     draws that are overwritten later go to a scratch tensor, so that the random stream moves on;
             all else runs as soon as the last draw before it, so that tensors become final one by one
    replay   one generator, one pass over the plan: the bits of ``torch.manual_seed(seed); factory()``

Tensors are told apart by their storage, so views, ``.data``, ``detach`` and Parameters are the same tensor.
What is replayed is the very operation that PyTorch would have run, on the same values and with the same
generator state; equality of the bits needs no knowledge of what an initialiser means. Whatever the recorder
does not understand marks the recording as not replayable, with a reason, and the caller builds the model once
instead.
"""

from __future__ import annotations

import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from offload_sparse.store.recorder import Operation, PythonCalls, Recorder, View, on_meta, view_of


@dataclass
class _Chunk:
    """Operations that run together, then storages that nobody reads any more, then tensors that are final."""

    operations: list[Operation]
    scratch: bool = False
    release: set[int] = field(default_factory=set)
    final: list[tuple[str, View]] = field(default_factory=list)


@dataclass
class Recording:
    """What ``record`` saw of a model's construction.

    Attributes:
        model: the model, all parameters and buffers on the meta device.
        replayable: whether ``replay`` gives the values that the construction gives.
        reason: one line that says why not; empty when it is.
    """

    model: nn.Module
    reason: str = ""
    _chunks: list[_Chunk] = field(default_factory=list, repr=False)
    _constants: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def replayable(self) -> bool:
        return not self.reason

    def replay(self, seed: int, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer as ``torch.manual_seed(seed); factory()`` on the CPU would hold it.

        Yields (qualified name, CPU tensor) for all names of ``named_parameters()`` and ``named_buffers()``,
        integer buffers included, each once, in the order in which values become final (the same in every
        process). Values are drawn in the model's own dtype; floating ones are then converted to ``dtype``.
        What a construction leaves undefined (``torch.empty``) is 0. The caller's random state is neither used
        nor changed.

        At any time the replay holds one tensor of the model and a scratch tensor, beside the one that the
        caller got last (``nn.init.trunc_normal_`` adds its own temporaries; tensors computed from one another
        are held together).

        Raises:
            ValueError: the recording is not replayable.
        """
        if not self.replayable:
            raise ValueError(f"this initialisation cannot be replayed ({self.reason}); build the model once")
        return self._values(seed, dtype)

    def _values(self, seed: int, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        held: dict[int, Tensor] = {}
        for name, constant in self._constants.items():
            yield name, _converted(constant.clone(), dtype)
        for chunk in self._chunks:
            with torch.no_grad():
                for operation in chunk.operations:
                    _run(operation, {} if chunk.scratch else held, generator)
            for storage in chunk.release:
                held.pop(storage, None)
            for position, (name, view) in enumerate(chunk.final):
                shared = any(other.storage == view.storage for _, other in chunk.final[position + 1 :])
                # No local name may hold the tensor while the caller has it.
                yield name, _converted(_handed_over(view, held, keep=shared), dtype)


def record(factory: Callable[[], nn.Module]) -> Recording:
    """Build a model on the meta device and note how its values come about.

    A model that cannot be built on the meta device (its construction asks for values) is built once for real
    and then moved there; such a recording is not replayable. PyTorch's random state is left as it was.

    Args:
        factory: builds the model with the default device; called once (twice if it fails on the meta device).
    """
    recorder = Recorder()
    with torch.random.fork_rng(devices=[]):
        before = _random_states()
        try:
            with torch.device("meta"), recorder, PythonCalls(recorder), recorder.opaque_initialisers():
                model = factory()
        except Exception as error:  # tensors without values may fail anywhere; a real fault fails again below
            message = (str(error) or type(error).__name__).splitlines()[0]
            return Recording(factory().to("meta"), f"it does not build on the meta device: {message}")
        if _random_states() != before:
            recorder.reject("it draws random numbers outside PyTorch's default device and generator")
    return _recording(model, recorder)


def _random_states() -> bytes:
    return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()))


def _recording(model: nn.Module, recorder: Recorder) -> Recording:
    """Check that the values of all parameters and buffers are known, and plan their replay."""
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        if on_meta(tensor) and (trouble := recorder.trouble(tensor)):
            recorder.reject(f"{name}: {trouble}")
    constants = {name: tensor.detach().clone() for name, tensor in named if not on_meta(tensor)}
    views = [(name, view_of(tensor)) for name, tensor in named if on_meta(tensor)]
    if constants:
        model = model.to("meta")
    if recorder.reason:
        return Recording(model, recorder.reason)
    return Recording(model, "", _plan(recorder.operations, views), constants)


def _plan(operations: Sequence[Operation], named: Sequence[tuple[str, View]]) -> list[_Chunk]:
    """Order the operations so that random ones keep their order and each tensor is final as early as
    possible.

    Tensors that are computed from one another form a family, which shares no storage with any other, so that
    its deterministic operations may run as soon as the random ones before them have.
    """
    wanted: dict[int, list[tuple[str, View]]] = defaultdict(list)
    for name, view in named:
        wanted[view.storage].append((name, view))
    live = _live(operations, set(wanted))
    family_of = _families(live)
    families: dict[int, list[Operation]] = defaultdict(list)
    for operation in live:
        families[family_of[operation.target.storage]].append(operation)
    chunk_at: dict[Operation, _Chunk] = {}
    for family in families.values():
        chunk_at |= _family_chunks(family, wanted)
    chunks = [
        chunk_at[operation] if operation in chunk_at else _Chunk([operation], scratch=True)
        for operation in operations
        if operation in chunk_at or (operation.random and operation not in live)
    ]
    undefined = [(name, view) for name, view in named if view.storage not in family_of]
    return [*chunks, _Chunk([], final=undefined)]


def _live(operations: Sequence[Operation], wanted: set[int]) -> dict[Operation, None]:
    """The operations that decide a final value, in program order; others are overwritten or never read."""
    live: list[Operation] = []
    for operation in reversed(operations):
        if operation.target.storage in wanted:
            live.append(operation)
            if operation.overwrites:
                wanted.discard(operation.target.storage)
            wanted.update(operation.reads)
    return dict.fromkeys(reversed(live))


def _families(operations: Iterable[Operation]) -> dict[int, int]:
    """Storage → representative of all storages connected with it through operations (union-find)."""
    parent: dict[int, int] = {}

    def find(storage: int) -> int:
        while parent.setdefault(storage, storage) != storage:
            storage = parent[storage]
        return storage

    for operation in operations:
        for storage in operation.reads:
            parent[find(storage)] = find(operation.target.storage)
        find(operation.target.storage)
    return {storage: find(storage) for storage in tuple(parent)}


def _family_chunks(
    family: Sequence[Operation], wanted: Mapping[int, list[tuple[str, View]]]
) -> dict[Operation, _Chunk]:
    """A family's chunks by the operation at whose place in the program they run: one per random operation.

    What follows the last random operation runs at once behind it; a family without any runs at its first
    operation.
    """
    places = [operation for operation in family if operation.random] or [family[0]]
    chunks = {place: _Chunk([]) for place in places}
    remaining = list(places)
    for operation in family:
        chunks[remaining[0]].operations.append(operation)
        if operation is remaining[0] and len(remaining) > 1:
            del remaining[0]
    storages = dict.fromkeys(s for operation in family for s in (*operation.reads, operation.target.storage))
    last = chunks[places[-1]]
    last.release = {storage for storage in storages if storage not in wanted}
    last.final = [entry for storage in storages if storage in wanted for entry in wanted[storage]]
    return chunks


def _run(operation: Operation, held: dict[int, Tensor], generator: torch.Generator) -> None:
    """Run one operation on the tensors in ``held``; new ones are added to it."""
    args, kwargs = tree_map_only(View, lambda view: _tensor(view, held), (operation.args, operation.kwargs))
    if operation.random:
        kwargs = kwargs | {"generator": generator}
    result = operation.call(*args, **kwargs)
    if operation.creates:
        assert result.stride() == operation.target.stride, f"{operation.call} lays its result out differently"
        held[operation.target.storage] = result


def _tensor(view: View, held: dict[int, Tensor]) -> Tensor:
    """The tensor at ``view``; a storage that nothing has defined yet is 0."""
    if view.storage not in held:
        held[view.storage] = torch.zeros(view.elements, dtype=view.dtype, device="cpu")
    return held[view.storage].as_strided(view.size, view.stride, view.offset)


def _handed_over(view: View, held: dict[int, Tensor], keep: bool) -> Tensor:
    """The tensor at ``view`` for the caller: a copy to ``keep`` the storage, else taken out of ``held``."""
    tensor = _tensor(view, held)
    if keep:
        return tensor.clone()
    del held[view.storage]
    return tensor


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
