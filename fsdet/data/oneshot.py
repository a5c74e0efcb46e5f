"""One-shot benchmarks: scenes with boxes, and a folder with a picture or more of each class (the supports).

    grozi/classes/grozi.csv  grozi/classes/images/16.jpg 16_side.jpg …  grozi/src/1.jpg …

Training and test may be parts of one file (its column "split") or two files. Base classes are those of the training
set; novel ones are those of the novel test set that training does not have. Every image of a test set is a test image,
also one that shows none of the classes tested.

Source: Osokin et al., ECCV 2020 (OS2D), section 6 and its data sets (GroZi-3.2k, Dairy, Paste, INSTRE).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from detectron2.structures import BoxMode
from PIL import Image

from fsdet.data.coco import guess_image_folder
from fsdet.data.mapper import ImageError
from fsdet.data.oneshot_files import PREPARE, AnnotationFile, Id, LabelledBox, read_annotation_file
from fsdet.data.records import SHOWN, LoadReport, Record
from fsdet.data.spec import DatasetSources, DatasetSpec
from fsdet.data.splits import ClassSplit

__all__ = [
    "PREPARE", "REMEDY", "annotation_path", "check_scenes", "default_scenes", "no_classes", "oneshot_split",
    "picture_size", "records_of", "require_scenes", "scene_folder", "scene_records",
]  # fmt: skip

REMEDY = "Correct or remove them. In a CSV lx, ty, rx and by are fractions of width and height, from 0 to 1."
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112  # EXIF tag


def annotation_path(part: str, sources: DatasetSources) -> Path:
    """The CSV or json of "train" or "test"; without one of its own the test is part of the training file.

    Raises: ValueError when none is configured.
    """
    path = sources.json_of(part) or (sources.train_json if part == "test" else None)
    if path is None:
        keys = "FEWSHOT.TRAIN_JSON" if part == "train" else "FEWSHOT.TEST_JSON (or TRAIN_JSON)"
        raise ValueError(f"The {part} part of a one-shot set needs {keys}: its CSV, or a COCO-format json")
    return path


def scene_folder(part: str, sources: DatasetSources) -> Path:
    """Folder of the scenes: as configured, else "src" beside the annotation file or beside its folder."""
    path = annotation_path(part, sources)
    given = sources.images_of(part) or (sources.train_images if path == sources.train_json else None)
    return given or default_scenes(path)


def default_scenes(path: Path) -> Path:
    """Where the scenes of an annotation file usually are."""
    places = [folder for folder in (path.parent / "src", path.parent.parent / "src") if folder.is_dir()]
    if places or path.suffix.lower() == ".csv":
        return (places or [path.parent.parent / "src"])[0]
    return guess_image_folder(path) or path.parent


def oneshot_split(sources: DatasetSources) -> ClassSplit:
    """Base classes, then novel ones, each in the order of the ids. Raises: as `read_annotation_file`, `select`."""
    training, _, novel_test = sources.oneshot_sets
    base = _classes_of(annotation_path("train", sources), training) if sources.train_json else ()
    found = _classes_of(annotation_path("test", sources), novel_test)
    novel = tuple(name for name in found if name not in set(base))
    return ClassSplit(base=base, novel=novel, all=base + novel)


def no_classes(subset: str, sources: DatasetSources) -> ValueError:
    """The error for a set without classes of a subset."""
    return ValueError(
        f"{annotation_path('test', sources)}: no {subset} class with the sets {sources.oneshot_sets}. Base classes are "
        "those of the training set, novel ones those of the test of the novel classes that training does not have; "
        "correct FEWSHOT.TRAIN_JSON, TEST_JSON or ONESHOT_SETS"
    )


def _classes_of(path: Path, subset: str) -> tuple[str, ...]:
    """Names of the classes that a set shows, in the order of the ids."""
    file = read_annotation_file(path)
    shown = {box.class_id for box in file.select(subset)}
    return tuple(name for class_id, name in file.classes.items() if class_id in shown)


def scene_records(
    spec: DatasetSpec, sources: DatasetSources, class_names: Sequence[str], report: LoadReport
) -> list[Record]:
    """One record per scene of the training or the test set, in the order of the image ids.

    Difficult objects carry "difficult" 1: training may use or ignore them, evaluation ignores them.

    Args:
        spec: without shots.
        sources: where it is.
        class_names: kept classes; their place is the class id.
        report: receives counts and bad boxes.
    Raises: as `read_annotation_file`; FileNotFoundError for missing scenes; ImageError for broken ones.
    """
    file = read_annotation_file(annotation_path(spec.part, sources))
    sets, wanted = _sets_of(spec, sources)
    images = file.images if not file.is_csv else {box.image_id for name in sets for box in file.select(name)}
    boxes = list({box.place: box for name in wanted for box in file.select(name)}.values())
    known = set(oneshot_split(sources).all)
    if others := sum(file.classes[box.class_id] not in known for box in boxes):
        report.add("boxes_of_neither_base_nor_novel_classes", count=others)
    if spec.part == "train" and not (spec.difficult or spec.clear_difficult):
        if dropped := sum(box.difficult for box in boxes):
            report.add("difficult_dropped", count=dropped)
        boxes = [box for box in boxes if not box.difficult]
    folder = scene_folder(spec.part, sources)
    records = records_of(file, boxes, images, class_names, folder, report, clear_difficult=spec.clear_difficult)
    if spec.part == "test":
        _look_at_test(spec, sources, file, records, report)
    return records


def _sets_of(spec: DatasetSpec, sources: DatasetSources) -> tuple[Sequence[str], Sequence[str]]:
    """Values of the column "split" whose images a spec has, and those whose boxes it has."""
    training, base_test, novel_test = sources.oneshot_sets
    if spec.part == "train":
        return (training,), (training,)
    if sources.train_json and base_test == training and spec.subset != "base":
        base_test = novel_test  # the base classes have no test of their own: their scenes were trained on
    tests = (base_test, novel_test)
    return tests, {"base": (base_test,), "novel": (novel_test,), "all": tests}[spec.subset]


def _look_at_test(
    spec: DatasetSpec, sources: DatasetSources, file: AnnotationFile, records: Sequence[Record], report: LoadReport
) -> None:
    """Count what makes a test worthless."""
    if not any(record["annotations"] for record in records):
        report.add("tests_without_objects", f"{file.path}: no box of a {spec.subset} class")
    if file.path == sources.train_json:
        trained = {box.image_id for box in file.select(sources.oneshot_sets[0])}
        if common := sum(record["image_id"] in trained for record in records):
            report.add("test_images_of_the_training_set", count=common)


def records_of(
    file: AnnotationFile,
    boxes: Iterable[LabelledBox],
    images: Iterable[Id],
    class_names: Sequence[str],
    folder: Path,
    report: LoadReport,
    *,
    clear_difficult: bool = False,
) -> list[Record]:
    """Dataset dicts of some images of a file with some of its boxes.

    Args:
        file: content.
        boxes: of these images; those of classes outside `class_names` are left out.
        images: image ids; the records follow their order.
        class_names: kept classes; their place is the class id.
        folder: of the scenes.
        report: receives bad boxes.
        clear_difficult: take difficult objects for plain ones.
    Raises: FileNotFoundError listing missing scenes; ImageError for a broken one (both of a CSV alone).
    """
    places = {name: place for place, name in enumerate(class_names)}
    paths = {image_id: folder / file.images[image_id] for image_id in sorted(images)}
    if file.is_csv:
        require_scenes(paths.values(), file.path)
    records: dict[Id, Record] = {}
    for image_id, path in paths.items():
        height, width = picture_size(path) if file.is_csv else file.sizes[image_id]
        records[image_id] = {
            "file_name": str(path), "image_id": image_id, "height": height, "width": width, "annotations": [],
        }  # fmt: skip
    for labelled in boxes:
        place = places.get(file.classes[labelled.class_id])
        if place is None:
            continue
        record = records[labelled.image_id]
        annotation = _annotation(file, labelled, record, place, clear_difficult)
        size = (record["height"], record["width"])
        if report.accepts_box(
            annotation["bbox"], size=size, file=file.path, image=labelled.image_id, annotation=labelled.place
        ):
            record["annotations"].append(annotation)
    return list(records.values())


def _annotation(
    file: AnnotationFile, labelled: LabelledBox, record: Record, class_id: int, clear_difficult: bool
) -> Record:
    """Detectron2 annotation with the box in pixels."""
    x, y = (record["width"], record["height"]) if file.is_csv else (1, 1)
    x0, y0, x1, y1 = labelled.box
    result = {
        "id": labelled.id,
        "category_id": class_id,
        "bbox": [x0 * x, y0 * y, x1 * x, y1 * y],
        "bbox_mode": BoxMode.XYXY_ABS,
        "iscrowd": int(labelled.is_crowd),
        "difficult": int(labelled.difficult and not clear_difficult),
    }
    return result if labelled.area is None else {**result, "area": labelled.area}


def require_scenes(paths: Iterable[Path], annotations: Path) -> None:
    """Raise FileNotFoundError that lists missing scenes of an annotation file."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        names = ", ".join(path.name for path in missing[:SHOWN]) + (", ..." if missing[SHOWN:] else "")
        raise FileNotFoundError(
            f"{annotations} names {len(missing)} scene(s) that are not in {missing[0].parent}: {names}. Correct "
            "FEWSHOT.TRAIN_IMAGES or TEST_IMAGES, put them back, or remove their rows"
        )


def picture_size(path: Path) -> tuple[int, int]:
    """(H, W) of a picture file, turned as its EXIF data says; only its header is read.

    Raises: FileNotFoundError; ImageError naming a file that is no picture.
    """
    return _size_of(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _size_of(path: Path, _changed: int) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(_ORIENTATION) in _TURNED else (height, width)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: this image cannot be read ({error}). Replace or remove the file.") from error


def check_scenes(spec: DatasetSpec, sources: DatasetSources, class_names: Sequence[str], report: LoadReport) -> None:
    """Read a training or test set, and make sure that every scene is there. Raises: as `scene_records`."""
    records = scene_records(spec, sources, class_names, report)
    require_scenes((Path(record["file_name"]) for record in records), annotation_path(spec.part, sources))
    report.finish(spec.name)
