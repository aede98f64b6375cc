"""Evaluation counts each image once, BatchNorm statistics are a plain average: against float64 references."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from offload_sparse.engine.batch_norm import reestimate_batch_norm
from offload_sparse.run.evaluation import evaluate

Batches = list[tuple[Tensor, Tensor]]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 5),
    ).double()


def batches(sizes: list[int], seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 2, 7, 7, dtype=torch.float64, generator=generator),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for size in sizes
    ]


def identity(images: Tensor) -> Tensor:
    return images


def test_loss_and_accuracy_are_means_over_images_not_over_batches() -> None:
    model, data = network(), batches([7, 1, 4])
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    result = evaluate(model, data, identity, "cpu")
    logits = model.eval()(images)
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    assert result.loss == pytest.approx(-log_probabilities[torch.arange(12), labels].mean().item(), rel=1e-12)
    assert result.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert result.count == 12


def test_the_transform_is_applied_to_every_batch() -> None:
    model, data = network(), batches([3, 2])
    halved = [(images / 2, labels) for images, labels in data]
    assert evaluate(model, data, lambda images: images / 2, "cpu") == evaluate(model, halved, identity, "cpu")


def test_sums_over_ranks_give_the_figures_of_one_process() -> None:
    """Two ranks with different numbers of images; the second one's sums are what the reduction adds."""
    model, data = network(), batches([7, 1, 4])
    sums: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        sums.append(tensor.clone())
        return tensor

    evaluate(model, data[2:], identity, "cpu", keep)
    result = evaluate(model, data[:2], identity, "cpu", lambda tensor: tensor + sums[0])
    alone = evaluate(model, data, identity, "cpu")
    assert result.count == alone.count == 12
    assert result.accuracy == alone.accuracy
    assert result.loss == pytest.approx(alone.loss, rel=1e-14)


def test_a_rank_without_images_still_joins_the_reduction() -> None:
    others = torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])
    result = evaluate(network(), [], identity, "cpu", lambda sums: sums + others)
    assert (result.loss, result.accuracy, result.count) == (0.5, 0.25, 4)


@pytest.mark.parametrize(
    ("bias", "labels", "one_class"), [(9.0, [1, 2], True), (9.0, [4, 4], False), (0.0, [1, 2], False)]
)
def test_a_network_that_knows_one_class_only_is_noticed(
    bias: float, labels: list[int], one_class: bool
) -> None:
    model = nn.Linear(5, 5)
    with torch.no_grad():
        model.weight.copy_(torch.eye(5))
        model.bias.copy_(torch.tensor([0, 0, 0, 0, bias]))
    data = [(torch.eye(5)[[label]], torch.tensor([label])) for label in labels]
    assert evaluate(model, data, identity, "cpu").one_class == one_class


def test_no_images_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images to evaluate on"):
        evaluate(network(), [], identity, "cpu")


def failing(images: Tensor) -> Tensor:
    raise RuntimeError("the disk is gone")


@pytest.mark.parametrize("fails", [False, True])
def test_every_training_flag_is_put_back_and_no_state_changes(fails: bool) -> None:
    model = network()
    model.train()
    model[1].eval()  # a BatchNorm that the user has frozen
    flags = [layer.training for layer in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError):
            evaluate(model, batches([4]), failing, "cpu")
    else:
        evaluate(model, batches([4]), identity, "cpu")
    assert [layer.training for layer in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def expected_statistics(model: nn.Sequential, data: list[Tensor]) -> list[Tensor]:
    """Running mean and variance of both BatchNorms, by definition: averages of the batches' own."""
    first, second = [], []
    for x in data:
        a = model[0](x)
        first.append((a.mean((0, 2, 3)), a.var((0, 2, 3), correction=1)))
        centred = (a - a.mean((0, 2, 3), keepdim=True)) / (
            a.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
        ).sqrt()
        scale, shift = (t.view(1, -1, 1, 1) for t in (model[1].weight, model[1].bias))
        b = model[4](torch.relu(centred * scale + shift))  # without dropout
        second.append((b.mean((0, 2, 3)), b.var((0, 2, 3), correction=1)))
    return [
        torch.stack(values).mean(0).detach() for part in (first, second) for values in zip(*part, strict=True)
    ]


def statistics(model: nn.Sequential) -> list[Tensor]:
    return [tensor for norm in (model[1], model[5]) for tensor in (norm.running_mean, norm.running_var)]


def test_running_statistics_become_those_of_the_batches() -> None:
    """The average over the batches, all with equal weights, but those that are not finite."""
    model, data = network(), [images for images, _ in batches([9, 3, 6])]
    bad = torch.full_like(data[0], torch.nan)
    with torch.no_grad():
        model[1].running_mean.fill_(99)
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
    reestimate_batch_norm(model, iter([bad, data[0], bad, *data[1:]]))
    for got, expected in zip(statistics(model), expected_statistics(model, data), strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-13)


def on_ranks(models: Sequence[nn.Module], parts: Sequence[Sequence[Tensor]]) -> list[BaseException | None]:
    """Every model on its part of the batches, as ranks do it; what each has raised."""
    given, meet = [Tensor()] * len(models), threading.Barrier(len(models), timeout=60)

    def rank(number: int) -> None:
        def mean(tensor: Tensor) -> Tensor:
            given[number] = tensor
            meet.wait()
            result = sum(given, torch.zeros_like(tensor)) / len(given)
            meet.wait()
            return result

        reestimate_batch_norm(models[number], parts[number], mean)

    with ThreadPoolExecutor(len(models)) as pool:
        return [job.exception() for job in [pool.submit(rank, number) for number in range(len(models))]]


@pytest.mark.parametrize("cuts", [(2, 4), (3, 3), (1, 5)])
def test_averages_over_ranks_are_those_over_all_their_batches(cuts: tuple[int, int]) -> None:
    """However many a rank has, none at all included."""
    data = [images for images, _ in batches([4] * 5)]
    alone, ranks = network(), [network() for _ in range(3)]
    reestimate_batch_norm(alone, data)
    assert on_ranks(ranks, [data[: cuts[0]], data[cuts[0] : cuts[1]], data[cuts[1] :]]) == [None] * 3
    for rank in ranks:
        for got, expected in zip(statistics(rank), statistics(alone), strict=True):
            assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_no_finite_batch_on_any_rank_is_an_error_on_all() -> None:
    errors = on_ranks([network(), network()], [[], [batches([4])[0][0] * torch.inf]])
    assert ["need at least one batch" in str(error) for error in errors] == [True, True]


def test_a_batch_norm_that_no_batch_reaches_stays_as_it_is() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(2).double(), nn.BatchNorm2d(2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, data = Branches(), [images for images, _ in batches([4, 4])]
    known = {"running_mean": torch.full((2,), 3.0), "running_var": torch.full((2,), 4.0)}
    model.unused.load_state_dict(known, strict=False)
    reestimate_batch_norm(model, data)
    assert model.unused.state_dict()["running_mean"].tolist() == [3, 3]
    assert model.unused.state_dict()["running_var"].tolist() == [4, 4]
    means = torch.stack([images.mean((0, 2, 3)) for images in data])
    assert torch.allclose(model.used.state_dict()["running_mean"], means.mean(0))


def test_momenta_flags_weights_and_gradients_are_as_before() -> None:
    model = network().eval()
    model[3].train()
    flags = [layer.training for layer in model.modules()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    reestimate_batch_norm(model, [images for images, _ in batches([4])])
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.3)
    assert [layer.training for layer in model.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_statistics_that_are_views_of_a_flat_buffer_stay_views() -> None:
    model = network()
    flat = torch.zeros(8, dtype=torch.float64)
    model[1].running_mean, model[1].running_var = flat[:4], flat[4:]
    data = [images for images, _ in batches([4, 4])]
    reestimate_batch_norm(model, data, lambda tensor: tensor)
    assert torch.allclose(flat, torch.cat(expected_statistics(model, data)[:2]))


def test_without_batches_the_statistics_are_kept_and_an_error_says_so() -> None:
    model = network()
    model[1].running_mean.fill_(3)
    with pytest.raises(ValueError, match=r"give some to .*finalize\(\)"):
        reestimate_batch_norm(model, [])
    assert (model[1].running_mean == 3).all()


def test_a_network_without_batch_norm_reads_nothing() -> None:
    def unread() -> Tensor:
        raise AssertionError("no batch is needed")

    reestimate_batch_norm(nn.Linear(2, 2), (unread() for _ in range(1)))
