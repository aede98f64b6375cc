"""Published weights of torchvision and timm, where their own loaders keep what they have fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from offload_sparse.workloads.models.registry import published_by_timm

PRETRAINED = "pretrained"
"""What stands in place of a path; a tag may follow behind a colon."""

_TO_HALVES = ("googlenet", "inception_v3")
"""Networks of torchvision that, built with their weights, take images of its usual mean and deviation and
turn them into ones of 0.5, by which they were trained."""


@dataclass(frozen=True)
class CachedWeights:
    """Weights on this machine, and how the images were prepared that they were trained on.

    Attributes:
        mean, std: per channel, of pixels in [0, 1].
        crop: side of the square that is cut out of the middle, in pixels.
        resize: of the shorter side before.
        interpolation: by which."""

    path: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int
    resize: int
    interpolation: str


def cached_weights(name: str, tag: str = "") -> CachedWeights:
    """The weights that a model's name stands for, by their ``tag``: empty for the best ones or, of a name of
    timm, for those of the tag behind a dot. Fetches nothing. Raises ValueError: there are none, or they have
    not been fetched: says which file to fetch."""
    family, _, short = name.partition("/")
    if family == "torchvision":
        return _torchvision(name, short, tag)
    if family == "timm":
        return _timm(name, short, tag)
    raise ValueError(f"{name} has no published weights; give a file with model.weights")


def _torchvision(name: str, short: str, tag: str) -> CachedWeights:
    import torchvision

    known = torchvision.models.get_model_weights(short)
    _check_tag(name, tag, list(known.__members__))
    weights: Any = known[tag] if tag else known.DEFAULT
    images = weights.transforms()
    path, way = _in_cache_of_torch(name, weights.url), images.interpolation.value
    sides = images.crop_size[0], images.resize_size[0]
    mean, std = tuple(images.mean), tuple(images.std)
    if short in _TO_HALVES:
        mean = std = (0.5,) * 3
    return CachedWeights(path, mean, std, *sides, way)


def _timm(name: str, short: str, tag: str) -> CachedWeights:
    import timm

    network, _, of_name = short.partition(".")
    tag = tag or of_name
    _check_tag(name, tag, [each.partition(".")[2] for each in published_by_timm(network)])
    about = timm.models.get_pretrained_cfg(f"{network}.{tag}" if tag else network)
    if about is None or not (about.url or about.hf_hub_id or about.file):
        raise ValueError(f"{name} has no published weights; give a file with model.weights")
    if about.file:
        path = Path(about.file)
    elif about.hf_hub_id:
        path = _in_cache_of_the_hub(name, about.hf_hub_id, about.hf_hub_filename)
    else:
        path = _in_cache_of_torch(name, str(about.url))
    crop = about.input_size[-1]
    return CachedWeights(
        path, tuple(about.mean), tuple(about.std), crop, round(crop / about.crop_pct), about.interpolation
    )


def _check_tag(name: str, tag: str, known: list[str]) -> None:
    if tag and tag not in known:
        raise ValueError(f"{name} has no weights {tag!r}; give one of {', '.join(known)}")


def _in_cache_of_torch(name: str, url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.is_file():
        raise ValueError(f"the weights of {name} have not been fetched; save {url} as {path}")
    return path


def _in_cache_of_the_hub(name: str, repository: str, file: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    files = [file] if file else ["model.safetensors", "pytorch_model.bin"]
    for each in files:
        found = try_to_load_from_cache(repository, each)
        if isinstance(found, str):
            return Path(found)
    raise ValueError(
        f"the weights of {name} have not been fetched; where there is a network, run: hf download "
        f"{repository} {files[0]}"
    )
