"""What can be known before hours of work: data, samples, pictures and weights of a configuration."""

from __future__ import annotations

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from PIL import Image, UnidentifiedImageError

from fsdet.checkpoint.predictor import predictor_classes
from fsdet.checkpoint.safe_io import load_weights
from fsdet.data.catalog import check_sources
from fsdet.data.mapper import ImageError
from fsdet.engine.setup import config_classes, dataset_sources, dataset_specs, stage_subset

logger = logging.getLogger(__name__)


def check_run(cfg: CfgNode, *, resume: bool = False, training: bool = True) -> None:
    """Raise one clear error for what would stop this run later.

    Args:
        cfg: resolved configuration with its data sets registered.
        resume: whether a checkpoint in OUTPUT_DIR replaces MODEL.WEIGHTS.
        training: False checks the test set and the weights alone.
    Raises: FileNotFoundError, ValueError, ImageError; each names the file and the remedy.
    """
    train, test = dataset_specs(cfg)
    sources = dataset_sources(cfg)
    check_sources(test, sources)
    if training:
        check_sources(train, sources)
        if train.shot or cfg.FEWSHOT.LAYOUT == "custom":
            check_pictures(cfg.DATASETS.TRAIN[0])
    if not (resume and (Path(cfg.OUTPUT_DIR) / "last_checkpoint").exists()):
        check_weights(cfg)


def check_pictures(dataset_name: str) -> None:
    """Decode every picture of a small or own training set, so that a broken one surfaces now.

    Raises: ImageError naming all broken files.
    """
    files = sorted({record["file_name"] for record in DatasetCatalog.get(dataset_name)})
    broken = []
    for file_name in files:
        try:
            with Image.open(file_name) as image:
                image.load()
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            broken.append(f"{file_name} ({error})")
    if broken:
        raise ImageError(
            f"{len(broken)} of {len(files)} pictures of {dataset_name} cannot be read; replace them or remove them "
            "from the annotations:\n  " + "\n  ".join(broken)
        )


def surgery_command(cfg: CfgNode) -> str:
    """The command that makes MODEL.WEIGHTS of a novel stage from its base run."""
    fewshot = cfg.FEWSHOT
    split = {"voc": f"voc{fewshot.SPLIT}", "coco": "coco"}.get(fewshot.LAYOUT)
    names = f"--split {split}" if split else "--target-classes NAMES"
    return (
        f"python tools/surgery.py {fewshot.SURGERY} --src {fewshot.BASE_RUN}/model_final.pth {names} "
        f"--output {cfg.MODEL.WEIGHTS}"
    )


def check_weights(cfg: CfgNode) -> None:
    """MODEL.WEIGHTS exists and, for a novel stage, has the predictor that the stage expects.

    Raises: FileNotFoundError, ValueError with the command that mends it.
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights or "://" in weights:  # random start, or a hub name that Detectron2 resolves
        return
    novel = cfg.FEWSHOT.STAGE == "novel"
    if not Path(weights).is_file():
        remedy = (
            f"train the base stage first, then run\n  {surgery_command(cfg)}\nor set MODEL.WEIGHTS"
            if novel
            else "docs/datasets.md says where the ImageNet weights come from; or set MODEL.WEIGHTS"
        )
        raise FileNotFoundError(f"{weights}: no such weights file; {remedy}")
    if not novel or cfg.FEWSHOT.RESET_PREDICTOR:
        return
    have, want = predictor_classes(load_weights(weights)["model"]), cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if have is None or have == want:
        return
    base = len(config_classes(cfg).base)
    cause = "it is a base model that has had no surgery" if have == base else "it belongs to another class list"
    raise ValueError(
        f"{weights} predicts {have} classes, but this {cfg.FEWSHOT.SETTING} run has {want} ({stage_subset(cfg)} "
        f"classes): {cause}. Run\n  {surgery_command(cfg)}\nor start with a fresh predictor: "
        "FEWSHOT.RESET_PREDICTOR True"
    )
