"""DatasetSpec -> dataset dicts: registers in Detectron2's catalogs exactly what a configuration names.

Importing this module registers nothing, and registering reads no annotation (of own data only the list of classes, of
one-shot sets the file that says which classes are base and novel).

Source: data set names and record rules of TFA (Wang et al., ICML 2020) and DeFRCN (Qiao et al., ICCV 2021). Their
loaders parse a registered name; here the name is only a label, and everything comes from the spec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from fsdet.data import coco, custom, oneshot, oneshot_supports, voc
from fsdet.data.files import listed_images
from fsdet.data.records import LoadReport, Record, missing_file
from fsdet.data.seeds import check_manifest, coco_shot_path, voc_shot_path
from fsdet.data.spec import DatasetSources, DatasetSpec, class_file
from fsdet.data.splits import ClassSplit, coco_split, voc_split

__all__ = [
    "DatasetSources", "DatasetSpec", "check_sources", "class_names", "class_split", "image_finder", "json_file",
    "load_records", "load_supports", "new_report", "register", "sample_files",
]  # fmt: skip

PREPARE = {"voc": voc.PREPARE, "coco": coco.PREPARE, "custom": custom.PREPARE, "oneshot": oneshot.PREPARE}


def class_split(spec: DatasetSpec, sources: DatasetSources) -> ClassSplit:
    """Base, novel and all classes of a spec; read from the json's categories (own data) or boxes (one-shot sets)."""
    if spec.benchmark == "voc":
        return voc_split(spec.split)
    if spec.benchmark == "coco":
        return coco_split()
    if spec.benchmark == "oneshot":
        return oneshot.oneshot_split(sources)
    return custom.custom_split(class_file(sources), sources.novel_classes)


def class_names(spec: DatasetSpec, sources: DatasetSources) -> tuple[str, ...]:
    """Names of the classes kept; the place in the tuple is the class id.

    Raises: ValueError when own data or a one-shot set has no class of the wanted subset.
    """
    names = class_split(spec, sources).of(spec.subset)
    if not names and spec.benchmark == "oneshot":
        raise oneshot.no_classes(spec.subset, sources)
    if not names:
        raise ValueError(
            f"{class_file(sources)}: no {spec.subset} class is left with the novel classes "
            f"{list(sources.novel_classes)}; name the novel classes of own data with FEWSHOT.NOVEL_CLASSES"
        )
    return names


def sample_files(spec: DatasetSpec, sources: DatasetSources) -> list[Path]:
    """The K-shot files that a spec reads, in class order; empty for full sets.

    One a class, but for one-shot sets, where they are the K pictures of each class.
    """
    if not spec.shot:
        return []
    if spec.benchmark == "oneshot":
        chosen = oneshot_supports.class_images(spec, sources, class_names(spec, sources))
        return [path for pictures in chosen.values() for path in pictures]
    path_of = voc_shot_path if spec.benchmark == "voc" else coco_shot_path
    folder = sources.samples_of(spec.benchmark)
    return [path_of(folder, spec.seed, spec.shot, name) for name in class_names(spec, sources)]


def json_file(spec: DatasetSpec, sources: DatasetSources) -> Path:
    """Annotation file of the full set of a COCO-format or one-shot spec; it need not exist."""
    if spec.benchmark == "oneshot":
        return oneshot.annotation_path(spec.part, sources)
    given = sources.json_of(spec.part)
    if spec.benchmark == "custom" and given is None:
        raise ValueError(f"Own data needs FEWSHOT.{spec.part.upper()}_JSON, a COCO-format json")
    try:
        return coco.annotation_file(sources.root, spec.part, given)
    except FileNotFoundError:
        return given or sources.root / coco.LAYOUT[spec.part][0]


def image_finder(spec: DatasetSpec, sources: DatasetSources) -> coco.ImageFinder:
    """Where the pictures of a COCO-format spec lie: as configured, beside the json, or the official folders."""
    given = sources.json_of(spec.part)
    folder = sources.images_of(spec.part) or (coco.guess_image_folder(given) if given else None)
    if folder is None and spec.benchmark == "custom":
        folder = json_file(spec, sources).parent
    return coco.ImageFinder(sources.root / "coco", spec.part, folder)


def new_report(spec: DatasetSpec) -> LoadReport:
    """Empty report with the policy for bad boxes that a spec needs."""
    if spec.benchmark == "custom":
        return LoadReport("fatal", "Correct or remove these annotations in the file.")
    if spec.benchmark == "oneshot":
        return LoadReport("fatal", oneshot.REMEDY)
    if spec.shot:
        remedy = (
            f"Correct these annotations, or draw the samples again with `python datasets/{PREPARE[spec.benchmark]}`."
        )
        return LoadReport("fatal", remedy)
    return LoadReport("drop" if spec.part == "train" else "keep")


def load_records(spec: DatasetSpec, sources: DatasetSources, report: LoadReport | None = None) -> list[Record]:
    """Read the dataset dicts of a spec, without any registry.

    Args:
        spec: which data.
        sources: where it is.
        report: filled with counted warnings when given.
    Returns: Detectron2 dataset dicts. Beside Detectron2's keys, annotations carry "id", VOC and one-shot ones
        "difficult", COCO ones "area" where the file has it, and records "ignore_regions" (XYXY boxes) under the leak
        policy "ignore".
    Raises: FileNotFoundError for missing files; ValueError for unknown classes, broken files and, in K-shot samples and
        own data, boxes without area or outside their image.
    """
    report = new_report(spec) if report is None else report
    load = {"voc": _load_voc, "oneshot": _load_oneshot}.get(spec.benchmark, _load_coco)
    records = load(spec, sources, report)
    report.finish(spec.name)
    return _listed(records, sources.test_list) if spec.part == "test" and sources.test_list else records


def load_supports(spec: DatasetSpec, sources: DatasetSources, report: LoadReport | None = None) -> list[Record]:
    """Read the dataset dicts whose annotations are the supports of a spec's classes.

    Those are its K-shot records (or full set). One-shot sets have pictures of their classes, also where the training
    set is a full one: then all of them.

    Returns, Raises: as `load_records`.
    """
    if spec.benchmark != "oneshot" or spec.shot:
        return load_records(spec, sources, report)
    report = new_report(spec) if report is None else report
    return oneshot_supports.support_records(spec, sources, class_names(spec, sources), report)


def _listed(records: list[Record], path: Path) -> list[Record]:
    """The records whose image id stands in a file, one id a line.

    Raises: FileNotFoundError for a missing file; ValueError for an empty one, repeated ids, and ids that no record has.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such list of test images (FEWSHOT.TEST_LIST); leave it empty to test on all"
        )
    wanted = listed_images(path)
    listed = set(wanted)
    found = [record for record in records if str(record["image_id"]) in listed]
    if not wanted or len(found) != len(wanted):
        unknown = sorted(listed - {str(record["image_id"]) for record in records})
        fault = f"names images that the test set lacks: {unknown[:5]}" if unknown else "is empty or repeats an image"
        raise ValueError(f"{path} {fault}; FEWSHOT.TEST_LIST holds one image id of the test set a line, each once")
    return found


def _leaked(spec: DatasetSpec, sources: DatasetSources) -> tuple[str, ...]:
    return class_split(spec, sources).novel if spec.removes_leak else ()


def _is_strict(spec: DatasetSpec, sources: DatasetSources) -> bool:
    """Whether the K-shot lists say of themselves that they were drawn to hold exactly K instances."""
    manifest = check_manifest(sources.samples_of(spec.benchmark), spec.seed)
    return manifest is not None and manifest.get("algorithm") == "strict"


def _load_voc(spec: DatasetSpec, sources: DatasetSources, report: LoadReport) -> list[Record]:
    names = class_names(spec, sources)
    sets = sources.voc_sets(spec.part)
    if not spec.shot:
        keep = spec.difficult or spec.part == "test"
        return voc.full_records(sets, names, report, difficult=keep, leak=spec.leak, leaked=_leaked(spec, sources))
    return voc.shot_records(
        sources.samples_of("voc"),
        list(dict.fromkeys(folder for folder, _ in sets)),
        names,
        report,
        shot=spec.shot,
        seed=spec.seed,
        split=spec.split,
        choice=spec.choice,
        merge=spec.records == "image",
        difficult=spec.difficult,
        strict=_is_strict(spec, sources),
    )


def _load_oneshot(spec: DatasetSpec, sources: DatasetSources, report: LoadReport) -> list[Record]:
    read = oneshot_supports.support_records if spec.shot else oneshot.scene_records
    return read(spec, sources, class_names(spec, sources), report)


def _load_coco(spec: DatasetSpec, sources: DatasetSources, report: LoadReport) -> list[Record]:
    names = class_names(spec, sources)
    find = image_finder(spec, sources).resolver()

    def make_reader(path: Path, data: Mapping[str, Any]) -> coco.CocoReader:
        if spec.benchmark == "coco":
            known = coco.official_ids(data["categories"], path)
        else:
            custom.validate(data, path)
            known = {category["id"]: category["name"] for category in data["categories"]}
            _check_known(known, sources, path)
        return coco.CocoReader(path, known, names, find, report)

    if spec.shot:
        return coco.shot_records(
            sources.samples_of(spec.benchmark),
            names,
            make_reader,
            shot=spec.shot,
            seed=spec.seed,
            choice=spec.choice,
            merge=spec.records == "image",
            strict=_is_strict(spec, sources),
            draw=_draw_command(spec, sources),
        )
    path = json_file(spec, sources)
    data = coco.read_coco(path, PREPARE[spec.benchmark])
    return coco.full_records(data, make_reader(path, data), leak=spec.leak, leaked=_leaked(spec, sources))


def _draw_command(spec: DatasetSpec, sources: DatasetSources) -> str:
    """The command that draws the K-shot lists of a COCO-format spec."""
    if spec.benchmark != "custom":
        return f"python datasets/{PREPARE[spec.benchmark]}"
    names = class_names(spec, sources) if spec.subset == "novel" else ()
    place, samples = class_file(sources), sources.samples_of("custom")
    return custom.draw_command(place, samples, shot=spec.shot, seed=spec.seed, class_names=names)


def _check_known(found: Mapping[int, str], sources: DatasetSources, path: Path) -> None:
    """Every class of a file of own data must be one of the class file."""
    own = custom.read_categories(class_file(sources)).values()
    unknown = sorted(set(found.values()) - set(own))
    if unknown:
        raise ValueError(f"{path}: unknown classes {unknown}; {class_file(sources)} has {list(own)}")


def register(spec: DatasetSpec, sources: DatasetSources) -> str:
    """Make a spec known to Detectron2's catalogs; annotations are read by `DatasetCatalog.get(name)`.

    Registering the same again changes nothing; other sources under the same name replace the former ones. Loading
    fills `load_report` (counts), `load_details` (lines) and `chosen_annotations` (class -> ids) of the metadata.

    Returns: the name.
    Raises: ValueError for unknown novel classes of own data, FileNotFoundError when its json is missing.
    """
    name = spec.name
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if (metadata.get("spec"), metadata.get("sources")) == (spec, sources):
            return name
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    described = _describe(spec, sources)  # may raise: before anything is registered
    metadata = MetadataCatalog.get(name).set(**described)

    def load() -> list[Record]:
        report = new_report(spec)
        records = load_records(spec, sources, report)
        for kept, new in (
            (metadata.load_report, report.counts),
            (metadata.chosen_annotations, report.chosen),
        ):
            kept.clear()
            kept.update(new)
        metadata.load_details[:] = report.details
        return records

    DatasetCatalog.register(name, load)
    return name


def _describe(spec: DatasetSpec, sources: DatasetSources) -> dict[str, Any]:
    """Metadata of a spec. Beside ours, what Detectron2's own VOC and COCO evaluators read."""
    split, names = class_split(spec, sources), class_names(spec, sources)
    described: dict[str, Any] = {
        "thing_classes": list(names),
        "base_classes": list(split.base),
        "novel_classes": list(split.novel),
        "evaluator_type": "voc" if spec.benchmark == "voc" else "coco",
        "spec": spec,
        "sources": sources,
        "load_report": {},
        "load_details": [],
        "chosen_annotations": {},
    }
    if spec.benchmark == "voc":
        folder, image_set = sources.voc_sets(spec.part)[0]
        year = 2012 if folder.name == "VOC2012" else 2007
        return {**described, "dirname": str(folder), "split": image_set, "year": year}
    if spec.benchmark == "oneshot":  # class pictures have no scenes
        return described if spec.shot else {**described, "image_root": str(oneshot.scene_folder(spec.part, sources))}
    places = {name: place for place, name in enumerate(names)}
    finder = image_finder(spec, sources)
    ids = coco.COCO_CLASSES if spec.benchmark == "coco" else custom.read_categories(class_file(sources))
    if not spec.shot:
        path = json_file(spec, sources)
        described["json_file"] = str(path)
        if spec.part == "test" and sources.test_list:
            described["test_list"] = str(sources.test_list)
        if spec.benchmark == "custom":
            ids = custom.read_categories(path)
            _check_known(ids, sources, path)
    described["image_root"] = str(finder.root())
    described["thing_dataset_id_to_contiguous_id"] = {i: places[name] for i, name in ids.items() if name in places}
    return described


def check_sources(spec: DatasetSpec, sources: DatasetSources) -> None:
    """Find missing and faulty files before training starts, without parsing large annotation files.

    Folders and annotation files must exist; K-shot samples, which are small, are read completely, and the pictures they
    name must exist. Of full sets the first picture must. One-shot sets are read completely: every scene must exist, and
    every picture of a class be readable.

    Raises: FileNotFoundError naming path, environment variable and remedy; ValueError for unknown classes, bad boxes in
        samples, and lists with too few instances.
    """
    if spec.part == "test" and sources.test_list and not sources.test_list.is_file():
        _listed([], sources.test_list)
    if not sources.root.is_dir():
        raise FileNotFoundError(
            f"Data set folder not found: {sources.root}. Correct FEWSHOT.ROOT or the environment variable "
            "DETECTRON2_DATASETS; without both it is datasets/. datasets/README.md shows the expected tree."
        )
    names = class_names(spec, sources)
    report = new_report(spec)
    report.quiet = True  # training reads the same again and says what it found
    if spec.benchmark == "oneshot":
        oneshot_supports.check_class_images(spec, sources, names)
        if not spec.shot:
            oneshot.check_scenes(spec, sources, names, report)
        return
    if spec.shot:
        # "official" would consume NumPy's global generator.
        records = load_records(replace(spec, choice="seeded"), sources, report)
        pictures = [Path(record["file_name"]) for record in records]
    elif spec.benchmark == "voc":
        sets = sources.voc_sets(spec.part)
        images = [voc.read_voc_image(folder, voc.read_image_set(folder, name)[0]) for folder, name in sets]
        pictures = [Path(image.record()["file_name"]) for image in images]
    else:
        pictures = _first_picture(spec, sources)
    for picture in pictures:
        if not picture.is_file():
            raise missing_file(picture, f"Picture of {spec.name}", _image_keys(spec, sources))


def _image_keys(spec: DatasetSpec, sources: DatasetSources) -> str:
    """The keys that set where pictures lie, empty for the official places of COCO."""
    if spec.benchmark == "voc":
        return f"FEWSHOT.VOC_{spec.part.upper()}"
    official = spec.benchmark == "coco" and sources.images_of(spec.part) is None
    return "" if official else f"FEWSHOT.{spec.part.upper()}_IMAGES"


def _first_picture(spec: DatasetSpec, sources: DatasetSources) -> list[Path]:
    """Path of the first picture that a COCO-format file names, found in the first megabyte; checks what it passes."""
    path = json_file(spec, sources)
    if spec.benchmark == "custom":
        _check_known(custom.read_categories(path), sources, path)
    else:
        path = coco.annotation_file(sources.root, spec.part, sources.json_of(spec.part))
    finder = image_finder(spec, sources)
    if not finder.root().is_dir():
        raise missing_file(finder.root(), f"Picture folder of {spec.name}", _image_keys(spec, sources))
    with path.open(encoding="utf-8", errors="replace") as file:
        match = re.search(r'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")', file.read(1 << 20))
    return [Path(finder.resolver()(json.loads(match[1])))] if match else []
