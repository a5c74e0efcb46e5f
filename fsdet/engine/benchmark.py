"""Paired timings: each pair does the same work in two ways, in turn, and is reported as a ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from fsdet.engine import benchmark_defrcn, benchmark_fewx, benchmark_os2d
from fsdet.engine.benchmark_parts import (
    Pair,
    Work,
    cpu_seconds,
    measure_pair,
    peak_mib,
    seeded_model,
    train_step,
    wall_seconds,
)
from fsdet.engine.setup import load_config, on_this_machine
from fsdet.engine.trainer import build_detector
from fsdet.evaluation.coco_style import coco_precision
from fsdet.evaluation.ground_truth import Detections, GroundTruth


def run_benchmarks(
    names: Sequence[str], *, rounds: int = 5, size: int = 240, threads: int = 0, classes: Sequence[int] = ()
) -> Iterator[Pair]:
    """Measure the named pairs.

    Args:
        names: keys of `BENCHMARKS`, `MEMORY` or `MEASURED`.
        rounds: counted rounds of each.
        size: shorter side of the pictures in pixels.
        threads: 0 measures wall time with as many threads as PyTorch takes; n > 0 takes n threads and, without a GPU,
            measures CPU time. The pairs of `MEASURED` measure CPU time with one thread in any case.
        classes: numbers of classes of the pairs of `MEASURED`, one line each; () takes each pair's own.
    """
    if threads:
        torch.set_num_threads(threads)
    measure = cpu_seconds if threads and not torch.cuda.is_available() else wall_seconds
    for name in names:
        if name in MEASURED:
            yield from MEASURED[name](size, rounds, classes)
        elif name in MEMORY:
            yield measure_pair(name, *MEMORY[name](size), rounds, peak_mib, "MiB")
        else:
            yield measure_pair(name, *BENCHMARKS[name](size), rounds, measure)


def _config(size: int, *opts: str) -> CfgNode:
    """R-50 FPN for 20 classes without weights or data."""
    folder = Path(__file__).resolve().parents[2] / "configs" / "tfa"
    sizes = ["INPUT.MIN_SIZE_TRAIN", f"({size},)", "INPUT.MIN_SIZE_TEST", str(size)]
    words = ["FEWSHOT.SHOT", "1", *sizes, *opts]
    return on_this_machine(load_config(str(folder / "voc_cos.yaml"), words, model="r50_fpn"))


def freeze_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A training step of TFA (only the predictor) against one of the whole detector."""
    frozen, whole = _config(size), _config(size, "MODEL.BACKBONE.FREEZE", "False", *_THAW)
    return (
        ("TFA: predictor only", train_step(seeded_model(build_detector, frozen), frozen, size)),
        ("whole detector", train_step(seeded_model(build_detector, whole), whole, size)),
    )


_THAW = ("MODEL.PROPOSAL_GENERATOR.FREEZE", "False", "MODEL.ROI_HEADS.FREEZE_FEAT", "False")
_STOCK = ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads")


def stock_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A training step of fsdet's heads against Detectron2's own, same sizes: what the extensions cost."""
    words = ("MODEL.BACKBONE.FREEZE", "False", *_THAW, "MODEL.ROI_HEADS.OUTPUT_LAYER", "linear")
    ours, stock = _config(size, *words), _config(size, *words, *_STOCK)
    return (
        ("fsdet", train_step(seeded_model(build_detector, ours), ours, size)),
        ("stock Detectron2", train_step(seeded_model(build_model, stock), stock, size)),
    )


def precision_pair(size: int) -> tuple[tuple[str, Work], tuple[str, Work]]:
    """A training step of the whole detector in bfloat16 against single precision."""
    cfg = _config(size, "MODEL.BACKBONE.FREEZE", "False", *_THAW)
    mixed, single = seeded_model(build_detector, cfg), seeded_model(build_detector, cfg)
    device = torch.device(cfg.MODEL.DEVICE).type
    mixed.forward = torch.autocast(device, dtype=torch.bfloat16)(mixed.forward)
    return ("bfloat16", train_step(mixed, cfg, size)), ("float32", train_step(single, cfg, size))


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


BENCHMARKS = {
    "tfa-freeze": freeze_pair,
    "heads": stock_pair,
    "precision": precision_pair,
    "evaluator": evaluator_pair,
    **benchmark_defrcn.BENCHMARKS,
}
MEMORY = benchmark_defrcn.MEMORY
MEASURED = {**benchmark_fewx.MEASURED, **benchmark_os2d.MEASURED}
