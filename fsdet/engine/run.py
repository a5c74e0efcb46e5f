"""One run from configuration to result.json: set up, check, train, evaluate, record."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from fsdet.checkpoint.safe_io import METADATA_KEY, load_weights
from fsdet.data.files import save_text_atomic
from fsdet.data.loader import build_test_loader
from fsdet.data.mapper import FewShotMapper
from fsdet.data.support import SupportSet
from fsdet.engine.calibrated import calibrate, is_calibrated
from fsdet.engine.memories import encode_or_recall, read_supports
from fsdet.engine.preflight import check_run
from fsdet.engine.record import (
    Cost,
    check_fresh,
    evaluated_cost,
    evaluated_origin,
    record_result,
    resume_digest,
    run_origin,
)
from fsdet.engine.setup import config_classes, load_config, on_this_machine, register_datasets, run_classes
from fsdet.engine.trainer import Trainer, autocast, build_detector
from fsdet.engine.validate import is_untrained
from fsdet.evaluation.diagnosis import diagnose, is_novel_zero, proposal_recall
from fsdet.evaluation.evaluator import FewShotEvaluator, build_evaluator
from fsdet.evaluation.result import reset_peak_memory
from fsdet.modeling.freeze import trainable_prefixes

logger = logging.getLogger(__name__)

_LOGGERS = ("fvcore", "detectron2", "fsdet")


def start_logging(output_dir: str, *, quiet: bool = False) -> None:
    """Log to the console (main process; `quiet`: errors alone) and to OUTPUT_DIR/log.txt, afresh for every run."""
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # Detectron2 v0.6's anchors; harmless
    for name in _LOGGERS:
        target = logging.getLogger(name)
        for handler in list(target.handlers):
            target.removeHandler(handler)
        plain = getattr(setup_logger, "__wrapped__", setup_logger)  # later Detectron2 caches calls with equal arguments
        plain(output_dir, distributed_rank=comm.get_rank(), name=name)
        for handler in target.handlers:
            if quiet and getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.ERROR)


def prepare(cfg: CfgNode, *, quiet: bool = False, keep_config: bool = False) -> CfgNode:
    """Make OUTPUT_DIR with config.yaml and classes.json, start the log, seed; returns the config to run."""
    output = Path(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        if not (keep_config and (output / "config.yaml").exists()):  # evaluating and resuming rewrite nothing
            save_text_atomic(cfg.dump(), output / "config.yaml")
        classes = config_classes(cfg)
        listed = {name: list(classes.of(name)) for name in ("all", "base", "novel")}
        save_text_atomic(json.dumps({**listed, "detector": run_classes(cfg)}, indent=1), output / "classes.json")
    comm.synchronize()
    start_logging(cfg.OUTPUT_DIR, quiet=quiet)
    if cfg.SEED >= 0:
        # As Detectron2 does: FEWSHOT.CHOICE official then chooses other instances on every process, as it always did.
        seed_all_rng(cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    reset_peak_memory()
    return on_this_machine(cfg)


def load_for_run(cfg: CfgNode, checkpointer: FewShotCheckpointer, *, resume: bool, training: bool = True) -> int:
    """Resume or load MODEL.WEIGHTS; returns the iteration to start from.

    With FEWSHOT.RESET_PREDICTOR the box predictor (of a detector without regions: its head) keeps its start whatever
    the file holds, in training alone: an evaluation takes the file as it is.

    Raises: ValueError when the file fills nothing of the model.
    """
    reset = cfg.FEWSHOT.RESET_PREDICTOR and training and not (resume and checkpointer.has_checkpoint())
    predictor = checkpointer.model.get_submodule(_predictor_name(checkpointer.model)) if reset else None
    fresh = {name: value.clone() for name, value in predictor.state_dict().items()} if predictor else None
    checkpointer.strict_heads = not reset
    state = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if predictor is not None:
        predictor.load_state_dict(fresh)
    check_match(cfg, checkpointer, training=training)
    if not (resume and checkpointer.has_checkpoint()):
        return 0
    if training and state.get(METADATA_KEY, {}).get("recipe", resume_digest(cfg)) != resume_digest(cfg):
        raise ValueError(
            f"{cfg.OUTPUT_DIR} holds checkpoints of another configuration; resuming would mix the two. Use the "
            "options of its config.yaml, or another OUTPUT_DIR"
        )
    return int(state.get("iteration", -1)) + 1


def check_match(cfg: CfgNode, checkpointer: FewShotCheckpointer, *, training: bool = True) -> None:
    """Refuse weights that fill too little of the model to train or evaluate on.

    A novel stage needs everything but the box predictor, or everything where there is no surgery; a base stage a whole
    pretrained backbone.

    Raises: ValueError naming what is not filled.
    """
    report = checkpointer.report
    if report is None:
        return
    remedy = "Convert the file with tools/convert_checkpoint.py, or use the configuration that it was trained with."
    if not report.matched:
        raise ValueError(f"{cfg.MODEL.WEIGHTS}: none of its tensors has a name of this model. {remedy}")
    unfilled = [*report.missing, *(name for name, _, _ in report.mismatched)]
    parameters = dict(checkpointer.model.named_parameters())
    bottom_up = "backbone.bottom_up." if any("bottom_up" in name for name in parameters) else "backbone."
    parts = bottom_up, f"{_predictor_name(checkpointer.model)}."
    if deeper := _blocks_too_many(report.unexpected, parameters, bottom_up):
        raise ValueError(
            f"{cfg.MODEL.WEIGHTS} is of a deeper network than this one (R-{cfg.MODEL.RESNETS.DEPTH}): it has "
            f"{', '.join(deeper[:4])}{', ...' if len(deeper) > 4 else ''}. Its other blocks would fit by name only. "
            "Take weights of this network, or the file's own network by --model"
        )
    needed = [name for name in unfilled if name in parameters and _must_be_filled(cfg, name, parts, training)]
    if needed:
        raise ValueError(
            f"{cfg.MODEL.WEIGHTS} fills the model only in part: {len(needed)} tensors would start at random, "
            f"{', '.join(needed[:4])}{', ...' if len(needed) > 4 else ''}. {remedy}"
        )


def _blocks_too_many(unexpected: Sequence[str], parameters: Mapping[str, Any], bottom_up: str) -> list[str]:
    """Residual blocks of a file, such as "res4.6", whose stage the model has in its backbone, but shorter."""
    found = [re.search(r"(?:^|\.)(res[2-5])\.\d+(?=\.)", name) for name in unexpected if "roi_heads" not in name]
    stages = {name.removeprefix(bottom_up).split(".")[0] for name in parameters if name.startswith(bottom_up)}
    return list(dict.fromkeys(m.group().lstrip(".") for m in found if m and m.group(1) in stages))


def _predictor_name(model: nn.Module) -> str:
    """Name of the part that FEWSHOT.RESET_PREDICTOR leaves at its start."""
    return "roi_heads.box_predictor" if hasattr(model, "roi_heads") else "head"


def _must_be_filled(cfg: CfgNode, name: str, parts: tuple[str, str], training: bool) -> bool:
    """Whether a parameter may not keep its random start; `parts` are prefixes of the backbone and the predictor."""
    bottom_up, predictor = parts
    # RESET_PREDICTOR without training measures heads that have learnt nothing.
    whole = cfg.FEWSHOT.SURGERY == "none" and not cfg.FEWSHOT.RESET_PREDICTOR
    if cfg.FEWSHOT.STAGE == "base" and (training or not whole):
        return name.startswith(bottom_up)
    return whole or not name.startswith(predictor)


def make_evaluator(cfg: CfgNode) -> FewShotEvaluator:
    """Evaluator of DATASETS.TEST as TEST.* describe it; writes the detections below OUTPUT_DIR/inference."""
    (name,) = cfg.DATASETS.TEST
    return build_evaluator(
        name,
        style=cfg.TEST.STYLE,
        output_dir=Path(cfg.OUTPUT_DIR) / "inference",
        voc_11_point=cfg.TEST.VOC_11_POINT,
        fast=cfg.TEST.FAST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        oneshot_metric=cfg.TEST.ONESHOT_METRIC,
    )


def evaluate(cfg: CfgNode, model: nn.Module) -> tuple[dict[str, float], FewShotEvaluator]:
    """Evaluate on DATASETS.TEST; a detector with supports encodes them once, before the first image.

    Calibrates where the configuration says so. The class memory is kept in OUTPUT_DIR, and taken from there on a
    machine without the support pictures.

    Returns: metrics in percent, e.g. {"AP50": …, "nAP50": …} (empty on all but the main process), and the evaluator.
    """
    model = calibrate(model, cfg)
    encode_or_recall(model, lambda: build_support(cfg), cfg.OUTPUT_DIR, run_classes(cfg))
    (name,) = cfg.DATASETS.TEST
    evaluator = make_evaluator(cfg)
    # A pyramid is built from the picture as it is stored.
    loader = build_test_loader(cfg, name, keep_original=is_calibrated(cfg) or cfg.OS2D.ENABLED)
    with autocast(cfg):
        results = inference_on_dataset(model, loader, evaluator)
    return dict(results.get("bbox", {})), evaluator


def build_support(cfg: CfgNode) -> SupportSet:
    """The supports of the configuration, as whole images with boxes."""
    return read_supports(cfg)


def explain_zero(cfg: CfgNode, model: nn.Module, checkpointer: FewShotCheckpointer, evaluator: FewShotEvaluator) -> str:
    """Why the novel AP may be 0: weights, head, class order, frozen parts, scores, RPN recall on novel boxes."""
    name = cfg.DATASETS.TEST[0]
    novel = [c for c in run_classes(cfg) if c in config_classes(cfg).novel]
    mapper = FewShotMapper(cfg, True, augmentations=build_augmentation(cfg, False))
    loader = ([mapper(record)] for record in DatasetCatalog.get(name))
    novel_ids = [run_classes(cfg).index(c) for c in novel]
    proposes = hasattr(model, "proposal_generator")
    weights = Path(cfg.MODEL.WEIGHTS)
    has_rows = cfg.FEWSHOT.SURGERY != "none"  # whose order could be another one
    recorded = recorded_classes(load_weights(weights)) if has_rows and weights.is_file() else None
    return diagnose(
        novel_classes=novel,
        test_classes=run_classes(cfg),
        load_report=checkpointer.report,
        head_classes=predictor_classes(model.state_dict()),
        checkpoint_classes=recorded,
        trainable=trainable_prefixes(model) if hasattr(model, "roi_heads") else None,
        score_threshold=cfg.OS2D.SCORE_THRESH_TEST if cfg.OS2D.ENABLED else cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        highest_scores=evaluator.highest_scores(),
        recall=proposal_recall(model, loader, novel_ids, max_images=200) if proposes else None,
    ).text()


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
    cfg = load_config(config_file, opts, model=model)
    register_datasets(cfg)
    untrained = is_untrained(cfg)
    resume = resume and not untrained  # there is nothing of its own to resume from
    check_run(cfg, resume=resume, training=not eval_only)
    if not (eval_only or resume):
        check_fresh(cfg)
    cfg = prepare(cfg, quiet=quiet, keep_config=eval_only or resume)
    eval_only = eval_only or untrained
    metadata = {"classes": run_classes(cfg), "stage": cfg.FEWSHOT.STAGE, "method": cfg.FEWSHOT.METHOD}
    if untrained:
        metadata["origin"] = run_origin(cfg)
    if eval_only:
        detector = build_detector(cfg)
        checkpointer = FewShotCheckpointer(detector, cfg.OUTPUT_DIR, metadata=metadata)
        load_for_run(cfg, checkpointer, resume=resume, training=False)
        measured, cost = Evaluation(cfg, detector), Cost() if untrained else evaluated_cost(checkpointer)
        measured()
    else:
        metadata["recipe"] = resume_digest(cfg)
        if not resume and comm.is_main_process():  # else a later --resume could take up a former run's checkpoints
            (Path(cfg.OUTPUT_DIR) / "last_checkpoint").unlink(missing_ok=True)
        trainer = Trainer(cfg, metadata=metadata)
        checkpointer, detector = trainer.checkpointer, trainer.checkpointer.model
        trainer.start_iter = load_for_run(cfg, checkpointer, resume=resume)
        is_resumed = resume and checkpointer.has_checkpoint()  # then the first part tells, whatever the options name
        metadata["origin"] = evaluated_origin(cfg, checkpointer) if is_resumed else run_origin(cfg)
        checkpointer.metadata["origin"] = metadata["origin"]
        trainer.evaluate = measured = Evaluation(cfg, detector)
        trainer.train()
        cost = Cost(trainer.seconds, trainer.max_iter)
    if not comm.is_main_process():
        return {}
    notes = {}
    if is_novel_zero(measured.metrics):
        notes["novel AP is 0"] = explain_zero(cfg, detector, checkpointer, measured.evaluator)
        logger.warning("Novel AP is 0\n%s", notes["novel AP is 0"])
    origin = metadata.get("origin") or evaluated_origin(cfg, checkpointer)
    record_result(cfg, measured.metrics, cost=cost, eval_seconds=measured.seconds, origin=origin, notes=notes)
    return measured.metrics


class Evaluation:
    """Evaluates a detector when called, as a training hook or by itself, and keeps the last outcome.

    Attributes:
        metrics: in percent; empty on all but the main process.
        evaluator: with the detections behind them.
        seconds: that the last evaluation took.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        self.cfg, self.model = cfg, model
        self.metrics: dict[str, float] = {}
        self.evaluator: FewShotEvaluator | None = None
        self.seconds = 0.0

    def __call__(self) -> dict[str, dict[str, float]]:
        """Metrics that have a value, as Detectron2's evaluation hook wants them."""
        started = time.perf_counter()
        self.model = calibrate(self.model, self.cfg)  # once: later evaluations find network and prototypes in it
        self.metrics, self.evaluator = evaluate(self.cfg, self.model)
        self.seconds = time.perf_counter() - started
        finite = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        return {"bbox": finite} if finite else {}
