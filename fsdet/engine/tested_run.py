"""What an evaluated run leaves: its test set and its detections; and whether two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from fsdet.engine.setup import config_classes, load_config, register_datasets
from fsdet.evaluation.bootstrap import DRAWS, Difference, paired_bootstrap
from fsdet.evaluation.evaluator import DETECTIONS_FILE
from fsdet.evaluation.ground_truth import Detections, GroundTruth, load_ground_truth
from fsdet.evaluation.matching import read_detections

GROUPS = ("all", "base", "novel")


def config_file(folder: Path) -> Path:
    """The config of a run, also seen from the folder of another evaluation inside it. Raises: FileNotFoundError."""
    for place in (folder, folder.parent) if folder.is_dir() else ():
        if (place / "config.yaml").is_file():
            return place / "config.yaml"
    raise FileNotFoundError(f"{folder / 'config.yaml'}: not found; name the folder of an evaluated run, which holds it")


def tested_on(cfg: CfgNode) -> tuple[dict[int | str, str], GroundTruth]:
    """Image id -> file, and the ground truth of the images that the run was tested on."""
    (name,) = cfg.DATASETS.TEST
    files = {record["image_id"]: record["file_name"] for record in DatasetCatalog.get(name)}
    return files, load_ground_truth(name)


def detections_of_run(folder: Path, config: Path, truth: GroundTruth) -> Detections:
    """Detections that the evaluation of a run has written. Raises: FileNotFoundError, and ValueError for others."""
    path = folder / "inference" / DETECTIONS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found; evaluate the run again, which writes it: "
            f"python tools/train_net.py --config-file {config} --eval-only --resume"
        )
    return read_detections(path, truth)


def compare_runs(
    first: Sequence[str | Path],
    second: Sequence[str | Path],
    *,
    group: str = "all",
    ious: Sequence[float] = (0.5, 0.75),
    draws: int = DRAWS,
    data_root: str | Path | None = None,
) -> Iterator[Difference]:
    """Paired bootstrap over the test pictures of evaluated runs, one result for each IoU.

    Args:
        first, second: run folders of the two sides, e.g. one for each seed; AP is averaged over a side.
        group: "all", "base" or "novel" classes.
        ious: least IoU of a correct detection.
        draws: of the test pictures.
        data_root: where the data is, when it has moved since the runs.
    Raises: FileNotFoundError for what a run lacks; ValueError for runs on other pictures or classes.
    """
    if group not in GROUPS:
        raise ValueError(f"Classes {group!r}: expected {' | '.join(GROUPS)}")
    truth, sides, names = None, ([], []), ()
    for side, folders in zip(sides, (first, second), strict=True):
        for folder in map(Path, folders):
            own, detections, names = _read(folder, group, data_root)
            if truth is not None and (own.image_ids, own.class_names) != (truth.image_ids, truth.class_names):
                raise ValueError(
                    f"{folder}: tested on {len(own.image_ids)} images and the classes {list(own.class_names)}; "
                    f"{first[0]} on {len(truth.image_ids)} and {list(truth.class_names)}. Only evaluations "
                    "of the same images and classes can be compared"
                )
            truth = truth or own
            side.append(detections)
    if truth is None:
        raise ValueError("No run to compare")
    classes = [truth.class_names.index(name) for name in names]
    for iou in ious:
        yield paired_bootstrap(truth, *sides, classes=classes, iou=iou, draws=draws)


def _read(folder: Path, group: str, data_root: str | Path | None) -> tuple[GroundTruth, Detections, tuple[str, ...]]:
    """Test set and detections of a run, and the tested classes of a group."""
    config = config_file(folder)
    cfg = load_config(str(config), ["FEWSHOT.ROOT", str(data_root)] if data_root else [])
    register_datasets(cfg)
    _, truth = tested_on(cfg)
    split = config_classes(cfg)
    wanted = truth.class_names if group == "all" else getattr(split, group)
    names = tuple(name for name in truth.class_names if name in wanted)
    if not names:
        raise ValueError(f"{config}: this run was tested on no {group} class, but on {list(truth.class_names)}")
    return truth, detections_of_run(folder, config, truth), names
