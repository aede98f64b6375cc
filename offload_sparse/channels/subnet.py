"""The narrow network of a selection: an ordinary dense ``nn.Module``.

``Subnet`` keeps one skeleton (the model's modules without weights) and binds it to new flat buffers in every
round: parameters are views of one buffer, BatchNorm statistics views of another.
Nothing is built anew, so nothing leaks however many rounds there are. ``narrow_module`` makes an independent
copy instead.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from offload_sparse.channels.attention import fit_attention
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.model_call import Inputs, move_inputs, seeded
from offload_sparse.channels.selection import Selection
from offload_sparse.channels.stream_add import expose_additions, set_additions

Result = TypeVar("Result")
_Place = tuple[Any, Any]
"""A mapping or a list, and a key of it."""


class Subnet:
    """A skeleton of the full model whose tensors can be bound to flat buffers, again and again.

    Args:
        model: the full model, on any device (the meta device serves), with the additions of its channel map
            exposed; it is not changed.
        integer_buffers: real values of the buffers that are not sliced, by qualified name, integer ones among
            them; not copied, so that subnets on the same device share them."""

    def __init__(
        self, model: nn.Module, device: torch.device, integer_buffers: Mapping[str, Tensor] | None = None
    ) -> None:
        self.module = meta_copy(model)
        values, buffers = integer_buffers or {}, dict(self.module.named_buffers())
        self.parameter_names = tuple(name for name, _ in self.module.named_parameters())
        self.buffer_names = tuple(n for n, b in buffers.items() if b.is_floating_point() and n not in values)
        self.device = device
        self.parameters: list[nn.Parameter] = []  # as bound, in the order of their names
        self._fits = _fits(self.module)
        self._places = _places(self.module)
        self._trainable = {name: p.requires_grad for name, p in self.module.named_parameters()}
        for name in buffers.keys() - set(self.buffer_names):
            buffer = buffers[name]
            value = values.get(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
            _put(value.to(device), self._places[name])
        for layer in self.module.modules():
            if isinstance(layer, nn.RNNBase):
                vars(layer)["flatten_parameters"] = _stay

    def bind(self, selection: Selection, weights: Tensor, buffers: Tensor, step: int = 1) -> None:
        """Make the skeleton the network of ``selection``.

        Args:
            weights: flat parameters in the order of ``parameter_names``; parameters become views of it, each
                with a version of its own: a forward may write into one that it has not read yet.
            buffers: flat floating-point buffers in the order of ``buffer_names``, likewise.
            step: that of the layouts of both."""
        views = selection.layout(self.parameter_names, step).views(weights)
        self.parameters = []
        for name, view in zip(self.parameter_names, views, strict=True):
            self.parameters.append(nn.Parameter(view.data, self._trainable[name]))
            _put(self.parameters[-1], self._places[name])
        views = selection.layout(self.buffer_names, step).views(buffers)
        for name, view in zip(self.buffer_names, views, strict=True):
            _put(view.data, self._places[name])
        for fit in self._fits:
            fit()
        set_additions(self.module, selection, self.device)

    def release(self) -> None:
        """Drop every view, so that the buffers can be freed."""
        self.parameters = []
        for name in (*self.parameter_names, *self.buffer_names):
            empty = torch.empty(0, device="meta")
            _put(nn.Parameter(empty, False) if name in self._trainable else empty, self._places[name])


def _stay() -> None:
    """In place of what moves the weights of a recurrent layer into memory of their own, on a GPU."""


def build_on_meta(build: Callable[[], nn.Module], whole: bool = True) -> nn.Module:
    """The network that ``build`` makes: parameters and buffers on the meta device, all else as it is made.

    Whoever trains, reads or exports a network builds it here, with the same random numbers (seed 0; the
    caller's random state stays as it is), so that what a constructor keeps outside of its parameters and
    buffers is the same for all of them. Three ways are tried:

        all on meta          for most networks; costs nothing
        parameters on meta   where a plain tensor would be left without values, or the value of one is read
        all for real         where the value of a parameter is read; not where ``whole`` is False
    """
    ways = (_all_on_meta, _parameters_on_meta, lambda build: build())[: 3 if whole else 2]
    for number, way in enumerate(ways):
        try:
            with seeded(0):
                model = way(build)
        except Exception:  # a tensor without values may fail anywhere; a real fault fails again for real
            if number + 1 == len(ways):
                raise
            continue
        if not any(value.is_meta for value in other_tensors(model)):
            break
    return meta_copy(model)


def other_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that the modules of ``model`` hold as plain attributes, alone or in lists, tuples and mappings.
    A parameter or buffer that is held so, too, is none of them where it can be replaced."""
    own, registered = {*model.parameters(), *model.buffers()}, ("_parameters", "_buffers", "_modules")
    for module in model.modules():
        rest = {name: value for name, value in vars(module).items() if name not in registered}
        yield from (tensor for held, _, tensor in _held(rest) if held is None or tensor not in own)


def require_places(model: nn.Module) -> None:
    """Raises ValueError: a module keeps a tensor that has no values, and cannot be given any."""
    left = next((value for value in other_tensors(model) if value.is_meta), None)
    if left is not None:
        raise ValueError(
            f"{type(model).__name__} keeps a tensor of shape {tuple(left.shape)} without values; let its "
            "constructor register it as a buffer, or keep a parameter in a list, where a tuple does"
        )


def _all_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _parameters_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    moved = WeakTensorKeyDictionary()  # what is registered twice stays one parameter

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        del module, name
        if parameter is None or parameter.is_meta:
            return parameter
        if parameter not in moved:
            empty = torch.empty_like(parameter, device="meta")
            moved[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return moved[parameter]

    handle = register_module_parameter_registration_hook(move)
    try:
        return build()
    finally:
        handle.remove()


def meta_copy(model: nn.Module, other: bool = False) -> nn.Module:
    """A copy of ``model`` on the meta device, made without copying any weights; with ``other`` the tensors
    that modules hold as plain attributes move, too, for a forward pass on meta."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for tensor in other_tensors(model):
        if other or not tensor.is_leaf:  # computed from parameters; deepcopy refuses such
            empty = torch.empty_like(tensor, device="meta") if other else tensor.detach().clone()
            memo.setdefault(id(tensor), empty)
    return copy.deepcopy(model, memo)


def hollow_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters are zeros that take no memory as long as nobody writes to them, to
    run models that look at values. Buffers keep their values, as far as these are known.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        zeros = torch.from_numpy(np.zeros(parameter.nbytes, np.uint8))
        zeros = zeros.view(parameter.dtype).view(parameter.shape)
        memo[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
    for buffer in model.buffers():
        known = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().cpu().clone()
        memo[id(buffer)] = known
    for tensor in other_tensors(model):
        if not tensor.is_leaf:  # as in ``meta_copy``
            memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(model, memo)


def on_copy(model: nn.Module, inputs: Inputs, run: Callable[[nn.Module, Inputs], Result]) -> Result:
    """What ``run`` makes of a copy of ``model`` and of the inputs on meta; of a hollow copy if that fails, as
    it does where a model looks at values."""
    try:
        return run(meta_copy(model, other=True), move_inputs(inputs, "meta"))
    except Exception:  # a meta tensor has no values; a real fault fails again
        return run(hollow_copy(model), move_inputs(inputs, "cpu"))


def narrow_module(model: nn.Module, channel_map: ChannelMap, mask: Tensor) -> nn.Module:
    """An independent narrow copy of ``model`` (real or on meta) with copies of the kept entries."""
    selection = Selection(channel_map, mask)
    narrow = expose_additions(copy.deepcopy(model), channel_map.additions)
    set_tensor = tensor_setter(narrow)
    for name, tensor in [*narrow.named_parameters(), *narrow.named_buffers()]:
        if name in selection.shapes:
            set_tensor(name, selection.take(name, tensor.detach()))
    fit_attributes(narrow)
    device = next((p.device for p in narrow.parameters()), torch.device("cpu"))
    set_additions(narrow, selection, device)
    return narrow


def tensor_setter(module: nn.Module) -> Callable[[str, Tensor], None]:
    """What replaces a parameter or a buffer of ``module``, wherever it is held, given its name and value. A
    plain tensor in place of a parameter becomes one, trained if that was.

    Looks through the modules once, for however many tensors."""
    places = _places(module)

    def set_tensor(name: str, value: Tensor) -> None:
        held, key = places[name][0]
        if isinstance(held[key], nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, held[key].requires_grad)
        _put(value, places[name])

    return set_tensor


def _put(value: Tensor, places: list[_Place]) -> None:
    for held, key in places:
        held[key] = value


def _places(module: nn.Module) -> dict[str, list[_Place]]:
    """Under each of its names, where a parameter or buffer is held: by every layer that shares it, and in
    plain attributes, such as the list of the parameters of an LSTM."""
    named: dict[str, Tensor] = {}
    places: dict[Tensor, list[_Place]] = {}
    for path, part in module.named_modules():
        own = {**part._parameters, **part._buffers}
        named |= {f"{path}.{leaf}".lstrip("."): tensor for leaf, tensor in own.items() if tensor is not None}
        for held, key, tensor in _held(vars(part)):
            if held is not None:
                places.setdefault(tensor, []).append((held, key))
    return {name: places[tensor] for name, tensor in named.items()}


def _held(container: Any) -> Iterator[tuple[Any, Any, Tensor]]:
    """The tensors in a mapping or a list and in those within, with their places; None for one that has none,
    in a tuple, say."""
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, Tensor):
            yield container, key, value
        elif isinstance(value, dict | list):
            yield from _held(value)
        elif isinstance(value, Collection):
            yield from ((None, None, leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def fit_attributes(module: nn.Module) -> None:
    """Make the size attributes of every layer agree with the shapes of its tensors.

    Layers read these numbers in ``forward`` (the groups of a depthwise convolution) or show them in ``repr``.
    """
    for fit in _fits(module):
        fit()


def _fits(module: nn.Module) -> list[Callable[[], None]]:
    """What makes the attributes of each layer of ``module`` agree with its tensors."""
    kinds: list[tuple[type[nn.Module], Callable[[Any], None]]] = [
        (_ConvNd, _fit_convolution),
        (nn.Linear, _fit_linear),
        (_NormBase, _fit_norm),
        (nn.GroupNorm, _fit_group_norm),
        (nn.PReLU, _fit_prelu),
        (nn.MultiheadAttention, fit_attention),
        (nn.RNNBase, _fit_recurrent),
    ]
    found = ((layer, [fit for kind, fit in kinds if isinstance(layer, kind)]) for layer in module.modules())
    return [partial(fits[0], layer) for layer, fits in found if fits]


def output_dimension(layer: nn.Module | None) -> int:
    """The dimension of a layer's weight that its outputs lie along; along the other of the first two lie its
    inputs."""
    transposed = isinstance(layer, _ConvTransposeNd) and layer.groups == 1
    table = isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
    return int(transposed or table or type(layer).__name__ == "Conv1D")  # a linear layer of transformers


def is_norm(module: nn.Module) -> bool:
    """Whether this is a batch or an instance norm, also one whose tensors are all buffers, as torchvision's
    frozen one's."""
    own = {name for name, buffer in module.named_buffers(recurse=False) if buffer.dim() == 1}
    return isinstance(module, _NormBase) or own >= {"weight", "bias", "running_mean", "running_var"}


def _weight_shape(layer: Any) -> torch.Size:
    weight = layer._parameters.get("weight")  # faster than the attribute, which may be computed of others
    if weight is None and is_parametrized(layer, "weight"):  # in training, a spectral norm learns of it
        computed = layer.parametrizations.weight
        training = computed.training
        weight = computed.eval()()
        computed.train(training)
    shape: torch.Size = (layer.weight if weight is None else weight).shape
    return shape


def _fit_linear(layer: nn.Linear) -> None:
    layer.__dict__["out_features"], layer.__dict__["in_features"] = _weight_shape(layer)


def _fit_norm(layer: _NormBase) -> None:
    weight = layer._parameters.get("weight")
    reference = layer._buffers.get("running_mean") if weight is None else weight
    if reference is not None:
        layer.__dict__["num_features"] = reference.shape[0]


def _fit_group_norm(layer: nn.GroupNorm) -> None:
    own = vars(layer)
    channels = own.setdefault(_CHANNELS_PER_GROUP, layer.num_channels // layer.num_groups)
    if layer.affine:
        own["num_channels"] = len(layer.weight)
        own["num_groups"] = len(layer.weight) // channels


def _fit_prelu(layer: nn.PReLU) -> None:
    vars(layer)["num_parameters"] = layer.weight.numel()


def _fit_recurrent(layer: Any) -> None:
    vars(layer)["input_size"] = layer.weight_ih_l0.shape[1]
    layer._flat_weight_refs = [w if w is None else weakref.ref(w) for w in layer._flat_weights]
    layer.flatten_parameters()  # as it does itself where its weights are others than those it refers to


def _fit_convolution(layer: _ConvNd) -> None:
    own, (first, second, *_) = layer.__dict__, _weight_shape(layer)
    transposed = isinstance(layer, _ConvTransposeNd)
    if own["groups"] > 1 and _ROWS_PER_GROUP not in own:
        own[_ROWS_PER_GROUP] = own["in_channels" if transposed else "out_channels"] // own["groups"]
    if _ROWS_PER_GROUP in own:  # groups are kept or dropped whole, those of one channel included
        own["groups"] = first // own[_ROWS_PER_GROUP]
    columns = second * own["groups"]
    own["in_channels"], own["out_channels"] = (first, columns) if transposed else (columns, first)


_ROWS_PER_GROUP, _CHANNELS_PER_GROUP = "rows_per_group", "channels_per_group"
"""Noted on grouped convolutions, because one of which a single group is left looks like an ordinary one, and
on group norms, likewise."""
