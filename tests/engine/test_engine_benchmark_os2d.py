"""Benchmarks of OS2D run and compare what they say; no time is asserted."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fsdet.engine import benchmark_os2d, benchmark_parts
from fsdet.engine.benchmark import run_benchmarks
from fsdet.engine.benchmark_os2d import Case
from fsdet.engine.benchmark_os2d_release import ReleasedWay, check_same, detections
from fsdet.engine.parity import read_npz
from fsdet.engine.parity_os2d_detector import VERSIONS, golden_head
from fsdet.methods.os2d.geometry import anchor_boxes, decode_boxes
from fsdet.methods.os2d.templates import template_of

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "os2d"
WIDTHS = {"STEM_OUT_CHANNELS": 4, "WIDTH_PER_GROUP": 4, "RES2_OUT_CHANNELS": 16}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A narrow network and small supports."""
    words = [word for key, value in WIDTHS.items() for word in (f"MODEL.RESNETS.{key}", str(value))]
    monkeypatch.setattr(benchmark_os2d, "OPTS", tuple(words))
    monkeypatch.setattr(benchmark_os2d, "SUPPORT", 96)


@pytest.fixture
def released():
    def make(case):
        return ReleasedWay(case.detector.head.transform_net, inverse=case.detector.head.inverse)

    return make


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_released_way_computes_what_the_release_computes(version):
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden data in {GOLDEN}")
    values, weights = read_npz(GOLDEN / "head.npz"), read_npz(GOLDEN / "transform_net.npz")
    output, is_inverted = VERSIONS[version]
    net = golden_head(weights, weights, output, is_inverted=is_inverted).transform_net
    supports = [torch.from_numpy(values[f"class_feature_map_{number}"]) for number in range(3)]
    templates = torch.stack([template_of(support) for support in supports])
    for number, scene in enumerate(torch.from_numpy(values["query_feature_map"])):
        scores, codes = ReleasedWay(net, inverse=is_inverted)(scene, templates)
        expected = torch.from_numpy(values[f"{version}/recognition"])[number].flatten(1)
        assert (scores - expected).abs().max() <= 2e-5
        expected = torch.from_numpy(values[f"{version}/localization"])[number].flatten(2).mT
        assert (codes - expected).abs().max() <= 2e-5


def test_class_cost_is_counted_a_class_in_backbones(released):
    ticks = {"run_backbone": 2.0, "ours": 12.0, "release": 36.0}
    order = []

    def measure(work):
        order.append(work.__name__)
        return ticks[work.__name__]

    case = Case(96, 3)
    pair = benchmark_os2d._class_cost(case, released(case), 3, 2, measure)
    assert order == ["run_backbone", "ours", "release"] * 2
    assert pair.first_costs == (2.0, 2.0) and pair.second_costs == (6.0, 6.0)  # 12 and 36 for 3 classes, by 2
    assert pair.ratio == 3.0 and pair.unit == "backbones"


def test_every_pair_runs(monkeypatch):
    counts, cases = [], []
    monkeypatch.setattr(benchmark_os2d, "Case", lambda *args: cases.append(Case(*args)) or cases[-1])
    monkeypatch.setattr(
        benchmark_parts, "in_a_process", lambda work, size, count, opts: counts.append(count) or float(count)
    )
    threads = torch.get_num_threads()
    names = ["os2d-class", "os2d-chunk", "os2d-aligned", "os2d-memory"]
    pairs = list(run_benchmarks(names, rounds=1, size=64, classes=[1, 3]))
    assert [pair.name for pair in pairs] == np.repeat(names, 2).tolist()
    assert all(len(pair.first_costs) == len(pair.second_costs) == 1 and pair.line() for pair in pairs)
    assert [pair.first for pair in pairs[:2]] == ["fsdet, 1 cl.", "fsdet, 3 cl."]
    assert [case.detector.head.aligned_share for case in cases] == [1, 1, 1, 0.2, 1, 0.2, 1]
    assert [len(case.templates) for case in cases] == [3, 1, 3, 1, 1, 3, 3]
    assert counts == [5, 1, 5, 3] and pairs[-1].ratio == 0.6
    assert torch.get_num_threads() == threads


def test_memory_is_that_of_the_detector_with_its_classes(monkeypatch):
    known = []
    real = benchmark_os2d.build_detector

    def build(cfg):
        detector = real(cfg)
        forward = detector.inference
        detector.inference = lambda inputs: known.append(list(detector.class_memory)) or forward(inputs)
        return detector

    monkeypatch.setattr(benchmark_os2d, "build_detector", build)
    assert benchmark_os2d.peak_of(64, 3, benchmark_os2d.OPTS) > 50
    assert known == [["class0", "class1", "class2"]] * 2


@torch.no_grad()
def test_case_tells_scores_and_alignments_apart():
    """Scores of places differ, alignments differ and are no identity; more classes leave the first ones as they are."""
    case, more = Case(384, 2), Case(384, 3)
    scores, boxes = case.match(2)
    assert scores.std(dim=1).min() > 0.01 and scores.max() - scores.min() > 0.1
    shifts = boxes - anchor_boxes(*case.features.shape[1:])
    assert shifts.std(dim=1).min() > 0.1 and 5 < shifts.abs().max() < 120
    found = detections(scores, boxes, (384, 512))
    assert len(found) > 10 and found.classes.unique().tolist() == [0, 1]
    torch.testing.assert_close(more.match(2), (scores, boxes))
    assert not torch.allclose(more.templates[2], more.templates[1])


@torch.no_grad()
def test_other_weights_are_noticed(released):
    case = Case(96, 2)
    other = ReleasedWay(copy.deepcopy(case.detector.head.transform_net), inverse=case.detector.head.inverse)
    other.transform_net.linear.bias[2] += 0.001  # 0.12 pixels
    for way in (released(case), other):
        scores, codes = way(case.features, case.templates)
        results = case.match(2), (scores, decode_boxes(codes, anchor_boxes(*case.features.shape[1:]))), (96, 128)
        if way is not other:
            check_same(*results)
    with pytest.raises(RuntimeError, match="different things"):
        check_same(*results)


@pytest.fixture
def matches():
    """Two classes on three anchors; all of them are detections."""

    def make(scores=((0.9, 0.5, 0.3), (0.7, 0.2, 0.1)), left=0.0):
        boxes = torch.tensor([[left, 0, 9, 9], [20, 20, 30, 30], [40, 0, 50, 9]]).expand(2, 3, 4)
        return torch.tensor(scores), boxes

    return make


def test_equal_results_are_told_from_others(matches):
    check_same(matches(), matches(left=0.01), (60, 60))
    check_same(matches(), matches(scores=((0.900015, 0.5, 0.3), (0.7, 0.2, 0.1))), (60, 60))
    for other in (matches(left=0.05), matches(scores=((0.90005, 0.5, 0.3), (0.7, 0.2, 0.1)))):
        with pytest.raises(RuntimeError, match="different things"):
            check_same(matches(), other, (60, 60))
    beyond = torch.ones(1, 1), torch.tensor([[[70.0, 70, 80, 80]]])
    with pytest.raises(RuntimeError, match="0 and 0 detections"):
        check_same(beyond, beyond, (60, 60))


def test_ties_alone_may_change_places(matches):
    """The second score of the second class, just above the third of the first class, falls below it."""
    above = matches(scores=((0.9, 0.5, 0.3), (0.7, 0.300004, 0.1)))
    check_same(above, matches(scores=((0.9, 0.5, 0.3), (0.7, 0.299996, 0.1))), (60, 60))
    with pytest.raises(RuntimeError, match="6 and 6 detections"):
        check_same(above, matches(scores=((0.9, 0.5, 0.3), (0.7, 0.299987, 0.1))), (60, 60))
