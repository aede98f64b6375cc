"""Widths that others have found, as a control and as a start: by name, scaled to any budget.

Numbers are channels per group in the order in which a network runs; the sources give them for the full widths
named with them. Streams of residual blocks count once, at the block that begins them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload_sparse.channels.accounting import CostModel
from offload_sparse.channels.atoms import fewest_channels
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.policy.budget import Budget, evenly_narrowed
from offload_sparse.policy.config import PolicyConfig
from offload_sparse.policy.widths import of_least_margin

_VGG16 = (64, 64, 128, 128, *(256,) * 3, *(512,) * 6)
_VGG19 = (64, 64, 128, 128, *(256,) * 4, *(512,) * 8)
_MOBILENET = (32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)
_RESNET50 = (
    *(64, 64, 64, 256, *(64,) * 4),
    *(128, 128, 512, *(128,) * 6),
    *(256, 256, 1024, *(256,) * 10),
    *(512, 512, 2048, *(512,) * 4),
)

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # Pruning Filters for Efficient ConvNets (Li et al. 2017), Table 2, VGG-16-pruned-A, CIFAR-10
    "vgg16_cifar_filters": (_VGG16, (32, 64, 128, 128, *(256,) * 9)),
    # Network Slimming (Liu et al. 2017), CIFAR-10, 70 % of the channels pruned
    "vgg19_cifar_slimming": (
        _VGG19,
        (49, 64, 128, 128, 256, 254, 234, 198, 114, 41, 24, 11, 14, 13, 19, 104),
    ),
    # MetaPruning (Liu et al. 2019), its published code, ImageNet
    "mobilenetv1_metapruning": (
        _MOBILENET,
        (31, 60, 81, 51, 202, 202, 389, 389, 250, 312, 481, 312, 870, 1024),
    ),
    # AutoSlim (Yu and Huang 2019), apps/autoslim_resnet_val.yml of its published code, ImageNet
    "resnet50_autoslim_570m": (
        _RESNET50,
        (
            *(24, 8, 16, 72, 16, 16, 8, 8),
            *(16, 24, 240, 16, 24, 16, 16, 16, 24),
            *(72, 72, 704, 48, 72, 48, 72, 72, 72, 48, 48, 48, 48),
            *(280, 240, 1680, 120, 200, 280, 280),
        ),
    ),
    "resnet50_autoslim_1g": (
        _RESNET50,
        (
            *(32, 16, 16, 72, 16, 16, 8, 8),
            *(24, 40, 280, 16, 24, 16, 24, 24, 40),
            *(72, 72, 880, 72, 96, 72, 72, 72, 72, 48, 72, 168, 96),
            *(360, 280, 2016, 320, 360, 480, 440),
        ),
    ),
    "resnet50_autoslim_2g": (
        _RESNET50,
        (
            *(40, 16, 16, 120, 24, 24, 16, 24),
            *(48, 72, 440, 32, 48, 40, 56, 64, 72),
            *(168, 168, 1024, 96, 144, 120, 168, 120, 144, 120, 144, 256, 256),
            *(512, 512, 2016, 480, 480, 512, 512),
        ),
    ),
}
"""By name: the widths of the whole network, by which a model is known to be the right one, and the published
ones.
"""

_LEAST = 4
"""Channels that every group keeps, however small the budget: fewer are a bottleneck that nobody published."""


def static_mask(
    widths: str,
    config: PolicyConfig,
    channel_map: ChannelMap,
    costs: CostModel,
    margin: Tensor | None = None,
) -> Tensor:
    """The mask bool[C] of a network that is fixed from the start, by one width for each group or the name of
    published ones; without either all groups are narrowed evenly to the budget of ``config``. Each keeps its
    atoms of the smallest ``margin`` (float64[C]), or the first ones. Raises ValueError: the widths do not fit
    the groups."""
    parts = widths.replace(",", " ").split()
    if not parts:
        return evenly_narrowed(config, channel_map, costs, margin)
    groups = channel_map.groups
    if not all(part.isdigit() for part in parts):
        return mask_of_shape(widths, channel_map, Budget.of(config, groups, costs), margin)
    numbers = [int(part) for part in parts]
    if len(numbers) != len(groups) or any(not 1 <= n <= g.size for n, g in zip(numbers, groups, strict=True)):
        raise ValueError(
            f"static.widths is {widths}; give one width for each of the {len(groups)} groups of "
            f"{[group.size for group in groups]} atoms"
        )
    mask = torch.zeros(channel_map.num_atoms, dtype=torch.bool)
    for group, width in zip(groups, numbers, strict=True):
        mask[group.start : group.start + width] = True
    return mask if margin is None else of_least_margin(mask, margin, groups)


def mask_of_shape(
    name: str, channel_map: ChannelMap, budget: Budget, margin: Tensor | None = None
) -> Tensor:
    """The mask bool[C] of the published widths ``name`` of ``SHAPES``, all times the factor that spends the
    budget; the atoms of the smallest ``margin``, or the first ones. Raises ValueError: there is no such
    shape, it is of another network, or the budget has no room for ``_LEAST`` channels everywhere."""
    if name not in SHAPES:
        raise ValueError(f"there are no published widths {name!r}; give one of {', '.join(SHAPES)}")
    whole, widths = SHAPES[name]
    fewest = fewest_channels(channel_map)
    sizes = [int(fewest[group.start : group.stop].sum()) for group in channel_map.groups]
    full = [width * sizes[0] // whole[0] for width in whole]  # of a wider one of the same kind, too
    if sizes != full:
        raise ValueError(
            f"{name} has widths for a network of {list(whole)} channels, and this one has groups of "
            f"{sizes}; give the widths themselves, or take the model that they are made for"
        )
    shares = [w / f for w, f in zip(widths, whole, strict=True)]
    atoms = [group.size for group in channel_map.groups]
    least = max(-(-_LEAST * count // size) for count, size in zip(atoms, sizes, strict=True))
    budget.require_widths(least)
    s = torch.repeat_interleave(torch.tensor(shares, dtype=torch.float64), torch.tensor(atoms))
    return budget.mask(s, torch.zeros_like(s) if margin is None else margin, least)
