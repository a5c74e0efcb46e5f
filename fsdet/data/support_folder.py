"""A folder of examples -> SupportSet: one folder of pictures per class, boxes from COCO json files or whole pictures.

    supports/
        mug/     1.jpg 2.jpg
        plate/   1.jpg
        boxes.json         for all class folders, names such as "mug/1.jpg"
        plate/boxes.json   or for one class, names such as "1.jpg"; then the one above does not count for it

Of a picture in the folder of a class only the boxes of that class are examples. Nothing is repaired silently.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from fsdet.data.coco import CocoReader, read_coco
from fsdet.data.custom import FIELDS, validate
from fsdet.data.pictures import IMAGE_SUFFIXES, is_picture, read_pixels
from fsdet.data.records import SHOWN, LoadReport, Record
from fsdet.data.support import SupportSet

logger = logging.getLogger(__name__)

_LAYOUT = "Expected one folder of pictures for each class, such as DIR/mug/1.jpg"


def read_support_folder(folder: str | Path, *, image_format: str = "BGR") -> SupportSet:
    """Read the examples of a folder; every picture that is an example is decoded once, to find broken ones now.

    Classes are the names of the folders below `folder`, sorted; hidden files and folders do not count. A picture
    without json is an example as a whole.

    Args:
        folder: see the top of this module.
        image_format: channel order of the crops, "BGR" or "RGB".
    Returns: the set, under the policy "whole"; a detector cuts as it needs.
    Raises: FileNotFoundError for a missing folder, class folder or picture; ImageError for a broken picture; ValueError
        for a json that is no COCO file, a class that it lacks, and boxes that do not fit their pictures. Each names the
        file and the remedy.
    """
    folder = Path(folder)
    folders = _class_folders(folder)
    own = {name: _json_files(path) for name, path in folders.items()}
    shared = _json_files(folder)
    records: list[Record] = []
    sharing = {name: path for name, path in folders.items() if not own[name]}
    if shared and sharing:
        records += _labelled(shared, sharing, list(folders))
    elif sharing:
        records += [_whole(p, place) for place, n in enumerate(folders) if n in sharing for p in _pictures(sharing[n])]
    for name, files in own.items():
        if files:
            records += _labelled(files, {name: folders[name]}, list(folders))
    support_set = SupportSet.from_records(records, list(folders), image_format=image_format)
    logger.info("%s: %s", folder, {name: len(shots) for name, shots in support_set})
    return support_set


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _json_files(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix.lower() == ".json" and path.is_file()]


def _pictures(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if is_picture(path)]


def _class_folders(folder: Path) -> dict[str, Path]:
    """Class name -> folder. Raises: FileNotFoundError when there is none, or one holds no picture."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of supports. {_LAYOUT}")
    found = {path.name: path for path in _visible(folder) if path.is_dir()}
    if not found:
        raise FileNotFoundError(f"{folder}: no class folder in it. {_LAYOUT}")
    empty = [str(path) for path in found.values() if not _pictures(path)]
    if empty:
        raise FileNotFoundError(
            f"No picture in {', '.join(empty)}; looked for {', '.join(IMAGE_SUFFIXES)} right below. {_LAYOUT}; take "
            "away the folders of other things"
        )
    return found


def _whole(path: Path, class_id: int) -> Record:
    """Record of a picture that is an example as a whole. Raises: ImageError naming a broken one."""
    height, width = read_pixels(path, "BGR").shape[:2]
    whole = {"category_id": class_id, "bbox": [0, 0, width, height], "bbox_mode": BoxMode.XYXY_ABS}
    return {"file_name": str(path), "image_id": str(path), "height": height, "width": width, "annotations": [whole]}


def _labelled(files: Sequence[Path], folders: Mapping[str, Path], classes: Sequence[str]) -> list[Record]:
    """Records of the pictures with boxes.

    Args:
        files: json files of one folder.
        folders: class name -> folder, for the classes that they serve.
        classes: all classes; their place is the class id.
    Raises: as `read_support_folder`.
    """
    contents = {file: _read_annotations(file) for file in files}
    listed = ", ".join(map(str, files))
    known = {category["name"] for data in contents.values() for category in data["categories"]}
    if unknown := [name for name in folders if name not in known]:
        raise ValueError(
            f"{listed}: no category {unknown}, as folders are named; there are {sorted(map(str, known))}. Rename the "
            "folders or the categories. To take whole pictures for some classes, put the json into the folders of the "
            "others"
        )
    report = LoadReport("fatal", "Correct or remove these annotations.", quiet=True)
    records = [
        record for file, data in contents.items() for record in _records_of(file, data, folders, classes, report)
    ]
    report.finish(listed)
    for record in records:
        _check_size(record, listed)
    _check_coverage(records, folders, classes, listed)
    return records


def _read_annotations(file: Path) -> dict[str, Any]:
    """Content of a complete COCO file whose pictures are there. Raises: ValueError, FileNotFoundError."""
    try:
        data = read_coco(file)
        for key in FIELDS:
            if not isinstance(data[key], list) or not all(isinstance(item, dict) for item in data[key]):
                raise ValueError(f'{file}: "{key}" is no list of objects; expected a COCO detection file')
        validate(data, file)
        missing = [i["file_name"] for i in data["images"] if not (file.parent / i["file_name"]).is_file()]
    except (ValueError, TypeError) as error:  # TypeError: an id or a name of an odd type
        what = error if isinstance(error, ValueError) else f"{file}: {error}"
        raise ValueError(
            f"{what}\nEvery .json in a support folder is read as COCO annotations; put other files elsewhere"
        ) from error
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise FileNotFoundError(
            f"{file} names pictures that are not there: {', '.join(missing[:SHOWN])}{more}. File names are relative to "
            f"{file.parent}; correct them, put the pictures back, or take them out of the file"
        )
    return data


def _records_of(
    file: Path, data: Mapping[str, Any], folders: Mapping[str, Path], classes: Sequence[str], report: LoadReport
) -> list[Record]:
    """Records of one file with the boxes of each class on the pictures of its own folder."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    reader = CocoReader(file, names, classes, lambda name: str(file.parent / name), report)
    places = {classes.index(name): path.resolve() for name, path in folders.items()}
    records = reader.records(data["images"])
    parents = {image_id: Path(record["file_name"]).parent.resolve() for image_id, record in records.items()}
    for annotation in data["annotations"]:
        image_id, class_id = annotation["image_id"], reader.class_of(annotation)
        if class_id is None or places.get(class_id) != parents[image_id]:
            continue
        kept = reader.annotate(records[image_id], annotation, class_id)
        if kept is not None and not kept["iscrowd"]:
            records[image_id]["annotations"].append(kept)
    # Ids of several files may coincide.
    return [{**record, "image_id": record["file_name"]} for record in records.values() if record["annotations"]]


def _check_size(record: Record, listed: str) -> None:
    """Raise ImageError for a broken picture, ValueError for one of another size than its annotations state."""
    height, width = read_pixels(record["file_name"], "BGR").shape[:2]
    if (record["width"], record["height"]) != (width, height):
        raise ValueError(
            f"{record['file_name']}: this picture is shown with {width} x {height} pixels (width x height), {listed} "
            f"says {record['width']} x {record['height']}; the boxes were drawn on another form of it. Export the "
            "annotations again for this file"
        )


def _check_coverage(
    records: Sequence[Record], folders: Mapping[str, Path], classes: Sequence[str], listed: str
) -> None:
    """Raise ValueError for a class without any box; warn of pictures without one."""
    with_box = {Path(record["file_name"]).resolve() for record in records}
    found = {classes[annotation["category_id"]] for record in records for annotation in record["annotations"]}
    if bare := [name for name in folders if name not in found]:
        raise ValueError(
            f"{listed}: no box of the classes {bare} on a picture of the folder of that name (crowds do not count). "
            "Label one, or take the folder away"
        )
    unused = [str(p) for path in folders.values() for p in _pictures(path) if p.resolve() not in with_box]
    if unused:
        logger.warning(
            "%d picture(s) without a box in %s are no examples: %s%s",
            len(unused), listed, ", ".join(unused[:SHOWN]), ", ..." if unused[SHOWN:] else "",
        )  # fmt: skip
