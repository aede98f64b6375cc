"""A forward pass of a subnet: the closure that computes a loss, and how it is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any, SupportsFloat
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offload_sparse.store.copy.tables import to_device

Metrics = dict[str, Tensor]
Closure = Callable[[nn.Module], Any]
"""network -> mean loss of a batch, a scalar tensor; or (mean loss, {name: scalar}), averaged over ranks. All
ranks, and all parts of a batch, name the same scalars."""

MOST_METRICS = 11

OWN_BACKWARD = (
    "the closure calls backward by itself; return the loss, and give session.step a list of closures for a "
    "batch in parts"
)


@dataclass
class Forward:
    """How a forward pass is run.

    Attributes:
        autocast: context of forward passes, such as ``accelerator.autocast``.
        frozen_batch_norm: normalise with the running statistics.
        scaler: for fp16; its settings are those of the scale of the losses, which a session keeps by itself.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    frozen_batch_norm: bool = False
    scaler: torch.amp.GradScaler | None = None

    _switched: WeakSet[nn.Module] = field(default_factory=WeakSet, init=False, repr=False, compare=False)
    _differentiates: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.autocast, AbstractContextManager):
            raise ValueError(
                "autocast is entered in every pass; give a function that makes it, such as "
                "accelerator.autocast, or partial(torch.autocast, 'cuda', torch.bfloat16)"
            )

    def train_mode(self, module: nn.Module) -> None:
        """The module's own training mode; one that is in it already stays as it is."""
        if module.training and module in self._switched:
            return
        self._switched.add(module)
        train_mode(module)
        if self.frozen_batch_norm:
            for layer in module.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()

    def trained(self, module: nn.Module, closure: Closure) -> tuple[Tensor, Metrics]:
        """Loss with its graph."""
        self.train_mode(module)
        return self._called(module, closure)

    def evaluated(self, module: nn.Module, closure: Closure) -> Tensor:
        """Loss under the same conditions as a trained pass, without a graph."""
        self.train_mode(module)
        return self.loss(module, closure)

    def loss(self, module: nn.Module, closure: Closure) -> Tensor:
        """Loss without a graph, in the mode that ``module`` is in. A closure that takes derivatives by
        itself, as a penalty of the gradient does, has a graph inside."""
        if not self._differentiates:
            try:
                with torch.no_grad():
                    return self._called(module, closure)[0]
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
        with torch.enable_grad(), _no_backward(module):
            loss = self._called(module, closure)[0].detach()
        self._differentiates = True
        return loss

    def run(self, module: nn.Module, closure: Closure) -> Any:
        """What ``closure`` says of ``module``. Weights may be others than those of the pass before, and casts
        of these be kept: a loop's own autocast around several passes does so."""
        torch.clear_autocast_cache()
        with self.autocast():
            return closure(module)

    def _called(self, module: nn.Module, closure: Closure) -> tuple[Tensor, Metrics]:
        """The loss and the metrics of ``closure``. Raises ValueError: it returns something else, or the batch
        is on another device than the network."""
        try:
            return _checked(self.run(module, closure))
        except RuntimeError as error:
            own = next(module.parameters()).device
            other = other_device(str(error), own)
            if other is None:
                raise
            raise ValueError(
                f"the session is on {own}, and the closure uses a tensor on {other}; move the batch, such as "
                "by x.to(session.device), y.to(session.device)"
            ) from error


@contextmanager
def _no_backward(module: nn.Module) -> Iterator[None]:
    """Gradients that there are stay as they are. Raises ValueError: there came some."""
    parameters = list(module.parameters())
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
        if any(parameter.grad is not None for parameter in parameters):
            raise ValueError(OWN_BACKWARD)
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def train_mode(module: nn.Module) -> None:
    """The module's own training mode; layers that are in evaluation mode while it is in training stay so."""
    fixed = [layer for layer in module.modules() if not layer.training] if module.training else []
    module.train()
    for layer in fixed:
        layer.training = False


def other_device(message: str, own: torch.device) -> str | None:
    """The device beside ``own`` that torch's ``message`` complains of; None if it is of something else."""
    if re.search("same device|different devices|expected device", message):
        named: list[str] = re.findall(r"\b(?:cpu|cuda|xpu|mps)\b(?::\d+)?", message)
        return next((name for name in named if torch.device(name) != own), None)
    if types := re.search(r"Input type \((.*?)\) and weight type \((.*?)\)", message):
        on_cuda = ["cuda" in of.lower() for of in types.groups()]
        if on_cuda[0] != on_cuda[1]:
            return "cuda" if on_cuda[0] else "cpu"
    return None


def _checked(result: Any) -> tuple[Tensor, Metrics]:
    """What a closure has returned, if it is a loss. Raises ValueError: it is something else."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the closure returns {found}; return the mean loss, a scalar tensor, or (loss, {{name: scalar}})"
        )
    if not isinstance(metrics, dict):
        raise ValueError(f"the metrics are {type(metrics).__name__}; return (loss, {{name: scalar}})")
    if len(metrics) > MOST_METRICS:
        raise ValueError(f"the closure returns {len(metrics)} metrics; at most {MOST_METRICS} are carried")
    # By name: ranks, and parts of a batch, may have them in different orders.
    return loss.reshape(()), {name: _scalar(name, metrics[name], loss) for name in sorted(metrics, key=str)}


def _scalar(name: str, value: Any, like: Tensor) -> Tensor:
    """A metric as a scalar on the device of ``like``. Raises ValueError: it is something else."""
    size = value.numel() if isinstance(value, Tensor) else int(isinstance(value, SupportsFloat))
    if size != 1:
        found = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"metric {name!r} is {found}; return a number, or a tensor of one element")
    scalar = torch.as_tensor(value).detach().reshape(())
    return to_device(scalar, like.device) if scalar.device.type == "cpu" else scalar.to(like.device)


def in_parts(closure: Closure | Iterable[Closure]) -> list[Closure]:
    """The closures of a step, one or several. Raises ValueError: they are something else."""
    closures: list[Closure] = []
    if callable(closure):
        closures = [closure]
    elif isinstance(closure, Iterable) and not isinstance(closure, Tensor):
        closures = list(closure)
    if not closures or not all(map(callable, closures)):
        raise ValueError(
            "step takes a function of the network, or a list of them, such as session.step(lambda "
            "network: F.cross_entropy(network(x), y))"
        )
    return closures


def bound(closure: Closure) -> Closure:
    """``closure`` as it is now, to be called later: with the present values of the variables that it reads.

    A lambda in a loop reads the loop's variables when it is called, and by then they belong to another batch.
    """
    if not isinstance(closure, FunctionType):
        return closure
    own = closure.__globals__
    values = {name: own[name] for name in ("__builtins__", *_names(closure.__code__)) if name in own}
    cells = tuple(_copied(cell) for cell in closure.__closure__ or ())
    copy = FunctionType(closure.__code__, values, closure.__name__, closure.__defaults__, cells)
    copy.__kwdefaults__ = closure.__kwdefaults__
    return copy


def _copied(cell: CellType) -> CellType:
    try:
        return CellType(cell.cell_contents)
    except ValueError:  # a variable that has no value yet
        return cell


@lru_cache(maxsize=64)
def _names(code: CodeType) -> frozenset[str]:
    """Names that ``code``, or a function in it, may look up among the globals."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)
