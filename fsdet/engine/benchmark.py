"""Paired timings: each pair does the same work in two ways, in turn, and is reported as a ratio.

Absolute times depend on the machine and on what else runs there; the ratio of two things timed in turn does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fsdet.engine.setup import load_config, on_this_machine
from fsdet.engine.trainer import build_detector
from fsdet.evaluation.coco_style import coco_precision
from fsdet.evaluation.ground_truth import Detections, GroundTruth

Work = Callable[[], Any]


@dataclass(frozen=True)
class Pair:
    """Result of one pair: seconds of each round, and what the two sides are."""

    name: str
    first: str
    second: str
    first_seconds: tuple[float, ...]
    second_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the rounds of second / first: how many times faster the first side is."""
        pairs = zip(self.first_seconds, self.second_seconds, strict=True)
        return statistics.median(second / first for first, second in pairs)

    def line(self) -> str:
        """One row of the table."""
        sides = ((self.first, self.first_seconds), (self.second, self.second_seconds))
        cells = [f"{name:<20} {statistics.median(seconds):8.3f} s" for name, seconds in sides]
        return f"{self.name:<12} {'   '.join(cells)}   {self.ratio:6.2f}x"


def time_pair(name: str, first: tuple[str, Work], second: tuple[str, Work], rounds: int) -> Pair:
    """Time two pieces of work in turn, after one round that is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, (_, work) in enumerate((first, second)):
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[side].append(time.perf_counter() - started)
    return Pair(name, first[0], second[0], tuple(seconds[0]), tuple(seconds[1]))


def run_benchmarks(names: list[str], *, rounds: int = 5, size: int = 240) -> Iterator[Pair]:
    """Time the named pairs.

    Args:
        names: keys of `BENCHMARKS`.
        rounds: counted rounds of each.
        size: shorter side of the pictures in pixels.
    """
    for name in names:
        first, second = BENCHMARKS[name](size)
        yield time_pair(name, first, second, rounds)


def _config(size: int, *opts: str) -> CfgNode:
    """R-50 FPN for 20 classes without weights or data."""
    folder = Path(__file__).resolve().parents[2] / "configs" / "tfa"
    sizes = ["INPUT.MIN_SIZE_TRAIN", f"({size},)", "INPUT.MIN_SIZE_TEST", str(size)]
    words = ["FEWSHOT.SHOT", "1", *sizes, *opts]
    return on_this_machine(load_config(str(folder / "voc_cos.yaml"), words, model="r50_fpn"))


def _batch(size: int, images: int = 2) -> list[dict[str, Any]]:
    """Noise pictures of `size` x 4/3 `size` with four boxes each."""
    generator = torch.Generator().manual_seed(0)
    height, width = size, size * 4 // 3
    batch = []
    for _ in range(images):
        corner = torch.rand(4, 2, generator=generator) * size * 0.5
        boxes = torch.cat([corner, corner + size * (0.2 + 0.3 * torch.rand(4, 2, generator=generator))], dim=1)
        instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.arange(4))
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def _build(build: Callable[[CfgNode], torch.nn.Module], cfg: CfgNode) -> torch.nn.Module:
    """Model with the same random weights each time; a small last norm a block keeps them finite under frozen norms."""
    torch.manual_seed(0)
    model = build(cfg)
    for name, value in model.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            value.fill_(0.3)
    return model


def _train_step(model: torch.nn.Module, cfg: CfgNode, size: int) -> Work:
    """One step of Detectron2's SimpleTrainer on a fixed batch."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR = 1e-6
    trainer = SimpleTrainer(model, _Endless(_batch(size)), build_optimizer(cfg, model))

    def step() -> None:
        torch.manual_seed(0)  # both sides sample the same anchors and regions
        with EventStorage() as trainer.storage:
            trainer.iter = 0
            trainer.run_step()

    return step


class _Endless:
    """The same batch for ever."""

    def __init__(self, batch: list[dict[str, Any]]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            yield self.batch


def freeze_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A training step of TFA (only the predictor) against one of the whole detector."""
    frozen, whole = _config(size), _config(size, "MODEL.BACKBONE.FREEZE", "False", *_THAW)
    return (
        ("TFA: predictor only", _train_step(_build(build_detector, frozen), frozen, size)),
        ("whole detector", _train_step(_build(build_detector, whole), whole, size)),
    )


_THAW = ("MODEL.PROPOSAL_GENERATOR.FREEZE", "False", "MODEL.ROI_HEADS.FREEZE_FEAT", "False")
_STOCK = ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads")


def stock_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A training step of fsdet's heads against Detectron2's own, same sizes: what the extensions cost."""
    words = ("MODEL.BACKBONE.FREEZE", "False", *_THAW, "MODEL.ROI_HEADS.OUTPUT_LAYER", "linear")
    ours, stock = _config(size, *words), _config(size, *words, *_STOCK)
    return (
        ("fsdet", _train_step(_build(build_detector, ours), ours, size)),
        ("stock Detectron2", _train_step(_build(build_model, stock), stock, size)),
    )


def precision_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A training step of the whole detector in bfloat16 against single precision."""
    cfg = _config(size, "MODEL.BACKBONE.FREEZE", "False", *_THAW)
    mixed, single = _build(build_detector, cfg), _build(build_detector, cfg)
    device = torch.device(cfg.MODEL.DEVICE).type
    mixed.forward = torch.autocast(device, dtype=torch.bfloat16)(mixed.forward)
    return ("bfloat16", _train_step(mixed, cfg, size)), ("float32", _train_step(single, cfg, size))


def evaluator_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """COCO metrics of 500 images, 20 classes and 100 detections an image: fast evaluator against pycocotools."""
    truth, detections = _random_results(images=500, classes=20, per_image=100, size=size)
    return (
        ("hotcoco", lambda: coco_precision(truth, detections, fast=True, max_detections=100)),
        ("pycocotools", lambda: coco_precision(truth, detections, fast=False, max_detections=100)),
    )


def _random_results(images: int, classes: int, per_image: int, size: int) -> tuple[GroundTruth, Detections]:
    """Eight random boxes an image, and detections of which each second one is a jittered copy of one of them."""
    rng = np.random.default_rng(0)
    objects = 8
    corners = rng.uniform(0, size * 0.6, (images * objects, 2))
    sides = rng.uniform(size * 0.05, size * 0.4, (images * objects, 2))
    class_ids = rng.integers(0, classes, images * objects)
    truth = GroundTruth(
        source="random boxes",
        image_ids=tuple(range(1, images + 1)),
        image_sizes=np.full((images, 2), size),
        class_names=tuple(f"class{i}" for i in range(classes)),
        dataset_ids=tuple(range(1, classes + 1)),
        image_index=np.repeat(np.arange(images), objects),
        boxes=np.concatenate([corners, sides], axis=1),
        class_ids=class_ids,
        areas=sides.prod(axis=1),
        ignored=np.zeros(images * objects, bool),
    )
    image_index = np.repeat(np.arange(images), per_image)
    chosen = image_index * objects + rng.integers(0, objects, len(image_index))
    boxes = np.concatenate([corners[chosen], corners[chosen] + sides[chosen]], axis=1)
    boxes += rng.normal(0, size * 0.02, boxes.shape)
    boxes[1::2] += rng.uniform(0, size * 0.3, (len(boxes[1::2]), 1))
    found = np.where(np.arange(len(chosen)) % 2, rng.integers(0, classes, len(chosen)), class_ids[chosen])
    return truth, Detections(image_index, boxes, rng.uniform(0, 1, len(chosen)), found)


BENCHMARKS = {"tfa-freeze": freeze_pair, "heads": stock_pair, "precision": precision_pair, "evaluator": evaluator_pair}
