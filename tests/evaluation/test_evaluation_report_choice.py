"""Why detections are not correct, and which pictures a gallery shows."""

from judged_cases import DETECTIONS, TRUTH, found, truth_of

from fsdet.evaluation.matching import judge
from fsdet.evaluation.report_choice import choose, why_false


def test_reasons_by_hand():
    judged = judge(TRUTH, DETECTIONS, 0)
    reasons = [why_false(TRUTH, DETECTIONS, judged, rank) for rank in (1, 2, 5, 6)]
    assert reasons == [
        ("on an object of another class: dog", 1),
        ("a second box on an object that is found already", 0),
        ("badly placed, IoU 0.20", 0),
        ("on nothing annotated", -1),
    ]


def test_choice_takes_turns_and_shows_each_image_once():
    judged = judge(TRUTH, DETECTIONS, 0)
    chosen = choose(TRUTH, DETECTIONS, judged, 6)
    assert [(item.role, item.image, item.rank, item.object) for item in chosen] == [
        ("best", 0, 0, -1),
        ("best", 1, 4, -1),  # no false detection outside image 0
        ("missed", 2, -1, 4),
    ]
    assert [item.role for item in choose(TRUTH, DETECTIONS, judged, 1)] == ["best"]


def test_choice_with_a_picture_for_all():
    """Ten images with a cat each; even ones are found, odd ones have a box beside the cat; the last one has none."""
    truth = truth_of([(i, 0, (10, 10, 20, 20 + i), False) for i in range(10)], images=10)
    rows = [(i, 0, (10, 10, 30, 30 + i) if i % 2 == 0 else (60, 60, 90, 90), 0.9 - 0.05 * i) for i in range(9)]
    detections = found(rows)
    judged = judge(truth, detections, 0)
    chosen = choose(truth, detections, judged, 6)
    assert [(item.role, item.image) for item in chosen] == [
        ("best", 0), ("best", 2), ("median", 4), ("false", 1), ("false", 3), ("missed", 9),
    ]  # fmt: skip
    assert choose(truth, detections, judged, 6) == chosen
