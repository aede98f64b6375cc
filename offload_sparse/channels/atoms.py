"""Atoms of several channels: runs of neighbours that are kept or dropped as one.

    group of 20 channels, block 8      channels 0 … 7 | 8 … 15 | 16 … 19
                                       atom         0 |      1 |       2     (the last takes the remainder)

Widths are then multiples of the block (but for a remainder), which is what matrix units want, and the rows of
a weight move in longer runs.
"""

from __future__ import annotations

import torch

from offload_sparse.channels.channel_map import ALWAYS, NEVER, ChannelMap, Group
from offload_sparse.channels.config import channels_per_atom

FEWEST_ATOMS = 8
"""Of a width whose runs may be shortened."""


def block_atoms(channel_map: ChannelMap, block: str | int) -> ChannelMap:
    """The map whose atoms are runs of ``block`` consecutive channels of ``channel_map``; of 1, the map as it
    is. ``<=8`` shortens the runs of 8, to 4, 2 or 1, in groups of which fewer than ``FEWEST_ATOMS`` would be
    left.

    An atom that already stands for several channels everywhere (a group of a grouped convolution, an
    attention head) counts as that many: runs are as short as gives ``block`` channels in every tensor. Raises
    ValueError: ``block`` is no number of channels."""
    most, shortens = channels_per_atom(block)
    if most == 1:
        return channel_map
    fewest = fewest_channels(channel_map)
    groups: list[Group] = []
    number = torch.full((channel_map.num_ids + 2,), ALWAYS)  # the last entries serve positions of no atom
    number[NEVER] = NEVER
    start = 0
    for group in channel_map.groups:
        channels = max(1, int(fewest[group.start : group.stop].min()))
        run = -(-most // channels)
        while shortens and run > 1 and group.size < FEWEST_ATOMS * run:
            run //= 2
        number[group.start : group.stop] = start + torch.arange(group.size) // run
        groups.append(Group(group.name, start, -(-group.size // run), group.shared))
        start = groups[-1].stop
    unions = channel_map.num_ids - channel_map.num_atoms
    number[channel_map.num_atoms : channel_map.num_ids] = start + torch.arange(unions)
    return channel_map.renumbered(groups, number, channel_map.full_mask())


def fewest_channels(channel_map: ChannelMap) -> torch.Tensor:
    """int64[C]: the fewest positions that an atom takes on an axis that names it; 0 for one without any."""
    never = torch.iinfo(torch.int64).max
    fewest = torch.full((channel_map.num_atoms,), never)
    axes = {id(axis): axis for row in channel_map.axes.values() for axis in row if axis is not None}
    for axis in axes.values():
        atoms = axis[(axis >= 0) & (axis < channel_map.num_atoms)]
        count = torch.bincount(atoms, minlength=channel_map.num_atoms)
        fewest = torch.where(count > 0, torch.minimum(fewest, count), fewest)
    return torch.where(fewest == never, 0, fewest)
