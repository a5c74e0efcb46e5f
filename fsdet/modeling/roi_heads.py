"""ROI heads of the suite: Detectron2's, with a named box predictor and with ignore regions.

C4 heads leave out, without a change of the result, what their strided res5 never reads (`FewShotRes5ROIHeads`).
State-dict names are Detectron2's and those of the official few-shot code: `roi_heads.box_predictor.cls_score.*` and
`roi_heads.box_predictor.bbox_pred.*`.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from fsdet.layers.roi_cells import pool_cells
from fsdet.modeling.ignore_regions import IgnoreRegionsMixin

BOX_PREDICTOR_REGISTRY = Registry("BOX_PREDICTOR")
BOX_PREDICTOR_REGISTRY.__doc__ = """
Box predictors by the name that MODEL.ROI_HEADS.OUTPUT_LAYER gives. An entry is a function `name(cfg, input_shape)`
that returns a module with the interface of Detectron2's FastRCNNOutputLayers. Methods register theirs here.
"""


@BOX_PREDICTOR_REGISTRY.register()
def linear(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Detectron2's predictor: two linear layers with biases."""
    return FastRCNNOutputLayers(cfg, input_shape)


def build_box_predictor(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the predictor named by MODEL.ROI_HEADS.OUTPUT_LAYER.

    Raises:
        ValueError: for a name that nobody has registered.
    """
    name = cfg.MODEL.ROI_HEADS.OUTPUT_LAYER
    known = sorted(key for key, _ in BOX_PREDICTOR_REGISTRY)
    if name not in known:
        raise ValueError(
            f"MODEL.ROI_HEADS.OUTPUT_LAYER: got {name!r}, expected one of {known} (import fsdet.methods for them all)"
        )
    return BOX_PREDICTOR_REGISTRY.get(name)(cfg, input_shape)


def _few_shot_arguments(args: dict[str, Any], cfg: CfgNode, feature_shape: ShapeSpec) -> dict[str, Any]:
    """Complete the constructor arguments that Detectron2 derived from the config."""
    args["ignore_ioa_thresh"] = cfg.MODEL.IGNORE_REGIONS.IOA_THRESH
    # Detectron2 has made the linear predictor already; another one would only shift the random numbers.
    if cfg.MODEL.ROI_HEADS.OUTPUT_LAYER != "linear":
        args["box_predictor"] = build_box_predictor(cfg, feature_shape)
    return args


class SinglePrecisionPooler(nn.Module):
    """Pools in float32 under mixed precision too.

    Detectron2 casts the boxes to the type of the features, and bfloat16 moves a corner at 200 pixels by up to half a
    pixel.
    """

    def __init__(self, pooler: ROIPooler) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Pool the levels (N, C, H, W) at the boxes of each image; returns (R, C, P, P)."""
        return self.pooler([level.float() for level in features], boxes)


@ROI_HEADS_REGISTRY.register()
class FewShotROIHeads(IgnoreRegionsMixin, StandardROIHeads):
    """Heads on a feature pyramid; MODEL.ROI_HEADS.FREEZE_FEAT concerns `box_head`."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.ROI_HEADS.*, MODEL.ROI_BOX_HEAD.* and MODEL.IGNORE_REGIONS.*."""
        args = super().from_config(cfg, input_shape)
        args["box_pooler"] = SinglePrecisionPooler(args["box_pooler"])
        return _few_shot_arguments(args, cfg, args["box_head"].output_shape)


class ReadCellPooler(nn.Module):
    """Takes the place of a ROIPooler of one level and pools only every `step`-th cell of its grid.

    The result is in channels-last memory format, and boxes keep single precision under mixed precision too.
    """

    def __init__(self, pooler: ROIPooler, step: int) -> None:
        super().__init__()
        (level,) = pooler.level_poolers
        self.size, self.step = level.output_size[0], step
        self.scale, self.sampling_ratio = level.spatial_scale, level.sampling_ratio

    def forward(self, features: list[Tensor], boxes: list[Boxes]) -> Tensor:
        """Pool (N, C, H, W) features of one level at the boxes of each image; returns (R, C, Q, Q)."""
        return pool_cells(
            features[0],
            convert_boxes_to_pooler_format(boxes),
            size=self.size,
            step=self.step,
            scale=self.scale,
            sampling_ratio=self.sampling_ratio,
        )

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"every {self.step}. of {self.size} x {self.size} cells, scale={self.scale}"


def _read_step(pooler: ROIPooler, res5: nn.Module) -> int:
    """Every how many pooled cells res5 reads, in either direction; 1 where it reads all, or for unknown modules."""
    first = res5[0] if isinstance(res5, nn.Sequential) else None
    levels = list(pooler.level_poolers)
    if not isinstance(first, BottleneckBlock) or first.shortcut is None or len(levels) != 1:
        return 1
    is_known = isinstance(levels[0], ROIAlign) and levels[0].aligned and len(set(levels[0].output_size)) == 1
    readers = (first.conv1, first.shortcut)
    strides = {stride for layer in readers for stride in layer.stride}
    if not is_known or len(strides) != 1 or any(set(layer.kernel_size) != {1} for layer in readers):
        return 1
    return strides.pop()


def _skip_unread_cells(args: dict[str, Any]) -> None:
    """Let the pooler make only the cells that res5 reads, and res5 read them one by one."""
    pooler, res5 = args["pooler"], args["res5"]
    step = _read_step(pooler, res5)
    if step == 1:
        return
    args["pooler"] = ReadCellPooler(pooler, step)
    res5[0].stride = 1
    for layer in (res5[0].conv1, res5[0].shortcut):
        layer.stride = (1, 1)


@ROI_HEADS_REGISTRY.register()
class FewShotRes5ROIHeads(IgnoreRegionsMixin, Res5ROIHeads):
    """Heads on res4 with the fifth stage run per region (C4); MODEL.ROI_HEADS.FREEZE_FEAT concerns `res5`.

    Where the first convolutions of res5 are 1x1 with stride 2 (MODEL.RESNETS.STRIDE_IN_1X1), they read a quarter of the
    pooled cells. With MODEL.ROI_HEADS.SKIP_UNREAD_CELLS the others are not computed: `pooler` returns those that are
    read, `res5` has no stride, and everything behind is the same. Parameters and their names do not change.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Constructor arguments from MODEL.ROI_HEADS.*, MODEL.RESNETS.* and MODEL.IGNORE_REGIONS.*."""
        args = super().from_config(cfg, input_shape)
        if cfg.MODEL.ROI_HEADS.SKIP_UNREAD_CELLS:
            _skip_unread_cells(args)
        channels = args["box_predictor"].cls_score.in_features  # res5's, averaged over the region
        return _few_shot_arguments(args, cfg, ShapeSpec(channels=channels, height=1, width=1))
