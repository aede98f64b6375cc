"""The weights that a run starts from, and the preparation of images that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from offload_sparse.config.run import RunConfig
from offload_sparse.engine.distributed import on_every_rank
from offload_sparse.engine.pretrained import NEW_HEAD, FittedWeights, WeightSource
from offload_sparse.export.description import Preprocessing
from offload_sparse.workloads.config import LOGITS_ONLY, DataConfig
from offload_sparse.workloads.data.source import listed
from offload_sparse.workloads.models.weight_cache import PRETRAINED, CachedWeights, cached_weights


def weight_source(config: RunConfig) -> WeightSource | None:
    """What ``model.weights`` names, opened; None where training starts afresh. Raises ValueError: there are
    no weights, or they cannot be read; one line, on every rank."""
    text = config.model.weights.removesuffix(LOGITS_ONLY)
    published = on_every_rank(lambda: _published(config))
    if published is None:
        return WeightSource(text) if text else None
    source = WeightSource(f"{published.path}{NEW_HEAD if text.endswith(NEW_HEAD) else ''}")
    source.preprocessing = Preprocessing(published.mean, published.std)
    return source


def fitted_weights(
    source: WeightSource | None, model: nn.Module, classes: Sequence[str], begins: bool
) -> FittedWeights | None:
    """The weights of ``source``, known to fit the network ``model`` and, where a run begins, ``classes``, the
    names of the classes of its images by number. Raises ValueError: they do not; one line with advice."""
    if source is None:
        return None
    weights = source.fitted(model)  # which has advice of its own where the classes are not as many
    theirs = source.preprocessing.class_names
    if begins and theirs and theirs != tuple(classes) and not source.new_head:
        raise ValueError(
            f"{source.path} knows the classes {listed(theirs)}, and the images have {listed(classes)}; "
            f"{NEW_HEAD} behind the path starts the last layer afresh, data.class_map renames classes"
        )
    return weights


def prepared_images(
    config: RunConfig, weights: FittedWeights | None, shape: Sequence[int]
) -> tuple[DataConfig, tuple[str, ...]]:
    """The data section with the mean and the deviation of the images that ``weights`` were trained on, unless
    it gives its own; and what to tell about them and what else differs from the run's images, whose ``shape``
    is channels, height and width."""
    data = config.data
    if weights is None:
        return data, ()
    lines, theirs = list(weights.lines), weights.preprocessing
    if not config.model.trained:
        lines.append("  for their logits only; training starts from fresh ones")
    if len(theirs.mean) == shape[0] and not (data.mean or data.std):
        data = replace(data, mean=list(theirs.mean), std=list(theirs.std))
        lines.append(f"  mean and std of the images as they were trained on: {_shown(data.mean, data.std)}")
    elif theirs.mean and (list(theirs.mean), list(theirs.std)) != (list(data.mean), list(data.std)):
        lines.append(f"  they were trained on images of mean and std {_shown(theirs.mean, theirs.std)}")
    published = _published(config)
    if published is not None:
        ours = (shape[1], data.eval_resize or shape[1], "bilinear")
        if (theirs_too := (published.crop, published.resize, published.interpolation)) != ours:
            side, resize, way = theirs_too
            lines.append(
                f"  they were evaluated on {side} pixels of {resize} ({way}), this run on {ours[0]} of "
                f"{ours[1]} ({ours[2]}): see data.image_size and data.eval_resize"
            )
    return data, tuple(lines)


def _published(config: RunConfig) -> CachedWeights | None:
    text = config.model.weights.removesuffix(LOGITS_ONLY)
    word, _, tag = text.removesuffix(NEW_HEAD).partition(":")
    return cached_weights(config.model.name, tag) if word == PRETRAINED else None


def _shown(mean: Sequence[float], std: Sequence[float]) -> str:
    return ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, std, strict=True))
