"""PASCAL VOC annotation files -> dataset dicts: full sets and K-shot samples.

Source: Everingham et al., IJCV 2010 (format); TFA (Wang et al., ICML 2020), official VOC loader (record rules, boxes
moved from 1-based inclusive pixels by taking 1 from xmin and ymin). Unlike there, difficult objects carry their flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

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
from fsdet.data.seeds import read_voc_shots, voc_shot_path
from fsdet.data.splits import VOC_CLASSES

PREPARE = "prepare_voc.py"


@dataclass(frozen=True)
class VocObject:
    """One labelled object; `box` is (x0, y0, x1, y1) in 0-based pixels, `id` is "<image id>/<place in the file>"."""

    id: str
    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocImage:
    """The content of one annotation file."""

    file: Path
    image_id: str
    height: int
    width: int
    objects: tuple[VocObject, ...]

    def record(self) -> Record:
        """Dataset dict without annotations."""
        picture = self.file.parent.parent / "JPEGImages" / f"{self.image_id}.jpg"
        return {
            "file_name": str(picture),
            "image_id": self.image_id,
            "height": self.height,
            "width": self.width,
            "annotations": [],
        }

    def accepts(self, labelled: VocObject, report: LoadReport) -> bool:
        """Whether the report lets the box of an object of this image pass."""
        size = (self.height, self.width)
        return report.accepts_box(labelled.box, size=size, file=self.file, image=self.image_id, annotation=labelled.id)


def read_image_set(folder: Path, image_set: str) -> list[str]:
    """Image ids of ImageSets/Main/<image_set>.txt, in file order.

    Raises: FileNotFoundError, or ValueError for an empty list.
    """
    path = folder / "ImageSets" / "Main" / f"{image_set}.txt"
    if not path.is_file():
        raise missing_file(path, f'VOC image set "{image_set}"')
    ids = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not ids:
        raise ValueError(f"{path}: the list is empty; unpack the data set again")
    return ids


def read_voc_image(folder: Path, image_id: str) -> VocImage:
    """Read Annotations/<image_id>.xml of a VOC folder.

    Raises: FileNotFoundError; ValueError naming the file for broken XML, missing fields and unknown classes.
    """
    path = folder / "Annotations" / f"{image_id}.xml"
    try:
        root = ElementTree.parse(path).getroot()
        size = root.find("size")
        height, width = int(size.find("height").text), int(size.find("width").text)
        objects = tuple(_read_object(node, f"{image_id}/{place}") for place, node in enumerate(root.iterfind("object")))
    except FileNotFoundError as error:
        raise missing_file(path, f"VOC annotation of image {image_id}") from error
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a VOC annotation file ({error}); unpack the data set again") from error
    for labelled in objects:
        if labelled.name not in VOC_CLASSES:
            raise ValueError(
                f'{path}: unknown class "{labelled.name}"; VOC has {", ".join(VOC_CLASSES)}. Data of other classes '
                "belongs in a COCO-format json (FEWSHOT.LAYOUT custom)."
            )
    return VocImage(path, image_id, height, width, objects)


def _read_object(node: ElementTree.Element, object_id: str) -> VocObject:
    box = node.find("bndbox")
    x0, y0, x1, y1 = (float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
    name = (node.findtext("name") or "").strip()
    difficult = (node.findtext("difficult") or "0").strip() == "1"
    return VocObject(object_id, name, (x0 - 1.0, y0 - 1.0, x1, y1), difficult)


def _annotation(labelled: VocObject, class_names: Sequence[str]) -> Record:
    return {
        "id": labelled.id,
        "category_id": class_names.index(labelled.name),
        "bbox": list(labelled.box),
        "bbox_mode": BoxMode.XYXY_ABS,
        "difficult": int(labelled.difficult),
    }


def full_records(
    sets: Sequence[tuple[Path, str]],
    class_names: Sequence[str],
    report: LoadReport,
    *,
    difficult: bool = True,
    leak: str = "background",
    leaked: Sequence[str] = (),
) -> list[Record]:
    """One record per image, with the objects of `class_names`; images without any stay.

    Args:
        sets: (VOC folder, image set) pairs, read in this order.
        class_names: kept classes; their place is the class id.
        report: receives counts and bad boxes.
        difficult: keep objects marked difficult.
        leak, leaked: what to do with images that show objects of the classes `leaked` (see `apply_leak`).
    """
    records = []
    for folder, image_set in sets:
        for image_id in read_image_set(folder, image_set):
            image = read_voc_image(folder, image_id)
            record = image.record()
            for labelled in image.objects:
                if labelled.name not in class_names:
                    continue
                if labelled.difficult and not difficult:
                    report.add("difficult_dropped")
                elif image.accepts(labelled, report):
                    record["annotations"].append(_annotation(labelled, class_names))
            if apply_leak(record, [o.box for o in image.objects if o.name in leaked], leak, report):
                records.append(record)
    return records


def folder_of(image_id: str, folders: Sequence[Path]) -> Path:
    """VOC folder of a listed image: the only one, else VOC2012 for an id with "_" and VOC2007 for the others.

    When no folder has that name, the first one that holds the annotation is taken.
    """
    year = "VOC2012" if "_" in image_id else "VOC2007"
    named = [folder for folder in folders if folder.name == year]
    if len(folders) == 1 or not named:
        holding = [folder for folder in folders if (folder / "Annotations" / f"{image_id}.xml").is_file()]
        return (holding or list(folders))[0]
    return named[0]


def shot_records(
    samples: Path,
    folders: Sequence[Path],
    class_names: Sequence[str],
    report: LoadReport,
    *,
    shot: int,
    seed: int,
    split: int,
    choice: str = "seeded",
    merge: bool = False,
    difficult: bool = True,
    strict: bool = False,
) -> list[Record]:
    """K-shot records class by class: every object of the class in a listed image is one record with one annotation.

    Args:
        samples: folder of the lists (seedN/box_Kshot_<class>_train.txt).
        folders: VOC folders that may hold the images.
        class_names: classes, in the order of the class ids.
        report: receives counts and bad boxes.
        shot, seed, split: which lists, and what seeds the choice.
        choice: see `choose_shots`.
        merge: join the records of one image.
        difficult: keep objects marked difficult.
        strict: the lists were drawn to offer exactly K.
    Raises: FileNotFoundError for a missing list or annotation; ValueError for a class without any instance, or with
        another number than K where `strict`.
    """
    records = []
    for class_name in class_names:
        path = voc_shot_path(samples, seed, shot, class_name)
        require_shot_list(path, shot, class_name, f"python datasets/{PREPARE}")
        offered = _offered(path, folders, class_name, class_names, report, difficult)
        records += choose_shots(
            offered,
            shot,
            choice=choice,
            split=split,
            seed=seed,
            class_name=class_name,
            report=report,
            path=path,
            strict=strict,
        )
    return merge_by_image(records, report) if merge else records


def _offered(
    path: Path,
    folders: Sequence[Path],
    class_name: str,
    class_names: Sequence[str],
    report: LoadReport,
    difficult: bool,
) -> list[Record]:
    """Every instance that one list offers, repeated lines included (the official loader reads them again)."""
    ids = read_voc_shots(path)
    if len(set(ids)) < len(ids):
        report.add("repeated_entries", f"{path}: {len(ids) - len(set(ids))}", len(ids) - len(set(ids)))
    offered = []
    for image_id in ids:
        try:
            image = read_voc_image(folder_of(image_id, folders), image_id)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} lists image {image_id}, but: {error}") from error
        before = len(offered)
        for labelled in image.objects:
            if labelled.name != class_name:
                continue
            if labelled.difficult and not difficult:
                report.add("difficult_dropped")
            elif image.accepts(labelled, report):
                offered.append({**image.record(), "annotations": [_annotation(labelled, class_names)]})
        if len(offered) == before:
            report.add("listed_without_object", f'{path}: image {image_id} shows no usable "{class_name}"')
    return offered
