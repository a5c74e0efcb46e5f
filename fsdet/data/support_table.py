"""Legacy support tables: the list of ready-cut crops that FewX's release trains from, as CSV or JSON.

The release keeps it as a pickle of a pandas table, which nothing here reads; docs/datasets.md has the line that exports
it. One row is one crop:

    support_box   x0, y0, x1, y1 of the object in pixels of the crop
    category_id   dataset id of its class
    image_id, id  of the image and the annotation that it was cut from
    file_path     of the crop, relative to the folder of the table

Further columns are passed over. Rows are counted from 1, the header of a CSV file not among them.

Source: FewX (Fan et al., CVPR 2020) and its release, support preparation.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from fsdet.data.support import Support

COLUMNS = ("support_box", "category_id", "image_id", "id", "file_path")
FORMATS = (".csv", ".json")
FILES_CHECKED = 1000  # crops whose existence is checked when the table is read; the others when they are used


def read_support_table(path: Path, class_ids: Mapping[int, int], *, crop_size: int | None = None) -> list[Support]:
    """Read a table; each support is a crop file with its box, for the crop policy "whole".

    Args:
        path: .csv or .json (a list of objects).
        class_ids: dataset id -> class id of every class that a row may have.
        crop_size: side in pixels that the crops must have (the first one is looked at); None: any.
    Returns: supports in the order of the rows.
    Raises: FileNotFoundError for a missing table or crop; ValueError for other content. Both name file, row, column and
        remedy.
    """
    path = Path(path)
    rows = _rows(path)
    supports = [_support(row, path, number, class_ids) for number, row in enumerate(rows, start=1)]
    seen: dict[int | str | None, int] = {}
    for number, support in enumerate(supports, start=1):
        first = seen.setdefault(support.annotation_id, number)
        if first != number:
            raise _fault(path, number, "id", support.annotation_id, f"an id of its own; row {first} has the same")
    for number, support in enumerate(supports[:FILES_CHECKED], start=1):
        if not Path(support.file_name).is_file():
            raise FileNotFoundError(
                f'{path}: row {number}, column "file_path": there is no crop {support.file_name}; paths are relative '
                "to the folder of the table, so put it where the release has it, above its crops"
            )
    if crop_size is not None:
        _check_size(Path(supports[0].file_name), crop_size)
    return supports


def table_text(rows: Sequence[Mapping[str, Any]], suffix: str) -> str:
    """Text of a table that `read_support_table` reads.

    Args:
        rows: with the values of `COLUMNS`.
        suffix: ".csv" or ".json".
    Raises: ValueError for another suffix.
    """
    if suffix == ".json":
        lines = ",\n".join(json.dumps({column: row[column] for column in COLUMNS}) for row in rows)
        return f"[\n{lines}\n]\n"
    if suffix != ".csv":
        raise ValueError(f'A support table is written as {" or ".join(FORMATS)}, got "{suffix}"')
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row[column] for column in COLUMNS] for row in rows)
    return text.getvalue()


def _rows(path: Path) -> list[Mapping[str, Any]]:
    """Rows of a file that has all columns. Raises: FileNotFoundError, ValueError."""
    remedy = "Export it as docs/datasets.md shows, or make it with datasets/prepare_fewx.py."
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such support table (INPUT.FS.TABLE). {remedy}")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a support table is {' or '.join(FORMATS)}. {remedy}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix.lower() == ".json" else _csv_rows(text)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:].upper()} ({error}). {remedy}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{path}: expected a list of objects, one for each crop (pandas: orient="records"). {remedy}')
    if not rows:
        raise ValueError(f"{path}: the table has no row. {remedy}")
    for number, row in enumerate(rows, start=1):
        if lacking := [column for column in COLUMNS if row.get(column) is None]:
            raise ValueError(
                f"{path}: row {number} lacks the columns {lacking}; it has {[*filter(None, row)]}. {remedy}"
            )
    return rows


def _csv_rows(text: str) -> list[dict[str, Any]]:
    """Rows of a CSV text, with ids that are whole numbers as such (pandas writes some as 12.0)."""
    rows = list(csv.DictReader(io.StringIO(text)))
    for row in rows:
        for column in ("category_id", "image_id", "id"):
            if match := re.fullmatch(r"\s*(-?\d+)(\.0)?\s*", row.get(column) or ""):
                row[column] = int(match[1])
    return rows


def _support(row: Mapping[str, Any], path: Path, number: int, class_ids: Mapping[int, int]) -> Support:
    category = _id(row["category_id"])
    if category not in class_ids:
        raise _fault(
            path, number, "category_id", row["category_id"], f"an id of this run's classes, {sorted(class_ids)}"
        )
    box = _box(row["support_box"])
    if box is None or not (0 <= box[0] <= box[2] and 0 <= box[1] <= box[3]):
        expected = "four numbers x0, y0, x1, y1 with 0 <= x0 <= x1 and 0 <= y0 <= y1"
        raise _fault(path, number, "support_box", row["support_box"], expected)
    ids = {column: _id(row[column]) for column in ("image_id", "id")}
    for column, value in ids.items():
        if value is None:
            raise _fault(path, number, column, row[column], "a number or a text")
    if not isinstance(row["file_path"], str) or not row["file_path"].strip():
        raise _fault(path, number, "file_path", row["file_path"], "the path of a crop")
    return Support(str(path.parent / row["file_path"]), ids["image_id"], ids["id"], class_ids[category], box)


def _id(value: Any) -> int | str | None:
    """A number or a text as the annotation file has it; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value or None if isinstance(value, str) else value if type(value) is int else None


def _box(value: Any) -> tuple[float, ...] | None:
    """Four numbers from a list or its text ("[1.0, 2.0, 3.0, 4.0]", commas or not); None for anything else."""
    parts = re.split(r"[\s,]+", value.strip(" []()")) if isinstance(value, str) else value
    try:
        box = tuple(map(float, parts))
    except (TypeError, ValueError):
        return None
    return box if len(box) == 4 and all(map(math.isfinite, box)) else None


def _fault(path: Path, number: int, column: str, got: Any, expected: str) -> ValueError:
    return ValueError(
        f'{path}: row {number}, column "{column}": got {got!r}, expected {expected}. Correct the row or export the '
        "table again."
    )


def _check_size(crop: Path, crop_size: int) -> None:
    """Raise ValueError unless a crop is a picture of `crop_size` squared."""
    try:
        with Image.open(crop) as picture:
            size = picture.size
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{crop}: cannot be decoded ({error}); replace the file") from error
    if size != (crop_size, crop_size):
        raise ValueError(
            f"{crop}: this crop is {size[0]} x {size[1]} pixels, not {crop_size} x {crop_size}; set INPUT.FS.CROP_SIZE "
            "to the size of the stored crops"
        )
