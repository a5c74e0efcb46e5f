"""The floor under every detector: boxes and classes drawn at random, evaluated like detections."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from fsdet.engine.record import Cost, record_result
from fsdet.engine.run import make_evaluator
from fsdet.engine.setup import load_config, register_datasets, run_classes

# Range of a box's side as a fraction of the image's, drawn evenly in the logarithm.
SIDES = (0.1, 1.0)


def random_detections(
    height: int, width: int, *, count: int, num_classes: int, generator: torch.Generator
) -> Instances:
    """Detections that know nothing of the picture.

    Args:
        height, width: of the picture in pixels.
        count: number of boxes.
        num_classes: classes are drawn evenly from [0, num_classes).
        generator: of all draws.
    Returns: Instances with pred_boxes (XYXY in pixels, inside the picture), scores in [0, 1), pred_classes.
    """
    low, high = (math.log(side) for side in SIDES)
    size = torch.tensor([width, height], dtype=torch.float32)
    sides = torch.exp(low + (high - low) * torch.rand(count, 2, generator=generator)) * size  # (R, 2)
    corners = torch.rand(count, 2, generator=generator) * (size - sides)
    return Instances(
        (height, width),
        pred_boxes=Boxes(torch.cat([corners, corners + sides], dim=1)),
        scores=torch.rand(count, generator=generator),
        pred_classes=torch.randint(num_classes, (count,), generator=generator),
    )


def evaluate_chance(config_file: str, opts: Sequence[str] = (), *, seed: int = 0) -> Path:
    """Evaluate random boxes on the test set of a configuration and write their result.json.

    Args:
        config_file, opts: as `load_config`; the method is called "random_boxes".
        seed: of the boxes.
    Returns: path of the result.
    """
    cfg = load_config(config_file, [*opts, "FEWSHOT.METHOD", "random_boxes"])
    register_datasets(cfg)
    started = time.perf_counter()
    metrics = chance_metrics(cfg, seed)
    return record_result(
        cfg,
        metrics,
        cost=Cost(),
        eval_seconds=time.perf_counter() - started,
        origin={"base_model": "", "pretraining": ""},
        notes={"detections": f"random boxes, seed {seed}"},
    )


def chance_metrics(cfg: CfgNode, seed: int) -> dict[str, float]:
    """Metrics in percent of TEST.DETECTIONS_PER_IMAGE random boxes on every test image."""
    generator = torch.Generator().manual_seed(seed)
    evaluator = make_evaluator(cfg)
    evaluator.reset()
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
        found = random_detections(
            record["height"],
            record["width"],
            count=cfg.TEST.DETECTIONS_PER_IMAGE,
            num_classes=len(run_classes(cfg)),
            generator=generator,
        )
        evaluator.process([record], [{"instances": found}])
    return dict(evaluator.evaluate()["bbox"])
