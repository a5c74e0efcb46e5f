"""The calibration of a configuration: its network, and the class memory that an evaluation keeps and others take up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from fsdet.checkpoint.safe_io import load_weights
from fsdet.data.catalog import load_records, new_report
from fsdet.data.support import SupportSet
from fsdet.engine.setup import config_classes, dataset_sources, dataset_specs, run_classes
from fsdet.modeling.base import SupportConditioned, condition_on_support
from fsdet.modeling.calibration import KIND, CalibratedDetector, check_settings, with_calibration
from fsdet.modeling.class_memory import ClassMemory
from fsdet.modeling.imagenet import NETWORKS, ImageEncoder, build_encoder, check_weights

logger = logging.getLogger(__name__)

MEMORY = "class_memory"  # files <OUTPUT_DIR>/class_memory.safetensors and .json
_EVALUATIONS = ("", "calibrated")  # folders of a run in which an evaluation may have left one


def is_calibrated(cfg: CfgNode) -> bool:
    """Whether detections of this configuration are calibrated; a base stage has no shots to do it with."""
    return bool(cfg.TEST.CALIBRATION.ENABLED) and cfg.FEWSHOT.STAGE == "novel"


def _weights(cfg: CfgNode) -> tuple[dict, str]:
    """State dict of the classifier, and its file. Raises: ValueError, FileNotFoundError with the remedy."""
    network, file = cfg.TEST.CALIBRATION.NETWORK, cfg.TEST.CALIBRATION.WEIGHTS
    remedy = f"Set TEST.CALIBRATION.WEIGHTS to {NETWORKS[network].origin}, or TEST.CALIBRATION.ENABLED False"
    if not file:
        raise ValueError(f'Calibration needs the ImageNet classifier "{network}", and no file is named. {remedy}')
    if not Path(file).is_file():
        raise FileNotFoundError(f'{file}: no such file for the ImageNet classifier "{network}". {remedy}')
    return load_weights(file)["model"], file


def load_encoder(cfg: CfgNode) -> ImageEncoder:
    """The classifier of a configuration, on the CPU. Raises: as `check_calibration`."""
    check_settings(cfg)
    weights, file = _weights(cfg)
    return build_encoder(cfg.TEST.CALIBRATION.NETWORK, weights, file)


def check_calibration(cfg: CfgNode) -> None:
    """Find what would stop a calibrated evaluation: settings out of range, the classifier's file missing or another's.

    The readers of K-shot lists refuse a class without boxes.

    Args:
        cfg: resolved configuration; nothing is checked where it does not calibrate.
    Raises: ValueError, FileNotFoundError; each with the remedy.
    """
    if is_calibrated(cfg):
        check_settings(cfg)
        weights, file = _weights(cfg)
        check_weights(cfg.TEST.CALIBRATION.NETWORK, weights, file)


def calibrate(
    model: nn.Module, cfg: CfgNode, class_names: Sequence[str] = (), novel_names: Sequence[str] = ()
) -> nn.Module:
    """The detector with the calibration of a configuration; itself where there is none, or it has one already.

    Args:
        model: any detector.
        cfg: resolved configuration.
        class_names, novel_names: names in predictor order, and the novel ones; empty = those of the data.
    Raises: as `load_encoder`.
    """
    if isinstance(model, CalibratedDetector) or not is_calibrated(cfg):
        return model
    return with_calibration(
        model,
        cfg,
        encoder=load_encoder(cfg),
        class_names=class_names or run_classes(cfg),
        novel_names=novel_names or config_classes(cfg).novel,
    )


def read_supports(cfg: CfgNode) -> SupportSet:
    """The K-shot records of a configuration, read without any registry. Raises: FileNotFoundError; ValueError."""
    spec, _ = dataset_specs(cfg)
    report = new_report(spec)
    report.quiet = True
    return SupportSet.from_records(load_records(spec, dataset_sources(cfg), report), run_classes(cfg))


def encode_or_recall(model: nn.Module, build_support: Callable[[], SupportSet], folder: str | Path) -> None:
    """Give a detector its class memory before an evaluation.

    It is kept below `folder`, and only classes whose supports have changed since are encoded again. Where the support
    pictures are absent, the one kept there is taken.

    Args:
        model: any detector; one without memory is left alone.
        build_support: as for `condition_on_support`.
        folder: OUTPUT_DIR.
    Raises: FileNotFoundError when pictures and memory are absent; ValueError for a memory of another network.
    """
    is_encoded = True
    _reuse(model, folder)
    try:
        if not condition_on_support(model, build_support):
            return
    except FileNotFoundError as error:
        path = find_memory(folder)
        # A detector inside that reads supports itself has nothing to recall.
        if path is None or not isinstance(model, CalibratedDetector) or isinstance(model.detector, SupportConditioned):
            raise
        model.keep_class_memory(_recall(model, path))
        logger.warning("Calibrating with %s: the supports are not here (%s)", path, error)
        is_encoded = False
    # Nobody reads the former one any more. Every process comes by here, also one that lacks the supports.
    comm.synchronize()
    if is_encoded and isinstance(model, CalibratedDetector) and comm.is_main_process():
        model.class_memory.save(Path(folder) / MEMORY)


def _reuse(model: nn.Module, folder: str | Path) -> None:
    """Hand the prototypes of an earlier evaluation to a model without any; its encoding takes over what still holds."""
    path = Path(folder) / MEMORY
    if (
        not isinstance(model, CalibratedDetector)
        or model.has_class_memory
        or not path.with_name(f"{MEMORY}.json").is_file()
    ):
        return
    try:
        model.keep_class_memory(_recall(model, path))
    except ValueError as error:  # of another network, or damaged: encoded anew
        logger.info("Prototypes are made anew: %s", error)


def recall_or_encode(model: nn.Module, cfg: CfgNode, folder: str | Path) -> None:
    """Give a detector the class memory that an evaluation has kept, or encode the supports when there is none.

    Args:
        model: calibrated detector; another one is left alone.
        cfg: its configuration, which says where the K-shot data lies.
        folder: of the run; its evaluation "calibrated" is looked into as well.
    Raises: ValueError for a memory of another network, or of other supports than those that the configuration reads
        now; FileNotFoundError when neither memory nor supports are there.
    """
    if not isinstance(model, CalibratedDetector):
        return
    path = find_memory(folder)
    if path is None or isinstance(model.detector, SupportConditioned):
        try:
            condition_on_support(model, lambda: read_supports(cfg))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{Path(folder) / MEMORY}.json not found, and the supports to make it from are absent: {error}. "
                "Evaluate the run with calibration where its data is (tools/train_net.py --eval-only) and copy "
                f"{MEMORY}.json and .safetensors, or set TEST.CALIBRATION.ENABLED False"
            ) from error
        return
    memory = _recall(model, path)
    _refuse_stale(model, cfg, memory, path)
    model.keep_class_memory(memory)


def find_memory(folder: str | Path) -> Path | None:
    """Common path of a run's two memory files, or None when there are none."""
    paths = (Path(folder) / name / MEMORY for name in _EVALUATIONS)
    return next((path for path in paths if path.with_name(f"{MEMORY}.json").is_file()), None)


def _recall(model: CalibratedDetector, path: Path) -> ClassMemory:
    try:
        return ClassMemory.load(path, encoder=model.memory_encoder, kind=KIND)
    except ValueError as error:
        raise ValueError(
            f"{path}.json is no class memory of this calibration: {error}. Evaluate the run again, which writes it "
            "anew, or remove it"
        ) from error


def _refuse_stale(model: CalibratedDetector, cfg: CfgNode, memory: ClassMemory, path: Path) -> None:
    """Raise ValueError when the K-shot data is here and is not what the memory was made of."""
    if cfg.FEWSHOT.CHOICE == "official":
        return  # draws other shots each time
    try:
        stale = model.stale_classes(memory, read_supports(cfg))
    except FileNotFoundError as error:
        logger.info("%s is taken as it is: the supports are not here (%s)", path, error)
        return
    if stale:
        raise ValueError(
            f"{path}.json was made of other pictures or boxes than the K-shot data now gives for {stale}. Evaluate the "
            "run again, which writes it anew, or point FEWSHOT.ROOT and FEWSHOT.SAMPLES to the data it was made of"
        )
