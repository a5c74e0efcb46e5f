"""Annotation files of one-shot sets: OS2D's CSV, and COCO-format json, in one form.

A CSV has a row for each box: `imageid`, `classid`, `gtbboxid`, `difficult` (1 or 0), `lx`, `ty`, `rx`, `by` (fractions
of width and height), and where the defaults do not hold `imagefilename` (imageid + ".jpg"), `classfilename` (classid +
".jpg") and `split`. Ours is the optional column `classname`; without it class 16 of logos.csv is called "logos-16", so
that the classes of two sets never mix. Other columns are passed over.

Source: Osokin et al., ECCV 2020 (OS2D), format of its data sets.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsdet.data.coco import read_coco
from fsdet.data.custom import validate
from fsdet.data.records import SHOWN

PREPARE = "prepare_oneshot.py"
CORNERS = ("lx", "ty", "rx", "by")
COLUMNS = ("imageid", "classid", "gtbboxid", "difficult", *CORNERS)
_FLAGS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "": False}

Id = int | str


@dataclass(frozen=True, slots=True)  # slots: a set may hold a hundred thousand
class LabelledBox:
    """One labelled object.

    Attributes:
        id: of the annotation. place: where it stands in the file, for messages.
        image_id, class_id: as the file spells them; numbers where all of its ids are.
        box: (x0, y0, x1, y1), fractions of width and height in a CSV, pixels in a json.
        difficult: neither rewarded nor punished in a test. is_crowd: a json's region of many objects.
        subset: value of the column "split", "" without it.
        area: square pixels as a json states it, else None.
    """

    id: Id
    place: str
    image_id: Id
    class_id: Id
    box: tuple[float, float, float, float]
    difficult: bool
    is_crowd: bool = False
    subset: str = ""
    area: float | None = None


@dataclass(frozen=True)
class AnnotationFile:
    """Content of one file; not to be changed, since readers share it.

    Attributes:
        path: the file.
        images: image id -> name of the picture file.
        sizes: image id -> (H, W); empty for a CSV, whose pictures have to be asked.
        classes: class id -> name, in the order of the ids.
        class_files: class id -> names or stems that the picture of the class may have, the likeliest first.
        boxes: in the order of the file.
        subsets: values of the column "split"; None where there is no such column.
    """

    path: Path
    images: Mapping[Id, str]
    sizes: Mapping[Id, tuple[int, int]]
    classes: Mapping[Id, str]
    class_files: Mapping[Id, tuple[str, ...]]
    boxes: tuple[LabelledBox, ...]
    subsets: tuple[str, ...] | None = None

    @property
    def is_csv(self) -> bool:
        """Whether boxes are fractions, and sizes unknown."""
        return self.path.suffix.lower() == ".csv"

    def select(self, subset: str) -> tuple[LabelledBox, ...]:
        """Boxes of a value of the column "split"; all of them for "" and for a json, which is one set.

        Raises: ValueError for a value that the file does not have, or a file without that column.
        """
        if not subset or not self.is_csv:
            return self.boxes
        if self.subsets is None or subset not in self.subsets:
            have = "it has no such column" if self.subsets is None else f"it has {list(self.subsets)}"
            raise ValueError(
                f'{self.path}: no rows with "{subset}" in the column "split"; {have}. Correct FEWSHOT.ONESHOT_SETS '
                '(training, test of the base classes, test of the novel ones), where "" stands for all rows'
            )
        return tuple(box for box in self.boxes if box.subset == subset)


def read_annotation_file(path: Path) -> AnnotationFile:
    """Read a CSV (by its suffix) or a COCO-format json; a file that has not changed is read once.

    Raises: FileNotFoundError; ValueError that lists missing columns or fields, and rows that cannot be read or
        contradict each other.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such annotation file; correct FEWSHOT.TRAIN_JSON or TEST_JSON, which name the CSV or the json "
            "of a one-shot set. Relative paths lie below the folder that DETECTRON2_DATASETS names"
        )
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, _changed: int) -> AnnotationFile:
    return _read_csv(path) if path.suffix.lower() == ".csv" else _read_json(path)


def _read_csv(path: Path) -> AnnotationFile:
    rows = _csv_rows(path)
    for row in rows:
        row["imagefilename"] = row.get("imagefilename") or f"{row['imageid']}.jpg"
        row["classfilename"] = row.get("classfilename") or f"{row['classid']}.jpg"
        row["classname"] = row.get("classname") or f"{path.stem}-{row['classid']}"
    faults = _contradictions(rows, "imageid", "imagefilename", "image")
    faults += _contradictions(rows, "classid", "classfilename", "class")
    faults += _contradictions(rows, "classid", "classname", "class")
    faults += _contradictions(rows, "classname", "classid", "class name")
    image_ids, class_ids, box_ids = (_ids(row[key] for row in rows) for key in ("imageid", "classid", "gtbboxid"))
    boxes = []
    for row in rows:
        try:
            boxes.append(_labelled(row, image_ids, class_ids, box_ids))
        except ValueError as error:
            faults.append(f"row {row['line']}: {error}")
    if faults:
        _refuse(path, faults)
    class_rows = {class_ids[row["classid"]]: row for row in reversed(rows)}
    return AnnotationFile(
        path=path,
        images={image_ids[row["imageid"]]: row["imagefilename"] for row in rows},
        sizes={},
        classes={i: class_rows[i]["classname"] for i in sorted(class_rows)},
        class_files={i: (row["classfilename"],) for i, row in class_rows.items()},
        boxes=tuple(boxes),
        subsets=tuple(dict.fromkeys(row["split"] for row in rows if row["split"])) if "split" in rows[0] else None,
    )


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with stripped cells and their place under "line", counted from 1 with the header.

    Raises: ValueError.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            found = list(reader.fieldnames or ())
            rows = [{**row, "line": reader.line_num} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file ({error}); export it again with commas, in UTF-8") from error
    if lacking := [column for column in COLUMNS if column not in found]:
        raise ValueError(
            f"{path}: the columns {lacking} are missing, found {found}. Expected {', '.join(COLUMNS)}, separated by "
            "commas, and where needed imagefilename, classfilename, classname, split"
        )
    if not rows:
        raise ValueError(f"{path}: no row below the header; export the annotations again")
    # None is the key of cells behind the last column.
    return [{k: v.strip() if isinstance(v, str) else v for k, v in row.items() if k is not None} for row in rows]


def _contradictions(rows: Sequence[Mapping[str, Any]], key: str, value: str, what: str) -> list[str]:
    """Faults of rows that give one `key` two values."""
    first: dict[str, Mapping[str, Any]] = {}
    faults = {}
    for row in rows:
        other = first.setdefault(row[key], row)
        if other[value] != row[value] and row[key] not in faults:
            faults[row[key]] = (
                f'rows {other["line"]} and {row["line"]} give the {what} "{row[key]}" two values of {value}: '
                f'"{other[value]}" and "{row[value]}"'
            )
    return list(faults.values())


def _ids(texts: Iterable[str]) -> dict[str, Id]:
    """Text of an id -> the id: a number where all of them are plain numbers ("007" is none)."""
    texts = dict.fromkeys(texts)
    plain = all(text.isdecimal() and str(int(text)) == text for text in texts)
    return {text: int(text) if plain else text for text in texts}


def _labelled(
    row: Mapping[str, Any], image_ids: Mapping[str, Id], class_ids: Mapping[str, Id], box_ids: Mapping[str, Id]
) -> LabelledBox:
    """The box of a row. Raises: ValueError saying what cannot be read."""
    if empty := [key for key in ("imageid", "classid", *CORNERS) if row[key] == ""]:
        raise ValueError(f"{', '.join(empty)} empty")
    if row["difficult"].lower() not in _FLAGS:
        raise ValueError(f'difficult is "{row["difficult"]}"; expected 1 or 0')
    return LabelledBox(
        id=box_ids[row["gtbboxid"]],
        place=f"row {row['line']}",
        image_id=image_ids[row["imageid"]],
        class_id=class_ids[row["classid"]],
        box=tuple(float(row[key]) for key in CORNERS),
        difficult=_FLAGS[row["difficult"].lower()],
        subset=row.get("split", ""),
    )


def _read_json(path: Path) -> AnnotationFile:
    data = read_coco(path, PREPARE)
    validate(data, path)
    boxes, faults = [], []
    for item in data["annotations"]:
        try:
            x, y, width, height = map(float, item["bbox"])
        except (TypeError, ValueError):
            faults.append(f"annotation {item['id']}: bbox {item['bbox']}; expected four numbers x, y, width, height")
            continue
        difficult = bool(item.get("difficult", 0))
        # COCO tools know crowds alone, so files mark difficult objects as such too; these are single objects.
        is_crowd = bool(item.get("iscrowd", 0) or item.get("ignore", 0)) and not difficult
        box = (x, y, x + width, y + height)
        boxes.append(
            LabelledBox(
                item["id"],
                str(item["id"]),
                item["image_id"],
                item["category_id"],
                box,
                difficult,
                is_crowd,
                area=item.get("area"),
            )  # fmt: skip
        )
    if faults:
        _refuse(path, faults)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    return AnnotationFile(
        path=path,
        images={image["id"]: image["file_name"] for image in data["images"]},
        sizes={image["id"]: (image["height"], image["width"]) for image in data["images"]},
        classes={category["id"]: category["name"] for category in categories},
        class_files={
            category["id"]: (category["class_image"],)
            if "class_image" in category
            else (category["name"], str(category["id"]))
            for category in categories
        },
        boxes=tuple(boxes),
    )


def _refuse(path: Path, faults: Sequence[str]) -> None:
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    listed = "".join(f"\n  {fault}" for fault in [*faults[:SHOWN], *more])
    raise ValueError(f"{path}: {len(faults)} fault(s):{listed}\nCorrect the file or export it again.")
