"""What a search for a structure does, in a few numbers per epoch.

``deaths`` and ``revivals`` count atoms that reached the floor of s, or left it, since the last report;
``mask_overlap`` is the share of a round's mask that the mask of the round before kept too. The mean loss
difference of a fair comparison is 0: if it is not, s drifts toward whatever was drawn first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from offload_sparse.channels.channel_map import Group

_OVERLAPS, _OVERLAP_SUM, _DIFFERENCES, _SUM, _SQUARES, _ROUND = range(6)


class Diagnostics:
    """Counts between two reports, from ``s`` (float64[C]) at the start on, whose smallest value is ``floor``;
    all of it can be saved."""

    def __init__(self, groups: Sequence[Group], floor: float, s: Tensor) -> None:
        self._groups, self._floor = groups, floor
        self._sums = torch.zeros(6, dtype=torch.float64)
        self._sums[_ROUND] = -1
        self._mask = torch.zeros(len(s), dtype=torch.bool)
        self._dead = self._at_floor(s)

    def compared(self, differences: Sequence[float], mask: Tensor, round: int) -> None:
        """Note comparisons: L(m) - L(m') of each, and the mask m bool[C] of their round."""
        sums = self._sums
        if round != sums[_ROUND]:
            if sums[_ROUND] >= 0:
                sums[_OVERLAPS] += 1
                sums[_OVERLAP_SUM] += float((mask & self._mask).sum()) / max(1, int(mask.sum()))
            sums[_ROUND] = round
            self._mask = mask.clone()
        sums[_DIFFERENCES] += len(differences)
        sums[_SUM] = sum(differences, float(sums[_SUM]))
        sums[_SQUARES] = sum([d * d for d in differences], float(sums[_SQUARES]))

    def report(self, s: Tensor) -> dict[str, float | dict[str, float]]:
        """The figures since the last report, which begin anew; those that nothing was counted for are left
        out."""
        dead, sums = self._at_floor(s), self._sums
        figures: dict[str, float | dict[str, float]] = {
            "deaths": int((dead & ~self._dead).sum()),
            "revivals": int((self._dead & ~dead).sum()),
            "group_keep": {g.name: float(s[g.start : g.stop].mean()) for g in self._groups},
        }
        if sums[_OVERLAPS] > 0:
            figures["mask_overlap"] = float(sums[_OVERLAP_SUM] / sums[_OVERLAPS])
        if sums[_DIFFERENCES] > 0:
            mean = float(sums[_SUM] / sums[_DIFFERENCES])
            figures["loss_difference_mean"] = mean
            variance = float(sums[_SQUARES] / sums[_DIFFERENCES]) - mean * mean
            figures["loss_difference_std"] = max(0.0, variance) ** 0.5
        self._dead = dead
        sums[:_ROUND] = 0
        return figures

    def state(self) -> dict[str, Tensor]:
        return {"sums": self._sums, "mask": self._mask, "dead": self._dead}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._sums.copy_(state["sums"])
        self._mask, self._dead = state["mask"].clone(), state["dead"].clone()

    def _at_floor(self, s: Tensor) -> Tensor:
        return s <= self._floor * (1 + 1e-9)
