"""What a finished run leaves behind: result.json with its metrics, protocol, cost and origin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TypeVar

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.checkpoint.safe_io import METADATA_KEY, load_weights
from fsdet.data.catalog import json_file, sample_files
from fsdet.data.files import sha256_of
from fsdet.data.seeds import check_manifest, digest_of
from fsdet.engine.calibrated import is_calibrated
from fsdet.engine.setup import config_classes, dataset_sources, dataset_specs, run_classes
from fsdet.evaluation.result import (
    RUN_KEYS,
    Protocol,
    RunResult,
    collect_versions,
    config_digest,
    git_commit,
    peak_memory_mib,
    read_result,
    split_metrics,
    write_result,
)
from fsdet.methods import idle_method_keys

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Seconds and iterations of training; zero when only evaluated."""

    seconds: float = 0.0
    iterations: int = 0


def backbone_label(cfg: CfgNode) -> str:
    """Short name of the backbone, e.g. "R50-FPN" or "tf_efficientnet_lite0-FPN"."""
    name = cfg.MODEL.BACKBONE.NAME.lower()
    body = cfg.MODEL.TIMM.NAME if "timm" in name else f"R{cfg.MODEL.RESNETS.DEPTH}"
    return f"{body}-{'FPN' if 'fpn' in name else 'C4'}"


def pretraining_label(cfg: CfgNode) -> str:
    """Where a base stage's backbone starts: a file's name, a package, "timm" (its hub), or "" for random weights."""
    timm_start = cfg.MODEL.TIMM.WEIGHTS or ("timm" if cfg.MODEL.TIMM.PRETRAINED else "")
    if (init := cfg.FEWSHOT.INIT) and init == cfg.MODEL.WEIGHTS:
        return f"detector {Path(init).parent.name}:{sha256_of(init)[:8]}"
    own = timm_start if "timm" in cfg.MODEL.BACKBONE.NAME.lower() else ""
    return Path(cfg.MODEL.WEIGHTS or own).name


def style_label(cfg: CfgNode) -> str:
    """Name of the evaluation, e.g. "coco" or "voc-11point"."""
    if cfg.TEST.STYLE == "coco":
        return "coco"
    return "voc-11point" if cfg.TEST.VOC_11_POINT else "voc-area"


def test_set_label(cfg: CfgNode) -> str:
    """Name of the evaluated set; for COCO formats with its annotation file, since 5k and val2017 are two sets.

    A list of test images adds its name and the first digits of its sha256.
    """
    _, test = dataset_specs(cfg)
    label = test.name
    if cfg.FEWSHOT.LAYOUT != "voc":
        label += f":{json_file(test, dataset_sources(cfg)).stem}"
    if cfg.FEWSHOT.LAYOUT == "oneshot":
        label += f":{'+'.join(name or 'all' for name in cfg.FEWSHOT.ONESHOT_SETS[1:])}"
    if cfg.FEWSHOT.TEST_LIST:
        path = Path(cfg.FEWSHOT.TEST_LIST)
        label += f":{path.stem}:{sha256_of(path)[:8]}"
    return label


def calibration_label(cfg: CfgNode) -> str:
    """How detections are rescored, e.g. "pcb resnet101:5d3b4d8f 0.5"; "" where they are not.

    Network, first digits of its file's sha256, weight of the detector's score; whatever else is not the default.
    """
    calibration = cfg.TEST.CALIBRATION
    if not is_calibrated(cfg):
        return ""
    bounds = (
        "" if (calibration.LOWER, calibration.UPPER) == (0.05, 1.0) else f" {calibration.LOWER:g}-{calibration.UPPER:g}"
    )
    classes = "" if calibration.CLASSES == "novel" else f" {calibration.CLASSES}"
    boxes = " legacy-boxes" if calibration.LEGACY_BOXES else ""
    network = f"{calibration.NETWORK}:{sha256_of(calibration.WEIGHTS)[:8]}"
    return f"pcb {network} {calibration.ALPHA:g}{bounds}{classes}{boxes}"


def base_model_digest(cfg: CfgNode) -> str:
    """Which base model a novel run starts from: digest of its checkpoint, or a hub name; "" for a base stage.

    For a file from surgery that is the checkpoint it was made from, since a `combine` file differs from draw to draw.
    """
    if cfg.FEWSHOT.STAGE == "base":
        return ""
    weights = Path(cfg.MODEL.WEIGHTS)
    if not weights.is_file():
        return cfg.MODEL.WEIGHTS
    sources = load_weights(weights).get(METADATA_KEY, {}).get("sources")  # surgery writes them, the base model first
    return (sources[0]["sha256"] if sources else sha256_of(weights))[:12]


def run_origin(cfg: CfgNode) -> dict[str, str]:
    """What a training starts from: "base_model" of a novel stage, "pretraining" of a base stage."""
    novel = cfg.FEWSHOT.STAGE == "novel"
    return {"base_model": base_model_digest(cfg), "pretraining": "" if novel else pretraining_label(cfg)}


def evaluated_origin(cfg: CfgNode, checkpointer: FewShotCheckpointer) -> dict[str, str]:
    """`run_origin` as the evaluated checkpoint records it, so that the result groups with its training's."""
    recorded = checkpointer.recorded.get(METADATA_KEY, {})
    return recorded["origin"] if "origin" in recorded else run_origin(cfg)


def evaluated_cost(checkpointer: FewShotCheckpointer) -> Cost:
    """What the training of the evaluated checkpoint cost; nothing where the file does not say, as Detectron2's own."""
    recorded = checkpointer.recorded
    return Cost(recorded["seconds"], recorded["iteration"] + 1) if "seconds" in recorded else Cost()


def run_protocol(cfg: CfgNode, origin: dict[str, str]) -> Protocol:
    """What this run's numbers stand for; `origin` is that of `run_origin`."""
    fewshot = cfg.FEWSHOT
    train, test = dataset_specs(cfg)
    sources = dataset_sources(cfg)
    novel = fewshot.STAGE == "novel"
    manifest = check_manifest(sources.samples_of(fewshot.LAYOUT), fewshot.SEED) if novel else None
    return Protocol(
        benchmark=fewshot.DATASET,
        test_set=test_set_label(cfg),
        test_images=len(DatasetCatalog.get(test.name)),
        split=fewshot.SPLIT if fewshot.LAYOUT == "voc" else 1,
        setting=fewshot.SETTING,
        stage=fewshot.STAGE,
        method=fewshot.METHOD,
        shot=fewshot.SHOT,
        evaluation=style_label(cfg),
        backbone=backbone_label(cfg),
        sampling=(manifest["algorithm"] if manifest else "unrecorded") if novel else "none",
        choice=fewshot.CHOICE,
        records=fewshot.RECORDS,
        leak=fewshot.LEAK,
        difficult=fewshot.DIFFICULT,
        calibration=calibration_label(cfg),
        proposals=0 if cfg.OS2D.ENABLED else cfg.MODEL.RPN.POST_NMS_TOPK_TEST,
        **origin,
        seed=fewshot.SEED,
        repeat=fewshot.REPEAT,
        samples_digest=_if_there(lambda: digest_of(sample_files(train, sources)), None) if novel else None,
    )


def _count_images(dataset_name: str) -> int:
    return len({record["file_name"] for record in DatasetCatalog.get(dataset_name)})


def _if_there(read: Callable[[], T], otherwise: T) -> T:
    """A fact about the training data, which a machine that only evaluates need not have."""
    try:
        return read()
    except FileNotFoundError as error:
        logger.warning("Not recorded in %s: %s", RESULT_FILE, error)
        return otherwise


# Switches that came later. Where one is off it is left out of digests, so that they are those of older runs.
_LATER = (
    "FEWSHOT.TEST_LIST", "DATALOADER.VIEWS", "MODEL.BACKBONE.CACHE_MIB", "MODEL.BACKBONE.CHANNELS_LAST",
    "MODEL.ROI_HEADS.BACKGROUND_KEPT", "MODEL.RPN.NEGATIVES_KEPT", "SOLVER.FUSED", "SOLVER.CLIP_TOTAL_NORM",
    "INPUT.PATCH.OBJECT_SIZE",
)  # fmt: skip


# Keys of one-shot data.
_ONESHOT = ("FEWSHOT.CLASS_IMAGES", "FEWSHOT.ONESHOT_SETS", "FEWSHOT.CLEAR_DIFFICULT")


def _switched_off(cfg: CfgNode) -> list[str]:
    """Keys of switches that are off, calibration with all that belongs to it."""
    keys = [] if is_calibrated(cfg) else ["TEST.CALIBRATION"]
    keys += idle_method_keys(cfg)
    # The one adds metrics and changes none, the other is a path; results record the file behind it.
    keys += ["TEST.ONESHOT_METRIC", "FEWSHOT.INIT"]
    keys += ["INPUT.FS.CACHE_MIB"] if cfg.INPUT.FS.ENABLED else ["INPUT.FS"]
    keys += [] if cfg.INPUT.PATCH.ENABLED else ["INPUT.PATCH"]
    keys += [] if cfg.FEWSHOT.LAYOUT == "oneshot" else list(_ONESHOT)
    keys += [] if cfg.SOLVER.HEAD_LR_FACTOR != 1 else ["SOLVER.HEAD_LR_FACTOR"]
    return keys + [key for key in _LATER if not reduce(getitem, key.split("."), cfg)]


def result_digest(cfg: CfgNode) -> str:
    """Digest of the recipe behind a result: the configuration without folders, device and draw."""
    return config_digest(cfg, without=(*RUN_KEYS, "FEWSHOT.BASE_RUN", "FEWSHOT.OUTPUT", *_switched_off(cfg)))


# What may change between the parts of one run: its length, how a step is computed, what is kept and tested.
_RESUMABLE = (
    "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.ACCUMULATION_STEPS", "SOLVER.CHECKPOINTS_KEPT", "SOLVER.AMP",
    "SOLVER.FIND_UNUSED_PARAMETERS", "TEST", "FEWX.TEST_SHOTS", "FEWX.SHARED_PROPOSALS", "FEWSHOT.TEST_LIST",
    "OS2D.FUSION", "OS2D.VIEWS", "OS2D.TEST_SHOTS", "OS2D.NMS", "OS2D.NMS_THRESH_TEST", "OS2D.NMS_ACROSS_CLASSES",
    "OS2D.SCORE_THRESH_TEST", "OS2D.ALIGNED_SHARE",
    "FEWSHOT.BASE_RUN",
    "FEWSHOT.OUTPUT",
)  # fmt: skip


def resume_digest(cfg: CfgNode) -> str:
    """Digest of what a resumed run must share with the part that it continues."""
    without = [key for key in RUN_KEYS if key not in ("SEED", "FEWSHOT.SEED")]
    return config_digest(cfg, without=(*without, *_RESUMABLE, *_switched_off(cfg)))


def check_fresh(cfg: CfgNode) -> None:
    """Refuse to train over the finished run of another recipe.

    Raises: ValueError naming the folder.
    """
    path = Path(cfg.OUTPUT_DIR) / RESULT_FILE
    if path.is_file() and read_result(path).config_digest != result_digest(cfg):
        raise ValueError(
            f"{path} is the result of another configuration. Set OUTPUT_DIR to a new folder, or remove this one"
        )


def record_result(
    cfg: CfgNode,
    metrics: dict[str, float],
    *,
    cost: Cost,
    eval_seconds: float,
    origin: dict[str, str],
    notes: dict[str, str],
) -> Path:
    """Write OUTPUT_DIR/result.json and return its path; evaluating again keeps the cost that training had."""
    path = Path(cfg.OUTPUT_DIR) / RESULT_FILE
    if not cost.iterations and path.is_file():
        former = read_result(path)
        if former.config_digest == result_digest(cfg):
            cost = Cost(former.seconds["train"], former.iterations)
    overall, per_class = split_metrics(metrics)
    classes, detected = config_classes(cfg), run_classes(cfg)
    result = RunResult(
        protocol=run_protocol(cfg, origin),
        classes={
            "base": tuple(name for name in detected if name in classes.base),
            "novel": tuple(name for name in detected if name in classes.novel),
        },
        metrics=overall,
        per_class=per_class,
        config_digest=result_digest(cfg),
        versions=collect_versions(cfg.MODEL.DEVICE),
        seconds={"train": cost.seconds, "eval": eval_seconds},
        peak_memory_mib=peak_memory_mib(),
        train_images=_if_there(lambda: _count_images(cfg.DATASETS.TRAIN[0]), 0),
        iterations=cost.iterations,
        images_per_step=cfg.SOLVER.IMS_PER_BATCH,
        git_commit=git_commit(),
        notes=notes,
    )
    write_result(path, result)
    logger.info("Wrote %s", path)
    return path
