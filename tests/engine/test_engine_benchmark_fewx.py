"""Benchmarks of FewX run and compare what they say; no time is asserted."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from fsdet.data.queries import Query
from fsdet.engine import benchmark_fewx, benchmark_parts
from fsdet.engine.benchmark import run_benchmarks
from fsdet.engine.benchmark_fewx import Case, ReleasedWay, check_same
from fsdet.engine.parity import read_npz
from fsdet.engine.parity_fewx_detector import GoldenDetector

SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "fewx"


@pytest.fixture(autouse=True)
def small(monkeypatch, narrow):
    """A narrow network, few proposals, and a small pool of supports."""
    monkeypatch.setattr(benchmark_fewx, "OPTS", (*narrow, "MODEL.RPN.POST_NMS_TOPK_TEST", "20"))
    monkeypatch.setattr(benchmark_fewx, "POOL", (3000, 900, 6))
    monkeypatch.setattr(benchmark_fewx, "DRAWS", 5)


def test_class_cost_is_counted_between_one_class_and_many(monkeypatch):
    ticks = {"backbone": 2.0, "detect": 10.0, "<lambda>": 30.0}
    classes = []

    def measure(work):
        work()
        name = work.__name__
        return ticks[name] * (1 if name == "backbone" else 1 + classes[-1])

    real = Case.keep
    monkeypatch.setattr(Case, "keep", lambda self, count: classes.append(count) or real(self, count))
    case = Case(96, 4)
    pair = benchmark_fewx._class_cost(case, ReleasedWay(case.cfg, case.detector), 4, 2, measure)
    assert pair.first_costs == (5.0, 5.0) and pair.second_costs == (15.0, 15.0)  # 10 and 30 a class, by 2
    assert pair.ratio == 3.0 and pair.unit == "backbones"


def test_every_pair_runs(monkeypatch):
    monkeypatch.setattr(benchmark_parts, "in_a_process", lambda function, *args: function(*args))
    threads = torch.get_num_threads()
    names = ["fewx-class", "fewx-shared", "fewx-memory", "fewx-supports"]
    pairs = list(run_benchmarks(names, rounds=1, size=64, classes=[2, 3]))
    assert [pair.name for pair in pairs] == [*np.repeat(names[:3], 2), names[3]]
    assert all(len(pair.first_costs) == len(pair.second_costs) == 1 and pair.line() for pair in pairs)
    assert [pair.first for pair in pairs[:2]] == ["fsdet, 2 classes", "fsdet, 3 classes"]
    assert torch.get_num_threads() == threads


def test_released_way_detects_what_the_release_detects():
    if not (SHARED / "d_eval.npz").is_file():
        pytest.skip("the golden files of the detector are not here")
    values = read_npz(SHARED / "d_eval.npz")
    limit = str(len(values["final_boxes"]))
    detector, cfg = GoldenDetector(SHARED).load("base", "TEST.DETECTIONS_PER_IMAGE", limit)
    kernels, features = (torch.from_numpy(values[f"support_{name}_avg"]) for name in ("res4", "res5"))
    entry = {"image": torch.from_numpy(values["image_chw_uint8"])}
    entry |= {side: int(values[f"output_{side}"]) for side in ("height", "width")}
    found = ReleasedWay(cfg, detector)(entry, kernels.flatten(1), features)
    assert np.abs(found.pred_boxes.tensor.numpy() - values["final_boxes"]).max() <= 0.02
    assert np.abs(found.scores.numpy() - values["final_scores"]).max() <= 1e-4
    assert (values["class_order"][found.pred_classes] == values["final_classes"]).all()


@pytest.fixture
def detections():
    def make(boxes=((0.0, 0, 9, 9), (5, 5, 20, 20)), scores=(0.9, 0.5), classes=(0, 1)):
        fields = {"pred_boxes": Boxes(torch.tensor(boxes)), "scores": torch.tensor(scores)}
        return Instances((30, 30), **fields, pred_classes=torch.tensor(classes))

    return make


def test_equal_detections_are_told_from_others(detections):
    check_same(detections(), detections(boxes=((0.01, 0, 9, 9), (5, 5, 20, 20)), scores=(0.90005, 0.5)))
    for other in (
        detections(boxes=((0.05, 0, 9, 9), (5, 5, 20, 20))),
        detections(scores=(0.9, 0.5002)),
        detections(classes=(1, 0)),
        detections()[:1],
    ):
        with pytest.raises(RuntimeError, match="different things"):
            check_same(detections(), other)
    with pytest.raises(RuntimeError, match="0 and 0 detections"):
        check_same(detections()[:0], detections()[:0])


def test_other_weights_are_noticed():
    case = Case(96, 2)
    released = ReleasedWay(case.cfg, case.detector)
    case.keep(2)
    check_same(case.detect(), released(case.entry, case.kernels, case.features))
    released.head["cls_score_fc.bias"] = released.head["cls_score_fc.bias"] + torch.tensor([0.01, 0.0])
    with pytest.raises(RuntimeError, match="different things"):
        check_same(case.detect(), released(case.entry, case.kernels, case.features))


def test_scores_of_a_case_lie_apart():
    case = Case(96, 3)
    case.keep(3)
    scores = case.detect().scores
    assert len(scores) > 5 and scores.diff().abs().min() > 1e-6 and scores.max() - scores.min() > 0.1


def test_processes_are_fresh():
    assert benchmark_parts.in_a_process(os.getpid) != os.getpid()


def test_scan_finds_supports_of_two_classes_from_different_images():
    rng = np.random.default_rng(1)
    images, classes = rng.integers(0, 300, 900), rng.integers(0, 5, 900)
    query = Query(int(images[7]), int(classes[7]), (int(classes[7]),), 7)
    rows = benchmark_fewx._scan(images, classes, query)
    shots = benchmark_fewx.SHOTS
    assert len(rows) == 2 * shots and len({images[7], *images[rows]}) == 2 * shots + 1
    assert set(classes[rows[:shots]]) == {classes[7]}
    (other,) = set(classes[rows[shots:]])
    assert other not in classes[images == images[7]]
