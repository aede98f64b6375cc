"""Channel maps written by hand, for networks that discovery cannot follow.

    builder = MapBuilder(model)
    hidden = builder.group("fc1", 64)                    # 64 atoms
    builder.rows("fc1", hidden)                          # fc1 makes them
    builder.columns("fc2", hidden)                       # fc2 reads them
    session = SparseOffload(model, inputs, optimizer, setup=Setup(channel_map=builder.build()))

Every map is checked by slice = mask before anything trains, whoever wrote it.

In transformers the embedding stays dense, since norms mix all of its channels; with grouped queries a
key-value head and its queries are one atom.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offload_sparse.channels.channel_map import Axis, ChannelMap, Group
from offload_sparse.channels.subnet import output_dimension


class MapBuilder:
    """Collects groups and axes of ``model`` (on any device, not changed); what no axis names is always kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = dict(model.named_modules())
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._shapes = {name: tuple(t.shape) for name, t in tensors if t.is_floating_point()}
        self._axes: dict[str, list[Axis]] = {
            name: [None] * len(shape) for name, shape in self._shapes.items()
        }
        self._groups: list[Group] = []

    def group(self, name: str, size: int) -> Tensor:
        """A new group of ``size`` atoms, best named after the layer that makes them. Returns int64[size], the
        atoms. Axes are made of them: ``repeat_interleave`` for an atom that stands at several neighbouring
        positions, ``torch.cat`` for several widths in a row, -1 for a position that is always kept."""
        start = self._groups[-1].stop if self._groups else 0
        self._groups.append(Group(name, start, size))
        return torch.arange(start, start + size)

    def axis(self, tensor: str, dim: int, atoms: Tensor) -> None:
        """Dimension ``dim`` of the parameter or buffer ``tensor`` holds ``atoms``, one per position. Raises
        ValueError: there is no such tensor or dimension."""
        self._size(tensor, dim)
        self._axes[tensor][dim] = atoms

    def rows(self, layer: str, atoms: Tensor) -> None:
        """The outputs of a linear layer or convolution, or the channels of a batch norm, are ``atoms``.
        Raises ValueError: the layer has no weight."""
        self.axis(f"{layer}.weight", output_dimension(self._layers.get(layer)), atoms)
        for leaf in ("bias", "running_mean", "running_var"):
            if f"{layer}.{leaf}" in self._axes:
                self.axis(f"{layer}.{leaf}", 0, atoms)

    def columns(self, layer: str, atoms: Tensor) -> None:
        """The inputs of a linear layer or convolution are ``atoms``. Raises ValueError: the layer has no
        weight of two dimensions."""
        self.axis(f"{layer}.weight", 1 - output_dimension(self._layers.get(layer)), atoms)

    def width(self, producers: tuple[str, ...], consumer: str) -> Tensor:
        """A group for a hidden width: the layers that make it, tied channel by channel, and its reader.

        Two producers are a gated unit, such as gate and up projection of SwiGLU."""
        atoms = self.group(producers[0], self._outputs(producers[0]))
        for producer in producers:
            self.rows(producer, atoms)
        self.columns(consumer, atoms)
        return atoms

    def heads(self, query: str, key: str, value: str, output: str, head_dim: int) -> Tensor:
        """A group for attention heads by their four projections, with ``head_dim`` channels each: one atom
        per key-value head, with all query heads that read it. Raises ValueError: the widths are no multiples
        of a head, or queries cannot be spread over key heads."""
        queries, keys = self._outputs(query), self._outputs(key)
        if keys % head_dim or queries % keys:
            raise ValueError(
                f"{query} has {queries} channels and {key} {keys}, which are no heads of {head_dim}; "
                "correct head_dim"
            )
        atoms = self.group(key, keys // head_dim)
        self.rows(key, atoms.repeat_interleave(head_dim))
        self.rows(value, atoms.repeat_interleave(head_dim))
        self.rows(query, atoms.repeat_interleave(queries // keys * head_dim))
        self.columns(output, atoms.repeat_interleave(queries // keys * head_dim))
        return atoms

    def build(self) -> ChannelMap:
        """The map. Raises ValueError: there is no group, or an axis has another length than its dimension."""
        if not self._groups:
            raise ValueError("the map has no group; add one with group(), width() or heads()")
        axes = {name: tuple(of_tensor) for name, of_tensor in self._axes.items()}
        return ChannelMap(tuple(self._groups), self._shapes, axes)

    def _outputs(self, layer: str) -> int:
        return self._size(f"{layer}.weight", output_dimension(self._layers.get(layer)))

    def _size(self, tensor: str, dim: int) -> int:
        if tensor not in self._shapes:
            raise ValueError(f"the model has no tensor {tensor!r}; give the name of a parameter or buffer")
        shape = self._shapes[tensor]
        if not 0 <= dim < len(shape):
            raise ValueError(f"{tensor} has no dimension {dim}; its shape is {list(shape)}")
        return shape[dim]
