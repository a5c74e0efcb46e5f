"""From a COCO json to the training files of FewX's release: filter, balance, splits, K-shot pick, support table.

All functions that choose annotations read the parsed json and return some of its annotations. Crowds count as
annotations everywhere, as in the release.

Source: FewX (Fan et al., CVPR 2020) and its release, data scripts. The 10-shot file that the release ships is not its
pick but was chosen by hand.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2

from fsdet.data import custom
from fsdet.data.coco import read_coco
from fsdet.data.crops import context_square, fewx_support_crop
from fsdet.data.files import replacing
from fsdet.data.sampling import ClassImage
from fsdet.data.seeds import list_files, write_files
from fsdet.data.splits import coco_split
from fsdet.data.support import read_picture
from fsdet.data.support_table import table_text

logger = logging.getLogger(__name__)

PREPARE = "prepare_fewx.py"
STEPS = ("base", "balance", "novel", "shots", "lists", "table")
SMALLEST_BASE = 32 * 32  # px², area of the box below which an object of a base class spoils its image
SHOT_AREAS = (64 * 64, 224 * 224)  # px², area of the segment of a shot
IMAGE_LIMIT = 2000  # images of a class above which "balance" drops images
CROP_FOLDER = "support/train2017"  # of the release, beside its table

Annotation = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Parse a COCO json and check that it is complete and consistent. Raises: FileNotFoundError, ValueError."""
    data = read_coco(path, PREPARE)
    custom.validate(data, path)
    for row in data["annotations"]:
        box = row["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise ValueError(
                f"{path}: annotation {row['id']} has the bbox {box}; expected x, y, width, height in pixels"
            )
    return data


def novel_ids(data: Mapping[str, Any], path: Path, novel: Sequence[str] = ()) -> set[int]:
    """Dataset ids of the novel classes, by default the 20 of COCO that PASCAL VOC has.

    Raises: ValueError naming the classes that the file does not have.
    """
    ids = {category["name"]: category["id"] for category in data["categories"]}
    wanted = novel or coco_split().novel
    if unknown := [name for name in wanted if name not in ids]:
        raise ValueError(f"{path} has no class {unknown}; it has {list(ids)}. Name the novel classes with --novel.")
    return {ids[name] for name in wanted}


def base_annotations(data: Mapping[str, Any], novel: Collection[int]) -> list[Annotation]:
    """Annotations of base classes on images where no box of one is smaller than 32² pixels, image by image."""
    kept = []
    for rows in _by_image(data, lambda row: row["category_id"] not in novel).values():
        if all(row["bbox"][2] * row["bbox"][3] >= SMALLEST_BASE for row in rows):
            kept += rows
    return kept


def balanced_annotations(data: Mapping[str, Any], limit: int = IMAGE_LIMIT) -> list[Annotation]:
    """Annotations of the images that are kept when frequent classes are cut down, image by image.

    Images are visited in file order. One goes when each of its classes is left with more than `limit` images.
    """
    images = _by_image(data)
    classes = {image: {row["category_id"] for row in rows} for image, rows in images.items()}
    counts = Counter(class_id for found in classes.values() for class_id in found)
    kept = []
    for image, rows in images.items():
        if any(counts[class_id] <= limit for class_id in classes[image]):
            kept += rows
        else:
            counts.subtract(classes[image])
    return kept


def novel_annotations(data: Mapping[str, Any], novel: Collection[int]) -> list[Annotation]:
    """Annotations of novel classes, in the order of the file."""
    return [row for row in data["annotations"] if row["category_id"] in novel]


def pick_shots(data: Mapping[str, Any], novel: Collection[int], shots: int = 10) -> list[Annotation]:
    """The first `shots` annotations of each novel class that are alone of their kind, in the order of the images.

    Only images with exactly one annotation of any novel class count, and only segments of 64² to 224² pixels. A class
    may end with fewer.

    Raises: ValueError for an annotation without "area".
    """
    picked, counts = [], Counter()
    for image, rows in _by_image(data, lambda row: row["category_id"] in novel).items():
        if len(rows) != 1:
            continue
        (row,) = rows
        if "area" not in row:
            raise ValueError(
                f'Annotation {row["id"]} of image {image} has no "area", the size of its segment in pixels'
            )
        if SHOT_AREAS[0] <= row["area"] <= SHOT_AREAS[1] and counts[row["category_id"]] < shots:
            counts[row["category_id"]] += 1
            picked.append(row)
    return picked


def support_rows(data: Mapping[str, Any], folder: str = CROP_FOLDER) -> list[dict[str, Any]]:
    """Rows of the support table: one for each annotation with a box that has an area, image by image.

    Args:
        data: parsed json.
        folder: of the crops, relative to that of the table.
    Returns: rows with the columns of `support_table`; crops are numbered within their image.
    Raises: ValueError for a box that leaves nothing of its image.
    """
    images = {image["id"]: image for image in data["images"]}
    rows = []
    for image_id, labelled in _by_image(data).items():
        image = images[image_id]
        for number, annotation in enumerate(labelled):
            box = _xyxy(annotation)
            if annotation["bbox"][2] <= 0 or annotation["bbox"][3] <= 0:
                continue
            try:
                square = context_square(box, image["height"], image["width"])
            except ValueError as error:
                raise ValueError(
                    f"Annotation {annotation['id']} of image {image_id}: {error}. Correct or remove the annotation."
                ) from error
            rows.append(
                {
                    "support_box": [float(value) for value in square.box],
                    "category_id": annotation["category_id"],
                    "image_id": image_id,
                    "id": annotation["id"],
                    "file_path": f"./{folder}/{Path(image['file_name']).stem}/{number:04d}.jpg",
                }
            )
    return rows


def shot_lists(data: Mapping[str, Any], path: Path, output: Path, *, seed: int = 0) -> dict[Path, str]:
    """K-shot lists, one a class, of a json that holds K annotations of each of its labelled classes; path -> content.

    Args:
        data: parsed json, such as a pick or the release's 10-shot file.
        path: of it.
        output: folder that will hold seedN.
        seed: N.
    Raises: ValueError where the classes have different numbers of annotations.
    """
    names = {category["id"]: category["name"] for category in data["categories"]}
    draws: dict[str, list[ClassImage]] = {}
    for row in (row for rows in _by_image(data).values() for row in rows):
        draws.setdefault(names[row["category_id"]], []).append(ClassImage(row["image_id"], (row["id"],)))
    counts = {name: len(picks) for name, picks in draws.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"{path}: K-shot lists need the same number of annotations for every labelled class, found {counts}. Take "
            "annotations out, or pick fewer with --shots."
        )
    shot = next(iter(counts.values()))
    facts = {
        "format": 1,
        "algorithm": "given",
        "version": 1,
        "sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()},
        "shots": [shot],
    }
    return list_files(output, seed, {name: {shot: picks} for name, picks in draws.items()}, facts, data)


def write_crops(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], images: Path, output: Path) -> None:
    """Cut the crops of a table and write them as JPEG, each whole or not at all; those that exist are kept.

    Args:
        data: the json that the rows were made from.
        rows: of the table. images: folder of the pictures. output: folder of the table.
    Raises: FileNotFoundError or ValueError naming a picture that is missing, cannot be decoded or has another size.
    """
    known = {image["id"]: image for image in data["images"]}
    boxes = {row["id"]: _xyxy(row) for row in data["annotations"]}
    pictures: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if not (output / row["file_path"]).is_file():
            pictures.setdefault(row["image_id"], []).append(row)
    for image_id, missing in pictures.items():
        path = images / known[image_id]["file_name"]
        picture = read_picture(str(path), "BGR", remedy=", or name its folder with --images")
        if picture.shape[:2] != (known[image_id]["height"], known[image_id]["width"]):
            raise ValueError(
                f"{path}: {picture.shape[:2]} pixels (H, W), the annotations say otherwise; replace the file"
            )
        for row in missing:
            crop, _ = fewx_support_crop(picture, boxes[row["id"]])
            with replacing(output / row["file_path"]) as temporary:
                temporary.write_bytes(cv2.imencode(".jpg", crop)[1].tobytes())


def run_step(
    step: str,
    json_file: Path,
    output: Path,
    *,
    novel: Sequence[str] = (),
    shots: int = 10,
    limit: int = IMAGE_LIMIT,
    seed: int = 0,
    images: Path | None = None,
    folder: str = CROP_FOLDER,
    force: bool = False,
) -> str:
    """Do one step from file to file; nothing is written before all is read and checked.

    Args:
        step: one of `STEPS`. json_file: what it reads.
        output: file that is written; for "lists" a folder.
        novel: names of the novel classes; none: the 20 of COCO.
        shots, limit, seed: of "shots", "balance" and "lists".
        images, folder: of "table": where the pictures are, to write the crops too, and where crops go.
        force: overwrite files with other content.
    Returns: a sentence about what was done.
    Raises: FileNotFoundError, FileExistsError or ValueError naming file and remedy.
    """
    data = read(json_file)
    if step == "lists":
        files = shot_lists(data, json_file, output, seed=seed)
        write_files(files, force=force)
        return f"{output}: {len(files)} files"
    if step == "table":
        rows = support_rows(data, folder)
        write_files({output: table_text(rows, output.suffix)}, force=force)
        if images is not None:
            write_crops(data, rows, images, output.parent)
        return f"{output}: {len(rows)} supports{'' if images is None else ', with their crops'}"
    ids = novel_ids(data, json_file, novel) if step != "balance" else set()
    kept = {
        "base": lambda: base_annotations(data, ids),
        "balance": lambda: balanced_annotations(data, limit),
        "novel": lambda: novel_annotations(data, ids),
        "shots": lambda: pick_shots(data, ids, shots),
    }[step]()
    if not kept:
        raise ValueError(f'{json_file}: no annotation is left after the step "{step}"')
    part = {**data, "annotations": kept}
    if step == "shots":
        _warn_of_short_classes(data, kept, ids, shots)
        shown = {row["image_id"] for row in kept}
        part["images"] = [image for image in data["images"] if image["id"] in shown]
    write_files({output: json.dumps(part)}, force=force)
    counts = f"{len(kept)} of {len(data['annotations'])} annotations"
    return f"{output}: {counts}, on {len({row['image_id'] for row in kept})} of {len(data['images'])} images"


def _warn_of_short_classes(
    data: Mapping[str, Any], picked: Sequence[Annotation], ids: Collection[int], shots: int
) -> None:
    counts = Counter(row["category_id"] for row in picked)
    names = {category["id"]: category["name"] for category in data["categories"]}
    short = {names[class_id]: counts[class_id] for class_id in sorted(ids) if counts[class_id] < shots}
    if short:
        logger.warning("Classes with fewer than %d suitable objects: %s", shots, short)


def _by_image(data: Mapping[str, Any], wanted: Any = lambda row: True) -> dict[Any, list[Annotation]]:
    """Image id -> its wanted annotations, images and annotations in file order, without images that have none."""
    images: dict[Any, list[Annotation]] = {image["id"]: [] for image in data["images"]}
    for row in data["annotations"]:
        if wanted(row):
            images[row["image_id"]].append(row)
    return {image: rows for image, rows in images.items() if rows}


def _xyxy(annotation: Mapping[str, Any]) -> tuple[float, float, float, float]:
    x, y, width, height = annotation["bbox"]
    return x, y, x + width, y + height
