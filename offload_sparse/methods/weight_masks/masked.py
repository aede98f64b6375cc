"""The training step of all methods that mask single weights, what it costs, and what is left in the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel, flops_by_weight
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.subnet import build_on_meta, meta_copy
from offload_sparse.methods.controls import undivided_map
from offload_sparse.methods.method import Task
from offload_sparse.methods.network_method import FixedNetwork
from offload_sparse.methods.weight_masks.sparsity import MaskedNetwork, Sparsity, maskable_weights


class MaskedTraining(FixedNetwork):
    """Trains a network, on the device of the task, whose single weights are masked by a ``Sparsity``."""

    note = (
        "Masks per element leave every matrix its size: on a GPU (and here) a step takes as long as a dense "
        "one and the masking on top; the FLOPs are those that hardware for such sparsity would need."
    )

    def __init__(
        self,
        task: Task,
        network: nn.Module,
        sparsity: Sparsity,
        channel_map: ChannelMap,
        cost: CostModel,
    ) -> None:
        if task.config.train.on_nonfinite == "skip":
            raise ValueError(
                f"masks move in every step, so {task.config.method} cannot leave one out; set "
                "train.on_nonfinite to stop or rollback"
            )
        self.network, self.sparsity = network, sparsity
        super().__init__(task, MaskedNetwork(network, sparsity), channel_map, channel_map.full_mask(), cost)
        # The network itself may be of another type than the inputs.
        flops = flops_by_weight(build_on_meta(task.factory), task.example_inputs)
        of_layers = torch.tensor([flops[name] for name in sparsity.weights], dtype=torch.float64)
        self._layer_flops = of_layers.to(task.device)
        self._other_flops = cost.dense_flops - float(self._layer_flops.sum())
        # FLOPs of all steps so far: forward pass, gradients of the inputs, gradients of the weights.
        self._spent = torch.zeros(3, dtype=torch.float64, device=task.device)

    def status(self) -> dict[str, float]:
        forward, backward = self._overall()
        return {"expected_size": forward, "forward_remaining": forward, "backward_remaining": backward}

    def dynamics(self) -> dict[str, Any]:
        layers = {f"{key}.{name}": value for name, of in self._layers().items() for key, value in of.items()}
        return self._ratios() | layers

    def report(self) -> dict[str, Any]:
        return super().report() | self._ratios() | {"layers": self._layers(), "note": self.note}

    def _layers(self) -> dict[str, dict[str, float]]:
        """Remaining ratios of every masked layer."""
        kept = torch.stack([self.sparsity.forward_kept, self.sparsity.backward_kept], 1).tolist()
        return {
            name.removesuffix(".weight"): {"forward_remaining": forward, "backward_remaining": backward}
            for name, (forward, backward) in zip(self.sparsity.weights, kept, strict=True)
        }

    def _ratios(self) -> dict[str, float]:
        """Remaining ratios of the real parameter count, and FLOPs of the three products of a step relative to
        dense ones.

        ``weight_gradient_flops_ratio`` counts what has to be computed, ``weight_gradient_kept_flops_ratio``
        what the masks keep of it (the count of the paper)."""
        forward, backward = self._overall()
        total = sum(p.numel() for p in self.network.parameters())
        masked = sum(w.numel() for w in self.sparsity.weights.values())
        dense = float(self.cost.dense_flops)
        shares = (self._pass_flops() / dense).tolist()
        kept = float((self._layer_flops * self.sparsity.backward_kept).sum()) + self._other_flops
        return {
            "params_ratio": (forward * masked + total - masked) / total,
            "flops_ratio": shares[0],
            "forward_remaining": forward,
            "backward_remaining": backward,
            "input_gradient_flops_ratio": shares[1],
            "weight_gradient_flops_ratio": shares[2],
            "weight_gradient_kept_flops_ratio": kept / dense,
        }

    def _parameter_groups(self) -> list[dict[str, Any]]:
        own = {"params": list(self.sparsity.parameters()), "weight_decay": 0.0}
        return [{"params": list(self.network.parameters())}, *([own] if own["params"] else [])]

    def _objective(self, loss: Tensor) -> Tensor:
        penalty = self.sparsity.penalty()
        return loss if penalty is None else loss + penalty

    def _amend_gradients(self) -> bool:
        takes_step = self.sparsity.amend_gradients(self._steps, self._optimizer)
        self._spent += self._pass_flops()
        return takes_step

    def _settle(self) -> None:
        self.sparsity.settle()

    @property
    def spent_flops(self) -> float:
        return float(self._spent.sum())

    def _final_network(self) -> tuple[nn.Module, Tensor]:
        network, masks = copy.deepcopy(self.network), self.sparsity.masks()
        with torch.no_grad():
            for name, weight in maskable_weights(network).items():
                weight.mul_(masks[name])
        return network, self._mask

    def _overall(self) -> tuple[float, float]:
        """Remaining shares of all maskable weights, and of their gradients."""
        kept = torch.stack([self.sparsity.forward_kept, self.sparsity.backward_kept])
        sizes = [float(w.numel()) for w in self.sparsity.weights.values()]
        entries = kept * torch.tensor(sizes, dtype=torch.float64, device=kept.device)
        forward, backward = (entries.sum(1) / sum(sizes)).tolist()
        return forward, backward

    def _pass_flops(self) -> Tensor:
        """float64[3]: FLOPs per image of the forward pass and of both products of the backward pass."""
        sparsity = self.sparsity
        kept = torch.stack(
            [sparsity.forward_kept, sparsity.input_gradient_used(), sparsity.weight_gradient_used()]
        )
        return (kept * self._layer_flops).sum(1) + self._other_flops

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes while training, buffers aside, with thresholds, masks and FLOPs spent."""
        masks = {f"sparsity/{name}": tensor for name, tensor in self.sparsity.tensors().items()}
        return super()._tensors() | masks | {"spent": self._spent}


def build_masked(task: Task, sparsity_of: Callable[[Mapping[str, nn.Parameter]], Sparsity]) -> MaskedTraining:
    """The full network, initialised as the seed says, with all weights of Linear and Conv2d layers masked by
    what ``sparsity_of`` makes of them."""
    network = task.network()
    channel_map = undivided_map(network)
    cost = CostModel(meta_copy(network), channel_map, task.example_inputs)
    network = network.to(task.device, task.dtype)
    return MaskedTraining(task, network, sparsity_of(maskable_weights(network)), channel_map, cost)
