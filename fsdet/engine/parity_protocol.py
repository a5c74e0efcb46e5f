"""Golden data and evaluation of the few-shot protocol: K-shot lists, records, metrics and the table over seeds.

Everything goes through the functions that the tools call: the lists through `fsdet.data.prepare`, the records through
Detectron2's catalog, the metrics through the evaluator. The switches that reproduce the official behaviour (unseeded
choice, rounded scores) are set here.

Source: TFA (Wang et al., ICML 2020) and DeFRCN (Qiao et al., ICCV 2021), official loaders and evaluators.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from fsdet.data import catalog, fake_tree, prepare, sampling
from fsdet.data.spec import DatasetSources, DatasetSpec
from fsdet.engine.parity import Comparison, Ledger, failure, golden_file, read_json
from fsdet.evaluation import aggregate
from fsdet.evaluation.evaluator import build_evaluator

# e, f: official data set names. A set of other split, shot and seed numbers has the same pattern.
VOC_NAME = re.compile(r"voc_(?P<year>\d{4})_(?P<part>trainval|test)_(?P<subset>base|novel|all)(?P<split>[123])")
COCO_NAME = re.compile(r"coco14_(?P<part>trainval|test)_(?P<subset>base|novel|all)")
SHOT_NAME = re.compile(r"_(?P<shot>\d+)shot_seed(?P<seed>\d+)")
EVALUATOR_TYPES = {"voc": "pascal_voc", "coco": "coco"}
LOADED = Counter(
    {
        "voc_2007_trainval_base": 1, "voc_2012_trainval_base": 1, "voc_2007_trainval_all": 1, "voc_2007_test_novel": 1,
        "voc_2007_test_all": 1, "voc_2007_trainval_novel shots": 3, "voc_2012_trainval_novel shots": 1,
        "voc_2007_trainval_all shots": 1, "coco14_trainval_base": 1, "coco14_trainval_novel shots": 2,
        "coco14_trainval_all shots": 2, "coco14_test_novel": 1, "coco14_test_base": 1, "coco14_test_all": 1,
    }
)  # fmt: skip
EVALUATED = Counter(
    {
        "voc_2007_test_all": 1, "voc_2007_test_novel": 1, "voc_2007_test_base": 1, "coco14_test_all": 1,
        "coco14_test_novel": 1, "coco14_test_base": 1,
    }
)  # fmt: skip
RECORD_FIELDS = ("thing_classes", "evaluator_type", "num_records", "num_annotations", "records")
# A golden file lists all records up to the first number, else the second number of them.
ALL_RECORDS, FIRST_RECORDS = 330, 60
# What our annotations carry beside the official keys.
OWN_KEYS = {"voc": {"id", "difficult"}, "coco": {"id", "area"}}
FAKE_SETS = {"voc": ("2007/trainval", "2012/trainval", "2007/test"), "coco": ("trainvalno5k", "5k")}
VOC_METRIC_TOLERANCE = 1e-6


@contextmanager
def _tree(folder: Path, *, with_samples: bool) -> Iterator[Path]:
    """The annotation trees of golden e on disk; yields the folder that plays DETECTRON2_DATASETS."""
    fakes = read_json(golden_file(folder, "e_fake_datasets"))
    samples = read_json(golden_file(folder, "e_fewshot_sampling")) if with_samples else {"voc": {}, "coco": {}}
    with tempfile.TemporaryDirectory(prefix="fsdet-parity-") as place:
        root = Path(place) / "datasets"
        fake_tree.write_fake_tree(root, fakes, samples)
        yield root


def check_fake_datasets(folder: Path) -> Iterator[Comparison]:
    """e: the input of the other files; every part is one that they read."""
    fakes = read_json(golden_file(folder, "e_fake_datasets"))
    expected = {"voc": ("annotations", "imagesets"), "coco": FAKE_SETS["coco"]}
    values = {f"{name}/{part}": None for name, parts in fakes.items() for part in parts}
    yield from Ledger(values, inputs=[f"{name}/{part}" for name, parts in expected.items() for part in parts]).rest()
    image_sets = Ledger(
        {f"voc/imagesets/{name}": None for name in fakes["voc"]["imagesets"]},
        inputs=[f"voc/imagesets/{name}" for name in FAKE_SETS["voc"]],
    )
    yield from image_sets.rest()


def check_sampling(folder: Path) -> Iterator[Comparison]:
    """e: the K-shot lists of the official algorithms, entry by entry."""
    golden = read_json(golden_file(folder, "e_fewshot_sampling"))
    values = {f"{kind}/{name}": content for kind, files in golden.items() for name, content in files.items()}
    seeds = sorted({int(match[1]) for name in values if (match := re.match(r"\w+/seed(\d+)/", name))})
    with _tree(folder, with_samples=False) as root:
        drawn = _draw_voc(root, seeds) | _draw_coco(root, seeds)
    ledger = Ledger(values, expected=drawn)
    for name, content in drawn.items():
        yield ledger.compare(name, content)
    yield from ledger.rest()


def _draw_voc(root: Path, seeds: Sequence[int]) -> dict[str, str]:
    """Name -> text of every VOC list."""
    recipe = prepare.Recipe(tuple(seeds), sampling.VOC_SHOTS, "legacy")
    files = prepare.draw_voc(root, Path("voc"), recipe)
    return {path.as_posix(): text for path, text in files.items() if path.suffix == ".txt"}


def _draw_coco(root: Path, seeds: Sequence[int]) -> dict[str, dict[str, list[int]]]:
    """Name -> ids in file order of every COCO list."""
    recipe = prepare.Recipe(tuple(seeds), sampling.COCO_SHOTS, "legacy", dataset="coco")
    files = prepare.draw_coco(root / fake_tree.COCO_FILES["trainvalno5k"], Path("coco"), recipe)
    return {path.as_posix(): _ids(text) for path, text in files.items() if path.name.startswith("full_box")}


def _ids(text: str) -> dict[str, list[int]]:
    data = json.loads(text)
    return {
        "image_ids": [image["id"] for image in data["images"]],
        "ann_ids": [annotation["id"] for annotation in data["annotations"]],
    }


def official_set(name: str, root: Path) -> tuple[DatasetSpec, DatasetSources] | None:
    """The data set that an official name stands for, with the official record rules; None for an unknown name."""
    shots = SHOT_NAME.search(name)
    shot, seed = (int(shots["shot"]), int(shots["seed"])) if shots else (0, 0)
    plain = name.replace(shots[0], "") if shots else name
    voc, coco = VOC_NAME.fullmatch(plain), COCO_NAME.fullmatch(plain)
    if voc is None and coco is None:
        return None
    found = voc or coco
    part = found["part"].removesuffix("val")
    spec = DatasetSpec(
        benchmark="voc" if voc else "coco",
        part=part,
        subset=found["subset"],
        split=int(voc["split"]) if voc else 1,
        shot=shot,
        seed=seed,
        records="instance" if voc else "image",
        choice="official",
    )
    sets = {f"voc_{part}": ((f"VOC{voc['year']}", found["part"]),)} if voc and not shot else {}
    return spec, DatasetSources(root=root, **sets)


def _pattern(name: str) -> str:
    """An official data set name without the numbers of split, shot and seed."""
    plain, shots = SHOT_NAME.subn("", name)
    return re.sub(r"(base|novel|all)\d$", r"\1", plain) + (" shots" if shots else "")


def _lacking(names: Iterable[str], wanted: Counter[str]) -> Iterator[Comparison]:
    """A failure for each kind of data set that the schema has more often than the file, or that it does not know."""
    found = Counter(map(_pattern, names))
    for pattern in sorted({*wanted, *found}):
        if found[pattern] < wanted[pattern]:
            yield failure(pattern, f"missing: {wanted[pattern]} such data sets expected, {found[pattern]} found")
        elif not wanted[pattern]:
            yield failure(pattern, "unknown: the schema has no such data set")


@contextmanager
def _registered(spec: DatasetSpec, sources: DatasetSources) -> Iterator[str]:
    """A registered data set, gone from Detectron2's catalogs afterwards."""
    name = catalog.register(spec, sources)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """NumPy's global generator seeded inside the block, which the official choice of instances draws from."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def check_records(folder: Path) -> Iterator[Comparison]:
    """e: records, classes and counts of the official data set names."""
    golden = read_json(golden_file(folder, "e_loader_records"))
    yield from _lacking(golden, LOADED)
    with _tree(folder, with_samples=True) as root:
        for name, content in golden.items():
            found = official_set(name, root)
            if found is None:
                continue  # reported as unknown above
            yield from _compare_records(name, content, *found)


def _compare_records(
    name: str, content: Mapping[str, Any], spec: DatasetSpec, sources: DatasetSources
) -> Iterator[Comparison]:
    values = {f"{name}/{field}": value for field, value in content.items()}
    seed = f"{name}/numpy_global_seed_before"
    ledger = Ledger(values, inputs=[seed], expected=[f"{name}/{field}" for field in RECORD_FIELDS])
    with _registered(spec, sources) as registered, _numpy_seed(values[seed]):
        records, metadata = DatasetCatalog.get(registered), MetadataCatalog.get(registered)
    computed = {
        "thing_classes": list(metadata.thing_classes),
        "evaluator_type": EVALUATOR_TYPES[metadata.evaluator_type],
        "num_records": len(records),
        "num_annotations": sum(len(record["annotations"]) for record in records),
        "records": _official_records(
            records if len(records) <= ALL_RECORDS else records[:FIRST_RECORDS], spec, sources
        ),
    }
    for field, value in computed.items():
        yield ledger.compare(f"{name}/{field}", value)
    yield from ledger.rest()


def _official_records(
    records: Sequence[Mapping[str, Any]], spec: DatasetSpec, sources: DatasetSources
) -> list[dict[str, Any]]:
    """Records under the official keys, with paths that start at the data folder."""
    own = OWN_KEYS[spec.benchmark]
    return [
        {
            **record,
            "file_name": Path(record["file_name"]).relative_to(sources.root.parent).as_posix(),
            "annotations": [{k: v for k, v in a.items() if k not in own} for a in record["annotations"]],
        }
        for record in records
    ]


def check_evaluators(folder: Path) -> Iterator[Comparison]:
    """f: metrics of fake detections, VOC style with the official rounding and COCO style."""
    golden = read_json(golden_file(folder, "f_evaluators"))
    yield from _lacking(golden, EVALUATED)
    with _tree(folder, with_samples=False) as root:
        for name, content in golden.items():
            found = official_set(name, root)
            if found is not None:
                yield from _compare_metrics(name, content, *found)


def _metric_names(spec: DatasetSpec) -> list[str]:
    """What the official evaluators report for a test set; a COCO subset has its headline AP repeated without prefix."""
    plain = ["AP", "AP50", "AP75"] + (["APs", "APm", "APl"] if spec.benchmark == "coco" else [])
    prefixes = {"all": ("b", "n"), "base": ("b",), "novel": ("n",)}[spec.subset]
    headline = ["AP"] if spec.benchmark == "coco" and spec.subset != "all" else plain
    return headline + [prefix + name for prefix in prefixes for name in plain]


def _compare_metrics(
    name: str, content: Mapping[str, Any], spec: DatasetSpec, sources: DatasetSources
) -> Iterator[Comparison]:
    values: dict[str, Any] = {f"{name}/{key}": value for key, value in content.items() if key != "results"}
    for task, metrics in content.get("results", {}).items():
        values.update({f"{name}/results/{task}/{metric}": value for metric, value in metrics.items()})
    expected = [f"{name}/results/bbox/{metric}" for metric in _metric_names(spec)]
    ledger = Ledger(values, inputs=[f"{name}/detections"], expected=expected)
    is_voc = spec.benchmark == "voc"
    with _registered(spec, sources) as registered:
        evaluator = build_evaluator(registered, style=spec.benchmark, legacy=is_voc)
        evaluator.reset()
        for image in content["detections"]:
            evaluator.process([{"image_id": image["image_id"]}], [{"instances": _instances(image)}])
        metrics = evaluator.evaluate()["bbox"]
    for metric in _metric_names(spec):
        full = f"{name}/results/bbox/{metric}"
        yield ledger.compare(full, metrics[metric], **({"tolerance": VOC_METRIC_TOLERANCE} if is_voc else {}))
    yield from ledger.rest()


def _instances(image: Mapping[str, Any]) -> Instances:
    """Detections of one image; the evaluators do not look at the image's size."""
    unknown = set(image) - {"image_id", "boxes", "scores", "classes"}
    if unknown:
        raise ValueError(f"Unknown fields {sorted(unknown)} of the detections of image {image['image_id']}")
    found = Instances((0, 0))
    found.pred_boxes = Boxes(torch.tensor(image["boxes"], dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.tensor(image["scores"], dtype=torch.float32)
    found.pred_classes = torch.tensor(image["classes"], dtype=torch.int64)
    return found


def check_aggregate(folder: Path) -> Iterator[Comparison]:
    """g: the official summary table of several runs, character by character."""
    values = read_json(golden_file(folder, "g_aggregate"))
    ledger = Ledger(values, inputs=["header", "runs"], expected=["summary_text"])
    shots = sorted({int(name.split("shot", 1)[0]) for name in values["runs"]})
    yield ledger.compare("summary_text", aggregate.legacy_table(values["runs"], values["header"], shots))
    yield from ledger.rest()
