"""Write annotation trees on disk from the compact description that the golden files of DeFRCN use.

A description holds images, boxes and classes of small made-up VOC and COCO sets, and the K-shot lists drawn from them;
`tools/check_parity.py` and the tests read the tree with the same loaders that training uses. No picture is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

# List of the description -> file and picture folders of the official layout.
COCO_FILES = {"trainvalno5k": "cocosplit/datasplit/trainvalno5k.json", "5k": "cocosplit/datasplit/5k.json"}
COCO_FOLDERS = ("coco/trainval2014", "coco/val2014")


def write_fake_tree(root: Path, fakes: Mapping[str, Any], sampling: Mapping[str, Any]) -> None:
    """Write a VOC and a COCO tree with their K-shot lists below `root`, in the official layout.

    Args:
        root: folder to fill; plays the part of DETECTRON2_DATASETS.
        fakes: {"voc": {"annotations": {id: {folder, filename, width, height, objects: [{name, bbox, difficult,
            truncated}]}}, "imagesets": {"<year>/<set>": [ids]}}, "coco": {"trainvalno5k": COCO json, "5k": COCO json}},
            VOC boxes as in the XML files: 1-based inclusive pixels.
        sampling: {"voc": {file name below vocsplit: text}, "coco": {file name below cocosplit: {image_ids, ann_ids}}};
            the ids refer to "trainvalno5k" and are written in the given order.
    """
    _write_voc(root, fakes["voc"])
    for name, text in sampling["voc"].items():
        _write(root / "vocsplit" / name, text)
    for name, place in COCO_FILES.items():
        _write(root / place, json.dumps(fakes["coco"][name]))
    for folder in COCO_FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    _write_coco_samples(root / "cocosplit", fakes["coco"]["trainvalno5k"], sampling["coco"])


def voc_xml(image: Mapping[str, Any]) -> str:
    """Text of a VOC annotation file from one entry of the description (also without "difficult" and "truncated")."""
    root = ElementTree.Element("annotation")
    for key in ("folder", "filename"):
        ElementTree.SubElement(root, key).text = image[key]
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for labelled in image["objects"]:
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = labelled["name"]
        for key in ("truncated", "difficult"):
            ElementTree.SubElement(node, key).text = str(labelled.get(key, 0))
        box = ElementTree.SubElement(node, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), labelled["bbox"], strict=True):
            ElementTree.SubElement(box, key).text = str(value)
    return ElementTree.tostring(root, encoding="unicode")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_voc(root: Path, voc: Mapping[str, Any]) -> None:
    for image_id, image in voc["annotations"].items():
        folder = root / image["folder"]
        _write(folder / "Annotations" / f"{image_id}.xml", voc_xml(image))
        (folder / "JPEGImages").mkdir(exist_ok=True)
    for name, ids in voc["imagesets"].items():
        year, image_set = name.split("/")
        _write(root / f"VOC{year}" / "ImageSets" / "Main" / f"{image_set}.txt", "".join(f"{i}\n" for i in ids))


def _write_coco_samples(folder: Path, full: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
    images = {image["id"]: image for image in full["images"]}
    annotations = {annotation["id"]: annotation for annotation in full["annotations"]}
    for name, ids in samples.items():
        content = {
            **{key: full[key] for key in ("info", "licenses")},
            "images": [images[i] for i in ids["image_ids"]],
            "annotations": [annotations[i] for i in ids["ann_ids"]],
            "categories": full["categories"],
        }
        _write(folder / name, json.dumps(content))
