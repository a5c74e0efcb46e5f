"""Class lists for surgery, from a split's short name, a file, or the command line."""

from __future__ import annotations

import json
from pathlib import Path

from fsdet.data.splits import ClassSplit, coco_split, voc_split


def named_split(name: str) -> ClassSplit:
    """Class split by its short name: voc1, voc2, voc3 or coco. Raises: ValueError for any other."""
    splits = {"voc1": 1, "voc2": 2, "voc3": 3}
    if name == "coco":
        return coco_split()
    if name not in splits:
        raise ValueError(f'Unknown split "{name}"; expected voc1, voc2, voc3 or coco, or give the class lists')
    return voc_split(splits[name])


def read_class_names(text: str) -> tuple[str, ...]:
    """Class names from a file (one per line, or a JSON list) or from a comma-separated list.

    Raises: ValueError when a file name is meant but there is no such file, or the list is empty.
    """
    path = Path(text)
    if path.suffix in (".txt", ".json", ".names") and not path.is_file():
        raise ValueError(f"Class list {path} not found; give a file of names or a comma-separated list")
    if path.is_file():
        content = path.read_text(encoding="utf-8")
        names = json.loads(content) if path.suffix == ".json" else content.splitlines()
    else:
        names = text.split(",")
    names = tuple(name.strip() for name in names if name.strip())
    if not names:
        raise ValueError(f'"{text}" names no class')
    return names
