"""Masks over single weights: surrogate and thresholds against autograd in float64; what is never masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from offload_sparse.methods.weight_masks.dfbst import ForwardBackwardThresholds, mask_gradients
from offload_sparse.methods.weight_masks.dst import TrainableThresholds
from offload_sparse.methods.weight_masks.sparsity import (
    MaskedNetwork,
    MaskedWeight,
    absolute_threshold,
    along,
    maskable_weights,
    row_sum,
    step_slope,
    unit_step,
)


class ReferenceStep(torch.autograd.Function):
    """U(x) with the surrogate written out as the paper does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slopes = [
            2 - 4 * abs(v) if abs(v) <= 0.4 else 0.4 if abs(v) <= 1 else 0.0 for v in x.flatten().tolist()
        ]
        return grads[0] * torch.tensor(slopes, dtype=x.dtype).view(x.shape)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("x", "slope"), [(0, 2), (0.25, 1), (-0.25, 1), (0.4, 0.4), (-0.7, 0.4), (1, 0.4), (1.01, 0), (-3, 0)]
)
def test_the_surrogate_is_that_of_the_papers(x: float, slope: float) -> None:
    assert step_slope(torch.tensor([x], dtype=torch.float64)).item() == pytest.approx(slope, abs=1e-12)


def test_the_unit_step_is_one_at_zero() -> None:
    assert unit_step(torch.tensor([-1e-9, -0.0, 0.0, 2.0])).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3)])
def test_a_masked_weight_and_its_gradients_equal_the_written_out_form(shape: tuple[int, ...]) -> None:
    weight, upstream = random(*shape).requires_grad_(), random(*shape, seed=1)
    threshold = random(shape[0], seed=2).abs().requires_grad_()
    expected = weight * ReferenceStep.apply(weight.abs() - along(threshold, weight))
    wanted = torch.autograd.grad(expected, (weight, threshold), upstream)
    found = MaskedWeight.apply(weight, threshold)
    assert torch.equal(found, expected)
    assert 0 < int((found == 0).sum()) < found.numel()
    for ours, reference in zip(
        torch.autograd.grad(found, (weight, threshold), upstream), wanted, strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_the_absolute_threshold_leaves_zero() -> None:
    threshold = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    value = absolute_threshold(threshold)
    (slope,) = torch.autograd.grad(value.sum(), threshold)
    assert value.tolist() == [2, 0, 3]
    assert slope.tolist() == [-1, 1, 1]


def reference_penalty(gradients: list[Tensor], thresholds: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """std of all masked gradients, and these, with autograd through the thresholds only."""
    masked = []
    for gradient, threshold in zip(gradients, thresholds, strict=True):
        matrix = gradient.detach().flatten(1)
        scores = matrix.abs() / matrix.abs().sum(1, keepdim=True)
        mask = ReferenceStep.apply(scores - absolute_threshold(threshold)[:, None])
        masked.append((matrix * mask).view(gradient.shape))
    return torch.cat([values.flatten() for values in masked]).std(), masked


def test_the_variance_penalty_equals_autograd() -> None:
    """Its backward masks and the gradient of its thresholds."""
    gradients = [random(6, 5), random(4, 2, 3, 3, seed=1, scale=0.1)]
    thresholds = [
        random(6, seed=2, scale=0.2).requires_grad_(),
        random(4, seed=3, scale=0.05).requires_grad_(),
    ]
    penalty, masked = reference_penalty(gradients, thresholds)
    wanted = torch.autograd.grad(penalty, thresholds)
    own = [gradient.clone() for gradient in gradients]
    slopes, kept = mask_gradients(own, [threshold.detach() for threshold in thresholds])
    for ours, reference in zip([*own, *slopes], [*masked, *wanted], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-13)
    assert kept.tolist() == [float((values != 0).double().mean()) for values in masked]
    assert 0 < float(kept.min()) < 1


@given(rows=st.integers(1, 5), columns=st.integers(1, 6), seed=st.integers(0, 99), dead=st.booleans())
@settings(max_examples=30, deadline=None)
def test_zero_thresholds_keep_every_gradient_even_of_rows_without_any(
    rows: int, columns: int, seed: int, dead: bool
) -> None:
    gradient = random(rows, columns, seed=seed)
    gradient[0] *= not dead
    own = gradient.clone()
    (slope,), kept = mask_gradients([own], [torch.zeros(rows, dtype=torch.float64)])
    assert torch.equal(own, gradient)
    assert kept.tolist() == [1]
    assert slope.isfinite().all()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return nn.Sequential(*layers).double()


def test_only_weights_of_linear_and_convolution_are_masked() -> None:
    network = net()
    assert list(maskable_weights(network)) == ["0.weight", "4.weight"]
    sparsity = TrainableThresholds(maskable_weights(network), 0.1, absolute=True)
    with torch.no_grad():
        for threshold in sparsity.thresholds:
            threshold.fill_(1e9)
    out = MaskedNetwork(network.eval(), sparsity)(random(2, 1, 8, 8))
    torch.testing.assert_close(out, network[4].bias.expand(2, 3), rtol=0, atol=0)


def test_a_shared_weight_is_masked_once() -> None:
    layer = nn.Linear(3, 3)
    assert list(maskable_weights(nn.Sequential(layer, nn.ReLU(), layer))) == ["0.weight"]


def test_a_network_without_weights_to_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="no Linear or Conv2d"):
        maskable_weights(nn.Sequential(nn.ReLU()))


def test_the_penalty_on_variance_reaches_the_gradient_thresholds_only() -> None:
    network, images = net(), random(8, 1, 8, 8)

    def gradients(beta: float) -> tuple[list[Tensor], list[Tensor]]:
        sparsity = ForwardBackwardThresholds(maskable_weights(network), 0.1, beta)
        masked = MaskedNetwork(network, sparsity)
        network.zero_grad()
        (masked(images).square().mean() + sparsity.penalty()).backward()
        sparsity.amend_gradients(0, torch.optim.SGD(network.parameters()))
        shared = [p.grad.clone() for p in (*network.parameters(), *sparsity.thresholds)]
        return shared, [p.grad.clone() for p in sparsity.own]

    without, own_without = gradients(0.0)
    with_it, own_with = gradients(5.0)
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))
    assert all(not values.any() for values in own_without)
    assert all(values.any() for values in own_with)


def test_the_sparsity_penalty_is_the_sum_of_exponentials() -> None:
    sparsity = TrainableThresholds(maskable_weights(net()), 0.5, absolute=False)
    with torch.no_grad():
        sparsity.thresholds[0].copy_(torch.tensor([0.0, 1.0, 2.0, -1.0]))
    e = torch.e
    expected = 0.5 * (1 + 1 / e + 1 / e**2 + e + 3)
    assert sparsity.penalty().item() == pytest.approx(expected)


def test_a_layer_with_one_percent_left_starts_anew_and_others_do_not() -> None:
    network = net()
    sparsity = TrainableThresholds(maskable_weights(network), 0.5, absolute=False)
    limit = network[4].weight.abs().quantile(0.5)
    with torch.no_grad():
        sparsity.thresholds[0].fill_(1e9)
        sparsity.thresholds[1].fill_(limit)
    sparsity.settle()
    assert (sparsity.thresholds[0] == 0).all()
    assert (sparsity.thresholds[1] == limit).all()
    assert sparsity.forward_kept.tolist() == [1, pytest.approx(0.5, abs=0.01)]


def test_row_sums_of_a_filter_run_over_all_of_it() -> None:
    values = random(3, 2, 5, 5)
    torch.testing.assert_close(row_sum(values), values.flatten(1).sum(1))
