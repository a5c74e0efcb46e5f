"""COCO-format annotation files -> dataset dicts: full sets and K-shot samples.

The JSON is read directly: Detectron2's loader refuses files with an `ignore` field and keeps masks that detection does
not need. An annotation with `ignore` set counts as crowd, which training drops and evaluation ignores.

Source: Lin et al., ECCV 2014 (format); TFA (Wang et al., ICML 2020) and DeFRCN (Qiao et al., ICCV 2021), official COCO
loaders: one record per instance in TFA, merged per image in DeFRCN.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from fsdet.data.records import (
    LoadReport,
    Record,
    apply_leak,
    choose_shots,
    merge_by_image,
    missing_file,
    require_shot_list,
)
from fsdet.data.seeds import coco_shot_path, read_coco_shots
from fsdet.data.splits import COCO_CLASSES

PREPARE = "prepare_coco.py"
# Official places below the root: annotation files of training and test, 2014 lists (TFA) before 2017 names.
LAYOUT = {
    "train": ("cocosplit/datasplit/trainvalno5k.json", "coco/annotations/instances_train2017.json"),
    "test": ("cocosplit/datasplit/5k.json", "coco/annotations/instances_val2017.json"),
}
NAME_2014 = re.compile(r"COCO_(train|val)2014_(\d+\.\w+)$")


def annotation_file(root: Path, part: str, given: Path | None = None) -> Path:
    """The annotation file of "train" or "test": the given one, else the first official place that exists.

    Raises: FileNotFoundError naming the official places.
    """
    places = [given] if given else [root / place for place in LAYOUT[part]]
    # 2014 lists and 2017 names cut COCO differently: both parts must come from the same layout, or training images
    # would be tested on.
    if not given and any((root / LAYOUT[other][0]).is_file() for other in LAYOUT):
        places = places[:1]
    for place in places:
        if place.is_file():
            return place
    other = f" (2014 lists; for 2017 names {places[1]})" if len(places) > 1 else ""
    what = f"COCO annotations of the {part} part{other}"
    raise missing_file(places[0], what, f"FEWSHOT.{part.upper()}_JSON" if given else "")


@dataclass(frozen=True)
class ImageFinder:
    """File name in an annotation file -> path of the picture.

    With `folder` every picture lies there. Otherwise the official COCO folders below `coco` are tried: the merged
    trainval2014 of the few-shot protocols, the folder that the name's prefix states, and the 2017 folders, which hold
    the same pictures under names without the prefix.
    """

    coco: Path
    part: str
    folder: Path | None = None

    def folders(self) -> dict[str, tuple[Path, bool]]:
        """Year and part of a name -> (folder, whether the prefix is cut off)."""
        if self.folder is not None:
            return {key: (self.folder, False) for key in ("train2014", "val2014", "")}
        merged = [self.coco / "trainval2014"] if self.part == "train" else []
        of_2017 = self.coco / ("train2017" if self.part == "train" else "val2017")
        found = {"": (of_2017, False)}
        for key in ("train2014", "val2014"):
            existing = [folder for folder in (*merged, self.coco / key) if folder.is_dir()]
            if not existing and of_2017.is_dir():
                found[key] = (of_2017, True)
            else:
                found[key] = ((existing or merged or [self.coco / key])[0], False)
        return found

    def root(self) -> Path:
        """The folder to show and to check: the one that holds every picture, else the first official one there is."""
        folders = [folder for folder, _ in self.folders().values()]
        return self.folder or next((folder for folder in folders if folder.is_dir()), folders[-1])

    def resolver(self) -> Callable[[str], str]:
        """Function of a file name; looks at the folders once, not at every picture."""
        folders = self.folders()

        def find(file_name: str) -> str:
            match = NAME_2014.search(file_name)
            folder, cut = folders[f"{match[1]}2014" if match else ""]
            return str(folder / (match[2] if match and cut else file_name))

        return find


def guess_image_folder(json_file: Path) -> Path | None:
    """Folder of the pictures of a json by the usual layouts, or None: DIR/train2017 for DIR/instances_train2017.json.

    Tried in this order, with X the file's stem without "instances_": X and images/X beside the file, X and images/X
    beside its folder, images beside the file.
    """
    stem = json_file.stem.removeprefix("instances_")
    near, above = json_file.parent, json_file.parent.parent
    for folder in (near / stem, near / "images" / stem, above / stem, above / "images" / stem, near / "images"):
        if folder.is_dir():
            return folder
    return None


def read_coco(path: Path, prepare: str = PREPARE) -> dict[str, Any]:
    """Parse a COCO-format file; `prepare` is the script of datasets/ that may have been given it.

    Raises: FileNotFoundError, or ValueError for text that is no JSON or lacks "images", "annotations", "categories".
    """
    if not path.is_file():
        keys = f"FEWSHOT.TRAIN_JSON or TEST_JSON (--json of datasets/{prepare})"
        raise missing_file(path, "COCO-format annotation file", keys)
    try:
        with path.open(encoding="utf-8") as file:
            data = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); download or write it again") from error
    lacking = [key for key in ("images", "annotations", "categories") if not isinstance(data, dict) or key not in data]
    if lacking:
        raise ValueError(f"{path}: the lists {lacking} are missing; expected a COCO detection file")
    return data


def official_ids(categories: Sequence[Mapping[str, Any]], path: Path) -> dict[int, str]:
    """Dataset id -> class name of the official 80 classes, after comparing the file's categories with them.

    Raises: ValueError naming a category that COCO does not have under this id.
    """
    for category in categories:
        if COCO_CLASSES.get(category["id"]) != category["name"]:
            raise ValueError(
                f'{path}: unknown class "{category["name"]}" with id {category["id"]}; COCO has '
                f'"{COCO_CLASSES.get(category["id"])}" there. Own classes need FEWSHOT.LAYOUT custom.'
            )
    return dict(COCO_CLASSES)


def _xyxy(annotation: Mapping[str, Any], path: Path) -> tuple[float, float, float, float]:
    try:
        x, y, w, h = map(float, annotation["bbox"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: annotation {annotation.get('id')} of image {annotation.get('image_id')} has the bbox "
            f"{annotation.get('bbox')}; expected four numbers x, y, width, height"
        ) from error
    return x, y, x + w, y + h


class CocoReader:
    """Turns the lists of one annotation file into records of the kept classes, in a single pass."""

    def __init__(
        self,
        path: Path,
        names: Mapping[int, str],
        class_names: Sequence[str],
        find: Callable[[str], str],
        report: LoadReport,
    ) -> None:
        """Set up the tables.

        Args:
            path: the annotation file, for messages.
            names: dataset id -> class name of every class that the file may use.
            class_names: kept classes; their place is the class id.
            find: file name -> path of the picture.
            report: receives counts and bad boxes.
        """
        self.path, self.names, self.find, self.report = path, names, find, report
        places = {name: place for place, name in enumerate(class_names)}
        self.class_ids = {i: places[name] for i, name in names.items() if name in places}

    def records(self, images: Sequence[Mapping[str, Any]]) -> dict[int, Record]:
        """Image id -> dataset dict without annotations, in the order of the ids.

        Raises: ValueError for an id that two images share and for images that lack a field.
        """
        records: dict[int, Record] = {}
        for image in images:
            try:
                records[image["id"]] = {
                    "file_name": self.find(image["file_name"]),
                    "image_id": image["id"],
                    "height": image["height"],
                    "width": image["width"],
                    "annotations": [],
                }
            except KeyError as error:
                raise ValueError(f"{self.path}: the image {dict(image)} lacks {error}") from error
        if len(records) < len(images):
            raise ValueError(f"{self.path}: {len(images) - len(records)} image id(s) occur more than once")
        return dict(sorted(records.items()))

    def class_of(self, annotation: Mapping[str, Any]) -> int | None:
        """Class id of an annotation, None when its class is not kept.

        Raises: ValueError for a category id that the file's data set does not have.
        """
        category = annotation["category_id"]
        class_id = self.class_ids.get(category)
        if class_id is None and category not in self.names:
            raise ValueError(
                f"{self.path}: annotation {annotation.get('id')} of image {annotation['image_id']} has the unknown "
                f"class id {category}; known are {sorted(self.names)}"
            )
        return class_id

    def annotate(self, record: Record, annotation: Mapping[str, Any], class_id: int) -> Record | None:
        """Detectron2 annotation of a kept class, or None when the report drops its box."""
        size = (record["height"], record["width"])
        box = _xyxy(annotation, self.path)
        annotation_id = annotation.get("id")
        if not self.report.accepts_box(
            box, size=size, file=self.path, image=record["image_id"], annotation=annotation_id
        ):
            return None
        is_crowd = int(bool(annotation.get("iscrowd", 0)))
        if annotation.get("ignore", 0) and not is_crowd:
            self.report.add("ignore_taken_as_crowd")
            is_crowd = 1
        result = {
            "id": annotation_id,
            "category_id": class_id,
            "bbox": annotation["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "iscrowd": is_crowd,
        }
        if "area" in annotation:  # of the mask, by which COCO sorts objects into small, medium and large
            result["area"] = annotation["area"]
        return result


def full_records(
    data: Mapping[str, Any], reader: CocoReader, *, leak: str = "background", leaked: Sequence[str] = ()
) -> list[Record]:
    """One record per image in the order of the image ids, with the kept classes; images without any stay.

    Args:
        data: content of a COCO-format file.
        reader: tables of that file.
        leak, leaked: what to do with images that show objects of the classes `leaked` (see `apply_leak`).
    """
    records = reader.records(data["images"])
    leaked_ids = {i for i, name in reader.names.items() if name in leaked}
    leaked_boxes: dict[int, list[tuple[float, ...]]] = {}
    for annotation in data["annotations"]:
        record = records.get(annotation["image_id"])
        if record is None:
            reader.report.add("annotations_without_image")
            continue
        class_id = reader.class_of(annotation)
        if class_id is not None:
            kept = reader.annotate(record, annotation, class_id)
            if kept is not None:
                record["annotations"].append(kept)
        elif annotation["category_id"] in leaked_ids:
            leaked_boxes.setdefault(record["image_id"], []).append(_xyxy(annotation, reader.path))
    return [
        record
        for image_id, record in records.items()
        if apply_leak(record, leaked_boxes.get(image_id, ()), leak, reader.report)
    ]


def shot_records(
    samples: Path,
    class_names: Sequence[str],
    make_reader: Callable[[Path, Mapping[str, Any]], CocoReader],
    *,
    shot: int,
    seed: int,
    choice: str = "seeded",
    merge: bool = False,
    strict: bool = False,
    draw: str = f"python datasets/{PREPARE}",
) -> list[Record]:
    """K-shot records class by class: every annotation of a class file is one record, images in the order of the ids.

    Args:
        samples: folder of the files (seedN/full_box_Kshot_<class>_trainval.json).
        class_names: classes, in the order of the class ids.
        make_reader: (path, content) -> reader of that file.
        shot, seed: which files, and what seeds the choice.
        choice: see `choose_shots`; "official" with `merge` keeps every annotation, as DeFRCN does.
        merge: join the records of one image.
        strict: the files were drawn to offer exactly K.
        draw: the command that an error recommends.
    Raises: FileNotFoundError for a missing file; ValueError for a class without any instance, or with another number
        than K where `strict`.
    """
    records: list[Record] = []
    report = None
    for class_name in class_names:
        path = coco_shot_path(samples, seed, shot, class_name)
        require_shot_list(path, shot, class_name, draw)
        data = read_coco_shots(path)
        reader = make_reader(path, data)
        report = reader.report
        offered = _offered(data, reader, class_name)
        if choice == "official" and merge and offered and not strict:
            records += offered
            continue
        records += choose_shots(
            offered,
            shot,
            choice=choice,
            split=0,  # COCO-format sets have one split; 0 stands for it in the seed
            seed=seed,
            class_name=class_name,
            report=report,
            path=path,
            strict=strict,
        )
    return merge_by_image(records, report) if merge and report else records


def _offered(data: Mapping[str, Any], reader: CocoReader, class_name: str) -> list[Record]:
    """Every instance of the class that one file offers; crowds, which training would drop, are counted and left out."""
    images = reader.records(data["images"])
    by_image: dict[int, list[Record]] = {image_id: [] for image_id in images}
    seen = set()
    for annotation in data["annotations"]:
        image = images.get(annotation["image_id"])
        class_id = reader.class_of(annotation)
        if image is None or class_id is None or reader.names[annotation["category_id"]] != class_name:
            raise ValueError(
                f'{reader.path}: annotation {annotation.get("id")} is not an instance of "{class_name}" in one of the '
                "images of this file; draw the samples again"
            )
        if annotation.get("id") in seen - {None}:
            reader.report.add("repeated_entries", f"{reader.path}: annotation {annotation['id']}")
        seen.add(annotation.get("id"))
        kept = reader.annotate(image, annotation, class_id)
        if kept is None or kept["iscrowd"]:
            reader.report.add("crowds_in_samples")
        else:
            by_image[annotation["image_id"]].append({**image, "annotations": [kept]})
    return [record for group in by_image.values() for record in group]
