"""The round by definition: every step on the full weights, with masks, in float64. Slow and obviously right.

Nothing here slices: the dropped entries of a full tensor are multiplied by zero, gradients of kept entries
move kept entries, absent entries stand still (no momentum, no decay), and s moves after every comparison.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.engine.config import OptimConfig, RoundConfig
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.mask_policy import MaskPolicy


def entry_masks(channel_map: ChannelMap, mask: Tensor) -> dict[str, Tensor]:
    """float64 {0, 1} per entry of every tensor: 1 where all its atoms are kept."""
    always = channel_map.alive(mask).double()
    masks = {}
    for name, axes in channel_map.axes.items():
        value = torch.ones(channel_map.shapes[name], dtype=torch.float64)
        for dim, axis in enumerate(axes):
            if axis is not None:
                value = value * always[axis].view([-1 if d == dim else 1 for d in range(value.dim())])
        masks[name] = value
    return masks


class MaskedTrainer:
    """Trains ``net`` (float64, in place) as ``SparseOffload`` says it does."""

    def __init__(
        self,
        net: nn.Module,
        channel_map: ChannelMap,
        policy: PolicyConfig,
        rounds: RoundConfig,
        optim: OptimConfig,
        seed: int,
    ) -> None:
        inputs = (torch.empty(1, 2, 6, 6, device="meta", dtype=torch.float64),)
        self.net = net
        self.channel_map = channel_map
        self.rounds = rounds
        self.optim = optim
        self.policy = MaskPolicy(policy, channel_map.groups, seed, CostModel(net, channel_map, inputs))
        self.weights = {n: p.detach().clone() for n, p in net.named_parameters()}
        self.momentum = {n: torch.zeros_like(p) for n, p in self.weights.items()}
        self.buffers = {n: b.clone() for n, b in net.named_buffers() if b.is_floating_point()}

    def run(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        for step, (x, y) in enumerate(batches):
            in_round = step % self.rounds.k
            if in_round == 0:
                round_index = step // self.rounds.k
                if self.rounds.prefetch and round_index:
                    self.masks = self.drawn_ahead
                else:
                    self.masks = self.policy.sample(round_index)
                if self.rounds.prefetch:
                    self.drawn_ahead = self.policy.sample(round_index + 1)
                # All of a round's updates of s are known only at its end; within it masks do not depend on s.
                self.updates: list[tuple[float, float]] = []
            turns = self.rounds.reference == "turns"
            trained = in_round % 2 if turns else 0
            compared = turns or self.rounds.reference == "every_step" or in_round == 0
            loss, gradients, statistics = self._pass(x, y, self.masks[trained])
            if compared and not torch.equal(*self.masks):
                other, _, _ = self._pass(x, y, self.masks[1 - trained])
                pair = (float(loss), float(other))
                self.updates.append(pair if trained == 0 else pair[::-1])
            self._move(gradients, self.masks[trained])
            kept = entry_masks(self.channel_map, self.masks[trained])
            for name, value in statistics.items():
                self.buffers[name] = torch.where(kept[name].bool(), value, self.buffers[name])
            if in_round == self.rounds.k - 1:
                for first, second in self.updates:
                    self.policy.update([first], [second], *self.masks, step // self.rounds.k)

    def _pass(
        self, x: Tensor, y: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        kept = entry_masks(self.channel_map, mask)
        net = copy.deepcopy(self.net).train()
        leaves = {n: w.clone().requires_grad_() for n, w in self.weights.items()}
        masked = {n: w * kept[n] for n, w in leaves.items()}
        buffers = {n: b.clone() for n, b in net.named_buffers()} | {
            n: b.clone() for n, b in self.buffers.items()
        }
        out = functional_call(net, (masked, buffers), (x,))
        loss = nn.functional.cross_entropy(out, y)
        loss.backward()
        gradients = {n: w.grad for n, w in leaves.items() if w.grad is not None}
        return loss.detach(), gradients, {n: buffers[n] for n in self.buffers}

    def _move(self, gradients: dict[str, Tensor], mask: Tensor) -> None:
        kept = entry_masks(self.channel_map, mask)
        for name, weight in self.weights.items():
            gradient = gradients[name] + self.optim.weight_decay * weight
            momentum = self.optim.momentum * self.momentum[name] + gradient
            inside = kept[name].bool()
            self.momentum[name] = torch.where(inside, momentum, self.momentum[name])
            self.weights[name] = torch.where(inside, weight - self.optim.lr * self.momentum[name], weight)


class LocalTrainer(MaskedTrainer):
    """The same by ranks that talk once per round, all of them here: K steps of each on full weights of its
    own, then the mean of every entry (weights, momentum, statistics) over the ranks that held it, and the
    outer step of the weights along it.

    s moves as it does when ranks talk at every step, by the mean losses; with a reference or a subnet per
    rank, by leave-one-out over the losses of these, divided by what masks drawn apart make it too large.
    """

    def train(self, batches: list[tuple[Tensor, Tensor]], world_size: int) -> None:
        """Every batch is of all ranks; each takes its contiguous part."""
        rounds, k = self.rounds, self.rounds.k
        own = rounds.subnets in ("per_rank", "partition") and world_size > 1
        turns = rounds.reference == "turns" and not own
        velocity = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        drawn = ahead = self._drawn(0, world_size)
        for number in range(len(batches) // k):
            drawn = ahead if rounds.prefetch else self._drawn(number, world_size)
            ahead = self._drawn(number + 1, world_size) if rounds.prefetch else ahead
            start = copy.deepcopy((self.weights, self.momentum, self.buffers))
            ended, kept, losses = [], [], torch.zeros(world_size, k, 2, dtype=torch.float64)
            for rank in range(world_size):
                self.weights, self.momentum, self.buffers = copy.deepcopy(start)
                pair = (drawn[rank],) * 2 if own else (drawn[0], drawn[1 + rank % (len(drawn) - 1)])
                for step, (x, y) in enumerate(batches[number * k : (number + 1) * k]):
                    size = len(x) // world_size
                    part = slice(rank * size, (rank + 1) * size)
                    trained = step % 2 if turns else 0
                    for side in range(2):
                        loss, gradients, statistics = self._pass(x[part], y[part], pair[side])
                        losses[rank, step, side] = loss
                        if side == trained:
                            move = gradients, statistics
                    self._move(move[0], pair[trained])
                    inside = entry_masks(self.channel_map, pair[trained])
                    for name, value in move[1].items():
                        self.buffers[name] = torch.where(inside[name].bool(), value, self.buffers[name])
                ended.append((self.weights, self.momentum, self.buffers))
                either = [entry_masks(self.channel_map, m) for m in pair[: 2 if turns and k > 1 else 1]]
                kept.append({n: torch.stack([e[n] for e in either]).amax(0) for n in either[0]})
            self.weights, self.momentum, self.buffers = start
            for place, values in enumerate(start):
                for name, value in values.items():
                    held = torch.stack([one[name] for one in kept])
                    mean = (torch.stack([one[place][name] for one in ended]) * held).sum(0) / held.sum(0)
                    inside = held.sum(0) > 0
                    if place == 0:
                        moved = torch.where(inside, mean - value, 0.0)
                        faster = rounds.outer_momentum * velocity[name] + moved
                        velocity[name] = torch.where(inside, faster, velocity[name])
                        mean = value + rounds.outer_lr * (moved + rounds.outer_momentum * velocity[name])
                    values[name] = torch.where(inside, mean, value)
            for step in range(k):
                if rounds.reference == "round_start" and step and not own:
                    continue
                if own:
                    masks = torch.stack(drawn)
                    self.policy.update_from_ranks(
                        losses[None, :, step, 0], masks, number, rounds.subnets == "partition"
                    )
                elif rounds.subnets == "references" and world_size > 1:
                    first, second = losses[:, step].T
                    mean = first.mean()  # what ranks' images add to both of their losses is taken out
                    of_all = torch.cat([mean[None], second - first + mean])
                    self.policy.update_from_ranks(of_all[None], torch.stack(drawn), number)
                elif not torch.equal(*drawn):
                    first, second = losses[:, step].mean(0).tolist()
                    self.policy.update([first], [second], *drawn, number)

    def _drawn(self, number: int, world_size: int) -> tuple[Tensor, ...]:
        if self.rounds.subnets == "shared" or world_size == 1:
            return self.policy.sample(number)
        if self.rounds.subnets == "references":
            return self.policy.sample_for_ranks(number, world_size)
        return self.policy.sample_subnets(number, world_size, self.rounds.subnets == "partition")
