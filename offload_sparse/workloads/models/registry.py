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

# Auxiliary heads would make the output a tuple; these networks have them unless told otherwise.
_WITHOUT_AUXILIARY_HEADS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}

_RESERVED = (
    "num_classes",
    "in_channels",
    "in_chans",
    "weights",
    "pretrained",
    "pretrained_cfg",
    "checkpoint_path",
)


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
    builders = {"offload_sparse": _build_own, "torchvision": _build_torchvision, "timm": _build_timm}
    return builders[family](short, num_classes, in_channels, image_size, arguments)


def input_channels(name: str, image_channels: int) -> int:
    """Channels that a network must be built with for images of ``image_channels``: 3 for torchvision's, else
    as many.

    The data room repeats grey images for networks that take 3 channels."""
    return 3 if name.startswith("torchvision/") else image_channels


def takes_tokens(name: str) -> bool:
    """Whether a network reads sequences of tokens, and not images."""
    family, _, short = name.partition("/")
    return family == "offload_sparse" and short in _OWN and not _OWN[short][1]


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

        # True for a name with a pretrained tag too, such as resnet50.a1_in1k.
        return bool(timm.is_model(short))
    return family in FAMILIES and short in _short_names(family)


def _unknown(name: str) -> str:
    family, _, short = name.partition("/")
    if family in FAMILIES:
        near = [f"{family}/{match}" for match in difflib.get_close_matches(short, _short_names(family), 3)]
    else:
        short = short or family
        near = [
            f"{home}/{match}"
            for home in FAMILIES
            for match in difflib.get_close_matches(short, _short_names(home), 1)
        ]
    advice = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown model {name!r}{advice} (names are torchvision/…, timm/… and offload_sparse/…)"


def _build_own(
    short: str, num_classes: int, in_channels: int, image_size: int, arguments: dict[str, Any]
) -> nn.Module:
    constructor, smallest = _OWN[short]
    if image_size < smallest or (short in _ONE_SIDE and image_size > smallest):
        least = "" if short in _ONE_SIDE else "at least "
        raise ValueError(
            f"offload_sparse/{short} needs images of {least}{smallest} pixels, not {image_size}; set "
            "data.image_size or choose another model"
        )
    parameters = set(inspect.signature(constructor).parameters)
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    fixed: dict[str, Any] = {name: value for name, value in given.items() if name in parameters}
    accepted = parameters - set(_RESERVED) - {"image_size"}
    for argument in arguments:
        if argument not in accepted:
            raise ValueError(_unexpected(f"offload_sparse/{short}", argument, accepted))
    return _construct(f"offload_sparse/{short}", constructor, arguments, **fixed)


def _build_torchvision(
    short: str, num_classes: int, in_channels: int, image_size: int, arguments: dict[str, Any]
) -> nn.Module:
    import torchvision

    if in_channels != 3:
        raise ValueError(
            f"torchvision/{short} takes images of 3 channels, not {in_channels}; have grey images repeated "
            "to 3 channels, or choose a timm/ or offload_sparse/ model"
        )
    arguments = {**_WITHOUT_AUXILIARY_HEADS.get(short, {}), **arguments}
    if short.startswith("vit_"):  # the others pool adaptively
        arguments["image_size"] = image_size
    builder = torchvision.models.get_model_builder(short)
    return _construct(f"torchvision/{short}", builder, arguments, weights=None, num_classes=num_classes)


def _build_timm(
    short: str, num_classes: int, in_channels: int, image_size: int, arguments: dict[str, Any]
) -> nn.Module:
    del image_size  # networks of a fixed size take img_size among their arguments
    import timm

    def builder(**keywords: Any) -> nn.Module:
        return timm.create_model(short, **keywords)

    return _construct(
        f"timm/{short}", builder, arguments, pretrained=False, num_classes=num_classes, in_chans=in_channels
    )


def _construct(
    name: str, builder: Callable[..., nn.Module], arguments: dict[str, Any], **fixed: Any
) -> nn.Module:
    try:
        return builder(**fixed, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        if not arguments:
            raise
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected and unexpected[1] in arguments:
            raise ValueError(_unexpected(name, unexpected[1])) from error
        reason = " ".join(str(error).split())
        raise ValueError(f"model.arguments {arguments} do not fit {name}: {reason}") from error


def _unexpected(name: str, argument: str, accepted: set[str] | None = None) -> str:
    known = f"; it takes {', '.join(sorted(accepted))}" if accepted else ""
    return f"{name} has no argument {argument!r}{known}; correct model.arguments"
