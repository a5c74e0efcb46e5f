"""Golden detector of DeFRCN: a ResNet-50 of small width with the official weights, and three optimizer steps of it.

The model is the one that training builds from configs/defrcn, made narrower; the official weights reach it through the
rename table. `parity_model` compares what it computes.

Source: DeFRCN (Qiao et al., ICCV 2021), official implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fsdet.checkpoint.rename import TABLES, rename
from fsdet.engine.parity import Comparison, Ledger, golden_file, read_npz
from fsdet.engine.setup import load_config
from fsdet.engine.trainer import build_detector
from fsdet.methods.defrcn import RENAMES

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "defrcn"
NETWORK = (
    "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.ANCHOR_GENERATOR.SIZES",
    "[[16,32,64,96,128]]", "MODEL.RPN.POST_NMS_TOPK_TEST", "60", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "300",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.25",
)  # fmt: skip
EXHAUSTIVE = (
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "2048", "MODEL.RPN.POSITIVE_FRACTION", "1.0",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4096", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0",
)  # fmt: skip
NO_DROPOUT = ("MODEL.ROI_HEADS.OUTPUT_LAYER", "linear")
STAGES = {
    "base": ("voc_base.yaml", ()),
    "novel": ("voc_novel.yaml", ("FEWSHOT.SETTING", "fsod", "FEWSHOT.SHOT", "1")),
}
HEADS = {"base": "weights_k15", "novel": "weights_k5"}
PREDICTOR = tuple(f"roi_heads.box_predictor.{n}.{k}" for n in ("cls_score", "bbox_pred") for k in ("weight", "bias"))
LOSSES = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")
CHANGED = (
    "backbone.res4.0.conv1.weight", "backbone.res4.5.conv3.weight", "proposal_generator.rpn_head.conv.bias",
    "proposal_generator.rpn_head.objectness_logits.weight", *PREDICTOR[:2], PREDICTOR[3],
    *(f"{affine}.{kind}" for affine in ("affine_rpn", "affine_rcnn") for kind in ("weight", "bias")),
)  # fmt: skip
STEP_TOLERANCE = 1e-4


def official_name(name: str) -> str:
    """Official name of one of our parameters."""
    for official, ours in RENAMES:
        if name.startswith(ours):
            return official + name.removeprefix(ours)
    return name


def build_small(stage: str, *opts: str) -> tuple[nn.Module, CfgNode]:
    """The narrow detector of a stage as training builds it, and its configuration."""
    file, words = STAGES[stage]
    cfg = load_config(str(CONFIGS / file), [*words, *NETWORK, *opts])
    return build_detector(cfg), cfg


class GoldenDetector:
    """Weights and pictures of the file."""

    def __init__(self, folder: Path) -> None:
        self.values = read_npz(golden_file(folder, "d_model_r50w16"))

    def load(self, stage: str, *opts: str) -> tuple[nn.Module, CfgNode]:
        """Detector of a stage with the official weights of the file.

        Raises: ValueError when a tensor of either side finds no partner.
        """
        model, cfg = build_small(stage, *opts)
        prefixes = ("weights/", f"{HEADS[stage]}/")
        state = {
            name.removeprefix(prefix): torch.from_numpy(value)
            for prefix in prefixes
            for name, value in self.values.items()
            if name.startswith(prefix)
        }
        renamed, report = rename(state, TABLES["defrcn"], model.state_dict())
        if not report.is_full:
            raise ValueError(f"the official weights do not fit: {report.describe()}")
        model.load_state_dict(renamed)
        return model, cfg

    def batch(self, stage: str, *, only: Sequence[int] = (0, 1)) -> list[dict[str, Any]]:
        """Inputs of the detector: the pictures as they are, with the stage's ground truth."""
        batch = []
        for i in only:
            picture = self.values[f"input/image{i}_bgr_uint8"]
            height, width = self.values["input/output_hw"][i].tolist()
            boxes, classes = (torch.from_numpy(self.values[f"{stage}/gt_{n}{i}"]) for n in ("boxes", "classes"))
            instances = Instances(picture.shape[:2], gt_boxes=Boxes(boxes), gt_classes=classes)
            image = torch.from_numpy(picture).permute(2, 0, 1)
            batch.append({"image": image, "height": height, "width": width, "instances": instances})
        return batch


def train_once(model: nn.Module, batch: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Losses and logged metrics of one forward pass in training, with the gradients left in the model."""
    model.train().zero_grad()
    with EventStorage() as storage:
        losses = model(batch)
        sum(losses.values()).backward()
        metrics = {name: value for name, (value, _) in storage.latest().items()}
    return {name: loss.detach().numpy() for name, loss in losses.items()}, metrics


def gradients(model: nn.Module) -> dict[str, np.ndarray]:
    """Gradient of every parameter that has one, by official name."""
    named = model.named_parameters()
    return {official_name(name): p.grad.numpy() for name, p in named if p.grad is not None}


def check_steps(folder: Path) -> Iterator[Comparison]:
    """d_train3: three optimizer steps of each stage, without dropout and warm-up."""
    golden = GoldenDetector(folder)
    values = read_npz(golden_file(folder, "d_train3"))
    names = ["lr", *(f"losses/{name}" for name in LOSSES), *(f"after3/{name}" for name in CHANGED)]
    ledger = Ledger(values, expected=[f"{stage}/{name}" for stage in STAGES for name in names])
    for stage in STAGES:
        model, cfg = golden.load(stage, *EXHAUSTIVE, *NO_DROPOUT)
        optimizer = build_optimizer(cfg, model)
        rates, losses = [], {name: [] for name in LOSSES}
        for _ in range(3):
            rates.append({group["lr"] for group in optimizer.param_groups})
            for name, loss in train_once(model, golden.batch(stage))[0].items():
                losses[name].append(loss.item())
            optimizer.step()
        yield ledger.compare(f"{stage}/lr", np.array([rate.pop() for rate in rates if len(rate) == 1]))
        for name, curve in losses.items():
            yield ledger.compare(f"{stage}/losses/{name}", np.array(curve), STEP_TOLERANCE)
        after = {official_name(name): p.detach().numpy() for name, p in model.named_parameters()}
        for name in CHANGED:
            yield ledger.compare(f"{stage}/after3/{name}", after[name], STEP_TOLERANCE)
    yield from ledger.rest()
