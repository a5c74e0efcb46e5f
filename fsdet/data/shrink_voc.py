"""A small VOC set from the full VOC2007: chosen images, shrunk, with boxes scaled, COCO json files and K-shot lists.

Boxes are scaled as areas: a VOC box covers the pixels xmin to xmax, both counted from 1, so its left edge lies at
xmin - 1 and its right edge at xmax. Edges are scaled by the ratio of the rounded image sizes and rounded.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from fsdet.data.seeds import voc_list_text
from fsdet.data.splits import VOC_CLASSES
from fsdet.data.voc import read_voc_image

PARTS = ("trainval", "test")
MAX_SIDE = 400  # pixels
JPEG_QUALITY = 85
KEPT_IN_IMAGE = ("folder", "filename", "source", "size", "segmented")  # and the objects; owners are dropped
KEPT_IN_OBJECT = ("name", "pose", "truncated", "difficult", "bndbox")  # body parts are dropped
SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class SmallObject:
    """One object after shrinking; `box` is (x0, y0, x1, y1) in 0-based pixels."""

    name: str
    box: tuple[int, int, int, int]
    difficult: int
    truncated: int


@dataclass(frozen=True)
class SmallImage:
    """One shrunk annotation file and what it says."""

    image_id: str
    text: str
    width: int
    height: int
    objects: tuple[SmallObject, ...]


def shrunk_size(width: int, height: int, max_side: int = MAX_SIDE) -> tuple[int, int]:
    """(width, height) with the longer side at most `max_side`; smaller images keep their size."""
    scale = min(1.0, max_side / max(width, height))
    return round(width * scale), round(height * scale)


def shrunk_box(
    box: tuple[int, int, int, int], old_size: tuple[int, int], new_size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Scale a box.

    Args:
        box: (xmin, ymin, xmax, ymax) in VOC pixels, counted from 1, both ends included.
        old_size, new_size: (width, height) of the image before and after.
    Returns: the same in the new image, inside it.
    """
    scale_x, scale_y = new_size[0] / old_size[0], new_size[1] / old_size[1]
    xmin, ymin = round((box[0] - 1) * scale_x) + 1, round((box[1] - 1) * scale_y) + 1
    xmax, ymax = round(box[2] * scale_x), round(box[3] * scale_y)
    return max(xmin, 1), max(ymin, 1), min(xmax, new_size[0]), min(ymax, new_size[1])


def shrunk_annotation(text: str, max_side: int = MAX_SIDE) -> str:
    """XML text of one VOC annotation for the shrunk image, without owner and body parts."""
    old = ElementTree.fromstring(text)
    new = ElementTree.Element("annotation")
    new.extend(old.find(tag) for tag in KEPT_IN_IMAGE)
    size = new.find("size")
    old_size = int(size.findtext("width")), int(size.findtext("height"))
    new_size = shrunk_size(*old_size, max_side)
    size.find("width").text, size.find("height").text = map(str, new_size)
    for labelled in old.iterfind("object"):
        kept = ElementTree.SubElement(new, "object")
        kept.extend(labelled.find(tag) for tag in KEPT_IN_OBJECT)
        box = kept.find("bndbox")
        scaled = shrunk_box(tuple(round(float(box.findtext(side))) for side in SIDES), old_size, new_size)
        box.clear()
        for side, value in zip(SIDES, scaled, strict=True):
            ElementTree.SubElement(box, side).text = str(value)
    ElementTree.indent(new, "\t")
    return ElementTree.tostring(new, encoding="unicode") + "\n"


def shrunk_picture(path: Path, size: tuple[int, int], max_side: int = MAX_SIDE) -> bytes:
    """JPEG of the shrunk picture.

    Args:
        path: the picture. size: (width, height) that its annotation file states.
    Raises: ValueError for an unreadable picture or one of another size.
    """
    remedy = "Unpack the data set again."
    try:
        with Image.open(path) as picture:
            found, pixels = picture.size, picture.convert("RGB")
    except OSError as fault:
        raise ValueError(f"{path} is no readable picture ({fault}). {remedy}") from fault
    if found != size:
        raise ValueError(f"{path} has {found} pixels (width, height), its annotation says {size}. {remedy}")
    if shrunk_size(*size, max_side) != size:
        pixels = pixels.resize(shrunk_size(*size, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def voc_small_texts(source: Path, output: Path, ids: Path) -> dict[Path, str]:
    """All text files of the small set: annotations, image sets, COCO json files, class counts, K-shot lists.

    Args:
        source: VOC2007 folder with Annotations. output: folder of the small set.
        ids: folder with trainval.txt, test.txt and shots.json.
    Raises: FileNotFoundError or ValueError naming file and remedy.
    """
    files: dict[Path, str] = {}
    parts = {}
    for part in PARTS:
        image_ids = (ids / f"{part}.txt").read_text(encoding="utf-8").split()
        parts[part] = [_small_image(source, image_id) for image_id in image_ids]
        files[output / "ImageSets" / "Main" / f"{part}.txt"] = "".join(f"{image_id}\n" for image_id in image_ids)
        files |= {output / "Annotations" / f"{image.image_id}.xml": image.text for image in parts[part]}
    drawn = json.loads((ids / "shots.json").read_text(encoding="utf-8"))
    files |= _shot_lists(output / "vocsplit_small", drawn, parts["trainval"])
    trainval = _coco_part(parts["trainval"], first_id=1)
    test = _coco_part(parts["test"], first_id=len(trainval["annotations"]) + 1)
    both = {key: trainval[key] + test[key] if key in ("images", "annotations") else trainval[key] for key in trainval}
    for name, part in (("trainval", trainval), ("test", test), ("all", both)):
        files[output / f"coco_{name}.json"] = json.dumps(part, separators=(",", ":"))
    files[output / "class_counts.tsv"] = _counts_table(parts)
    return files


def voc_small_pictures(source: Path, output: Path, ids: Path) -> dict[Path, bytes]:
    """Shrunk pictures of the small set. Args and Raises as for `voc_small_texts`."""
    files = {}
    for image_id in [i for part in PARTS for i in (ids / f"{part}.txt").read_text(encoding="utf-8").split()]:
        content = read_voc_image(source, image_id)
        path = source / "JPEGImages" / f"{image_id}.jpg"
        files[output / "JPEGImages" / path.name] = shrunk_picture(path, (content.width, content.height))
    return files


def differing_files(files: Mapping[Path, str], checksums: Path) -> list[str]:
    """Names in a list in the format of `sha256sum` whose file is missing or differs."""
    found = {path.name: hashlib.sha256(text.encode()).hexdigest() for path, text in files.items()}
    expected = (line.split() for line in checksums.read_text(encoding="utf-8").splitlines())
    return [name for digest, name in expected if found.get(name) != digest]


def _small_image(source: Path, image_id: str) -> SmallImage:
    file = read_voc_image(source, image_id).file  # checks it
    try:
        text = shrunk_annotation(file.read_text(encoding="utf-8"))
    except (AttributeError, TypeError) as fault:  # a field that only a full VOC file has
        raise ValueError(f"{file} is no complete VOC2007 annotation ({fault}). Unpack the data set again.") from fault
    root = ElementTree.fromstring(text)
    objects = []
    for node in root.iterfind("object"):
        xmin, ymin, xmax, ymax = (int(node.findtext(f"bndbox/{side}")) for side in SIDES)
        flags = int(node.findtext("difficult")), int(node.findtext("truncated"))
        objects.append(SmallObject(node.findtext("name"), (xmin - 1, ymin - 1, xmax, ymax), *flags))
    width, height = int(root.findtext("size/width")), int(root.findtext("size/height"))
    return SmallImage(image_id, text, width, height, tuple(objects))


def _coco_part(images: Sequence[SmallImage], first_id: int) -> dict[str, Any]:
    """COCO json; difficult objects are crowd there, so that COCO tools ignore them."""
    rows = [(int(image.image_id), labelled) for image in images for labelled in image.objects]
    return {
        "info": {
            "description": f"voc_small: subset of PASCAL VOC2007 trainval, images shrunk to max side {MAX_SIDE}",
            "year": 2007,
        },
        "licenses": [],
        "categories": [{"id": i, "name": name, "supercategory": "voc"} for i, name in enumerate(VOC_CLASSES, start=1)],
        "images": [
            {"id": int(i.image_id), "file_name": f"{i.image_id}.jpg", "width": i.width, "height": i.height}
            for i in images
        ],
        "annotations": [
            _coco_annotation(number, image_id, labelled) for number, (image_id, labelled) in enumerate(rows, first_id)
        ],
    }


def _coco_annotation(number: int, image_id: int, labelled: SmallObject) -> dict[str, Any]:
    x0, y0, x1, y1 = labelled.box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": VOC_CLASSES.index(labelled.name) + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": labelled.difficult,
        "difficult": labelled.difficult,
        "truncated": labelled.truncated,
    }


def _counts_table(parts: Mapping[str, Sequence[SmallImage]]) -> str:
    """Images with a box that is not difficult, such boxes, and difficult boxes, of each class and part."""
    columns: dict[str, Counter[str]] = {}
    for part, images in parts.items():
        easy = [[labelled.name for labelled in image.objects if not labelled.difficult] for image in images]
        columns[f"{part}_images"] = Counter(name for names in easy for name in set(names))
        columns[f"{part}_boxes"] = Counter(name for names in easy for name in names)
        columns[f"{part}_difficult"] = Counter(o.name for image in images for o in image.objects if o.difficult)
    rows = [["class", *columns], *([name, *(column[name] for column in columns.values())] for name in VOC_CLASSES)]
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def _shot_lists(folder: Path, drawn: Mapping[str, Any], images: Sequence[SmallImage]) -> dict[Path, str]:
    """K-shot lists: of the recorded order of images the shortest start with K objects that are not difficult."""
    counts = {
        image.image_id: Counter(labelled.name for labelled in image.objects if not labelled.difficult)
        for image in images
    }
    files = {}
    for seed, order_of in drawn["seeds"].items():
        for name, order in order_of.items():
            reached = list(accumulate(counts[image_id][name] for image_id in order))
            for shot in drawn["shots"]:
                length = next(n for n, count in enumerate(reached, start=1) if count >= shot)
                files[folder / f"seed{seed}" / f"box_{shot}shot_{name}_train.txt"] = voc_list_text(order[:length])
    return files
