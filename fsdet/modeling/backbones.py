"""Backbones from timm, alone or under Detectron2's feature pyramid.

Any network that timm can build with `features_only=True` and that accepts images of any size. Feature maps carry
Detectron2's names by stride: "res2" has stride 4, "res5" stride 32. Detectron2's own ResNets need nothing from here.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from fsdet.modeling.efficientnet_lite0 import PACKAGE_WEIGHTS, check_pixels, package_state_dict
from fsdet.modeling.freeze import freeze_module

logger = logging.getLogger(__name__)

# Values of MODEL.TIMM.NORM.
NORMS = ("FrozenBN", "BN", "SyncBN")


@BACKBONE_REGISTRY.register()
class TimmBackbone(Backbone):
    """A timm feature extractor with Detectron2's backbone interface.

    Args:
        name: model name as in `timm.list_models()`.
        out_features: subset of "res1" ... "res6", from high to low resolution; of several feature maps of one stride
            (plain transformers) the last is taken.
        norm: "FrozenBN" turns batch norm into fixed affine maps of the loaded statistics, "BN" leaves it live, "SyncBN"
            shares its statistics between processes. Other kinds of norm layers are left alone.
        freeze_at: n > 0 freezes everything up to the last layer of stride 2^n, as in Detectron2's ResNets
            (0: nothing; 2: up to and with res2). Norm layers among it keep their statistics.
        pretrained: let timm fetch its weights for this name from its hub (network access).
        weights: "", a file in timm's names (.pth, .safetensors), or "efficientnet-lite0-package".

    Raises:
        ValueError: for an unknown name, feature, norm, or weights that do not fit.
        FileNotFoundError: if the file of weights does not exist.
    """

    @configurable
    def __init__(
        self,
        name: str,
        out_features: list[str],
        *,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        pretrained: bool = False,
        weights: str = "",
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"MODEL.TIMM.NORM: got {norm!r}, expected one of {NORMS}")
        if pretrained and weights:
            raise ValueError(f"MODEL.TIMM.PRETRAINED is True and MODEL.TIMM.WEIGHTS is {weights!r}: set one of them")
        indices = _feature_indices(name, out_features)
        self.body = _set_norm(_build_body(name, indices, pretrained, weights), norm)
        info = self.body.feature_info
        self._channels_last = getattr(self.body, "output_fmt", None) == "NHWC"
        self._out_features = list(out_features)
        self._out_feature_strides = dict(zip(out_features, info.reduction(), strict=True))
        self._out_feature_channels = dict(zip(out_features, info.channels(), strict=True))
        _freeze_up_to_stride(self.body, name, 2**freeze_at if freeze_at > 0 else 0)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Constructor arguments from MODEL.TIMM.* and MODEL.BACKBONE.FREEZE_AT."""
        timm_cfg = cfg.MODEL.TIMM
        if input_shape.channels != 3:
            raise ValueError(
                f"TimmBackbone expects images of 3 channels, got {input_shape.channels} (MODEL.PIXEL_MEAN)"
            )
        if timm_cfg.WEIGHTS == PACKAGE_WEIGHTS:
            check_pixels(cfg)
        return {
            "name": timm_cfg.NAME,
            "out_features": list(timm_cfg.OUT_FEATURES),
            "norm": timm_cfg.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "pretrained": timm_cfg.PRETRAINED,
            "weights": timm_cfg.WEIGHTS,
        }

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of the largest stride, so that every feature map is exact."""
        return max(self._out_feature_strides.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to {name: (N, C, H / stride, W / stride)}."""
        features = self.body(images)
        if self._channels_last:
            features = [f.permute(0, 3, 1, 2).contiguous() for f in features]  # (N, H, W, C) -> (N, C, H, W)
        return dict(zip(self._out_features, features, strict=True))


@BACKBONE_REGISTRY.register()
class TimmFPNBackbone(FPN):
    """Detectron2's feature pyramid on a timm network, with one extra level on top, as its ResNet FPN has."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Constructor arguments from MODEL.TIMM.* and MODEL.FPN.*; without FPN.IN_FEATURES all features are used."""
        bottom_up = TimmBackbone(cfg, input_shape)
        in_features = list(cfg.MODEL.FPN.IN_FEATURES) or list(bottom_up.output_shape())
        extra_level = LastLevelMaxPool()
        extra_level.in_feature = in_features[-1].replace("res", "p")  # Detectron2's starts at p5 alone
        return {
            "bottom_up": bottom_up,
            "in_features": in_features,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "norm": cfg.MODEL.FPN.NORM,
            "top_block": extra_level,
            "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
        }


def _feature_indices(name: str, out_features: list[str]) -> list[int]:
    """Find timm's feature indices of the wanted strides."""
    import timm  # a second to import: only for those who use it

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(f"MODEL.TIMM.NAME: timm {timm.__version__} has no {name!r}; similar names: {near or 'none'}")
    with torch.device("meta"):  # only a built model knows its features; no memory, no random numbers
        stages = timm.create_model(name, features_only=True).feature_info.info
    known = {f"res{int(math.log2(stage['reduction']))}": index for index, stage in enumerate(stages)}
    unknown = [feature for feature in out_features if feature not in known]
    indices = [known[feature] for feature in out_features if feature in known]
    if unknown or not indices or indices != sorted(set(indices)):
        raise ValueError(
            f"MODEL.TIMM.OUT_FEATURES: got {list(out_features)}, expected some of {list(known)}, in this order "
            f"(the strides of {name})"
        )
    return indices


def _build_body(name: str, indices: list[int], pretrained: bool, weights: str) -> nn.Module:
    """Build the extractor with random weights, those of timm's hub, or those of `weights`."""
    import timm

    body = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=indices)
    if weights:
        source, own = load_timm_weights(name, weights), body.state_dict().keys()
        body.load_state_dict({new: value for old, value in source.items() for new in _extractor_names(old) & own})
        logger.info("%s: all %d entries loaded from %s", name, len(own), weights)
    return body


def _extractor_names(name: str) -> set[str]:
    """Names that an entry or module of a timm classifier can have in its feature extractor.

    Extractors flatten containers ("stages.0" -> "stages_0") or wrap the network.
    """
    return {name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}"}


def load_timm_weights(name: str, source: str) -> dict[str, Tensor]:
    """Read the weights of a timm classifier and check that they fit.

    Args:
        name: timm model name.
        source: "efficientnet-lite0-package", or a .pth (read weights-only) or .safetensors file in timm's names; its
            classifier may have any number of classes.

    Returns:
        A state dict with timm's names.

    Raises:
        FileNotFoundError: if the file or the package is missing.
        ValueError: if any name or shape outside the classifier differs from the model's.
    """
    import timm

    if source == PACKAGE_WEIGHTS:
        state = package_state_dict()
    elif Path(source).is_file():
        state = timm.models.load_state_dict(source)
    else:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS: {source} is not a file; give a .pth or .safetensors file or {PACKAGE_WEIGHTS!r}"
        )
    with torch.device("meta"):
        model = timm.create_model(name)
    heads = model.default_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    expected = {key: value.shape for key, value in model.state_dict().items()}
    wrong = sorted(key for key in expected.keys() ^ state.keys() if not key.startswith(heads))
    wrong += [key for key in expected.keys() & state.keys() if expected[key] != state[key].shape]
    wrong = [key for key in wrong if not key.startswith(heads)]
    if wrong:
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS: {source} does not fit {name}: {len(wrong)} missing, unknown or differently shaped "
            f"entries ({', '.join(wrong[:5])}, ...); set MODEL.TIMM.NAME to the model that the file belongs to"
        )
    return state


def _set_norm(body: nn.Module, norm: str) -> nn.Module:
    if norm == "FrozenBN":
        from timm.layers import freeze_batch_norm_2d

        # timm's own converter: its batch norm layers hold the activation, which Detectron2's would drop.
        return freeze_batch_norm_2d(body)
    if norm == "SyncBN":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(body)
    return body


def _freeze_up_to_stride(body: nn.Module, name: str, stride: int) -> None:
    """Freeze all modules defined up to the last one whose feature has at most this stride.

    timm defines modules in the order of their use (its feature extractors rely on it).
    """
    info = body.feature_info
    stages = [stage for stage in info.info[: max(info.out_indices) + 1] if stage["reduction"] <= stride]
    if not stages:
        return
    names = [module_name for module_name, _ in body.named_modules()]
    found = _extractor_names(stages[-1]["module"]) & set(names)
    if not found:
        raise ValueError(f"MODEL.BACKBONE.FREEZE_AT: the stages of {name} are no modules; use 0, or BACKBONE.FREEZE")
    stage = found.pop()
    end = max(index for index, n in enumerate(names) if n == stage or n.startswith(f"{stage}."))
    for index, module in enumerate(body.modules()):
        if index > end:
            break
        last = index + sum(1 for _ in module.modules()) - 1
        if last <= end:
            freeze_module(module)
        else:  # a container that reaches beyond: what it owns itself comes first
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
