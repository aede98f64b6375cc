"""Independent coin flips given how many came up: exact draws and exact inclusion probabilities.

With odds w_c = s_c / (1 - s_c), a subset A of n atoms has the probability Π_{c in A} w_c / e_n(w), where e_n
is the elementary symmetric polynomial (Chen, Dempster & Liu 1994). Its values over all suffixes of the atoms
are a table of size · n entries; everything follows from it. In logarithms, so that no width is too large.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TINY = 1e-12
"""Probabilities are kept this far from 0 and 1, where odds are not finite."""


class ConditionalBernoulli:
    """Bernoulli variables with probabilities ``s``, given that ``width`` of them are 1.

    Args:
        s: float64[size].
        width: how many are 1, in 0 … size.
    """

    def __init__(self, s: Tensor, width: int) -> None:
        probabilities = s.numpy().clip(_TINY, 1 - _TINY)
        self._log_odds = np.log(probabilities) - np.log1p(-probabilities)
        self._width = width
        self._suffix = _tables(self._log_odds[::-1], width)[::-1]

    def draw(self, u: Tensor) -> Tensor:
        """The subset bool[size] of the uniforms ``u`` (float64[size]), one decision per atom in turn."""
        kept = np.zeros(len(self._log_odds), dtype=bool)
        missing = self._width
        for atom, (log_odds, uniform) in enumerate(zip(self._log_odds, u.tolist(), strict=True)):
            if missing == 0:
                break
            rest = self._suffix[atom + 1, missing - 1]
            if uniform < np.exp(log_odds + rest - self._suffix[atom, missing]):
                kept[atom] = True
                missing -= 1
        return torch.from_numpy(kept)

    def inclusion(self) -> Tensor:
        """E[m], float64[size]: w_c · e_{n-1}(all but c) / e_n(all); it sums to ``width``."""
        size, width = len(self._log_odds), self._width
        if width == 0:
            return torch.zeros(size, dtype=torch.float64)
        prefix = _tables(self._log_odds, width)
        before, behind = prefix[:-1, :width], self._suffix[1:, :width][:, ::-1]
        others = np.logaddexp.reduce(before + behind, axis=1)
        return torch.from_numpy(np.exp(self._log_odds + others - self._suffix[0, width]))


def _tables(log_odds: np.ndarray, width: int) -> np.ndarray:
    """log e_n of the first 0, 1, … size atoms: float64[size + 1, width + 1]."""
    table = np.full((len(log_odds) + 1, width + 1), -np.inf)
    table[:, 0] = 0.0
    for count, value in enumerate(log_odds, start=1):
        table[count, 1:] = np.logaddexp(table[count - 1, 1:], table[count - 1, :-1] + value)
    return table
