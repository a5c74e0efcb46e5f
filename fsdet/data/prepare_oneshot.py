"""OS2D's CSV of a one-shot set: checked as a whole, and written as COCO-format json for other tools.

Every value of the column "split" becomes a file. Difficult objects have "difficult" 1 and "iscrowd" 1, so that COCO
tools ignore them; categories name the picture of their class ("class_image").
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdet.data.oneshot import REMEDY, default_scenes, records_of
from fsdet.data.oneshot_files import AnnotationFile, Id, read_annotation_file
from fsdet.data.oneshot_supports import class_pictures, default_class_images, first_pictures, require_pictures
from fsdet.data.pictures import read_pixels
from fsdet.data.records import LoadReport, Record, xyxy

_DECIMALS = 3  # of pixels, in the boxes written


@dataclass(frozen=True)
class SetSummary:
    """What a set holds; `name` is its value in the column "split", "" without that column."""

    name: str
    images: int
    boxes: int
    difficult: int
    classes: int

    def text(self) -> str:
        """One line."""
        counts = f"{self.images} images, {self.boxes} boxes ({self.difficult} difficult), {self.classes} classes"
        return f"{self.name or 'all rows'}: {counts}"


def prepare_oneshot(
    path: Path, *, scenes: Path | None = None, class_images: Path | None = None, output: Path | None = None
) -> tuple[dict[Path, str], list[SetSummary]]:
    """Check a CSV with everything that it names; nothing is written.

    Args:
        path: the CSV.
        scenes, class_images: folders; None = the usual places beside it.
        output: folder of the json files; None = beside the CSV, where their pictures are found as the CSV's are.
    Returns: files to write, <stem>_<split>.json -> text; and a summary of each set.
    Raises: ValueError for another file than a CSV, contradicting rows and bad boxes; FileNotFoundError for missing
        scenes and class pictures; ImageError for class pictures that cannot be read.
    """
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path}: expected a CSV file; a COCO-format json trains as it is")
    file = read_annotation_file(path)
    _check_pictures(file, class_images or default_class_images(path))
    folder, report = scenes or default_scenes(path), LoadReport("fatal", REMEDY, quiet=True)
    files, summaries = {}, []
    for subset in file.subsets or ("",):
        boxes = file.select(subset)
        images = {box.image_id for box in boxes}
        records = records_of(file, boxes, images, list(file.classes.values()), folder, report)
        name = f"{path.stem}_{subset}" if subset else path.stem
        files[(output or path.parent) / f"{name.replace('/', '-')}.json"] = json.dumps(_coco(file, records))
        difficult, classes = sum(box.difficult for box in boxes), len({box.class_id for box in boxes})
        summaries.append(SetSummary(subset, len(images), len(boxes), difficult, classes))
    report.finish(str(path))
    return files, summaries


def _check_pictures(file: AnnotationFile, folder: Path) -> None:
    found = class_pictures(file, folder)
    require_pictures(found, first_pictures(file, folder))
    for path in (path for pictures in found.values() for path in pictures):
        read_pixels(path, "BGR")


def _coco(file: AnnotationFile, records: Iterable[Record]) -> dict[str, Any]:
    """COCO-format content of some records of a CSV, whose category ids are places among the file's classes."""
    images, classes = _numbers(file.images), _numbers(file.classes)
    by_place = list(classes.values())
    rows = [(record, annotation) for record in records for annotation in record["annotations"]]
    ids = _numbers(annotation["id"] for _, annotation in rows)
    return {
        "images": [
            {
                "id": images[record["image_id"]],
                "file_name": file.images[record["image_id"]],
                "width": record["width"],
                "height": record["height"],
            }
            for record in records
        ],
        "annotations": [
            {
                "id": ids[annotation["id"]] if len(ids) == len(rows) else number,
                "image_id": images[record["image_id"]],
                "category_id": by_place[annotation["category_id"]],
                **_box(annotation),
                "iscrowd": annotation["difficult"],
                "difficult": annotation["difficult"],
            }
            for number, (record, annotation) in enumerate(rows, start=1)
        ],
        "categories": [
            {"id": classes[class_id], "name": name, "class_image": file.class_files[class_id][0]}
            for class_id, name in file.classes.items()
        ],
    }


def _box(annotation: Record) -> dict[str, Any]:
    x0, y0, x1, y1 = xyxy(annotation)
    bbox = [round(value, _DECIMALS) for value in (x0, y0, x1 - x0, y1 - y0)]
    return {"bbox": bbox, "area": round(bbox[2] * bbox[3], _DECIMALS)}


def _numbers(ids: Iterable[Id]) -> dict[Id, int]:
    """Ids as COCO has them: as they are where all are numbers, else counted from 1."""
    ids = list(dict.fromkeys(ids))
    plain = all(isinstance(value, int) for value in ids)
    return {value: value if plain else number for number, value in enumerate(ids, start=1)}
