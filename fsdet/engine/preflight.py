"""What can be known before hours of work: data, samples, pictures and weights of a configuration."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from fsdet.checkpoint.predictor import predictor_classes, recorded_classes
from fsdet.checkpoint.safe_io import METADATA_KEY, load_weights
from fsdet.data.catalog import DatasetSources, DatasetSpec, check_sources, load_records, new_report
from fsdet.data.files import sha256_of
from fsdet.data.mapper import ImageError
from fsdet.data.records import Record
from fsdet.engine.calibrated import check_calibration
from fsdet.engine.setup import (
    MODEL_FILE,
    config_classes,
    dataset_sources,
    dataset_specs,
    run_classes,
    stage_subset,
    surgered_weights,
)

logger = logging.getLogger(__name__)


def check_run(cfg: CfgNode, *, resume: bool = False, training: bool = True) -> None:
    """Raise one clear error for what would stop this run later.

    Args:
        cfg: resolved configuration.
        resume: whether a checkpoint in OUTPUT_DIR replaces MODEL.WEIGHTS.
        training: False checks the test set and the weights alone.
    Raises: FileNotFoundError, ValueError, ImageError; each names the file and the remedy.
    """
    train, test = dataset_specs(cfg)
    sources = dataset_sources(cfg)
    own = cfg.FEWSHOT.LAYOUT in ("custom", "oneshot")
    check_sources(test, sources)
    if training:
        check_sources(train, sources)
    if own:
        check_pictures(test.name, _read_quietly(test, sources))
    check_calibration(cfg)
    if training and (own or train.shot):
        records = _read_quietly(train, sources)
        check_labels(cfg, records)
        check_pictures(train.name, records)
    if not (resume and (Path(cfg.OUTPUT_DIR) / "last_checkpoint").exists()):
        check_weights(cfg, training=training)


def _read_quietly(spec: DatasetSpec, sources: DatasetSources) -> list[Record]:
    """Records of a small or own set; what is odd about them is logged when training reads them."""
    report = new_report(spec)
    report.quiet = True
    return load_records(spec, sources, report)


def check_labels(cfg: CfgNode, records: list[Record]) -> None:
    """At least one training image shows a labelled object, and each class where a detector learns it by its objects.

    Raises: ValueError naming the annotation file and what may have emptied it.
    """
    labelled = {a["category_id"] for record in records for a in record["annotations"] if not a.get("iscrowd", 0)}
    train, _ = dataset_specs(cfg)
    source = dataset_sources(cfg).json_of("train") or train.name
    if not labelled:
        cause = "check its annotations and FEWSHOT.NOVEL_CLASSES"
        if train.removes_leak and train.leak == "drop":
            cause = 'FEWSHOT.LEAK drop takes away every image that shows a novel object; use "ignore" or "background"'
        raise ValueError(
            f"{source}: no image with an object of the {train.subset} classes is left for training; {cause}"
        )
    learns_by_objects = cfg.FEWSHOT.SURGERY == "none" and cfg.FEWSHOT.LAYOUT != "oneshot"
    unseen = [name for number, name in enumerate(run_classes(cfg)) if number not in labelled]
    if learns_by_objects and unseen:
        raise ValueError(
            f"{source}: no object of the classes {unseen} is left for training, and {cfg.FEWSHOT.METHOD} knows a "
            "class by examples. Label one of each, or take the classes out of the file"
        )


def check_pictures(dataset_name: str, records: list[Record]) -> None:
    """Decode every picture of a small or own set, so that a broken one surfaces now.

    Raises: ImageError naming all broken files.
    """
    files = sorted({record["file_name"] for record in records})
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


def surgery_command(cfg: CfgNode, source: str, output: str) -> str:
    """The command that makes the weights of a novel stage, `output`, from a base checkpoint."""
    fewshot = cfg.FEWSHOT
    words = ["python tools/surgery.py", fewshot.SURGERY, "--src", source]
    if fewshot.SURGERY == "combine":
        words += ["--novel-src", "NOVEL_ONLY_RUN/model_final.pth"]
    if fewshot.SURGERY != "remove":
        split = {"voc": f"voc{fewshot.SPLIT}", "coco": "coco"}.get(fewshot.LAYOUT)
        names = shlex.quote(",".join(run_classes(cfg)))
        words += ["--split", split] if split else ["--target-classes", names]
    return " ".join([*words, "--output", output])


def check_weights(cfg: CfgNode, *, training: bool = True) -> None:
    """MODEL.WEIGHTS exists and, if it is a detector, has the classes of this run.

    Args:
        cfg: resolved configuration.
        training: False asks for a complete detector, since nothing will train what is missing.
    Raises: FileNotFoundError, ValueError with the remedy.
    """
    weights = cfg.MODEL.WEIGHTS
    trained = "Set MODEL.WEIGHTS to the model_final.pth of a finished run"
    if not weights and training and cfg.FEWSHOT.STAGE == "novel":
        raise ValueError(
            f"A novel stage needs MODEL.WEIGHTS, and it is empty. The usual file is {surgered_weights(cfg)}"
        )
    if not weights and not training:
        raise ValueError(f"There are no weights to evaluate. {trained}, or add --resume to take the newest of this one")
    if not weights:
        return
    file = _local_file(cfg)
    if cfg.FEWSHOT.RESET_PREDICTOR and training:
        return
    checkpoint = load_weights(file)
    have = predictor_classes(checkpoint["model"])
    if have is None and not training and cfg.FEWSHOT.SURGERY != "none":
        raise ValueError(f"{weights} is no complete detector: it has no box predictor to evaluate. {trained}")
    if have not in (None, cfg.MODEL.ROI_HEADS.NUM_CLASSES) and cfg.FEWSHOT.SURGERY != "none":
        raise ValueError(_wrong_classes(cfg, have, training))
    if training:
        _check_origin(cfg, checkpoint)
        _check_leak(cfg, checkpoint)


def _check_leak(cfg: CfgNode, checkpoint: dict[str, Any]) -> None:
    """Refuse start weights that have seen labels of the novel classes, where no predictor of classes would tell."""
    if cfg.FEWSHOT.SURGERY != "none":
        return
    if seen := sorted(set(recorded_classes(checkpoint) or ()) & set(config_classes(cfg).novel)):
        raise ValueError(
            f"{cfg.MODEL.WEIGHTS} was trained with labels of {seen}, which are novel classes here. Start from a "
            "detector of this split's base classes (FEWSHOT.INIT, FEWSHOT.BASE_RUN or MODEL.WEIGHTS)"
        )


def _check_origin(cfg: CfgNode, checkpoint: dict[str, Any]) -> None:
    """Refuse a surgered file that was made before the base model beside it was trained again."""
    base, weights = Path(cfg.FEWSHOT.BASE_RUN) / MODEL_FILE, cfg.MODEL.WEIGHTS
    sources = checkpoint.get(METADATA_KEY, {}).get("sources")
    if sources and base.is_file() and weights == surgered_weights(cfg) and sources[0]["sha256"] != sha256_of(base):
        raise ValueError(
            f"{weights} was made from another checkpoint than {base}, which has been trained again since. Remove it "
            f"and run\n  {surgery_command(cfg, str(base), weights)}"
        )


def _local_file(cfg: CfgNode) -> str:
    """Path of MODEL.WEIGHTS, fetched first where it is an address.

    Raises: FileNotFoundError with the remedy.
    """
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]  # "?matching_heuristics=True" is no part of the path
    if "://" in weights:
        try:
            return PathManager.get_local_path(weights)
        except OSError as error:
            raise FileNotFoundError(
                f"{weights} cannot be downloaded ({error}). Download it on a machine with network access and set "
                "MODEL.WEIGHTS to the file"
            ) from error
    if Path(weights).is_file():
        return weights
    raise FileNotFoundError(f"{weights}: no such weights file; {_weights_remedy(cfg, weights)}")


def _weights_remedy(cfg: CfgNode, weights: str) -> str:
    """How to come by a missing weights file."""
    made_here = cfg.FEWSHOT.STAGE == "novel" and surgered_weights(cfg) == cfg.MODEL.WEIGHTS
    if made_here and cfg.FEWSHOT.SURGERY == "none":
        return "train the base stage first, or set MODEL.WEIGHTS or FEWSHOT.BASE_RUN"
    if made_here:
        command = surgery_command(cfg, f"{cfg.FEWSHOT.BASE_RUN}/{MODEL_FILE}", weights)
        return f"train the base stage first, then run\n  {command}\nor set MODEL.WEIGHTS"
    if cfg.FEWSHOT.INIT and cfg.MODEL.WEIGHTS == cfg.FEWSHOT.INIT:
        return "train that detector first (FEWSHOT.INIT), or name another one"
    return "correct MODEL.WEIGHTS; docs/datasets.md (Weights) says where the files come from"


def _wrong_classes(cfg: CfgNode, have: int, training: bool) -> str:
    """Message for a checkpoint whose predictor has `have` classes instead of those of this run."""
    fewshot, novel = cfg.FEWSHOT, cfg.FEWSHOT.STAGE == "novel"
    unfitted = novel and have == len(config_classes(cfg).base)
    cause = "it is a base model that has had no surgery" if unfitted else "it belongs to another class list"
    remedy = "start with a fresh predictor: FEWSHOT.RESET_PREDICTOR True"
    if not training:
        remedy = "evaluate it with the config.yaml of the run that trained it"
    if novel:
        source = cfg.MODEL.WEIGHTS if unfitted else f"{fewshot.BASE_RUN}/{MODEL_FILE}"
        command = surgery_command(cfg, source, surgered_weights(cfg))
        remedy = f"run\n  {command}\nand set MODEL.WEIGHTS to its output, or {remedy}"
    return (
        f"{cfg.MODEL.WEIGHTS} predicts {have} classes, but this {fewshot.SETTING if novel else 'base'} run has "
        f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} ({stage_subset(cfg)} classes): {cause}. Remedy: {remedy}"
    )
