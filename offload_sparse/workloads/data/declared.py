"""What a configuration says about its images, for those who must not read them."""

from __future__ import annotations

from dataclasses import dataclass

from offload_sparse.workloads.config import DataConfig

_EMBEDDED = {"num_classes": 10, "channels": 1, "image_size": 28, "train_images": 12_000}


@dataclass(frozen=True)
class DeclaredData:
    """A data set, unread.

    Attributes:
        num_classes: classes.
        channels: channels of the images.
        image_size: their side in pixels.
        train_images: images that training reads per epoch, after what is held out and limited.
    """

    num_classes: int
    channels: int
    image_size: int
    train_images: int


def declared_data(config: DataConfig) -> DeclaredData:
    """The data set as ``config`` declares it.

    Raises:
        ValueError: the configuration leaves something open; names the key.
    """
    known = _EMBEDDED if config.name == "fashion_mnist_small" else {}
    values = {name: getattr(config, name) or known.get(name, 0) for name in _EMBEDDED}
    for name, value in values.items():
        if not value:
            raise ValueError(
                f"data.{name} is 0, but the images of {config.name!r} are not read here; set data.{name}"
            )
    if not config.validation_split:
        values["train_images"] -= round(config.validation_size * values["train_images"])
    if config.train_limit:
        values["train_images"] = min(values["train_images"], config.train_limit)
    return DeclaredData(**values)
