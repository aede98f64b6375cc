"""Samplers: from keep probabilities to masks, the same on every rank.

    bernoulli    m = 1[u < s] with new uniforms u in every round (Zhou et al. 2021)
    antithetic   the same, but m = 1[1 - u < s] beside m' = 1[u < s]
    apart        R masks m_r = 1[frac(u + r/R) < s]: disjoint where s <= 1/R, else with little in common
    persistent   u_c = hash(seed, c, floor(q·round + φ_c)): the atom c is redrawn every 1/q rounds
    fixed_width  Bernoulli given the width of every group (``ConditionalBernoulli``)

All are functions of (s, seed, round, stream): no state, nothing to communicate or to save. ``policy.widths``
repairs draws that a network cannot use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload_sparse.channels.channel_map import Group

FIRST, SECOND, CANDIDATES = range(3)
"""Streams of a round: m, its reference, candidates for the final mask."""

RANKS = 1 << 32
"""From here on, the streams of references that ranks have of their own."""

_MASK64 = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """A 64-bit integer mixed into another that looks random (Steele et al. 2014, one step of SplitMix)."""
    return int(_splitmix64_each(np.array([value & _MASK64], dtype=np.uint64))[0])


def mask_generator(seed: int, round: int, stream: int = 0) -> torch.Generator:
    """The CPU generator of one draw, a function of the run's seed, the round (or a candidate) and one of
    several independent streams of draws alone: ranks agree without communication."""
    mixed = 0
    for part in (seed, round, stream):
        mixed = splitmix64(mixed ^ (part & _MASK64))
    # The CPU generator reads the low 32 bits of a seed only; every bit of `mixed` depends on all arguments.
    return torch.Generator().manual_seed(mixed & 0xFFFFFFFF)


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """One u ~ U[0, 1) per atom: float64[count]."""
    return torch.rand(count, dtype=torch.float64, generator=generator)


class Drawn(NamedTuple):
    """A raw draw bool[C], and float64[C], below 1 where an atom was drawn; the larger, the closer it was to
    not being drawn."""

    mask: Tensor
    margin: Tensor


class Sampler(ABC):
    """Draws masks of ``count`` atoms from p(m|s)."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed

    @abstractmethod
    def draw(self, s: Tensor, round: int, stream: int) -> Drawn:
        """The mask of a stream of a round."""

    def redrawn(self, round: int) -> Tensor:  # noqa: ARG002
        """bool[C]: the atoms that were drawn for the reference anew, independently of the mask itself."""
        return torch.ones(self._count, dtype=torch.bool)

    def mean(self, s: Tensor) -> Tensor:
        """E[m], float64[C]."""
        return s


class Bernoulli(Sampler):
    """Independent draws; ``antithetic``: the first mask of a round uses 1 - u where the second uses u."""

    def __init__(self, count: int, seed: int, antithetic: bool = False) -> None:
        super().__init__(count, seed)
        self._antithetic = antithetic

    def draw(self, s: Tensor, round: int, stream: int) -> Drawn:
        mirrored = self._antithetic and stream == FIRST
        u = uniforms(self._count, mask_generator(self._seed, round, SECOND if mirrored else stream))
        u = 1 - u if mirrored else u
        return Drawn(u < s, u / s)

    def draw_apart(self, s: Tensor, round: int, count: int) -> list[Drawn]:
        """Masks that overlap as little as they can; each by itself is an exact draw."""
        first = uniforms(self._count, mask_generator(self._seed, round, FIRST))
        shifted = [(first + rank / count) % 1.0 for rank in range(count)]
        return [Drawn(u < s, u / s) for u in shifted]


class Persistent(Sampler):
    """Masks that drift: in every round a share of the atoms is drawn anew, the others keep their uniform.

    Each mask by itself is an exact draw from p(m|s). The reference of a round is the first mask of the next
    one. Atoms that are redrawn between the two are independent in them, given all others; which ones these
    are is known beforehand, and each has its turn every 1/refresh rounds (refresh in (0, 1])."""

    def __init__(self, count: int, seed: int, refresh: float) -> None:
        super().__init__(count, seed)
        self._refresh = refresh
        self._phase = self._hashed(np.zeros(count, dtype=np.int64)).numpy()

    def draw(self, s: Tensor, round: int, stream: int) -> Drawn:
        if stream == CANDIDATES:
            # the masks to come, which owe most of their atoms to those that were trained
            stream = FIRST
        u = self._hashed(1 + self._turn(round + (stream == SECOND)))
        if stream >= RANKS:
            own = uniforms(self._count, mask_generator(self._seed, round, stream))
            u = torch.where(self.redrawn(round), own, u)
        return Drawn(u < s, u / s)

    def redrawn(self, round: int) -> Tensor:
        return torch.from_numpy(self._turn(round + 1) != self._turn(round))

    def _turn(self, round: int) -> np.ndarray:
        """How often each atom has been redrawn, int64[C]."""
        return np.floor(self._refresh * round + self._phase).astype(np.int64)

    def _hashed(self, turn: np.ndarray) -> Tensor:
        """u ~ U[0, 1) of (seed, atom, turn), float64[C]."""
        mixed = np.full(self._count, splitmix64(self._seed & _MASK64), dtype=np.uint64)
        for part in (np.arange(self._count, dtype=np.uint64), turn.astype(np.uint64)):
            mixed = _splitmix64_each(mixed ^ part)
        return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


class FixedWidth(Sampler):
    """Independent draws given the width of every group, so that shapes never change."""

    def __init__(self, groups: Sequence[Group], widths: Sequence[int], seed: int) -> None:
        super().__init__(groups[-1].stop, seed)
        self._parts = [(slice(g.start, g.stop), width) for g, width in zip(groups, widths, strict=True)]

    def draw(self, s: Tensor, round: int, stream: int) -> Drawn:
        u = uniforms(len(s), mask_generator(self._seed, round, stream))
        # One group after the other: the tables of wide ones are large.
        mask = torch.cat([ConditionalBernoulli(s[part], n).draw(u[part]) for part, n in self._parts])
        return Drawn(mask, torch.where(mask, 1 - s, 2 - s))

    def mean(self, s: Tensor) -> Tensor:
        return torch.cat([ConditionalBernoulli(s[part], n).inclusion() for part, n in self._parts])


class ConditionalBernoulli:
    """Bernoulli variables with probabilities s, float64[size], given that ``width`` of them are 1: exact
    draws and exact inclusion probabilities.

    With odds w_c = s_c / (1 - s_c), a subset A of n atoms has the probability Π_{c in A} w_c / e_n(w), where
    e_n is the elementary symmetric polynomial (Chen, Dempster & Liu 1994). Its values over all suffixes of
    the atoms are a table of size · n entries; everything follows from it. In logarithms, so that no width is
    too large."""

    def __init__(self, s: Tensor, width: int) -> None:
        self._log_odds = np.log(s.numpy()) - np.log1p(-s.numpy())
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
        width = self._width
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


def _splitmix64_each(values: np.ndarray) -> np.ndarray:
    """``splitmix64`` of every entry of uint64[C]; products wrap as they must."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
