"""What a run folder gives for prediction: its configuration, its weights and its class names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import nn

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.engine.setup import MODEL_FILE, load_config, on_this_machine
from fsdet.engine.trainer import build_detector
from fsdet.engine.validate import is_untrained

_WRITES = f"tools/train_net.py writes config.yaml, classes.json and {MODEL_FILE} into its OUTPUT_DIR"


@dataclass(frozen=True)
class FinishedRun:
    """Contents of a run folder.

    Attributes:
        cfg: its resolved configuration.
        weights: file or address of its checkpoint.
        class_names: names in predictor order.
        novel_names: the novel classes of its data.
    """

    cfg: CfgNode
    weights: str
    class_names: tuple[str, ...]
    novel_names: tuple[str, ...]


def read_finished_run(run: str | Path, *, weights: str | Path = "", opts: Sequence[str] = ()) -> FinishedRun:
    """Read a run folder.

    An evaluation without fine-tuning (SOLVER.MAX_ITER 0) leaves no model_final.pth: its weights are MODEL.WEIGHTS.

    Args:
        run: OUTPUT_DIR of the run.
        weights: another checkpoint of it.
        opts: KEY VALUE overrides of its configuration.
    Raises: FileNotFoundError naming the missing file; ValueError for a damaged one.
    """
    run = Path(run)
    for path in (run / "config.yaml", run / "classes.json"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found. Name the folder of a finished training ({_WRITES})")
    classes = _read_classes(run / "classes.json")
    cfg = load_config(str(run / "config.yaml"), opts)
    found = _weights_of(run, cfg, weights)
    return FinishedRun(cfg, found, tuple(classes["detector"]), tuple(classes["novel"]))


def _weights_of(run: Path, cfg: CfgNode, weights: str | Path) -> str:
    """The checkpoint of a run, or another one that was asked for. Raises: FileNotFoundError with the remedy."""
    final, remedy = run / MODEL_FILE, f"Name the folder of a finished training ({_WRITES})"
    if not weights and not final.is_file() and is_untrained(cfg):
        weights = cfg.MODEL.WEIGHTS
        remedy = f"{run / 'config.yaml'} evaluates these weights without training; put the file back, or name another"
    weights = str(weights or final)
    if "://" not in weights and not Path(weights.partition("?")[0]).is_file():  # "?matching_heuristics=True"
        raise FileNotFoundError(f"{weights} not found. {remedy}")
    return weights


def _read_classes(path: Path) -> dict[str, list[str]]:
    """Class lists of a run. Raises: ValueError naming the file."""
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
        return {key: [str(name) for name in classes[key]] for key in ("detector", "novel")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} must hold the lists "detector" and "novel" of class names ({error!r}). Run an evaluation with '
            "tools/train_net.py --eval-only, which writes it anew."
        ) from error


def for_inference(cfg: CfgNode, threshold: float, device: str) -> CfgNode:
    """Copy of a config without what only training needs: initial weights, a higher score threshold."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(f'"{cfg.MODEL.DEVICE}" is no device; expected cpu, cuda, cuda:1, ...') from error
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED, cfg.OS2D.WEAKALIGN = "", False, ""
    # Never raised: a method may rescore what passes it.
    for node in (cfg.MODEL.ROI_HEADS, cfg.OS2D):
        node.SCORE_THRESH_TEST = min(node.SCORE_THRESH_TEST, threshold)
    cfg.freeze()
    return on_this_machine(cfg)


def load_detector(cfg: CfgNode, weights: str | Path, class_names: Sequence[str] = ()) -> nn.Module:
    """Detector of a configuration with the weights of a file that fills all of it.

    Args:
        cfg: from `for_inference`.
        weights: .pth, .safetensors or .pkl, or the address of one.
        class_names: names in predictor order, compared with those that the file records; empty = not compared.
    Raises: FileNotFoundError; ValueError when the weights do not fill the model or have other classes.
    """
    model = build_detector(cfg)
    metadata = {"classes": list(class_names)} if class_names else {}
    FewShotCheckpointer(model, require_full=True, metadata=metadata).load(weights, checkpointables=[])
    return model.eval()
