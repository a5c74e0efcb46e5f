"""What a report's gallery shows, gathered from a run's folder: its K supports, and its detections on test pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from fsdet.data.catalog import sample_files
from fsdet.data.seeds import digest_of
from fsdet.data.support import Support, SupportSet, read_picture
from fsdet.engine.record import RESULT_FILE
from fsdet.engine.setup import (
    config_classes,
    dataset_sources,
    dataset_specs,
    load_config,
    register_datasets,
    run_classes,
)
from fsdet.engine.tested_run import config_file, detections_of_run, tested_on
from fsdet.evaluation.ground_truth import GroundTruth
from fsdet.evaluation.matching import judge
from fsdet.evaluation.report_choice import choose
from fsdet.evaluation.report_gallery import Gallery, GalleryRow, Picture, draw_example, draw_support
from fsdet.evaluation.report_labels import method_name
from fsdet.evaluation.result import RunResult, read_result

EXAMPLES = 6  # pictures of a class
SUPPORTS = 10  # supports shown of a class; COCO has up to 30


def gather_gallery(
    folder: str | Path,
    *,
    classes: Sequence[str] = (),
    examples: int = EXAMPLES,
    supports: int = SUPPORTS,
    data_root: str | Path | None = None,
) -> Gallery:
    """Read a novel-stage run and draw its gallery.

    Args:
        folder: of the run, or of another evaluation of it (RUN/calibrated).
        classes: novel classes to show, in this order; empty for all.
        examples: test pictures of a class.
        supports: supports shown of a class.
        data_root: where the data is, when it has moved since the run.

    Raises:
        FileNotFoundError: no run folder, no detections, or data that is not there; names the file and the remedy.
        ValueError: a base-stage run, an unknown class, K-shot lists or detections that are not those of this run.
    """
    folder = Path(folder)
    config = config_file(folder)
    opts = ["FEWSHOT.ROOT", str(data_root)] if data_root else []
    cfg = load_config(str(config), opts)
    names = _shown_classes(cfg, config, classes)
    register_datasets(cfg)
    result = read_result(folder / RESULT_FILE) if (folder / RESULT_FILE).is_file() else None
    support_set = SupportSet.from_records(DatasetCatalog.get(cfg.DATASETS.TRAIN[0]), run_classes(cfg), min_shots=0)
    _check_samples(cfg, folder, result)
    files, truth = tested_on(cfg)
    detections = detections_of_run(folder, config, truth)
    rows = []
    for name in names:
        shots = support_set.shots(name)
        judged = judge(truth, detections, truth.class_names.index(name))
        pictures = []
        for example in choose(truth, detections, judged, examples):
            image = _read(files[truth.image_ids[example.image]])
            pictures.append(draw_example(image, truth, detections, judged, example))
        shown = tuple(_support_picture(support) for support in shots[:supports])
        facts = _facts(result, truth, judged.class_id, len(judged.rows), len(judged.missed))
        rows.append(GalleryRow(name, facts, len(shots), shown, tuple(pictures)))
    return Gallery(_title(cfg, result), tuple(_notes(cfg, folder, truth)), tuple(rows))


def _shown_classes(cfg: CfgNode, config: Path, wanted: Sequence[str]) -> list[str]:
    if cfg.FEWSHOT.STAGE == "base":
        raise ValueError(f"{config}: a base run has no novel classes to show; name the folder of a novel-stage run")
    novel = [name for name in run_classes(cfg) if name in config_classes(cfg).novel]
    if unknown := [name for name in wanted if name not in novel]:
        raise ValueError(f'{config}: no novel class "{unknown[0]}"; this run has {novel}')
    return list(wanted or novel)


def _check_samples(cfg: CfgNode, folder: Path, result: RunResult | None) -> None:
    """The supports shown must be those that the run was trained on."""
    recorded = result.protocol.samples_digest if result else None
    files = sample_files(dataset_specs(cfg)[0], dataset_sources(cfg))
    if recorded and digest_of(files) != recorded:
        raise ValueError(
            f"{files[0].parent}: these K-shot lists are not those that {folder / RESULT_FILE} was made with; put the "
            "former lists back, or say where they are with --data-root"
        )


def _support_picture(support: Support) -> Picture:
    return draw_support(_read(support.file_name), support.box, Path(support.file_name).name)


def _read(file_name: str) -> np.ndarray:
    return read_picture(file_name, "RGB", remedy=", or say where it is with --data-root")


def _facts(result: RunResult | None, truth: GroundTruth, class_id: int, detected: int, missed: int) -> str:
    name, objects = truth.class_names[class_id], int(truth.counted_objects()[class_id])
    measured = result.per_class.get(name, {}).get("AP50") if result else None
    figures = [] if measured is None else [f"AP50 {measured:.1f}"]
    figures.append(f"{objects - missed} of {objects} objects in the test set found by some detection")
    return " · ".join([*figures, f"{detected} detections of any score"])


def _title(cfg: CfgNode, result: RunResult | None) -> str:
    fewshot = cfg.FEWSHOT
    calibration = f" + {result.protocol.calibration}" if result and result.protocol.calibration else ""
    repeat = f", repeat {fewshot.REPEAT}" if fewshot.REPEAT else ""
    return f"{method_name(fewshot.METHOD)}{calibration}, {fewshot.SHOT}-shot, seed {fewshot.SEED}{repeat}"


def _notes(cfg: CfgNode, folder: Path, truth: GroundTruth) -> list[str]:
    return [
        f"{cfg.FEWSHOT.DATASET}, {cfg.FEWSHOT.SETTING}: {len(truth.image_ids)} test images. Run: {folder.as_posix()}.",
        "Correct: IoU of at least 0.5 with an object of the class that no detection of a higher score has taken.",
        "The pictures are chosen by rule, each image once a class: the correct and the false detections of the highest "
        "scores, the correct one at the median score, and the largest objects that no detection finds. Five further "
        "detections of a picture are drawn thin, those of higher scores first.",
    ]
