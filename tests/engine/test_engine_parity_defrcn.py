"""Golden files of DeFRCN: fsdet passes; every mutant and every lost, unknown or altered array fails."""

import gzip
import json
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from fsdet.checkpoint import surgery
from fsdet.data import catalog, fake_tree, prepare, sampling, splits
from fsdet.engine import parity, parity_protocol
from fsdet.engine.parity import all_passed, check_folder
from fsdet.evaluation import aggregate, coco_style, evaluator, ground_truth, voc_style

FILES = (
    "c_surgery.npz", "e_fake_datasets.json.gz", "e_fewshot_sampling.json.gz", "e_loader_records.json.gz",
    "f_evaluators.json.gz", "g_aggregate.json",
)  # fmt: skip
COPIES = Path(__file__).resolve().parents[1] / "golden" / "defrcn"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "defrcn"


@pytest.fixture(scope="module")
def golden():
    for folder in (COPIES, SHARED):
        if all((folder / name).is_file() for name in FILES):
            return folder
    pytest.skip("the golden files of DeFRCN are not here")


@pytest.fixture(scope="module")
def tree(golden, tmp_path_factory):
    """The annotation trees, written once for all tests of this file."""
    root = tmp_path_factory.mktemp("parity") / "datasets"
    contents = [parity.read_json(golden / name) for name in FILES[1:3]]
    fake_tree.write_fake_tree(root, *contents)
    return root


# Enough data sets of golden e for the mutants, which would take minutes on all of them.
FEW = (
    "voc_2007_trainval_all2", "voc_2007_trainval_novel1_3shot_seed1", "coco14_trainval_novel_2shot_seed0",
    "coco14_test_all",
)  # fmt: skip


FEW_TESTS = ("voc_2007_test_all1", "coco14_test_all")


@pytest.fixture(scope="module")
def reduced(golden, tmp_path_factory):
    """The golden files with one seed of lists and few data sets."""
    folder = tmp_path_factory.mktemp("reduced")
    for name in FILES:
        shutil.copyfile(golden / name, folder / name)
    edit_json(folder / "e_fewshot_sampling.json.gz", lambda d: [keep(d[kind], is_of_seed_1) for kind in d])
    edit_json(folder / "e_loader_records.json.gz", lambda d: keep(d, FEW.__contains__))
    edit_json(folder / "f_evaluators.json.gz", lambda d: keep(d, FEW_TESTS.__contains__))
    return folder


def is_of_seed_1(name):
    return name.startswith("seed1/")


def keep(mapping, wanted):
    for name in [name for name in mapping if not wanted(name)]:
        del mapping[name]


@pytest.fixture
def small(reduced, tree, monkeypatch):
    """The reduced files, with the trees already written and a schema that asks for no more."""

    @contextmanager
    def ready(folder, *, with_samples):
        yield tree

    monkeypatch.setattr(parity_protocol, "_tree", ready)
    monkeypatch.setattr(parity_protocol, "LOADED", Counter(map(parity_protocol._pattern, FEW)))
    monkeypatch.setattr(parity_protocol, "EVALUATED", Counter(map(parity_protocol._pattern, FEW_TESTS)))
    return reduced


def edit_json(path, change):
    content = parity.read_json(path)
    change(content)
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def edit_npz(path, change):
    arrays = parity.read_npz(path)
    change(arrays)
    np.savez(path, **arrays)


def failures(results):
    return [
        f"{stem}/{row.name}" for stem, rows in results.items() for row in rows if not row.passed and not row.optional
    ]


def test_fsdet_equals_the_official_implementations(golden):
    before = set(DatasetCatalog.list()), set(MetadataCatalog.list()), np.random.get_state()[1].tolist()
    results = check_folder(golden, ["c", "e", "f", "g"])
    assert failures(results) == []
    assert all_passed(results)
    counts = {stem: sum(row.note != "input" for row in rows) for stem, rows in results.items()}
    assert counts == {
        "c_surgery": 72, "e_fake_datasets": 0, "e_fewshot_sampling": 1740, "e_loader_records": 90, "f_evaluators": 53,
        "g_aggregate": 1,
    }  # fmt: skip
    assert (set(DatasetCatalog.list()), set(MetadataCatalog.list()), np.random.get_state()[1].tolist()) == before


def test_reduced_files_pass(small):
    assert failures(check_folder(small, ["e", "f"])) == []


# Mutants: what a wrong implementation would do. Each takes monkeypatch and changes one thing.


def changed_result(monkeypatch, change):
    """Let every surgery pass its result through `change(method, result)`."""
    real = surgery.operate

    def mutant(method, *args, **kwargs):
        result = real(method, *args, **kwargs)
        change(method, result)
        return result

    monkeypatch.setattr(surgery, "operate", mutant)


HEAD = "roi_heads.box_predictor."


def background_first(method, result):
    if method != "remove":
        for kind in ("weight", "bias"):
            name = f"{HEAD}cls_score.{kind}"
            result["model"][name] = torch.roll(result["model"][name], 1, dims=0)


def background_from_another_row(method, result):
    if method != "remove":
        result["model"][f"{HEAD}cls_score.weight"][-1] = result["model"][f"{HEAD}cls_score.weight"][-2]


def background_without_bias(method, result):
    if method != "remove":
        result["model"][f"{HEAD}cls_score.bias"][-1] = 0.0


def bias_kept(method, result):
    if method == "remove":
        result["model"][f"{HEAD}bbox_pred.bias"] = torch.zeros(60)


def affine_lost(method, result):
    result["model"].pop("affine_rcnn.bias")


def iteration_kept(method, result):
    result["iteration"] = 14999


def optimizer_kept(method, result):
    result["optimizer"] = {}


def backbone_from_elsewhere(method, result):
    if method == "combine":
        result["model"]["backbone.res4.0.conv1.weight"] = result["model"]["backbone.res4.0.conv1.weight"] * 1.001


def box_rows_interleaved(method, result):
    """Coordinates outside, classes inside: the wrong way to see 4K rows."""
    if method != "remove":
        rows = result["model"][f"{HEAD}bbox_pred.weight"]
        result["model"][f"{HEAD}bbox_pred.weight"] = rows.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)


RESULT_MUTANTS = (
    background_first, background_from_another_row, background_without_bias, bias_kept, affine_lost, iteration_kept,
    optimizer_kept, backbone_from_elsewhere, box_rows_interleaved,
)  # fmt: skip


@pytest.mark.parametrize("change", RESULT_MUTANTS)
def test_surgery_mutant_of_the_result_fails(golden, monkeypatch, change):
    changed_result(monkeypatch, change)
    assert failures(check_folder(golden, ["c"]))


def novel_last_on_coco(monkeypatch):
    split = splits.coco_split()
    wrong = splits.ClassSplit(base=split.base, novel=split.novel, all=split.base + split.novel)
    monkeypatch.setattr(splits, "coco_split", lambda: wrong)


def alphabetical_voc(monkeypatch):
    split = splits.voc_split(1)
    wrong = splits.ClassSplit(base=split.base, novel=split.novel, all=splits.VOC_CLASSES)
    monkeypatch.setattr(splits, "voc_split", lambda number: wrong)


def narrow_novel_rows(monkeypatch):
    monkeypatch.setattr(surgery, "NOVEL_STD", 0.001)


def slightly_wide_novel_rows(monkeypatch):
    monkeypatch.setattr(surgery, "NOVEL_STD", 0.012)


def zero_novel_rows(monkeypatch):
    real = torch.normal
    monkeypatch.setattr(surgery.torch, "normal", lambda *args, **kwargs: torch.zeros_like(real(*args, **kwargs)))


@pytest.mark.parametrize(
    "mutate",
    [
        novel_last_on_coco, alphabetical_voc, narrow_novel_rows, slightly_wide_novel_rows, zero_novel_rows,
    ],
)  # fmt: skip
def test_surgery_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert failures(check_folder(golden, ["c"]))


def other_generator(monkeypatch):
    real = sampling.sample_voc_legacy
    monkeypatch.setattr(sampling, "sample_voc_legacy", lambda pool, seed, shots: real(pool, seed + 1, shots))


def shots_in_one_call_each(monkeypatch):
    """Every K drawn by a fresh generator: the lists are no longer nested."""
    real = sampling.sample_coco_legacy

    def mutant(pool, seed, shots):
        single = {shot: real(pool, seed, (shot,)) for shot in shots}
        return {name: {shot: single[shot][name][shot] for shot in shots} for name in pool}

    monkeypatch.setattr(sampling, "sample_coco_legacy", mutant)


def classes_in_another_order(monkeypatch):
    names = tuple(reversed(splits.VOC_CLASSES))
    real = prepare.draw_voc
    monkeypatch.setattr(prepare, "draw_voc", lambda *args, **kwargs: real(*args, **kwargs, classes=names))


def crowds_in_the_pool(monkeypatch):
    real = sampling.coco_pool

    def mutant(annotations, names):
        return real([{**annotation, "iscrowd": 0} for annotation in annotations], names)

    monkeypatch.setattr(sampling, "coco_pool", mutant)


def one_line_short(monkeypatch):
    real = prepare.draw_voc

    def mutant(*args, **kwargs):
        files = real(*args, **kwargs)
        return {path: text.rsplit("\n", 2)[0] if path.suffix == ".txt" else text for path, text in files.items()}

    monkeypatch.setattr(prepare, "draw_voc", mutant)


@pytest.mark.parametrize(
    "mutate",
    [other_generator, shots_in_one_call_each, classes_in_another_order, crowds_in_the_pool, one_line_short],
)
def test_sampling_mutant_fails(small, monkeypatch, mutate):
    mutate(monkeypatch)
    assert failures(check_folder(small, ["e_fewshot_sampling"]))


def changed_load(monkeypatch, *, change_spec=lambda spec: spec, change_records=lambda spec, records: records):
    """Let the registered loader read a changed spec, or pass its records through a change."""
    real = catalog.load_records

    def mutant(spec, sources, report=None):
        return change_records(spec, real(change_spec(spec), sources, report))

    monkeypatch.setattr(catalog, "load_records", mutant)


def boxes_off_by_one(monkeypatch):
    def change(spec, records):
        for annotation in [a for record in records for a in record["annotations"] if spec.benchmark == "voc"]:
            annotation["bbox"] = [value + 1 if i < 2 else value for i, value in enumerate(annotation["bbox"])]
        return records

    changed_load(monkeypatch, change_records=change)


def other_instances(monkeypatch):
    changed_load(monkeypatch, change_spec=lambda spec: replace(spec, choice="seeded"))


def never_merged(monkeypatch):
    changed_load(monkeypatch, change_spec=lambda spec: replace(spec, records="instance"))


def difficult_dropped(monkeypatch):
    changed_load(monkeypatch, change_spec=lambda spec: replace(spec, difficult=False))


def another_seed(monkeypatch):
    changed_load(monkeypatch, change_spec=lambda spec: replace(spec, seed=2) if spec.shot else spec)


def images_in_another_order(monkeypatch):
    changed_load(monkeypatch, change_records=lambda spec, records: records[::-1])


def image_ids_as_text(monkeypatch):
    changed_load(
        monkeypatch, change_records=lambda _, records: [{**r, "image_id": str(r["image_id"])} for r in records]
    )


def novel_before_base(monkeypatch):
    real = catalog.class_split

    def mutant(spec, sources):
        split = real(spec, sources)
        return splits.ClassSplit(base=split.base, novel=split.novel, all=split.novel + split.base)

    monkeypatch.setattr(catalog, "class_split", mutant)


@pytest.mark.parametrize(
    "mutate",
    [
        boxes_off_by_one,
        other_instances,
        never_merged,
        difficult_dropped,
        another_seed,
        images_in_another_order,
        image_ids_as_text,
        novel_before_base,
    ],
)
def test_loader_mutant_fails(small, monkeypatch, mutate):
    mutate(monkeypatch)
    assert failures(check_folder(small, ["e_loader_records"]))


def area_under_the_curve(monkeypatch):
    monkeypatch.setattr(voc_style, "_eleven_point", voc_style.area_under_curve)


def ten_points(monkeypatch):
    def mutant(recall, precision):
        return sum(np.max(precision, where=recall >= p, initial=0.0) for p in np.arange(0.1, 1.1, 0.1)) / 10

    monkeypatch.setattr(voc_style, "_eleven_point", mutant)


def continuous_pixels(monkeypatch):
    """Width x1 - x0 instead of VOC's inclusive x1 - x0 + 1."""

    def mutant(left, right):
        size = np.maximum(np.minimum(left[:, 2:], right[:, 2:]) - np.maximum(left[:, :2], right[:, :2]), 0.0)
        areas = [(box[:, 2:] - box[:, :2]).prod(axis=1) for box in (left, right)]
        return size.prod(axis=1) / (areas[0] + areas[1] - size.prod(axis=1))

    monkeypatch.setattr(voc_style, "_pixel_iou", mutant)


def scores_not_rounded(monkeypatch):
    real = evaluator.build_evaluator
    mutant = lambda *args, **kwargs: real(*args, **{**kwargs, "legacy": False})  # noqa: E731
    monkeypatch.setattr(parity_protocol, "build_evaluator", mutant)


def difficult_counts(monkeypatch):
    monkeypatch.setattr(
        ground_truth.GroundTruth,
        "counted_objects",
        lambda self: np.bincount(self.class_ids, minlength=len(self.class_names)),
    )


def base_and_novel_swapped(monkeypatch):
    real = evaluator.FewShotEvaluator.__init__

    def mutant(self, *args):
        real(self, *args)
        self.base_classes, self.novel_classes = self.novel_classes, self.base_classes

    monkeypatch.setattr(evaluator.FewShotEvaluator, "__init__", mutant)


def few_detections(monkeypatch):
    real = evaluator.coco_precision
    monkeypatch.setattr(
        evaluator, "coco_precision", lambda *args, **kwargs: real(*args, **{**kwargs, "max_detections": 1})
    )


def medium_for_small(monkeypatch):
    monkeypatch.setattr(coco_style, "AREAS", {"all": "", "small": "m", "medium": "s", "large": "l"})


METRIC_MUTANTS = (
    area_under_the_curve, ten_points, continuous_pixels, scores_not_rounded, difficult_counts, base_and_novel_swapped,
    few_detections, medium_for_small,
)  # fmt: skip


@pytest.mark.parametrize("mutate", METRIC_MUTANTS)
def test_metric_mutant_fails(small, monkeypatch, mutate):
    mutate(monkeypatch)
    assert failures(check_folder(small, ["f"]))


def sample_deviation(monkeypatch):
    real = aggregate.summarize

    def mutant(values):
        summary = real(values)
        return aggregate.Summary(**{**vars(summary), "legacy": 1.96 * summary.sample_std / len(values) ** 0.5})

    monkeypatch.setattr(aggregate, "summarize", mutant)


def student_interval(monkeypatch):
    real = aggregate.summarize
    monkeypatch.setattr(
        aggregate, "summarize", lambda v: aggregate.Summary(**{**vars(real(v)), "legacy": real(v).student})
    )


def median_for_mean(monkeypatch):
    real = aggregate.summarize
    monkeypatch.setattr(
        aggregate, "summarize", lambda v: aggregate.Summary(**{**vars(real(v)), "mean": real(v).quartiles[1]})
    )


@pytest.mark.parametrize("mutate", [sample_deviation, student_interval, median_for_mean])
def test_aggregation_mutant_fails(golden, monkeypatch, mutate):
    mutate(monkeypatch)
    assert failures(check_folder(golden, ["g"])) == ["g_aggregate/summary_text"]


# Changed files: the tool must notice whatever is lost, added or altered.


@pytest.fixture
def copy(small, tmp_path):
    return Path(shutil.copytree(small, tmp_path / "golden"))


@pytest.mark.parametrize(
    "name",
    [
        "voc/combine_tfa/model/affine_rpn.weight", "coco/remove/top_keys", "coco/randinit/cls_score_row_source",
        "coco/novel/model/roi_heads.box_predictor.cls_score.bias", "voc/base/iteration",
    ],
)  # fmt: skip
def test_lost_array_fails(copy, name):
    edit_npz(copy / "c_surgery.npz", lambda arrays: arrays.pop(name))
    assert failures(check_folder(copy, ["c"]))


def test_unknown_array_fails(copy):
    edit_npz(copy / "c_surgery.npz", lambda arrays: arrays.update({"voc/remove/model/new.weight": np.zeros(3)}))
    assert failures(check_folder(copy, ["c"])) == ["c_surgery/voc/remove/model/new.weight"]


def test_altered_array_fails(copy):
    def alter(arrays):
        arrays["voc/combine_tfa/model/affine_rpn.weight"] += 3e-5

    edit_npz(copy / "c_surgery.npz", alter)
    (row,) = [row for row in check_folder(copy, ["c"])["c_surgery"] if not row.passed]
    assert row.name == "voc/combine_tfa/model/affine_rpn.weight"
    assert row.max_abs == pytest.approx(3e-5, rel=0.05)


@pytest.mark.parametrize(
    ("file", "change", "failed"),
    [
        ("e_fake_datasets.json.gz", lambda d: d.update(more={"x": 1}), "e_fake_datasets/more/x"),
        ("e_fake_datasets.json.gz", lambda d: d["voc"]["imagesets"].pop("2007/test"), "voc/imagesets/2007/test"),
        ("e_fewshot_sampling.json.gz", lambda d: d["voc"].pop("seed1/box_5shot_cow_train.txt"), "box_5shot_cow"),
        ("e_fewshot_sampling.json.gz", lambda d: d["coco"].update({"seed1/x.json": {}}), "coco/seed1/x.json"),
        ("e_loader_records.json.gz", lambda d: d.pop("voc_2007_trainval_all2"), "voc_2007_trainval_all"),
        ("e_loader_records.json.gz", lambda d: d.pop("coco14_trainval_novel_2shot_seed0"), "novel shots"),
        ("e_loader_records.json.gz", lambda d: d.update(lvis_train={}), "e_loader_records/lvis_train"),
        ("e_loader_records.json.gz", lambda d: d["coco14_test_all"].pop("records"), "coco14_test_all/records"),
        ("e_loader_records.json.gz", lambda d: d["coco14_test_all"].update(new=1), "coco14_test_all/new"),
        ("e_loader_records.json.gz", lambda d: d["coco14_test_all"]["records"].pop(), "coco14_test_all/records"),
        ("f_evaluators.json.gz", lambda d: d.pop("coco14_test_all"), "f_evaluators/coco14_test_all"),
        ("f_evaluators.json.gz", lambda d: d["coco14_test_all"]["results"]["bbox"].pop("bAPs"), "bbox/bAPs"),
        ("f_evaluators.json.gz", lambda d: d["coco14_test_all"]["results"].update(segm={"AP": 1}), "results/segm/AP"),
        ("f_evaluators.json.gz", lambda d: d["coco14_test_all"]["results"]["bbox"].update(AR=1.0), "bbox/AR"),
        ("f_evaluators.json.gz", lambda d: d["coco14_test_all"]["detections"][0].update(masks=[]), "(file)"),
        ("g_aggregate.json", lambda d: d.pop("summary_text"), "g_aggregate/summary_text"),
        ("g_aggregate.json", lambda d: d.update(more=1), "g_aggregate/more"),
    ],
)  # fmt: skip
def test_changed_json_fails(copy, file, change, failed):
    edit_json(copy / file, change)
    found = failures(check_folder(copy, [file.split(".")[0]]))
    assert found
    assert all(failed in name for name in found), found
