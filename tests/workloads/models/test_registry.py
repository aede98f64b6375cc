"""Models by string: what is known, what is refused and how, and what an import costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from offload_sparse.workloads.models import build_model, input_channels
from offload_sparse.workloads.models.registry import _OWN

OWN = [f"offload_sparse/{name}" for name in _OWN]


def message_of(name: str, **arguments: object) -> str:
    """The one line that ``build_model`` refuses with."""
    with pytest.raises(ValueError) as caught:
        build_model(name, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_importing_the_room_loads_neither_torchvision_nor_timm() -> None:
    program = (
        "import sys, offload_sparse.workloads.models as models; "
        "models.build_model('offload_sparse/vgg_small'); "
        "print([name for name in ('timm', 'torchvision') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


IMAGES = [name for name in OWN if "decoder" not in name]  # which has tests of its own, with tokens


@pytest.mark.parametrize("name", [*IMAGES, "torchvision/resnet18", "timm/mobilenetv1_100"])
def test_every_family_builds_on_meta_with_the_asked_for_outputs(name: str) -> None:
    size = 28 if "lenet" in name else 32
    with torch.device("meta"):
        network = build_model(name, num_classes=7, in_channels=3, image_size=size)
        outputs = network(torch.empty(2, 3, size, size))
    assert outputs.shape == (2, 7)
    assert all(tensor.is_meta for tensor in network.state_dict().values())


@pytest.mark.parametrize("name", ["torchvision/googlenet", "torchvision/inception_v3"])
def test_networks_with_auxiliary_heads_are_built_without_them(name: str) -> None:
    with torch.device("meta"):
        outputs = build_model(name, num_classes=7)(torch.empty(2, 3, 299, 299))
    assert outputs.shape == (2, 7)


def test_a_vision_transformer_is_built_for_the_size_of_the_images() -> None:
    with torch.device("meta"):
        outputs = build_model("torchvision/vit_b_16", image_size=64)(torch.empty(2, 3, 64, 64))
    assert outputs.shape == (2, 10)


def test_timm_networks_take_grey_images() -> None:
    with torch.device("meta"):
        outputs = build_model("timm/resnet18", in_channels=1)(torch.empty(2, 1, 32, 32))
    assert outputs.shape == (2, 10)


def test_the_seed_of_torch_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_model("offload_sparse/vgg_small", in_channels=1).state_dict()["features.0.weight"]

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("torchvision/resnet5", "torchvision/resnet50"),
        ("timm/mobilenetv1_10", "timm/mobilenetv1_100"),
        ("timm/resnet18.nothing", "timm/resnet18"),
        ("offload_sparse/vgg19_cifr", "offload_sparse/vgg19_cifar"),
        ("resnet50", "torchvision/resnet50"),
        ("torchvison/resnet50", "timm/resnet50"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest_ones(name: str, nearest: str) -> None:
    message = message_of(name)
    assert f"unknown model {name!r}" in message
    assert nearest in message


@pytest.mark.parametrize("name", ["", "timm/", "offload_sparse/", "torchvision/fasterrcnn_resnet50_fpn"])
def test_a_name_that_is_no_classifier_is_unknown(name: str) -> None:
    assert "unknown model" in message_of(name)


@pytest.mark.parametrize("name", ["offload_sparse/vgg_small", "torchvision/resnet18", "timm/resnet18"])
def test_an_argument_that_the_constructor_does_not_take_is_named(name: str) -> None:
    assert f"{name} has no argument 'depht'" in message_of(name, depht=3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("offload_sparse/decoder", {"heads": 0}),
        ("offload_sparse/decoder", {"hidden": -3}),
        ("timm/resnet18", {"act_layer": "nothing"}),
    ],
)
def test_an_argument_that_breaks_the_constructor_is_one_line(name: str, arguments: dict[str, object]) -> None:
    """Whatever the constructor raises."""
    assert message_of(name, **arguments).startswith(f"model.arguments {arguments} do not fit {name}: ")


@pytest.mark.parametrize("width", [0, -1.0, float("nan")])
def test_a_width_that_is_not_above_zero_is_refused(width: float) -> None:
    assert "width" in message_of("offload_sparse/resnet20_cifar", width=width)


@pytest.mark.parametrize("argument", ["weights", "pretrained", "in_chans"])
def test_weights_and_channels_cannot_be_smuggled_in_as_arguments(argument: str) -> None:
    assert repr(argument) in message_of("timm/resnet18", **{argument: True})


def test_torchvision_refuses_grey_images_with_advice() -> None:
    assert "3 channels" in message_of("torchvision/resnet18", in_channels=1)
    assert input_channels("torchvision/resnet18", 1) == 3
    assert input_channels("timm/resnet18", 1) == 1


@pytest.mark.parametrize(("name", "smallest"), [("vgg16_cifar", 32), ("vgg19_cifar", 32), ("vgg_small", 8)])
def test_images_that_the_pooling_leaves_nothing_of_are_refused(name: str, smallest: int) -> None:
    with torch.device("meta"):
        assert build_model(f"offload_sparse/{name}", image_size=smallest)(
            torch.empty(2, 3, smallest, smallest)
        ).shape == (2, 10)
    assert f"at least {smallest} pixels" in message_of(f"offload_sparse/{name}", image_size=smallest - 1)


@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5_caffe"])
def test_the_lenets_take_images_of_28_pixels_only(name: str) -> None:
    assert "needs images of 28 pixels, not 32" in message_of(f"offload_sparse/{name}", image_size=32)
