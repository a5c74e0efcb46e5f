"""From annotation files to K-shot lists: what the scripts of datasets/ do.

Every function here reads and checks everything and writes nothing: it returns contents for `seeds.write_files`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdet.data import custom, sampling, seeds
from fsdet.data.coco import ImageFinder, read_coco
from fsdet.data.records import SHOWN, LoadReport
from fsdet.data.splits import VOC_CLASSES
from fsdet.data.voc import VocImage, read_image_set, read_voc_image

ALGORITHMS = ("strict", "legacy")
VOC_IMAGE_SETS = (("VOC2007", "trainval"), ("VOC2012", "trainval"))


@dataclass(frozen=True)
class Recipe:
    """How lists are drawn; goes into their manifest.

    seeds, shots: which to draw. algorithm: "strict" or "legacy", see `sampling`.
    unit, difficult: see `sampling.sample_strict`; the legacy algorithms take whole images and do not look at the flag.
    dataset: name of the data set, part of the strict generator's seed.
    """

    seeds: tuple[int, ...]
    shots: tuple[int, ...]
    algorithm: str = "strict"
    unit: str = "image"
    difficult: bool = False
    dataset: str = "voc"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f'Unknown algorithm "{self.algorithm}"; expected one of {ALGORITHMS}.')
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"Seeds must be different numbers from 0 up, got {list(self.seeds)}.")
        if not self.shots or list(self.shots) != sorted(set(self.shots)) or self.shots[0] < 1:
            raise ValueError(f"Numbers of shots must be positive and rise, got {list(self.shots)}.")
        if self.algorithm == "legacy" and (self.unit != "image" or self.difficult):
            raise ValueError("The legacy algorithm has no unit and no switch for difficult objects; draw with strict.")

    @property
    def is_strict(self) -> bool:
        """Whether lists that miss K are an error."""
        return self.algorithm == "strict"

    def facts(self, sources: Mapping[str, str]) -> dict[str, Any]:
        """What a manifest says besides the draw itself; `sources` maps annotation sets to their digests."""
        return {
            "format": 1,
            "algorithm": self.algorithm,
            "version": sampling.STRICT_VERSION if self.is_strict else 1,
            "dataset": self.dataset,
            "sources": dict(sources),
            "shots": list(self.shots),
            "unit": self.unit,
            "difficult": self.difficult or not self.is_strict,
        }

    def draw_strict(self, pool: sampling.Pool, seed: int, source: str, named_objects: bool) -> sampling.Draws:
        """Draw every class. Raises: one ValueError for all classes that cannot give their shots."""
        draws: sampling.Draws = {}
        faults = []
        for name, images in pool.items():
            try:
                draws[name] = sampling.sample_strict(
                    images,
                    self.shots,
                    seed=seed,
                    class_name=name,
                    dataset=self.dataset,
                    unit=self.unit,
                    difficult=self.difficult,
                    named_objects=named_objects,
                    source=source,
                )
            except ValueError as fault:
                faults.append(str(fault))
        if faults:
            more = f"\nand {len(faults) - SHOWN} more classes" if len(faults) > SHOWN else ""
            raise ValueError("\n".join(faults[:SHOWN]) + more)
        return draws


def draw_voc(
    root: Path,
    output: Path,
    recipe: Recipe,
    *,
    image_sets: Sequence[tuple[str, str]] = VOC_IMAGE_SETS,
    classes: Sequence[str] = VOC_CLASSES,
) -> dict[Path, str]:
    """Draw VOC lists; returns path -> content.

    Args:
        root: folder that holds VOC2007 and VOC2012. output: folder that will hold seedN.
        image_sets: (folder, image set), in the order in which the images enter the pool.
        classes: classes to draw; the legacy algorithm reproduces the official order only for all 20.
    Raises: FileNotFoundError or ValueError naming file and remedy.
    """
    images = _read_voc_sets(root, image_sets)
    # Of the annotations as read, so that a manifest tells from which version of the data it was drawn.
    content = json.dumps([(i.image_id, [(o.name, o.box, o.difficult) for o in i.objects]) for i in images])
    sources = {" + ".join("/".join(part) for part in image_sets): hashlib.sha256(content.encode()).hexdigest()}
    if recipe.is_strict:
        images = _usable_voc(images)
    pool = sampling.voc_pool(((i.image_id, [(o.name, o.difficult) for o in i.objects]) for i in images), classes)
    files: dict[Path, str] = {}
    for seed in recipe.seeds:
        if recipe.is_strict:
            draws = recipe.draw_strict(pool, seed, " + ".join(str(root / f) for f, _ in image_sets), False)
        else:
            draws = sampling.sample_voc_legacy(pool, seed, recipe.shots)
        files |= seeds.list_files(output, seed, draws, recipe.facts(sources))
    return files


def draw_coco(json_file: Path, output: Path, recipe: Recipe, *, classes: Sequence[str] = ()) -> dict[Path, str]:
    """Draw lists from any COCO detection file; returns path -> content.

    The strict draw leaves out boxes without area or outside their image (one warning) in COCO itself and refuses them
    in own data; the legacy algorithm does not look at them.

    Args:
        json_file: training annotations. output: folder that will hold seedN.
        classes: classes to draw, all without it; the legacy algorithm reproduces the official order only for all.
    Raises: FileNotFoundError or ValueError naming file, classes and remedy.
    """
    prepare = "prepare_coco.py" if recipe.dataset == "coco" else custom.PREPARE
    data = read_coco(json_file, prepare)
    custom.validate(data, json_file)
    names = custom.read_categories(json_file)
    unknown = sorted(set(classes) - set(names.values()))
    if unknown:
        raise ValueError(f"{json_file} has no class {unknown}; it has {list(names.values())}. Correct --classes.")
    if classes:
        names = {category: name for category, name in names.items() if name in classes}
    rows = _usable_coco(data, json_file, recipe) if recipe.is_strict else data["annotations"]
    pool = sampling.coco_pool(rows, names)
    facts = recipe.facts({json_file.name: hashlib.sha256(json_file.read_bytes()).hexdigest()})
    files: dict[Path, str] = {}
    for seed in recipe.seeds:
        if recipe.is_strict:
            draws = recipe.draw_strict(pool, seed, str(json_file), True)
        else:
            draws = sampling.sample_coco_legacy(pool, seed, recipe.shots)
        files |= seeds.list_files(output, seed, draws, facts, data)
    return files


def split_coco(json_files: Sequence[Path], held_out_file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merge COCO files and part them by a list of image ids: (training part, held-out part).

    This makes `trainvalno5k.json` and `5k.json` of the few-shot protocol from the 2014 train and val annotations.

    Args:
        held_out_file: one image id or image file name per line.
    Raises: FileNotFoundError or ValueError naming file and remedy.
    """
    parts = [read_coco(path) for path in json_files]
    for part, path in zip(parts, json_files, strict=True):
        custom.validate(part, path)
        if part["categories"] != parts[0]["categories"]:
            raise ValueError(f"{path} and {json_files[0]} have different categories and cannot be merged.")
    images = [image for part in parts for image in part["images"]]
    annotations = [row for part in parts for row in part["annotations"]]
    for what, rows in (("image", images), ("annotation", annotations)):
        if len({row["id"] for row in rows}) < len(rows):
            raise ValueError(f"{', '.join(map(str, json_files))} share {what} ids; name every file once.")
    held_out = _read_ids(held_out_file, {Path(image["file_name"]).stem: image["id"] for image in images})
    if len(held_out) == len(images):
        raise ValueError(f"{held_out_file} names every image, none is left for training. Give the held-out ids only.")

    def part_of(is_held_out: bool) -> dict[str, Any]:
        return {
            "info": parts[0].get("info", {}),
            "licenses": parts[0].get("licenses", []),
            "images": [image for image in images if (image["id"] in held_out) is is_held_out],
            "annotations": [row for row in annotations if (row["image_id"] in held_out) is is_held_out],
            "categories": parts[0]["categories"],
        }

    return part_of(False), part_of(True)


def missing_images(coco: Path, files: Mapping[Path, str]) -> list[str]:
    """File names in drawn COCO lists whose picture is in none of the official folders (2014 and 2017) below `coco`."""
    lists = [json.loads(text) for path, text in files.items() if path.name != seeds.MANIFEST]
    names = dict.fromkeys(image["file_name"] for data in lists for image in data["images"])
    find = ImageFinder(coco, "train").resolver()
    return [name for name in names if not Path(find(name)).is_file()]


def check_voc_lists(
    root: Path, folder: Path, image_sets: Sequence[tuple[str, str]] = VOC_IMAGE_SETS
) -> list[seeds.ShotListReport]:
    """Check every VOC list below `folder` against the annotations, difficult objects counted as the loader does.

    Raises: FileNotFoundError or ValueError naming file and remedy.
    """
    images = _read_voc_sets(root, image_sets)
    counts: dict[str, dict[str, int]] = {name: {} for name in VOC_CLASSES}
    for image in images:
        for name, number in Counter(labelled.name for labelled in image.objects).items():
            counts[name][image.image_id] = number
    return [seeds.report_voc_shots(path, *named, counts[named[1]]) for path, named in _lists(folder, ".txt", "voc")]


def check_coco_lists(folder: Path) -> list[seeds.ShotListReport]:
    """Check every COCO list below `folder`. Raises: FileNotFoundError or ValueError naming file and remedy."""
    return [seeds.report_coco_shots(path, *named) for path, named in _lists(folder, ".json", "coco")]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from text such as "0-9" or "0,1,4". Raises: ValueError for other text."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f'"{text}" is no list of seeds; write 0-9 or 0,1,4.')
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _lists(folder: Path, suffix: str, kind: str) -> list[tuple[Path, tuple[int, str]]]:
    """K-shot lists below a folder with (K, class name); manifests are compared with their lists on the way."""
    for manifest in sorted(folder.glob(f"seed*/{seeds.MANIFEST}")):
        seeds.check_manifest(folder, int(manifest.parent.name.removeprefix("seed")))
    found = [(path, seeds.parse_shot_name(path)) for path in sorted(folder.rglob(f"*shot_*{suffix}"))]
    if not any(named for _, named in found):
        raise FileNotFoundError(f"No K-shot list below {folder}. {seeds.HOW_TO_GET.format(kind)}")
    return [(path, named) for path, named in found if named]


def _read_voc_sets(root: Path, image_sets: Sequence[tuple[str, str]]) -> list[VocImage]:
    """Images of several image sets in this order. Raises: ValueError for an image that is in more than one."""
    images = [
        read_voc_image(root / folder, image_id)
        for folder, image_set in image_sets
        for image_id in read_image_set(root / folder, image_set)
    ]
    repeated = [image for image, number in Counter(i.image_id for i in images).items() if number > 1]
    if repeated:
        raise ValueError(f"Image {repeated[0]} is in the image sets {list(image_sets)} more than once; name each once.")
    return images


def _usable_voc(images: Iterable[VocImage]) -> list[VocImage]:
    """Images without bad boxes, which K-shot samples must not have."""
    report = LoadReport("drop")
    usable = [image for image in images if all([image.accepts(labelled, report) for labelled in image.objects])]
    report.finish("Images that cannot be drawn for their boxes")
    return usable


def _usable_coco(data: Mapping[str, Any], path: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Annotations without bad boxes. Raises: ValueError listing the bad boxes of own data."""
    report = LoadReport("drop" if recipe.dataset == "coco" else "fatal", "Correct or remove them in the file.")
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    usable = []
    for row in data["annotations"]:
        try:
            x, y, width, height = map(float, row["bbox"])
        except (TypeError, ValueError) as fault:
            raise ValueError(
                f"{path}: annotation {row['id']} has the bbox {row['bbox']}; expected x, y, width, height in pixels."
            ) from fault
        box, image = (x, y, x + width, y + height), row["image_id"]
        if row.get("iscrowd", 0) or report.accepts_box(
            box, size=sizes[image], file=path, image=image, annotation=row["id"]
        ):
            usable.append(row)
    report.finish(f"{path}: boxes that cannot be drawn")
    return usable


def _read_ids(path: Path, ids_by_stem: Mapping[str, int]) -> set[int]:
    """Image ids from a text file with one id or image file name per line."""
    if not path.is_file():
        raise FileNotFoundError(f"List of image ids {path} not found. Expected is one image id or file name per line.")
    known, found = set(ids_by_stem.values()), set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        image = ids_by_stem.get(Path(text).stem)
        image = int(text) if image is None and text.isdecimal() else image
        if image not in known:
            raise ValueError(f'{path}, line {number}: the annotation files have no image "{text}".')
        found.add(image)
    if not found:
        raise ValueError(f"{path} names no image. Expected is one image id or file name per line.")
    return found
