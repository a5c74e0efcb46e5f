"""The calibration of a configuration: whether it has one, its network, and the detector around which it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from fsdet.checkpoint.safe_io import load_weights
from fsdet.engine.setup import config_classes, run_classes
from fsdet.modeling.calibration import CalibratedDetector, check_settings, with_calibration
from fsdet.modeling.imagenet import NETWORKS, ImageEncoder, build_encoder, check_weights


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
