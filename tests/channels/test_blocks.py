"""``block_atoms`` merges runs of neighbouring channels into one atom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from offload_sparse.channels.atoms import block_atoms
from offload_sparse.channels.channel_map import ChannelMap
from offload_sparse.channels.check import check, self_test
from offload_sparse.channels.config import chosen_block
from offload_sparse.channels.discovery import discover
from offload_sparse.export.json_values import Count
from offload_sparse.export.network_file import FinalNetwork, Kept
from offload_sparse.workloads.models import build_model
from tests.support.channel_maps import SmallNet, channel_maps, small_map


@pytest.mark.parametrize(
    ("name", "size", "block"),
    [
        ("offload_sparse/resnet20_cifar", 32, 8),
        ("offload_sparse/vgg_small", 28, 12),  # widths of 32, 64 and 128: remainders everywhere
        ("timm/mobilenetv1_100", 32, 8),
    ],
)
def test_slice_is_mask_with_blocks(name: str, size: int, block: int) -> None:
    with torch.device("meta"):
        model = build_model(name)
    inputs = (torch.zeros(2, 3, size, size),)
    single = discover(model, inputs)
    blocked = block_atoms(single, block)
    assert [g.size for g in blocked.groups] == [-(-g.size // block) for g in single.groups]
    assert check(model, inputs, blocked).error < 1e-10


@given(st.integers(1, 12), st.integers(3, 20), st.integers(3, 20), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_block_of_any_width_is_exact(block: int, first: int, second: int, seed: int) -> None:
    net = SmallNet((first, second))
    blocked = block_atoms(small_map(net), block)
    assert check(net, (torch.zeros(2, 2, 8, 8),), blocked, seed=seed).error < 1e-10


@given(channel_maps(), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_a_coarse_mask_keeps_exactly_the_channels_of_its_blocks(channel_map: ChannelMap, block: int) -> None:
    blocked = block_atoms(channel_map, block)
    assert [g.name for g in blocked.groups] == [g.name for g in channel_map.groups]
    assert blocked.shapes == channel_map.shapes
    number: dict[int, int] = {}
    for name, axes in channel_map.axes.items():
        for fine, coarse in zip(axes, blocked.axes[name], strict=True):
            assert (fine is None) == (coarse is None)
            if fine is not None and coarse is not None:
                for a, b in zip(fine.tolist(), coarse.tolist(), strict=True):
                    assert number.setdefault(a, b) == b, "an atom goes to one block"
                    assert (a < 0) == (b < 0), "what is always kept stays so"
    for fine_group, coarse_group in zip(channel_map.groups, blocked.groups, strict=True):
        found = [number[a] for a in range(fine_group.start, fine_group.stop) if a in number]
        assert found == sorted(found)
        assert all(coarse_group.start <= b < coarse_group.stop for b in found)


def test_one_channel_per_atom_changes_nothing_and_less_is_refused() -> None:
    channel_map = small_map(SmallNet())
    assert block_atoms(channel_map, 1) is channel_map
    for block in (0, "8x"):
        with pytest.raises(ValueError, match=rf"atoms\.block is {block}; give at least 1 channel per atom"):
            block_atoms(channel_map, block)


@pytest.mark.parametrize(
    ("block", "atoms"),
    [("<=8", [12, 9, 8, 16]), ("<=16", [12, 9, 8, 8]), ("<=1", [12, 36, 64, 128]), ("8", [2, 5, 8, 16])],
)
def test_runs_are_shortened_until_eight_atoms_are_left(block: str, atoms: list[int]) -> None:
    """Of 12, 36, 64 and 128 channels; without ``<=`` runs have the length that is asked for."""
    widths = [12, 36, 64, 128]
    layers = [nn.Conv2d(a, b, 1) for a, b in zip([3, *widths], [*widths, 2], strict=True)]
    found = discover(nn.Sequential(*layers), (torch.zeros(2, 3, 4, 4),))
    assert [group.size for group in block_atoms(found, block).groups] == atoms


def test_auto_is_one_channel_on_a_cpu() -> None:
    assert chosen_block("auto", "cpu", bf16=True) == 1
    assert (chosen_block("auto", "cuda"), chosen_block("auto", "cuda", bf16=True)) == ("<=8", "<=16")
    assert chosen_block("4", "cuda") == "4"


def test_an_atom_of_several_channels_counts_as_that_many() -> None:
    net = nn.Sequential(nn.Conv2d(2, 24, 1), nn.Conv2d(24, 24, 3, groups=6), nn.Conv2d(24, 3, 1))
    found = discover(net, (torch.zeros(2, 2, 8, 8),))
    assert found.num_atoms == 6, "each group of four channels is one atom"
    assert block_atoms(found, 4).num_atoms == 6
    assert block_atoms(found, 8).num_atoms == 3
    assert block_atoms(found, 16).num_atoms == 2, "the last atom takes the remainder"


def test_the_export_lists_channels_whatever_an_atom_is() -> None:
    net = SmallNet((6, 8))
    blocked = block_atoms(small_map(net), 4)
    mask = torch.tensor([False, True, True, False])
    assert FinalNetwork(net, mask, blocked).kept_channels() == {
        "conv1": Kept(Count(6), tuple(map(Count, (4, 5)))),
        "conv2": Kept(Count(8), tuple(map(Count, range(4)))),
    }


def test_blocks_of_a_filter_map_move_unions_and_additions_along() -> None:
    """Every filter its own mask, eight filters per atom: slice = mask, and streams hold unions of blocks."""
    model = build_model("offload_sparse/resnet20_cifar")
    inputs = (torch.empty(1, 3, 16, 16),)
    fine = discover(model, inputs, "filter")
    coarse = block_atoms(fine, 8)
    assert coarse.num_ids - coarse.num_atoms == fine.num_ids - fine.num_atoms
    assert coarse.num_atoms * 8 == fine.num_atoms
    assert self_test(model, inputs, coarse).error < 1e-10
