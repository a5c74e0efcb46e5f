"""One run from configuration to result.json: set up, check, train, evaluate, record."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import build_augmentation
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.checkpoint.predictor import predictor_classes, recorded_classes
from fsdet.checkpoint.safe_io import load_weights, save_text_atomic, sha256_of
from fsdet.data.catalog import sample_files
from fsdet.data.loader import build_test_loader
from fsdet.data.mapper import FewShotMapper
from fsdet.data.seeds import check_manifest, digest_of
from fsdet.data.support import SupportSet
from fsdet.engine.preflight import check_run
from fsdet.engine.setup import (
    config_classes,
    dataset_sources,
    dataset_specs,
    load_config,
    on_this_machine,
    register_datasets,
    run_classes,
)
from fsdet.engine.trainer import Trainer, autocast, build_detector
from fsdet.evaluation.diagnosis import diagnose, is_novel_zero, proposal_recall
from fsdet.evaluation.evaluator import FewShotEvaluator, build_evaluator
from fsdet.evaluation.result import (
    RUN_KEYS,
    Protocol,
    RunResult,
    collect_versions,
    config_digest,
    git_commit,
    peak_memory_mib,
    split_metrics,
    write_result,
)
from fsdet.modeling.base import condition_on_support
from fsdet.modeling.freeze import trainable_prefixes

logger = logging.getLogger(__name__)

_LOGGERS = ("fvcore", "detectron2", "fsdet")


def start_logging(output_dir: str, *, quiet: bool = False) -> None:
    """Log to the console (main process; `quiet`: warnings alone) and to OUTPUT_DIR/log.txt, afresh for every run."""
    for name in _LOGGERS:
        target = logging.getLogger(name)
        for handler in list(target.handlers):
            target.removeHandler(handler)
        plain = getattr(setup_logger, "__wrapped__", setup_logger)  # later Detectron2 caches calls with equal arguments
        plain(output_dir, distributed_rank=comm.get_rank(), name=name)
        for handler in target.handlers:
            if quiet and getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.ERROR)


def prepare(cfg: CfgNode, *, quiet: bool = False) -> CfgNode:
    """Make OUTPUT_DIR with config.yaml and classes.json, register the data, seed; returns the config to run."""
    output = Path(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        save_text_atomic(cfg.dump(), output / "config.yaml")
        classes = config_classes(cfg)
        listed = {name: list(classes.of(name)) for name in ("all", "base", "novel")}
        save_text_atomic(json.dumps({**listed, "detector": run_classes(cfg)}, indent=1), output / "classes.json")
    comm.synchronize()
    start_logging(cfg.OUTPUT_DIR, quiet=quiet)
    register_datasets(cfg)
    if cfg.SEED >= 0:
        seed_all_rng(cfg.SEED)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    return on_this_machine(cfg)


def load_for_run(cfg: CfgNode, checkpointer: FewShotCheckpointer, *, resume: bool, training: bool = True) -> int:
    """Resume or load MODEL.WEIGHTS; returns the iteration to start from.

    With FEWSHOT.RESET_PREDICTOR the box predictor keeps its random start whatever the file holds, in training alone:
    an evaluation takes the file as it is.

    Raises: ValueError when the file fills nothing of the model.
    """
    reset = cfg.FEWSHOT.RESET_PREDICTOR and training and not (resume and checkpointer.has_checkpoint())
    predictor = checkpointer.model.roi_heads.box_predictor if reset else None
    fresh = {name: value.clone() for name, value in predictor.state_dict().items()} if predictor else None
    checkpointer.strict_heads = not reset
    state = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if predictor is not None:
        predictor.load_state_dict(fresh)
    report = checkpointer.report
    if report is not None and not report.matched:
        raise ValueError(
            f"{cfg.MODEL.WEIGHTS}: none of its tensors has a name of this model ({report.describe()}). Convert it with "
            "tools/convert_checkpoint.py, or use the configuration that it was trained with."
        )
    return int(state.get("iteration", -1)) + 1 if resume and checkpointer.has_checkpoint() else 0


def evaluate(cfg: CfgNode, model: nn.Module) -> tuple[dict[str, float], FewShotEvaluator]:
    """Evaluate on DATASETS.TEST; a detector with supports encodes them once, before the first image.

    Returns: metrics in percent, e.g. {"AP50": …, "nAP50": …} (empty on all but the main process), and the evaluator.
    """
    condition_on_support(model, lambda: build_support(cfg))
    (name,) = cfg.DATASETS.TEST
    evaluator = build_evaluator(
        name,
        style=cfg.TEST.STYLE,
        output_dir=Path(cfg.OUTPUT_DIR) / "inference",
        voc_11_point=cfg.TEST.VOC_11_POINT,
        fast=cfg.TEST.FAST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    with autocast(cfg):
        results = inference_on_dataset(model, build_test_loader(cfg, name), evaluator)
    return dict(results.get("bbox", {})), evaluator


def build_support(cfg: CfgNode) -> SupportSet:
    """The K-shot records that the configuration trains on, as whole images with boxes."""
    return SupportSet.from_records(DatasetCatalog.get(cfg.DATASETS.TRAIN[0]), run_classes(cfg))


def explain_zero(cfg: CfgNode, model: nn.Module, checkpointer: FewShotCheckpointer, evaluator: FewShotEvaluator) -> str:
    """Why the novel AP may be 0: weights, head, class order, frozen parts, scores, RPN recall on novel boxes."""
    name = cfg.DATASETS.TEST[0]
    novel = [c for c in run_classes(cfg) if c in config_classes(cfg).novel]
    mapper = FewShotMapper(cfg, True, augmentations=build_augmentation(cfg, False))
    loader = ([mapper(record)] for record in DatasetCatalog.get(name))
    weights = Path(cfg.MODEL.WEIGHTS)
    recorded = recorded_classes(load_weights(weights)) if weights.is_file() else None
    return diagnose(
        novel_classes=novel,
        test_classes=run_classes(cfg),
        load_report=checkpointer.report,
        head_classes=predictor_classes(model.state_dict()),
        checkpoint_classes=recorded,
        trainable=trainable_prefixes(model),
        score_threshold=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        highest_scores=evaluator.highest_scores(),
        recall=proposal_recall(model, loader, [run_classes(cfg).index(c) for c in novel], max_images=200),
    ).text()


def backbone_label(cfg: CfgNode) -> str:
    """Short name of the backbone, e.g. "R50-FPN" or "tf_efficientnet_lite0-FPN"."""
    name = cfg.MODEL.BACKBONE.NAME.lower()
    body = cfg.MODEL.TIMM.NAME if "timm" in name else f"R{cfg.MODEL.RESNETS.DEPTH}"
    return f"{body}-{'FPN' if 'fpn' in name else 'C4'}"


def style_label(cfg: CfgNode) -> str:
    """Name of the evaluation, e.g. "coco" or "voc-11point"."""
    if cfg.TEST.STYLE == "coco":
        return "coco"
    return "voc-11point" if cfg.TEST.VOC_11_POINT else "voc-area"


def run_protocol(cfg: CfgNode) -> Protocol:
    """What this run's numbers stand for."""
    fewshot = cfg.FEWSHOT
    train, test = dataset_specs(cfg)
    sources = dataset_sources(cfg)
    novel = fewshot.STAGE == "novel"
    manifest = check_manifest(sources.samples_of(fewshot.LAYOUT), fewshot.SEED) if novel else None
    weights = Path(cfg.MODEL.WEIGHTS)
    # The base checkpoint itself where it is known: a `combine` file differs from draw to draw.
    base = Path(fewshot.BASE_RUN) / "model_final.pth"
    base = base if base.is_file() and base.parent == weights.parent else weights
    return Protocol(
        benchmark=fewshot.DATASET,
        test_set=test.name,
        test_images=len(DatasetCatalog.get(test.name)),
        split=fewshot.SPLIT if fewshot.LAYOUT == "voc" else 1,
        setting=fewshot.SETTING,
        stage=fewshot.STAGE,
        method=fewshot.METHOD,
        shot=fewshot.SHOT,
        evaluation=style_label(cfg),
        backbone=backbone_label(cfg),
        pretraining="" if novel else weights.name,
        sampling=(manifest["algorithm"] if manifest else "official") if novel else "none",
        choice=fewshot.CHOICE,
        records=fewshot.RECORDS,
        leak=fewshot.LEAK,
        difficult=fewshot.DIFFICULT,
        tta=bool(cfg.TEST.AUG.ENABLED),
        base_model=sha256_of(base)[:12] if novel and base.is_file() else "",
        seed=fewshot.SEED,
        samples_digest=digest_of(sample_files(train, sources)) if novel else None,
    )


def result_digest(cfg: CfgNode) -> str:
    """Digest of the recipe behind a result: the configuration without folders, device and draw."""
    return config_digest(cfg, without=(*RUN_KEYS, "FEWSHOT.BASE_RUN", "FEWSHOT.OUTPUT"))


def record_result(
    cfg: CfgNode, metrics: dict[str, float], *, seconds: dict[str, float], iterations: int, notes: dict[str, str]
) -> Path:
    """Write OUTPUT_DIR/result.json and return its path."""
    overall, per_class = split_metrics(metrics)
    classes, detected = config_classes(cfg), run_classes(cfg)
    result = RunResult(
        protocol=run_protocol(cfg),
        classes={
            "base": tuple(name for name in detected if name in classes.base),
            "novel": tuple(name for name in detected if name in classes.novel),
        },
        metrics=overall,
        per_class=per_class,
        config_digest=result_digest(cfg),
        versions=collect_versions(cfg.MODEL.DEVICE),
        seconds=seconds,
        peak_memory_mib=peak_memory_mib(),
        train_images=len({record["file_name"] for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])}),
        iterations=iterations,
        images_per_step=cfg.SOLVER.IMS_PER_BATCH,
        git_commit=git_commit(),
        notes=notes,
    )
    path = Path(cfg.OUTPUT_DIR) / "result.json"
    write_result(path, result)
    logger.info("Wrote %s", path)
    return path


def run(
    config_file: str,
    opts: Sequence[str] = (),
    model: str | None = None,
    resume: bool = False,
    eval_only: bool = False,
    quiet: bool = False,
) -> dict[str, float]:
    """Train and evaluate, or only evaluate, what a configuration describes.

    Args:
        config_file: a file of configs/ or a run's config.yaml.
        opts: KEY VALUE overrides.
        model: another network for the recipe, see `load_config`.
        resume: continue from the newest checkpoint in OUTPUT_DIR.
        eval_only: evaluate MODEL.WEIGHTS (with `resume`: the newest checkpoint).
        quiet: keep log lines off the console.
    Returns: metrics in percent, e.g. {"AP50": …, "nAP50": …}; empty on all but the main process.
    Raises: what `load_config` and `check_run` raise, before any work.
    """
    cfg = prepare(load_config(config_file, opts, model=model), quiet=quiet)
    check_run(cfg, resume=resume, training=not eval_only)
    metadata = {"classes": run_classes(cfg), "stage": cfg.FEWSHOT.STAGE, "method": cfg.FEWSHOT.METHOD}
    started = time.perf_counter()
    if eval_only:
        detector = build_detector(cfg)
        checkpointer = FewShotCheckpointer(detector, cfg.OUTPUT_DIR, metadata=metadata)
        load_for_run(cfg, checkpointer, resume=resume, training=False)
    else:
        trainer = Trainer(cfg, metadata=metadata)
        checkpointer, detector = trainer.checkpointer, trainer.checkpointer.model
        trainer.start_iter = load_for_run(cfg, checkpointer, resume=resume)
        trainer.train()
    trained = time.perf_counter()
    metrics, evaluator = evaluate(cfg, detector)
    if not comm.is_main_process():
        return {}
    notes = {}
    if is_novel_zero(metrics):
        notes["novel AP is 0"] = explain_zero(cfg, detector, checkpointer, evaluator)
        logger.warning("Novel AP is 0\n%s", notes["novel AP is 0"])
    seconds = {"train": 0.0 if eval_only else trained - started, "eval": time.perf_counter() - trained}
    record_result(cfg, metrics, seconds=seconds, iterations=0 if eval_only else cfg.SOLVER.MAX_ITER, notes=notes)
    return metrics
