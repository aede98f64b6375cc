"""GrowEfficient: channel gates trained by the straight-through estimator; sparse forward, dense backward.

Yuan, Savarese & Maire, "Growing Efficient Deep Networks by Structured Continuous Sparsification" (ICLR 2021),
as Zhou et al. (2021) describe and account for it: a channel whose gate is shut leaves the forward pass, but
the gradient of its gate needs its output, so that the backward pass is that of the dense network (remark 2).
With f_S and f_D the FLOPs of both forward passes a step costs f_S + 2 f_D, and the saving is
3 / (2 + f_S / f_D) (appendix C): never more than 1.5.

    p = sigmoid(b z)     q ~ Bernoulli(p)     dq/dz ≈ dp/dz     loss + PENALTY · |mean p - rho|

What is open there, and what is done here: z starts at 0, and b rises geometrically from 1 to ``SHARPNESS``
until the gates are frozen; from then on a gate is open where p > 1/2. Every group keeps its most probable
atom. Draws are a function of (seed, step), the same on every rank. A gate multiplies the columns that read
its channel: behind the activation, since a ReLU has no slope where a gate before it has shut. As a module
computes here, shut channels are multiplied by zero, not left out: FLOPs are counted, seconds are not saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.subnet import narrow_module, output_dimension
from offload_sparse.config.run import RunConfig
from offload_sparse.methods.controls import prepared_model
from offload_sparse.methods.method import Method, Task
from offload_sparse.methods.weight_masks.masked import MaskedTraining
from offload_sparse.methods.weight_masks.sparsity import Sparsity, along, maskable_weights
from offload_sparse.policy.samplers import mask_generator

GATE_LR, SHARPNESS, PENALTY = 0.1, 200.0, 1.0


class ChannelGates(Sparsity):
    """One gate per atom of a channel map without unions."""

    def __init__(
        self, network: nn.Module, channel_map: ChannelMap, config: RunConfig, total_steps: int
    ) -> None:
        super().__init__(maskable_weights(network))
        self.channel_map = channel_map
        self._rho, self._seed = config.policy.rho, config.train.seed
        self._learned_steps = config.round.freeze_step("sampled", total_steps)
        device = self.forward_kept.device
        some = next(iter(self.weights.values()))
        self.logits = nn.Parameter(torch.zeros(channel_map.num_atoms, dtype=some.dtype, device=device))
        axes = channel_map.axes
        # Every weight with columns that belong to atoms, the atom of each (-1: always read), their dimension.
        self._gated: dict[str, tuple[nn.Parameter, Tensor, int]] = {}
        for name, parameter in network.named_parameters():
            reads = 1 - output_dimension(network.get_submodule(name.rpartition(".")[0]))
            if len(axes.get(name, ())) > 1 and (axis := axes[name][reads]) is not None:
                self._gated[name] = parameter, axis.to(device), reads
        self._axes = [[a.to(device) for a in axes[name] if a is not None] for name in self.weights]
        self._steps_done = torch.zeros((), dtype=torch.int64)

    @property
    def learning(self) -> bool:
        """Whether gates are still drawn and trained."""
        return int(self._steps_done) < self._learned_steps

    def probabilities(self) -> Tensor:
        """Probability of every gate to be open: [C] with its graph."""
        progress = min(1.0, int(self._steps_done) / max(1, self._learned_steps))
        return torch.sigmoid(SHARPNESS**progress * self.logits)

    def gates(self) -> Tensor:
        """The gates of this step, [C] of zeros and ones, with the gradient of their probabilities."""
        p = self.probabilities()
        if not (self.training and self.learning):
            return self._open(p, 0.5) + 0 * p
        generator = mask_generator(self._seed, int(self._steps_done))
        uniforms = torch.rand(len(p), generator=generator, pin_memory=p.is_cuda)
        return self._open(p, uniforms.to(p, non_blocking=True)) + (p - p.detach())

    def mask(self) -> Tensor:
        """bool[C] on the CPU: the channels that would be kept now."""
        with torch.no_grad():
            return self._open(self.probabilities(), 0.5).bool().cpu()

    def masked(self) -> dict[str, Tensor]:
        gates = self.gates()
        with torch.no_grad():
            self._note(gates)
        open_or_always = torch.cat([gates, gates.new_ones(1)])  # -1 means always
        return {
            name: parameter * along(open_or_always[axis], parameter, reads)
            for name, (parameter, axis, reads) in self._gated.items()
        }

    def penalty(self) -> Tensor | None:
        if not self.learning:
            return None
        return PENALTY * (self.probabilities().mean() - self._rho).abs()

    @torch.no_grad()
    def amend_gradients(self, step: int, optimizer: torch.optim.Optimizer) -> bool:  # noqa: ARG002
        """The gates have their own learning rate, and no momentum."""
        assert self.logits.grad is not None
        if self.learning:
            self.logits.sub_(self.logits.grad, alpha=GATE_LR)
        self.logits.grad.zero_()
        return True

    def settle(self) -> None:
        self._steps_done += 1

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"steps_done": self._steps_done}

    def input_gradient_used(self) -> Tensor:
        return torch.ones_like(self.forward_kept)

    def _open(self, p: Tensor, limit: Tensor | float) -> Tensor:
        """1 where p > limit, and for the most probable atom of every group."""
        gates = (p.detach() > limit).to(p.dtype)
        for group in self.channel_map.groups:
            atom = group.start + p.detach()[group.start : group.stop].topk(1).indices
            gates.index_fill_(0, atom, 1.0)  # an assignment would make a device wait
        return gates

    def _note(self, gates: Tensor) -> None:
        """The share of each layer's weight that these gates keep."""
        kept = torch.cat([gates.detach().double(), torch.ones(1, dtype=torch.float64, device=gates.device)])
        for i, axes in enumerate(self._axes):
            share = torch.ones((), dtype=torch.float64, device=gates.device)
            for axis in axes:
                share = share * kept[axis].mean()
            self.forward_kept[i] = share


class GrowEfficient(MaskedTraining):
    """Trains gates and weights; hands out the narrow network of the open channels."""

    sparsity: ChannelGates
    note = (
        "Shut channels are multiplied by zero, so a step takes as long as a dense one; FLOPs leave them out."
    )

    def _ratios(self) -> dict[str, float]:
        mask = self.sparsity.mask()
        return super()._ratios() | {
            "params_ratio": self.cost.parameters(mask) / self.cost.dense_parameters,
            "flops_ratio": self.cost.flops(mask) / self.cost.dense_flops,
        }

    def _final_network(self) -> tuple[nn.Module, Tensor]:
        mask = self.sparsity.mask()
        return narrow_module(self.network, self.channel_map, mask), mask


def build(task: Task) -> Method:
    """GrowEfficient on the network of ``task``. Raises ValueError: the network cannot be narrowed, or every
    filter is to have a mask of its own."""
    config = task.config
    if config.model.residual == "filter":
        raise ValueError("grow_efficient gates whole streams; set model.residual to coupled or internal")
    prepared = prepared_model(task)
    channel_map = prepared.channel_map
    cost = CostModel(prepared.meta_model, channel_map, task.example_inputs)
    network = task.network().to(task.device, task.dtype)
    gates = ChannelGates(network, channel_map, config, task.total_steps)
    return GrowEfficient(task, network, gates, channel_map, cost)
