"""Models by string: ``torchvision/<name>``, ``timm/<name>`` and ``offload_sparse/<name>``."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from offload_sparse.workloads.models import decoder, lenet, mlp, resnet, vgg

FAMILIES = ("offload_sparse", "torchvision", "timm")

# Constructor and the smallest side of an image that its pooling leaves something of; 0 for one of tokens.
_OWN: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "decoder": (decoder.Decoder, 0),
    "lenet5_caffe": (lenet.LeNet5, 28),
    "lenet_300_100": (lenet.LeNet300, 28),
    "resnet18_cifar": (partial(resnet.ResNet, (64, 128, 256, 512), 2), 1),
    "mlp": (mlp.MLP, 1),
    "resnet20_cifar": (partial(resnet.ResNet, (16, 32, 64), 3), 1),
    "resnet32_cifar": (partial(resnet.ResNet, (16, 32, 64), 5), 1),
    "resnet32_wide_cifar": (partial(resnet.ResNet, (32, 64, 128), 5), 1),  # of Zhou et al. 2021, remark 5
    "vgg16_cifar": (partial(vgg.VGG, vgg.VGG16), 32),
    "vgg16_dst_cifar": (partial(vgg.VGG, vgg.VGG16, hidden=512), 16),
    "vgg19_cifar": (partial(vgg.VGG, vgg.VGG19), 32),
    "vgg_small": (partial(vgg.VGG, vgg.SMALL), 8),
    "wrn28_10_cifar": (partial(resnet.WideResNet, 4, 10), 1),
}

_ONE_SIDE = ("lenet5_caffe", "lenet_300_100")
"""Networks that flatten their last feature map, and take images of their smallest side only."""

_AUXILIARY_HEADS = ("googlenet", "inception_v3")
"""Networks that have such heads, which would make the output a tuple, unless they are told otherwise."""

_RESERVED = ("in_chans", "weights", "pretrained", "pretrained_cfg", "checkpoint_path")
_GIVEN = ("num_classes", "in_channels", "image_size")


def build_model(
    name: str, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, **arguments: Any
) -> nn.Module:
    """A classifier with fresh weights, drawn from torch's global generator (or none, under
    ``torch.device("meta")``): float[N, in_channels, H, W] to float[N, num_classes], or int64[N, L] to
    float[N, L, num_classes] where ``takes_tokens``. Raises ValueError: the name is unknown, an argument does
    not fit the model, or the images do not.

    Args:
        name: ``torchvision/<name>``, ``timm/<name>`` or ``offload_sparse/<name>``.
        in_channels: torchvision's networks take 3 only.
        image_size: shorter side of the images in pixels; only checked against what the network can pool.
        arguments: further keyword arguments of the constructor."""
    family, _, short = name.partition("/")
    if not _is_known(family, short):
        raise ValueError(_unknown(name))
    for argument in arguments:
        if argument in _RESERVED:
            raise ValueError(
                f"model.arguments must not set {argument!r}: it follows from the data or would load weights; "
                "remove it"
            )
    constructors = {"offload_sparse": _own, "torchvision": _of_torchvision, "timm": _of_timm}
    constructor = constructors[family](short, num_classes, in_channels, image_size)
    try:
        return constructor(**arguments)
    except Exception as error:  # which one says that an argument does not fit is the constructor's choice
        if not arguments:
            raise
        raise ValueError(_unfit(name, arguments, constructor, error)) from error


def input_channels(name: str, image_channels: int) -> int:
    """Channels that a network must be built with for images of ``image_channels``: 3 for torchvision's, else
    as many.

    The data room repeats grey images for networks that take 3 channels."""
    return 3 if name.startswith("torchvision/") else image_channels


def takes_tokens(name: str) -> bool:
    """Whether a network reads sequences of tokens, and not images."""
    family, _, short = name.partition("/")
    return family == "offload_sparse" and short in _OWN and not _OWN[short][1]


def published_by_timm(short: str) -> list[str]:
    """The names, each with its tag, of the weights that there are for a network of timm; its own tag, if it
    has one, counts for nothing."""
    import timm

    names: list[str] = timm.list_pretrained(f"{short.partition('.')[0]}.*")
    return names


def _short_names(family: str) -> list[str]:
    if family == "torchvision":
        import torchvision

        return sorted(torchvision.models.list_models(module=torchvision.models))
    if family == "timm":
        import timm

        return sorted(timm.list_models())
    return sorted(_OWN)


def _is_known(family: str, short: str) -> bool:
    if family == "timm":
        import timm

        _, _, tag = short.partition(".")  # as in resnet50.a1_in1k
        return bool(timm.is_model(short)) and (not tag or short in published_by_timm(short))
    return family in FAMILIES and short in _short_names(family)


def _unknown(name: str) -> str:
    family, slash, short = name.partition("/")
    homes = (family,) if family in FAMILIES else FAMILIES
    near = [
        f"{home}/{match}"
        for home in homes
        for match in difflib.get_close_matches(short if slash else name, _short_names(home), 3 // len(homes))
    ]
    advice = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown model {name!r}{advice} (names are torchvision/…, timm/… and offload_sparse/…)"


def _own(short: str, num_classes: int, in_channels: int, image_size: int) -> partial[nn.Module]:
    constructor, smallest = _OWN[short]
    if image_size < smallest or (short in _ONE_SIDE and image_size > smallest):
        least = "" if short in _ONE_SIDE else "at least "
        raise ValueError(
            f"offload_sparse/{short} needs images of {least}{smallest} pixels, not {image_size}; set "
            "data.image_size or choose another model"
        )
    taken = inspect.signature(constructor).parameters
    given = zip(_GIVEN, (num_classes, in_channels, image_size), strict=True)
    return partial(constructor, **{name: value for name, value in given if name in taken})


def _of_torchvision(short: str, num_classes: int, in_channels: int, image_size: int) -> partial[nn.Module]:
    import torchvision

    if in_channels != 3:
        raise ValueError(
            f"torchvision/{short} takes images of 3 channels, not {in_channels}; have grey images repeated "
            "to 3 channels, or choose a timm/ or offload_sparse/ model"
        )
    own: dict[str, Any] = {}
    if short in _AUXILIARY_HEADS:
        own = {"aux_logits": False, "init_weights": False}
    if short.startswith("vit_"):  # the others pool adaptively
        own = {"image_size": image_size}
    builder = torchvision.models.get_model_builder(short)
    return partial(builder, weights=None, num_classes=num_classes, **own)


def _of_timm(short: str, num_classes: int, in_channels: int, image_size: int) -> partial[nn.Module]:
    del image_size  # networks of a fixed size take img_size among their arguments
    import timm

    return partial(timm.create_model, short, pretrained=False, num_classes=num_classes, in_chans=in_channels)


def _unfit(name: str, arguments: dict[str, Any], constructor: partial[nn.Module], error: Exception) -> str:
    """What is wrong with the arguments of a network, whose constructor has refused them by ``error``."""
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not unexpected or unexpected[1] not in arguments:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:200]
        return f"model.arguments {arguments} do not fit {name}: {reason}"
    known = set(inspect.signature(constructor).parameters) if name.startswith("offload_sparse/") else set()
    takes = f"; it takes {', '.join(sorted(known.difference(_GIVEN)))}" if known else ""
    return f"{name} has no argument {unexpected[1]!r}{takes}; correct model.arguments"
