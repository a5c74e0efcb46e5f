"""Own data: any COCO-format json, base and novel classes by name, faults found before training.

Nothing is repaired silently here. An own data set has no official behaviour to keep, so every inconsistency is an error
that names file, image and annotation.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsdet.data.coco import read_coco
from fsdet.data.records import SHOWN, missing_file
from fsdet.data.seeds import parse_shot_name
from fsdet.data.splits import ClassSplit, split_of

PREPARE = "prepare_custom.py"
# Required fields of each list of a COCO detection file.
FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def read_categories(path: Path) -> dict[int, str]:
    """Dataset id -> class name in the order of the ids, from the "categories" list alone.

    The list is cut out of the text where possible, so that a large file is not parsed.

    Raises: FileNotFoundError; ValueError for a missing list, missing fields and repeated ids or names.
    """
    if not path.is_file():
        raise missing_file(path, "COCO-format annotation file", "FEWSHOT.TRAIN_JSON or TEST_JSON")
    return dict(_categories_of(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=64)
def _categories_of(path: Path, _changed: int) -> tuple[tuple[int, str], ...]:
    categories = _cut_categories(path.read_text(encoding="utf-8"))
    if categories is None:
        categories = read_coco(path)["categories"]
    _require_fields({"categories": categories}, path)
    names = [category["name"] for category in categories]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or len({category["id"] for category in categories}) < len(categories):
        raise ValueError(f'{path}: "categories" repeats an id or the names {repeated}; every class needs its own')
    return tuple(sorted((category["id"], category["name"]) for category in categories))


def _cut_categories(text: str) -> list[dict[str, Any]] | None:
    """The "categories" list of a COCO text; None unless exactly one list of objects has that key."""
    found = []
    for match in re.finditer(r'"categories"\s*:\s*(?=\[)', text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, match.end())
        except json.JSONDecodeError:
            return None
        found.append(value)
    usable = len(found) == 1 and found[0] and all(isinstance(item, dict) for item in found[0])
    return found[0] if usable else None


def custom_split(path: Path, novel_classes: Sequence[str]) -> ClassSplit:
    """Base and novel classes of a json: `novel_classes` by name, base is the rest, `all` in the order of the ids.

    Raises: ValueError naming novel classes that the file does not have.
    """
    names = read_categories(path).values()
    try:
        return split_of(names, novel_classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Correct FEWSHOT.NOVEL_CLASSES.") from error


def draw_command(path: Path, samples: Path, *, shot: int, seed: int, class_names: Sequence[str] = ()) -> str:
    """The command that draws the K-shot lists of one seed, beside those that are there: they are nested over K.

    Args:
        path: the json with all annotations.
        samples: folder of the lists.
        shot, seed: which lists are wanted.
        class_names: classes to draw; empty = all of the file.
    """
    drawn = list((samples / f"seed{seed}").glob("*.json"))
    there = drawn or (list(samples.glob("*.json")) if seed == 0 else [])  # lists of seed 0 may lie above it
    shots = {name[0] for name in map(parse_shot_name, there) if name} | {shot}
    words = ["--json", str(path), "--shots", *map(str, sorted(shots)), "--seeds", str(seed)]
    words += ["--classes", *class_names] if class_names else []
    words += ["--output", str(samples)] if samples != path.parent / "samples" else []
    words += ["--force"] if drawn else []  # the draw's manifest has to name the new shots as well
    return shlex.join(["python", f"datasets/{PREPARE}", *words])


def validate(data: Mapping[str, Any], path: Path) -> None:
    """Check that a parsed file is complete and consistent (boxes are checked by the reader).

    Raises: ValueError that lists missing fields, repeated ids, and annotations of unknown images or classes.
    """
    _require_fields(data, path)
    images = {image["id"] for image in data["images"]}
    classes = {category["id"] for category in data["categories"]}
    annotations = data["annotations"]
    faults = [
        f"annotation {a['id']} of image {a['image_id']}: unknown {what} {a[key]}"
        for a in annotations
        for key, known, what in (("image_id", images, "image"), ("category_id", classes, "class id"))
        if a[key] not in known
    ]
    for key, number in (("images", len(images)), ("annotations", len({a["id"] for a in annotations}))):
        if number < len(data[key]):
            faults.append(f'"{key}": {len(data[key]) - number} ids occur more than once')
    if faults:
        _refuse(path, faults)


def _require_fields(data: Mapping[str, Any], path: Path) -> None:
    faults = [
        f'"{key}" entry {row} lacks {[name for name in fields if name not in item]}'
        for key, fields in FIELDS.items()
        for row, item in enumerate(data.get(key, ()))
        if any(name not in item for name in fields)
    ]
    names = [item["name"] for item in data.get("categories", ()) if "name" in item]
    faults += [f'"categories": the name {n!r} is no text' for n in names if not (isinstance(n, str) and n.strip())]
    if faults:
        _refuse(path, faults)


def _refuse(path: Path, faults: Sequence[str]) -> None:
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    listed = "".join(f"\n  {fault}" for fault in [*faults[:SHOWN], *more])
    raise ValueError(f"{path}: not a consistent COCO detection file:{listed}\nCorrect the file or export it again.")
