"""K-shot sample lists in the official TFA formats: read, checked, written, recorded.

    VOC   seedN/box_{K}shot_{class}_train.txt           one image path per line, of which only the file name counts
    COCO  seedN/full_box_{K}shot_{class}_trainval.json  a COCO json with K annotations of that class

Seed 0 of the official lists lies at the root of the folder. Lists drawn here have a `manifest.json` beside them with
algorithm, seed, every drawn instance and a digest of the lists. The official lists may be short, overfull or repeat an
entry: that is counted (`ShotListReport`) and no error.

Source: TFA (Wang et al., ICML 2020), its released sample lists. The algorithms are in `sampling.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdet.data.sampling import (
    COCO_SHOTS,
    VOC_SHOTS,
    ClassImage,
    Draws,
    choose_instances,
    generator_for,
    sample_coco_legacy,
    sample_strict,
    sample_voc_legacy,
)

__all__ = [
    "COCO_SHOTS", "VOC_SHOTS", "ClassImage", "ShotListReport", "check_manifest", "choose_instances", "coco_shot_path",
    "count_warnings", "digest_of", "generator_for", "list_files", "parse_shot_name",
    "read_coco_shots", "read_voc_shots", "report_coco_shots", "report_voc_shots", "sample_coco_legacy", "sample_strict",
    "sample_voc_legacy", "voc_list_text", "voc_shot_path", "write_coco_shots", "write_files", "write_voc_shots",
]  # fmt: skip

MANIFEST = "manifest.json"
HOW_TO_GET = "Unpack the official lists there or draw them with datasets/prepare_{}.py (see datasets/README.md)."
_VOC_NAME = re.compile(r"box_(?P<shot>\d+)shot_(?P<name>.+)_train\.txt")
_COCO_NAME = re.compile(r"full_box_(?P<shot>\d+)shot_(?P<name>.+)_trainval\.json")
_VOC_LINE = re.compile(r"(?:.*[/\\])?(?P<stem>[^/\\]+)\.jpe?g", re.IGNORECASE)


def voc_shot_path(folder: Path, seed: int, shot: int, class_name: str) -> Path:
    """Path of the VOC list of one class, whether it exists or not."""
    return _seed_path(folder, seed, _voc_name(shot, class_name))


def coco_shot_path(folder: Path, seed: int, shot: int, class_name: str) -> Path:
    """Path of the COCO list of one class, whether it exists or not."""
    return _seed_path(folder, seed, _coco_name(shot, class_name))


def parse_shot_name(path: Path) -> tuple[int, str] | None:
    """(K, class name) of a list's file name in either format, None for other names."""
    match = _VOC_NAME.fullmatch(Path(path).name) or _COCO_NAME.fullmatch(Path(path).name)
    return (int(match["shot"]), match["name"].replace("%2F", "/").replace("%25", "%")) if match else None


def read_voc_shots(path: Path) -> list[str]:
    """Image ids of a VOC list in file order, repeats kept. An id with "_" belongs to VOC2012, any other to VOC2007.

    Raises: FileNotFoundError or ValueError naming file, line and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"K-shot list {path} not found. {HOW_TO_GET.format('voc')}")
    ids = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _VOC_LINE.fullmatch(line.strip())
        if match:
            ids.append(match["stem"])
        elif line.strip():
            raise ValueError(
                f'{path}, line {number}: "{line.strip()[:80]}" is no image path such as '
                f"datasets/VOC2007/JPEGImages/000123.jpg. {HOW_TO_GET.format('voc')}"
            )
    if not ids:
        raise ValueError(f"K-shot list {path} is empty. {HOW_TO_GET.format('voc')}")
    return ids


def read_coco_shots(path: Path) -> dict[str, Any]:
    """COCO json of a K-shot list, checked: one class, that of the file name, and every annotation's image there.

    Raises: FileNotFoundError or ValueError naming file and remedy.
    """
    path = Path(path)
    data = _load_list(path)
    if not data["annotations"]:
        raise ValueError(f"K-shot list {path} holds no annotation. {HOW_TO_GET.format('coco')}")
    names = {category["id"]: category["name"] for category in data["categories"]}
    found = sorted({names[annotation["category_id"]] for annotation in data["annotations"]})
    named = parse_shot_name(path)
    if len(found) > 1 or (named and found != [named[1]]):
        expected = f'"{named[1]}"' if named else "one class"
        raise ValueError(f"{path} must hold {expected}, its annotations are of {found}. {HOW_TO_GET.format('coco')}")
    return data


def _load_list(path: Path) -> dict[str, Any]:
    """Parse a COCO list and check its structure: fields, number of box values, no dangling reference."""
    remedy = HOW_TO_GET.format("coco")
    if not path.is_file():
        raise FileNotFoundError(f"K-shot list {path} not found. {remedy}")
    try:
        data = json.loads(path.read_bytes())
        categories = {category["id"]: category["name"] for category in data["categories"]}
        images = {image["id"] for image in data["images"] if image["file_name"]}
        references = [(row["image_id"], row["category_id"], len(row["bbox"])) for row in data["annotations"]]
    except (UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise ValueError(f"K-shot list {path} is no JSON file: {fault}. {remedy}") from fault
    except (KeyError, TypeError) as fault:
        what = f"{fault} is missing" if isinstance(fault, KeyError) else str(fault)
        raise ValueError(
            f"K-shot list {path} is no COCO detection file ({what}); expected lists images (id, file_name), "
            f"annotations (image_id, category_id, bbox) and categories (id, name). {remedy}"
        ) from fault
    for image, category, values in references:
        if image not in images or category not in categories or values != 4:
            raise ValueError(
                f"K-shot list {path}: an annotation of image {image} and category {category} with {values} box values; "
                f"image and category must be in the file and a box has 4 numbers (x, y, width, height). {remedy}"
            )
    return data


@dataclass(frozen=True)
class ShotListReport:
    """What a K-shot list holds against what its name says.

    requested: K. images: distinct images. repeated: entries (VOC lines, COCO annotations) that repeat an earlier one.
    instances: instances the loader finds before it chooses K of them; None for a VOC list read without annotations.
    """

    path: Path
    class_name: str
    requested: int
    images: int
    repeated: int
    instances: int | None

    @property
    def warnings(self) -> dict[str, str]:
        """Deviations: key for counting ("short_lists", "overfull_lists", "repeated_entries") -> sentence."""
        found = {}
        if self.instances is not None and self.instances < self.requested:
            found["short_lists"] = f"{self.path}: {self.instances} of {self.requested} instances"
        if self.instances is not None and self.instances > self.requested:
            found["overfull_lists"] = f"{self.path}: {self.instances} instances for {self.requested} shots"
        if self.repeated:
            found["repeated_entries"] = f"{self.path}: {self.repeated} repeated"
        return found


def report_voc_shots(path: Path, shot: int, class_name: str, counts: Mapping[str, int] | None = None) -> ShotListReport:
    """Check a VOC list.

    Args:
        counts: objects of the class by image id, as the loader counts them; without it instances stay unknown.
    Raises: as `read_voc_shots`; ValueError where an image is unknown or does not show the class.
    """
    ids = read_voc_shots(path)
    for image in ids if counts is not None else ():
        if not counts.get(image):
            raise ValueError(
                f'{path}: image {image} is not in the data set or shows no "{class_name}". The list belongs to another '
                f"class or data set. {HOW_TO_GET.format('voc')}"
            )
    instances = None if counts is None else sum(counts[image] for image in ids)
    return ShotListReport(Path(path), class_name, shot, len(set(ids)), len(ids) - len(set(ids)), instances)


def report_coco_shots(path: Path, shot: int, class_name: str) -> ShotListReport:
    """Check a COCO list. Raises: as `read_coco_shots`."""
    rows = read_coco_shots(path)["annotations"]
    # Without ids an annotation is known by its image and box.
    distinct = {(row["image_id"], row.get("id", tuple(row["bbox"]))) for row in rows}
    images = {row["image_id"] for row in rows}
    return ShotListReport(Path(path), class_name, shot, len(images), len(rows) - len(distinct), len(rows))


def count_warnings(reports: Iterable[ShotListReport]) -> dict[str, int]:
    """Number of lists with each kind of warning; kinds that do not occur are left out."""
    return dict(Counter(key for report in reports for key in report.warnings))


def digest_of(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files, independent of their order and folder."""
    return _digest((Path(path).name, Path(path).read_bytes()) for path in paths)


def check_manifest(folder: Path, seed: int) -> dict[str, Any] | None:
    """Manifest of one drawn seed after comparing its lists with the recorded digest; None where no manifest is.

    Raises: ValueError where a list was changed, removed or is unreadable after the draw.
    """
    path = Path(folder) / f"seed{seed}" / MANIFEST
    if not path.is_file():
        return None
    remedy = "Draw the seed again with --force, or delete the manifest if the lists were edited on purpose."
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        lists = [path.parent / name for name in manifest["files"]]
        missing = [item.name for item in lists if not item.is_file()]
        digest = manifest["digest"]
    except (ValueError, KeyError, TypeError) as fault:
        raise ValueError(f"{path} is no manifest of K-shot lists ({fault!r}). {remedy}") from fault
    if missing or digest_of(lists) != digest:
        what = f"{missing[0]} is missing" if missing else "a list was changed after the draw"
        raise ValueError(f"{path} does not fit its K-shot lists: {what}. {remedy}")
    return manifest


def voc_list_text(image_ids: Iterable[str]) -> str:
    """Text of a VOC list. The paths are the official ones, wherever the images really lie."""
    folder = {True: "datasets/VOC2012", False: "datasets/VOC2007"}
    return "".join(f"{folder['_' in image]}/JPEGImages/{image}.jpg\n" for image in image_ids)


def write_voc_shots(path: Path, image_ids: Sequence[str], *, force: bool = False) -> None:
    """Write a VOC list. Raises: FileExistsError, see `write_files`."""
    write_files({Path(path): voc_list_text(image_ids)}, force=force)


def write_coco_shots(path: Path, data: Mapping[str, Any], *, force: bool = False) -> None:
    """Write a COCO list. Raises: FileExistsError, see `write_files`."""
    write_files({Path(path): json.dumps(data)}, force=force)


def list_files(
    folder: Path, seed: int, draws: Draws, facts: Mapping[str, Any], data: Mapping[str, Any] | None = None
) -> dict[Path, str]:
    """Contents of all lists of one seed and of their manifest, nothing written yet.

    Args:
        draws: what a sampler returned.
        facts: what the manifest says besides the draws: algorithm, version, data set, sources, switches.
        data: the COCO json drawn from; None writes VOC lists.
    """
    parent = Path(folder) / f"seed{seed}"
    images = {image["id"]: image for image in data["images"]} if data else {}
    annotations = {row["id"]: row for row in data["annotations"]} if data else {}
    files = {}
    for name, by_shot in draws.items():
        for shot, picks in by_shot.items():
            if data is None:
                files[parent / _voc_name(shot, name)] = voc_list_text([pick.image for pick in picks])
            else:
                files[parent / _coco_name(shot, name)] = json.dumps(_cut(data, images, annotations, picks))
    classes = {
        name: {
            # Samples are nested: the K-shot list is the first `length[K]` entries of the draw.
            "draw": [[pick.image, list(pick.objects)] for pick in max(by_shot.values(), key=len)],
            "length": {str(shot): len(picks) for shot, picks in by_shot.items()},
        }
        for name, by_shot in draws.items()
    }
    manifest = {
        **facts,
        "seed": seed,
        "files": sorted(path.name for path in files),
        "digest": _digest((path.name, text.encode()) for path, text in files.items()),
        "classes": classes,
    }
    return {**files, parent / MANIFEST: json.dumps(manifest, indent=1) + "\n"}


def write_files(files: Mapping[Path, str | bytes], *, force: bool = False) -> None:
    """Write files atomically, after looking at all of them. A file that has the same content already is fine.

    Raises: FileExistsError, before anything is written, where a file has other content and `force` is not set.
    """
    contents = {path: data if isinstance(data, bytes) else data.encode() for path, data in files.items()}
    changed = {path: data for path, data in contents.items() if not (path.is_file() and path.read_bytes() == data)}
    existing = [path for path in changed if path.exists()]
    if existing and not force:
        raise FileExistsError(
            f"{existing[0]} exists with other content ({len(existing)} such file(s)). Write to another folder, or "
            "overwrite with --force."
        )
    for path, data in changed.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _seed_path(folder: Path, seed: int, name: str) -> Path:
    """Path in the folder of the seed; for seed 0 also the root, where the official lists have it."""
    path = Path(folder) / f"seed{seed}" / name
    at_root = Path(folder) / name
    return at_root if seed == 0 and not path.parent.is_dir() and at_root.is_file() else path


def _voc_name(shot: int, class_name: str) -> str:
    return f"box_{shot}shot_{_quoted(class_name)}_train.txt"


def _coco_name(shot: int, class_name: str) -> str:
    return f"full_box_{shot}shot_{_quoted(class_name)}_trainval.json"


def _quoted(class_name: str) -> str:
    """Class name as part of a file name. Official names stay as they are, spaces included."""
    return class_name.replace("%", "%25").replace("/", "%2F")


def _cut(data: Mapping[str, Any], images: Mapping, annotations: Mapping, picks: Sequence[ClassImage]) -> dict[str, Any]:
    """Cut a COCO json down to drawn objects: images and annotations in the order of the draw, all categories kept."""
    return {
        "info": data.get("info", {}),
        "licenses": data.get("licenses", []),
        "images": [images[image] for image in dict.fromkeys(pick.image for pick in picks)],
        "annotations": [annotations[i] for pick in picks for i in pick.objects],
        "categories": data["categories"],
    }


def _digest(contents: Iterable[tuple[str, bytes]]) -> str:
    lines = sorted(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
