"""ImageNet classifiers as encoders of boxes: the whole picture through the trunk, the classifier on box vectors alone.

Four networks are known: torchvision's ResNet-50 and ResNet-101, and the MSRA variant of both under Detectron2's names
(stride in the 1x1 convolution, fixed batch norm). Each brings its normalisation, channel order and stride. The
classifier's average pooling and its pass over the whole picture, which nobody reads, are left out; batch norm is folded
into the convolutions and the memory format is channels-last, which changes results by rounding alone and saves a tenth
of the time on a CPU.

Source: DeFRCN (Qiao et al., ICCV 2021), section 3.4, whose code takes torchvision's ResNet-101.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import roi_align

from fsdet.modeling.class_memory import module_digest

CLASSES = 1000  # of ImageNet
# Raise it when the numbers that `ImageEncoder` computes from the same weights change.
_ENCODING = "box logits 1"
_COUNTER = "num_batches_tracked"  # of batch norm: absent in older files, and without effect


@dataclass(frozen=True)
class Network:
    """How a classifier is built and fed.

    Attributes:
        build: makes it; its direct children, in the order of its forward pass, end with "avgpool" and one linear layer.
        pixel_mean, pixel_std: per channel of `channel_order`, for pixel values from 0 to 255.
        channel_order: "RGB" or "BGR".
        stride: pixels per cell of the last feature map.
        origin: where its weights come from, for messages.
    """

    build: Callable[[], nn.Module]
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    channel_order: str
    stride: int
    origin: str


def _msra(depth: int) -> ResNet:
    """ResNet as Detectron2 names it, strided in its 1x1 convolutions, with the classifier."""
    stages = ResNet.make_default_stages(depth, stride_in_1x1=True, norm="FrozenBN")
    return ResNet(BasicStem(3, 64, norm="FrozenBN"), stages, num_classes=CLASSES)


# The usual ImageNet statistics; torchvision states them for pixel values up to 1. The MSRA models divide by nothing.
_TORCHVISION_INPUT: dict[str, Any] = {
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
    "channel_order": "RGB",
    "stride": 32,
    "origin": "torchvision's ImageNet weights (a .pth file)",
}
_MSRA_INPUT: dict[str, Any] = {
    "pixel_mean": (103.53, 116.28, 123.675),
    "pixel_std": (1.0, 1.0, 1.0),
    "channel_order": "BGR",
    "stride": 32,
    "origin": "the MSRA weights under Detectron2's names, with linear.weight and linear.bias",
}
NETWORKS: dict[str, Network] = {
    "resnet101": Network(torchvision.models.resnet101, **_TORCHVISION_INPUT),
    "resnet50": Network(torchvision.models.resnet50, **_TORCHVISION_INPUT),
    "resnet101_msra": Network(functools.partial(_msra, 101), **_MSRA_INPUT),
    "resnet50_msra": Network(functools.partial(_msra, 50), **_MSRA_INPUT),
}


class ImageEncoder(nn.Module):
    """Boxes on a picture -> the classifier's output for each, without gradients and in float32 always.

    Under mixed precision too: cosines of prototypes are compared down to their third digit, where bfloat16 ends, and a
    class memory has to fit whatever precision a later run uses.

    Attributes:
        digest: SHA-256 of weights and settings, before folding, which rounds differently from machine to machine.
    """

    def __init__(
        self,
        trunk: nn.Module,
        classifier: nn.Linear,
        *,
        stride: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        channel_order: str,
    ) -> None:
        """Take over the two modules: they are put into evaluation mode and their batch norm is folded.

        Args:
            trunk: (1, 3, H, W) float -> feature map (1, C, h, w), one cell per `stride` pixels.
            classifier: C -> D.
            stride, pixel_mean, pixel_std, channel_order: as in `Network`.
        """
        super().__init__()
        self.trunk, self.classifier = trunk, classifier
        self.stride, self.channel_order = stride, channel_order
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        self.digest = module_digest(self, _ENCODING, stride, channel_order)
        fold_batch_norm(self.trunk)
        self.trunk.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.pixel_mean.device

    @torch.no_grad()
    def feature_map(self, picture: Any, image_format: str = "BGR") -> Tensor:
        """Features of the whole picture, neither resized nor padded.

        Args:
            picture: (H, W, 3) uint8 tensor or array.
            image_format: its channel order, "BGR" or "RGB".
        Returns: (1, C, ceil(H / stride), ceil(W / stride)) float32.
        """
        if not isinstance(picture, Tensor):
            picture = torch.tensor(np.ascontiguousarray(picture))  # a reversed or read-only view as well
        with torch.autocast(self.device.type, enabled=False):
            image = picture.to(self.device).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
            if image_format != self.channel_order:
                image = image.flip(1)
            image = (image - self.pixel_mean) / self.pixel_std
            with _no_tf32():
                return self.trunk(image.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def forward(self, picture: Any, boxes: Tensor, image_format: str = "BGR") -> Tensor:
        """Encode boxes.

        Args:
            picture: (H, W, 3) uint8 tensor or array.
            boxes: (M, 4) XYXY in pixels of the picture.
            image_format: channel order of the picture.
        Returns: (M, D) float32: one RoIAlign cell per box through the classifier (logits with bias, no softmax).
        """
        features = self.feature_map(picture, image_format)
        with torch.autocast(self.device.type, enabled=False):
            rois = [boxes.to(self.device, torch.float32)]
            # Sampling ratio 0: as many points as the box covers cells.
            vectors = roi_align(features, rois, 1, 1.0 / self.stride, 0, aligned=True)  # (M, C, 1, 1)
            return self.classifier(vectors.flatten(1))


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Convolutions on a GPU with all bits of float32; PyTorch's default keeps ten of the mantissa."""
    former = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = former


def fold_batch_norm(module: nn.Module) -> None:
    """Fold every fixed batch norm into the convolution before it, in place; needs evaluation mode.

    That is a `BatchNorm2d` registered right behind a convolution (torchvision), or the `norm` of a Detectron2
    convolution.
    """
    for parent in list(module.modules()):
        before: nn.Module | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                _fold(before, child)
                setattr(parent, name, nn.Identity())
            before = child
        if isinstance(parent, Conv2d) and parent.norm is not None:
            _fold(parent, parent.norm)
            parent.norm = None


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def build_encoder(name: str, weights: Mapping[str, Any], source: str) -> ImageEncoder:
    """Encoder of a known network with its weights; draws no random number.

    Args:
        name: a key of `NETWORKS`.
        weights: state dict of tensors or arrays under the network's own names.
        source: the file they come from, for messages.
    Raises: ValueError as `check_weights`.
    """
    check_weights(name, weights, source)
    network = NETWORKS[name]
    with torch.device("meta"):  # no random start that the weights would replace
        classifier = network.build()
    state = {
        key: torch.zeros((), dtype=torch.long) if key.endswith(_COUNTER) else torch.as_tensor(weights[key]).float()
        for key in classifier.state_dict()
    }
    classifier.load_state_dict(state, assign=True)
    trunk, linear = _split(classifier)
    return ImageEncoder(
        trunk,
        linear,
        stride=network.stride,
        pixel_mean=network.pixel_mean,
        pixel_std=network.pixel_std,
        channel_order=network.channel_order,
    )


def _split(classifier: nn.Module) -> tuple[nn.Sequential, nn.Linear]:
    """Trunk and last layer of a classifier, without the pooling between them."""
    children = OrderedDict(classifier.named_children())
    del children["avgpool"]
    (key,) = (key for key, child in children.items() if isinstance(child, nn.Linear))
    linear = children.pop(key)
    return nn.Sequential(children), linear


@functools.cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors."""
    with torch.device("meta"):
        state = NETWORKS[name].build().state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith(_COUNTER)}


def check_weights(name: str, weights: Mapping[str, Any], source: str) -> None:
    """Make sure that weights are those of a network, its last layer included, and nothing else.

    Raises: ValueError naming the file, what does not fit, and the network that it holds instead, if it is a known one.
    """
    if name not in NETWORKS:
        raise ValueError(f'TEST.CALIBRATION.NETWORK is "{name}"; expected one of {", ".join(NETWORKS)}')
    expected = _shapes(name)
    found = {key: tuple(value.shape) for key, value in weights.items() if not key.endswith(_COUNTER)}
    if found == expected:
        return
    other = next((known for known in NETWORKS if _shapes(known) == found), "")
    if other:
        raise ValueError(
            f'{source} holds the network "{other}", but TEST.CALIBRATION.NETWORK is "{name}": set '
            f'TEST.CALIBRATION.NETWORK {other}, or TEST.CALIBRATION.WEIGHTS to a file of "{name}"'
        )
    faults = {
        "missing": sorted(set(expected) - set(found)),
        "unknown": sorted(set(found) - set(expected)),
        "of another shape": sorted(key for key in set(found) & set(expected) if found[key] != expected[key]),
    }
    text = "; ".join(f"{len(keys)} tensors {kind} ({_some(keys)})" for kind, keys in faults.items() if keys)
    raise ValueError(
        f'{source} is not the ImageNet classifier "{name}": {text}. TEST.CALIBRATION.WEIGHTS must be '
        f"{NETWORKS[name].origin}: the whole network with its layer of {CLASSES} classes and nothing else, no "
        "backbone or detector"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
