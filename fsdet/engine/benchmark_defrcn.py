"""Paired timings of DeFRCN: its training step, its calibrated inference and its prototypes against the plain way.

Both sides have the same random weights; the plain side is stock Detectron2 and torchvision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import roi_align

from fsdet.data.support import Support, SupportSet
from fsdet.engine.benchmark_parts import Work, fixed_batch, seeded_model, train_step
from fsdet.engine.setup import config_classes, load_config, on_this_machine, run_classes
from fsdet.engine.trainer import autocast, build_detector, make_optimizer
from fsdet.modeling.calibration import KIND, CalibratedDetector, with_calibration
from fsdet.modeling.class_memory import ClassEntry, ClassMemory
from fsdet.modeling.imagenet import NETWORKS, build_encoder

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "defrcn"
PICTURE = (375, 500)  # height and width of a usual VOC picture
# Stock Detectron2 of the same sizes: no decoupling, no dropout, no skipped cells.
_STOCK = (
    "MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "Res5ROIHeads",
    "MODEL.ROI_HEADS.OUTPUT_LAYER", "linear", "MODEL.RPN.ENABLE_DECOUPLE", "False",
    "MODEL.ROI_HEADS.ENABLE_DECOUPLE", "False",
)  # fmt: skip


def _config(file: str, size: int, *opts: str) -> CfgNode:
    sizes = ["INPUT.MIN_SIZE_TRAIN", f"({size},)", "INPUT.MIN_SIZE_TEST", str(size)]
    return on_this_machine(load_config(str(CONFIGS / file), [*sizes, *opts]))


def training_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A base training step of DeFRCN (R-101 C4, 512 regions) against one of Detectron2's Faster R-CNN, same sizes."""
    ours, stock = _config("voc_base.yaml", size), _config("voc_base.yaml", size, *_STOCK)
    return (
        ("DeFRCN", train_step(seeded_model(build_detector, ours), ours, size)),
        ("stock Detectron2", train_step(seeded_model(build_model, stock), stock, size)),
    )


# What changes a fine-tuning step in time alone, all of it off and all of it on.
_PLAIN = ("MODEL.ROI_HEADS.SKIP_UNREAD_CELLS", "False")
_EXACT = (
    "MODEL.BACKBONE.CHANNELS_LAST", "True", "MODEL.RPN.HEAD_NAME", "SparseGradientRPNHead", "SOLVER.FUSED", "True",
)  # fmt: skip


def finetune_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A K-shot step of DeFRCN (R-101 C4, 512 regions) with all savings that keep its numbers against one with none."""
    return (
        ("exact savings", _finetune_step("voc_novel.yaml", size, 2, *_EXACT)),
        ("plain", _finetune_step("voc_novel.yaml", size, 2, *_PLAIN)),
    )


def fast_finetune_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A K-shot step of the fast recipe (R-101 C4), all views known, against one of the published recipe."""
    return (
        ("fast recipe", _finetune_step("voc_novel_fast.yaml", size, 2)),
        ("published recipe", _finetune_step("voc_novel.yaml", size, 2)),
    )


def small_finetune_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """The same of voc_small (R-50 C4, 32 regions, mixed precision)."""
    return (
        ("fast recipe", _finetune_step("voc_small_novel_fast.yaml", size, 4)),
        ("plain recipe", _finetune_step("voc_small_novel.yaml", size, 4)),
    )


def _finetune_step(file: str, size: int, images: int, *opts: str) -> Work:
    """One step of a novel stage, in the precision and with the optimizer of its recipe."""
    cfg = _config(file, size, "FEWSHOT.SHOT", "1", "SOLVER.BASE_LR", "1e-6", *opts)
    model, batch = seeded_model(build_detector, cfg).train(), fixed_batch(size, images)
    optimizer = make_optimizer(cfg, model)
    _propose_matches(model, batch)

    def step() -> None:
        torch.manual_seed(0)
        optimizer.zero_grad()
        with EventStorage(), autocast(cfg):
            losses = model(batch)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def _propose_matches(model: nn.Module, batch: Sequence[dict[str, Any]]) -> None:
    """Let an untrained RPN find the objects: eight boxes on each, which is many for boxes that have passed the NMS."""
    rpn = model.proposal_generator
    generator = torch.Generator().manual_seed(0)
    propose = rpn.predict_proposals
    rows = [item["instances"].gt_boxes.tensor.repeat(8, 1) for item in batch]
    sides = [(boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) for boxes in rows]
    matches = [
        b + side * 0.1 * (torch.rand(b.shape, generator=generator) - 0.5) for b, side in zip(rows, sides, strict=True)
    ]

    def predict_proposals(*args: Any) -> list[Instances]:
        proposals = propose(*args)
        for found, boxes in zip(proposals, matches, strict=True):
            count = min(len(found), len(boxes))
            found.proposal_boxes.tensor[:count] = boxes[:count].to(found.proposal_boxes.tensor)
        return proposals

    rpn.predict_proposals = predict_proposals


def calibration_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """Calibrated detections of one picture against a plain forward pass and an ImageNet ResNet-101 pass.

    Raises: RuntimeError when the detections before calibration differ in number, class, order, box or score.
    """
    novel = ("FEWSHOT.SETTING", "fsod", "FEWSHOT.SHOT", "1")
    cfg, stock_cfg = _config("voc_novel.yaml", size, *novel), _config("voc_novel.yaml", size, *novel, *_STOCK)
    detector = seeded_model(build_detector, cfg).eval()
    with torch.no_grad():  # scores further apart than rounding can bring together
        detector.roi_heads.box_predictor.cls_score.weight.mul_(20)
    stock = build_model(stock_cfg).eval()
    stock.load_state_dict({k: v for k, v in detector.state_dict().items() if "decouple" not in k})
    classifier = _classifier()
    calibrated = _calibrated(detector, cfg, classifier)
    rng = np.random.default_rng(1)
    rows = {name: ClassEntry({"prototype": torch.as_tensor(rng.normal(size=1000))}) for name in calibrated.calibrated}
    calibrated.keep_class_memory(ClassMemory(kind=KIND, encoder=calibrated.memory_encoder, entries=rows))
    picture = _picture(rng)
    (entry,) = fixed_batch(size, images=1)
    entry = {"image": entry["image"], "height": PICTURE[0], "width": PICTURE[1], "original_image": picture}

    @torch.no_grad()
    def ours() -> Instances:
        return calibrated([entry])[0]["instances"]

    @torch.no_grad()
    def plain() -> Instances:
        classifier(_normalised(picture).to(detector.device))
        return stock([entry])[0]["instances"]

    with torch.no_grad():
        _check_same(detector([entry])[0]["instances"], plain())
    return ("calibrated DeFRCN", ours), ("Detectron2 + R-101", plain)


def _check_same(ours: Instances, plain: Instances) -> None:
    """Same number, classes and order; boxes within 2e-3 pixels and scores within 1e-5."""
    same = len(ours) == len(plain) > 0 and torch.equal(ours.pred_classes, plain.pred_classes)
    if same:
        boxes = (ours.pred_boxes.tensor - plain.pred_boxes.tensor).abs().max()
        scores = (ours.scores - plain.scores).abs().max()
        same = bool(boxes <= 2e-3 and scores <= 1e-5)
    if not same:
        raise RuntimeError("fsdet and stock Detectron2 detect different things with the same weights")


def prototype_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """Prototypes of VOC G-FSOD, 1 shot: ours against one pass of the classifier per record. `size` plays no part."""
    del size
    cfg = _config("voc_novel.yaml", 800, "FEWSHOT.SHOT", "1")
    classifier = _classifier()
    calibrated = _calibrated(nn.Linear(1, 1).to(cfg.MODEL.DEVICE).eval(), cfg, classifier)  # stands for a detector
    names = run_classes(cfg)
    folder = tempfile.TemporaryDirectory()
    supports = _supports(names, Path(folder.name))
    support_set = SupportSet(names, supports)

    def ours() -> ClassMemory:
        _ = folder  # the pictures live as long as one of these functions
        calibrated.keep_class_memory(None)  # else nothing has changed, and nothing is encoded
        return calibrated.encode_support(support_set)

    @torch.no_grad()
    def per_record() -> dict[str, Tensor]:
        _ = folder
        return {names[support.class_id]: _logits(classifier, support) for support in supports}

    mine, theirs = ours(), per_record()
    for name in mine.names:
        torch.testing.assert_close(mine[name].tensors["prototype"], theirs[name], rtol=1e-3, atol=1e-3)
    return ("prototypes", ours), ("a pass per record", per_record)


def prototype_memory_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """The work whose peak memory is compared: prototypes, and one pass of the classifier on a usual picture."""
    ours, _ = prototype_pair(size)
    classifier = _classifier()
    image = _normalised(_picture(np.random.default_rng(1))).to(classifier.fc.weight.device)

    @torch.no_grad()
    def inference_pass() -> Tensor:
        return classifier(image)

    return ours, ("an inference pass", inference_pass)


def _classifier() -> nn.Module:
    """ResNet-101 of torchvision with random weights; a small last norm a block keeps them finite."""
    torch.manual_seed(0)
    network = torchvision.models.resnet101()
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith("bn3.weight"):
                value.fill_(0.3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.eval().to(device)


def _calibrated(detector: nn.Module, cfg: CfgNode, classifier: nn.Module) -> CalibratedDetector:
    classes = config_classes(cfg)
    encoder = build_encoder("resnet101", classifier.state_dict(), "random weights")
    names = run_classes(cfg)
    return with_calibration(detector, cfg, encoder=encoder, class_names=names, novel_names=classes.novel)


def _picture(rng: np.random.Generator) -> np.ndarray:
    """Coloured clouds, (H, W, 3) uint8."""
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(PICTURE[::-1], Image.Resampling.BICUBIC))


def _supports(names: Sequence[str], folder: Path) -> list[Support]:
    """A picture with one box for every class."""
    rng = np.random.default_rng(0)
    supports = []
    for class_id in range(len(names)):
        path = folder / f"{class_id}.png"
        Image.fromarray(_picture(rng)).save(path)
        x, y = rng.uniform(0, 200), rng.uniform(0, 150)
        supports.append(Support(str(path), class_id, class_id, class_id, (x, y, x + 180, y + 150)))
    return supports


def _normalised(picture: np.ndarray) -> Tensor:
    """(H, W, 3) BGR uint8 -> (1, 3, H, W) RGB, as torchvision's ImageNet networks are fed."""
    network = NETWORKS["resnet101"]
    image = torch.as_tensor(np.ascontiguousarray(picture[:, :, ::-1])).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.pixel_mean, network.pixel_std))
    return ((image - mean) / std)[None]


def _logits(classifier: nn.Module, support: Support) -> Tensor:
    """The plain way to the vector of a support box: read, whole network up to the last stage, pool, classify."""
    x = _normalised(read_image(support.file_name, format="BGR")).to(next(classifier.parameters()).device)
    for name, layer in classifier.named_children():
        if name == "avgpool":
            break
        x = layer(x)
    boxes = [torch.tensor([support.box], dtype=torch.float32, device=x.device)]
    return classifier.fc(roi_align(x, boxes, 1, 1 / 32, 0, aligned=True).flatten(1))[0].cpu()


BENCHMARKS = {
    "defrcn-train": training_pair,
    "finetune": finetune_pair,
    "finetune-fast": fast_finetune_pair,
    "finetune-small": small_finetune_pair,
    "calibration": calibration_pair,
    "prototypes": prototype_pair,
}
MEMORY = {"prototype-memory": prototype_memory_pair}
