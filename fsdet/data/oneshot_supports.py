"""Pictures of the classes of a one-shot benchmark: which ones a class has, which K are taken, and their dataset dicts.

A class has the picture that its annotation file names, and every further one in the folder that is called by the stem
of that, "_" and anything: 16.jpg, 16_b.jpg, 16_side.png.

Source: Osokin et al., ECCV 2020 (OS2D); several pictures of a class are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.structures import BoxMode

from fsdet.data.mapper import ImageError
from fsdet.data.oneshot import annotation_path, oneshot_split, picture_size
from fsdet.data.oneshot_files import AnnotationFile, read_annotation_file
from fsdet.data.pictures import is_picture, read_pixels
from fsdet.data.records import SHOWN, LoadReport, Record
from fsdet.data.seeds import choose_instances
from fsdet.data.spec import DatasetSources, DatasetSpec


def default_class_images(path: Path) -> Path:
    """Where the pictures of the classes usually are: "images" beside the annotation file, or classes/images."""
    near = path.parent / "classes" / "images"
    return near if near.is_dir() else path.parent / "images"


def class_pictures(file: AnnotationFile, folder: Path) -> dict[str, list[Path]]:
    """Class name -> its pictures: its own first, then those called by its stem, "_" and anything; may be empty.

    "a_b_2.jpg" belongs to the class of a_b.jpg where there is one, else to that of a.jpg.
    """
    pictures = sorted(path for path in folder.iterdir() if is_picture(path)) if folder.is_dir() else []
    by_stem = {path.stem: path for path in reversed(pictures)}
    result: dict[str, list[Path]] = {}
    stems: dict[str, list[str]] = {}  # stem of a class's own picture -> class names
    for class_id, name in file.classes.items():
        files = file.class_files[class_id]
        own = next((path for f in files for path in (folder / f, by_stem.get(f)) if path and path.is_file()), None)
        result[name] = [own] if own else []
        if own:
            stems.setdefault(own.stem, []).append(name)
    for path in pictures:
        parts = path.stem.split("_")
        heads = ("_".join(parts[:count]) for count in range(len(parts), 0, -1))
        head = next((head for head in heads if head in stems), path.stem)
        if head != path.stem:
            for name in stems[head]:
                result[name].append(path)
    return result


def class_images(spec: DatasetSpec, sources: DatasetSources, class_names: Sequence[str]) -> dict[str, list[Path]]:
    """Class name -> pictures that a spec takes as supports: all for shot 0, else K.

    Seed 0 takes the first K in their order; any other seed draws K by (seed, class). Base classes have theirs where the
    training set says, novel ones where the test set says.

    Raises: FileNotFoundError listing classes without a picture, ValueError listing those with fewer than K.
    """
    split = oneshot_split(sources)
    found: dict[str, list[Path]] = {}
    expected: dict[str, Path] = {}
    for part, names in (("train", split.base), ("test", split.novel)):
        wanted = set(names).intersection(class_names)
        if not wanted:
            continue
        path = annotation_path(part, sources)
        file, folder = read_annotation_file(path), sources.class_images or default_class_images(path)
        first, all_of = first_pictures(file, folder), class_pictures(file, folder)
        expected |= {name: first[name] for name in wanted}
        found |= {name: all_of[name] for name in wanted}
    found = {name: found[name] for name in class_names}
    require_pictures(found, expected, spec.shot)
    return {name: _choose(pictures, spec, name) for name, pictures in found.items()}


def first_pictures(file: AnnotationFile, folder: Path) -> dict[str, Path]:
    """Class name -> the likeliest place of its own picture."""
    return {name: folder / file.class_files[class_id][0] for class_id, name in file.classes.items()}


def require_pictures(found: Mapping[str, Sequence[Path]], expected: Mapping[str, Path], shot: int = 1) -> None:
    """Make sure that every class has its K pictures.

    Args:
        found: class name -> its pictures.
        expected: class name -> where its first one should be, for messages.
        shot: K; 0 as 1.
    Raises: FileNotFoundError listing classes without a picture, ValueError listing those with fewer than K.
    """
    if bare := [f"{expected[name]} ({name})" for name, pictures in found.items() if not pictures]:
        raise FileNotFoundError(
            f"{len(bare)} class(es) without a picture: {', '.join(bare[:SHOWN])}{', ...' if bare[SHOWN:] else ''}. Put "
            "it there, or correct FEWSHOT.CLASS_IMAGES (names stand in the column classfilename; of a json they are a "
            "category's class_image, name or id)"
        )
    if short := {name: len(pictures) for name, pictures in found.items() if len(pictures) < shot}:
        raise ValueError(
            f"FEWSHOT.SHOT is {shot}, but {len(short)} class(es) have fewer pictures, such as "
            f"{dict(list(short.items())[:SHOWN])} in {expected[next(iter(short))].parent}. Ask for fewer, or add "
            'pictures called like the first one with "_" and a word behind: 16_side.jpg'
        )


def _choose(pictures: list[Path], spec: DatasetSpec, class_name: str) -> list[Path]:
    if not spec.shot:
        return pictures
    if not spec.seed:
        return pictures[: spec.shot]
    drawn = choose_instances(len(pictures), spec.shot, split=0, seed=spec.seed, class_name=class_name)
    return [pictures[place] for place in drawn]


def support_records(
    spec: DatasetSpec, sources: DatasetSources, class_names: Sequence[str], report: LoadReport
) -> list[Record]:
    """One record per class picture, its box the whole picture; class by class in the order of the class ids.

    Raises: as `class_images`; ImageError for a broken picture.
    """
    records = []
    for place, (name, pictures) in enumerate(class_images(spec, sources, class_names).items()):
        if spec.shot and spec.seed:
            report.chosen[name] = [path.name for path in pictures]
        for path in pictures:
            height, width = picture_size(path)
            own_id = f"{name}/{path.name}"  # folders of two files may use a name twice
            whole = {"id": own_id, "category_id": place, "bbox": [0, 0, width, height], "bbox_mode": BoxMode.XYXY_ABS}
            records.append({
                "file_name": str(path), "image_id": own_id, "height": height, "width": width,
                "annotations": [{**whole, "iscrowd": 0, "difficult": 0}],
            })  # fmt: skip
    return records


def check_class_images(spec: DatasetSpec, sources: DatasetSources, class_names: Sequence[str]) -> None:
    """Decode the pictures that a spec takes as supports.

    Raises: as `class_images`; ImageError listing those that cannot be read.
    """
    broken = []
    for path in (path for pictures in class_images(spec, sources, class_names).values() for path in pictures):
        try:
            read_pixels(path, "BGR")
        except ImageError as error:
            broken.append(str(error))
    if broken:
        raise ImageError("Pictures of classes that cannot be read:\n  " + "\n  ".join(broken))
