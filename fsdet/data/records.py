"""What the readers of every annotation format share: box check, load report, leak policy, choice and merging of shots.

Source: the record rules of TFA (Wang et al., ICML 2020) and DeFRCN (Qiao et al., ICCV 2021) and their official loaders.
Unlike those loaders, the choice among more than K instances is seeded and equal on all processes unless the official
behaviour is asked for, and nothing is repaired without being counted.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from fsdet.data.seeds import choose_instances, parse_shot_name

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# A box may reach this many pixels over the border of its image: VOC counts pixels from 1 and COCO rounds to 0.01.
BORDER_TOLERANCE = 1.0
# Entries of a list that a log line or an error prints; the whole list stays in the metadata.
SHOWN = 10


def missing_file(path: Path, what: str, keys: str = "", *, draw: str = "") -> FileNotFoundError:
    """Build the error for a file or folder that should exist, with the remedy.

    Args:
        path: the expected place.
        what: short name of the thing, starts the message.
        keys: configuration keys that set the place, where it is not an official one.
        draw: command that makes it; only K-shot lists have one.
    """
    remedy = f"Correct {keys}: relative paths lie" if keys else "Put it there: the data sets lie"
    if draw:
        remedy = f"Draw it with `{draw}`, or c{remedy[1:]}"
    source = "" if draw else "says where to get it and "
    return FileNotFoundError(
        f"{what} not found: {path}. {remedy} below FEWSHOT.ROOT, without it below the folder that the environment "
        f"variable DETECTRON2_DATASETS names, else below datasets/. datasets/README.md {source}shows the expected tree."
    )


def require_shot_list(path: Path, shot: int, class_name: str, draw: str) -> None:
    """Make sure that a K-shot file exists; `draw` is the command that makes it.

    Raises: FileNotFoundError naming the file, the numbers of shots that are there for this class, and the remedy.
    """
    if path.is_file():
        return
    folder = path.parent if path.parent.is_dir() else path.parent.parent  # seed 0 may lie above
    named = [parse_shot_name(other) for other in folder.iterdir()] if folder.is_dir() else []
    there = sorted(k for k, name in filter(None, named) if name == class_name)
    what = f'{shot}-shot list of "{class_name}" (lists there: {", ".join(map(str, there)) or "no"} shot)'
    raise missing_file(path, what, "FEWSHOT.SAMPLES", draw=draw)


def xyxy(annotation: Record) -> tuple[float, float, float, float]:
    """Box of an annotation, (x0, y0, x1, y1) in pixels of the picture file."""
    return tuple(BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS))


def box_fault(box: Sequence[float], height: float, width: float) -> str | None:
    """Say what is wrong with a box: "zero_area_boxes", "outside_boxes" or None.

    Args:
        box: (x0, y0, x1, y1) in pixels of the original image.
        height, width: size of that image in pixels.
    """
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        return "outside_boxes"
    if x1 <= x0 or y1 <= y0:
        return "zero_area_boxes"
    if min(x0, y0, width - x1, height - y1) < -BORDER_TOLERANCE:
        return "outside_boxes"
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:  # nothing is left after cutting at the border
        return "outside_boxes"
    return None


@dataclass
class LoadReport:
    """Collector that the readers fill.

    `bad_boxes` decides what happens to a box without area or outside its image: "fatal" (K-shot samples and own data:
    `finish` raises one error for all of them), "drop" (official training sets) or "keep" (official test sets, where
    dropping ground truth would change the metric). In each case it is counted and listed. `remedy` ends the error;
    `quiet` leaves the log alone.
    """

    bad_boxes: str = "drop"
    remedy: str = "Correct or remove these annotations."
    quiet: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    chosen: dict[str, list[Any]] = field(default_factory=dict)
    _fatal: list[str] = field(default_factory=list)

    def add(self, key: str, detail: str | None = None, count: int = 1) -> None:
        """Count an event under `key`; with `detail` it is listed too."""
        self.counts[key] += count
        if detail is not None:
            self.details.append(f"{key}: {detail}")

    def accepts_box(
        self, box: Sequence[float], *, size: tuple[int, int], file: Any, image: Any, annotation: Any
    ) -> bool:
        """Check one box and count a bad one; returns whether the annotation stays.

        Args:
            box: (x0, y0, x1, y1) in pixels of the original image.
            size: (H, W) of that image.
            file, image, annotation: names for the message: annotation file, image id, annotation id.
        """
        fault = box_fault(box, *size)
        if fault is None:
            return True
        what = "has no area" if fault == "zero_area_boxes" else "lies outside the image"
        detail = (
            f"{file}: image {image}, annotation {annotation}: box (x0, y0, x1, y1) = "
            f"({', '.join(f'{v:g}' for v in box)}) {what} of {size[1]} x {size[0]} pixels (width x height)"
        )
        self.add(fault, detail)
        if self.bad_boxes == "fatal":
            self._fatal.append(detail)
        return self.bad_boxes != "drop"

    def finish(self, name: str) -> None:
        """Raise for fatal boxes, else write one log warning if anything was counted.

        Raises: ValueError that lists the bad boxes with file, image, annotation, box, image size and remedy.
        """
        if self._fatal:
            raise ValueError(f"{name}: {len(self._fatal)} unusable box(es):{_listed(self._fatal)}\n{self.remedy}")
        if self.quiet:
            return
        if self.chosen:
            logger.info("%s: instances chosen from longer lists: %s", name, self.chosen)
        if self.counts:
            counted = ", ".join(f"{key} {count}" for key, count in sorted(self.counts.items()))
            logger.warning("%s: %s%s", name, counted, _listed(self.details))


def _listed(lines: Sequence[str]) -> str:
    """Indented lines, cut at SHOWN."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "".join(f"\n  {line}" for line in [*lines[:SHOWN], *more])


def apply_leak(record: Record, boxes: Sequence[Sequence[float]], policy: str, report: LoadReport) -> bool:
    """Treat the unlabelled novel objects of a base training image; returns whether the image stays.

    Args:
        record: its dataset dict; "ignore" adds "ignore_regions" to it.
        boxes: (x0, y0, x1, y1) of the novel objects, original pixels.
        policy: "background" (the objects stay, unlabelled, as in the official loaders), "drop" (the image goes) or
            "ignore" (neither positives nor negatives may be taken from these regions).
        report: receives the counts.
    """
    if not boxes or policy == "background":
        return True
    if policy == "drop":
        report.add("leak_images_dropped")
        return False
    regions = [list(box) for box in boxes if box_fault(box, record["height"], record["width"]) is None]
    record["ignore_regions"] = regions
    report.add("leak_regions_ignored", count=len(regions))
    return True


def choose_shots(
    records: list[Record],
    shot: int,
    *,
    choice: str,
    split: int,
    seed: int,
    class_name: str,
    report: LoadReport,
    path: Path,
    strict: bool = False,
) -> list[Record]:
    """Cut the one-instance records of a class to K; a shorter list is counted and stays as it is.

    Args:
        records: every instance that the K-shot list of the class offers, in file order.
        shot: K.
        choice: "seeded" (generator from split, seed and class, equal on all processes) or "official" (NumPy's global
            generator, so that it differs between runs and processes).
        split, seed, class_name: what seeds the generator.
        report: receives counts and the ids of the chosen instances.
        path: the list, for messages.
        strict: the list was drawn to offer exactly K; anything else is an error.
    Raises: ValueError for a list without any instance, or a strict one that does not offer exactly K.
    Source: TFA and DeFRCN, official data set loaders.
    """
    if not records or (strict and len(records) != shot):
        raise ValueError(
            f'{path}: {shot} instances of "{class_name}" needed, {len(records)} found. Draw the samples again or ask '
            "for another number of shots; VOC lists drawn with difficult objects need FEWSHOT.DIFFICULT True."
        )
    if len(records) < shot:
        report.add("short_lists", f'{path}: {len(records)} of {shot} instances of "{class_name}"')
    if len(records) <= shot:
        return records
    report.add("overfull_lists", f"{path}: {len(records)} instances, {shot} of them chosen ({choice})")
    if choice == "official":
        rows = np.random.choice(len(records), shot, replace=False).tolist()
    else:
        rows = choose_instances(len(records), shot, split=split, seed=seed, class_name=class_name)
    kept = [records[row] for row in rows]
    report.chosen[class_name] = [record["annotations"][0]["id"] for record in kept]
    return kept


def merge_by_image(records: Sequence[Record], report: LoadReport) -> list[Record]:
    """Join one-instance records of the same file, in order of first appearance; a repeated instance counts once.

    Source: DeFRCN, COCO few-shot loader.
    """
    merged: dict[str, Record] = {}
    for record in records:
        target = merged.setdefault(record["file_name"], {**record, "annotations": []})
        known = [annotation["id"] for annotation in target["annotations"]]
        for annotation in record["annotations"]:
            if annotation["id"] is not None and annotation["id"] in known:
                report.add("repeated_instances")
            else:
                target["annotations"].append(annotation)
    return list(merged.values())


def join_pictures(records: Sequence[Record]) -> list[Record]:
    """One record for each picture, with the annotations of all its records, each once; K-shot sets have one an object.

    Args:
        records: dataset dicts, which stay as they are.
    """
    pictures: dict[tuple[str, Any], Record] = {}
    for record in records:
        picture = pictures.setdefault((record["file_name"], record["image_id"]), {**record, "annotations": []})
        known = {annotation.get("id") for annotation in picture["annotations"]} - {None}
        picture["annotations"] += [a for a in record.get("annotations", ()) if a.get("id") not in known]
    return list(pictures.values())
