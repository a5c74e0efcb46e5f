"""Which detections are correct and why others are not, which are shown, and how they are drawn and embedded."""

import base64
import io
import json
import re

import numpy as np
import pytest
from evaluation_cases import CLASSES
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fsdet.evaluation.ground_truth import Detections, GroundTruth, load_ground_truth
from fsdet.evaluation.matching import judge, read_detections
from fsdet.evaluation.report_choice import choose, why_false
from fsdet.evaluation.report_gallery import (
    COLOURS,
    SIDE,
    SUPPORT_SIDE,
    Gallery,
    GalleryRow,
    Picture,
    draw_example,
    draw_support,
    render_galleries,
    verdict_marks,
)


def truth_of(objects, images=3):
    """Ground truth of (image, class, box XYWH, ignored) rows; classes cat and dog."""
    columns = list(zip(*objects, strict=True))
    boxes = np.array(columns[2], np.float64)
    return GroundTruth(
        source="toy",
        image_ids=tuple(range(10, 10 + images)),
        image_sizes=np.full((images, 2), 100),
        class_names=("cat", "dog"),
        dataset_ids=(5, 7),
        image_index=np.array(columns[0]),
        boxes=boxes,
        class_ids=np.array(columns[1]),
        areas=boxes[:, 2] * boxes[:, 3],
        ignored=np.array(columns[3], bool),
    )


def found(rows):
    """Detections of (image, class, box XYXY, score) rows."""
    image, class_id, box, score = zip(*rows, strict=True)
    return Detections(np.array(image), np.array(box, np.float64), np.array(score), np.array(class_id))


TRUTH = truth_of(
    [
        (0, 0, (10, 10, 40, 40), False),
        (0, 1, (60, 60, 30, 30), False),
        (1, 0, (20, 20, 20, 20), False),
        (1, 0, (50, 50, 40, 40), True),
        (2, 0, (5, 5, 50, 20), False),
    ]
)
# In the order of the images; by score: 1, 2, 0, 5, 6, 3, 4.
DETECTIONS = found(
    [
        (0, 0, (12, 12, 50, 50), 0.70),  # on cat 0, but a better one has taken it
        (0, 0, (10, 10, 50, 50), 0.90),  # cat 0
        (0, 0, (60, 60, 90, 90), 0.80),  # the dog
        (0, 0, (30, 30, 70, 50), 0.30),  # IoU 400 / 2000 with cat 0
        (0, 0, (0, 80, 20, 99), 0.20),  # on nothing
        (1, 0, (55, 55, 85, 85), 0.60),  # inside the ignored cat
        (1, 0, (20, 20, 40, 38), 0.40),  # cat 2
    ]
)


def test_verdicts_by_hand():
    judged = judge(TRUTH, DETECTIONS, 0)
    assert judged.rows.tolist() == [1, 2, 0, 5, 6, 3, 4]
    assert judged.verdicts == ("correct", "false", "false", "ignored", "correct", "false", "false")
    assert judged.objects.tolist() == [0, -1, -1, -1, 2, -1, -1]
    assert judged.missed.tolist() == [4]
    reasons = [why_false(TRUTH, DETECTIONS, judged, rank) for rank in (1, 2, 5, 6)]
    assert reasons == [
        ("on an object of another class: dog", 1),
        ("a second box on an object that is found already", 0),
        ("badly placed, IoU 0.20", 0),
        ("on nothing annotated", -1),
    ]
    dogs = judge(TRUTH, DETECTIONS, 1)
    assert (dogs.verdicts, dogs.missed.tolist()) == ((), [1])


def test_marks_of_whole_pictures():
    """All detections and missed objects of every image, the best detection last."""
    marks = [[(mark.label, mark.colour) for mark in image] for image in verdict_marks(TRUTH, DETECTIONS)]
    correct, false, missed, ignored = (COLOURS[kind] for kind in ("correct", "false", "missed", "ignored"))
    assert marks == [
        [
            ("dog missed", missed),
            ("✗ cat 0.20", false),
            ("✗ cat 0.30", false),
            ("✗ cat 0.70", false),
            ("✗ cat 0.80", false),
            ("✓ cat 0.90", correct),
        ],
        [("✓ cat 0.40", correct), ("cat 0.60", ignored)],
        [("cat missed", missed)],
    ]
    assert verdict_marks(TRUTH, DETECTIONS)[2][0].box == (5, 5, 55, 25)


def test_verdicts_are_those_of_pycocotools(toy, tmp_path):
    """On random objects and detections, crowds included."""
    truth = load_ground_truth(toy.register())
    rows = [
        {"image_id": item["image_id"], "category_id": toy.dataset_ids[c], "score": s,
         "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for item in toy.detections
        for b, s, c in zip(item["boxes"], item["scores"], item["classes"], strict=True)
    ]  # fmt: skip
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(rows))
    detections = read_detections(path, truth)
    reference = COCOeval(COCO(toy.path), COCO(toy.path).loadRes(str(path)), "bbox")
    reference.params.iouThrs = np.array([0.5])
    reference.evaluate()
    seen = set()
    for class_id in range(len(CLASSES)):
        judged = judge(truth, detections, class_id)
        ours = {
            (truth.image_ids[detections.image_index[row]], round(detections.scores[row], 6)): verdict
            for row, verdict in zip(judged.rows, judged.verdicts, strict=True)
        }
        for item in reference.evalImgs:
            if item is None or item["category_id"] != toy.dataset_ids[class_id] or item["aRng"] != [0, 1e10]:
                continue
            columns = (item["dtScores"], item["dtMatches"][0], item["dtIgnore"][0])
            for score, match, ignored in zip(*columns, strict=True):
                expected = "ignored" if ignored else "correct" if match else "false"
                assert ours.pop((item["image_id"], round(score, 6))) == expected
                seen.add(expected)
        assert not ours
    assert seen == {"correct", "false", "ignored"}


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


def test_reading_detections(tmp_path):
    path = tmp_path / "detections.json"
    with pytest.raises(FileNotFoundError, match=r"detections\.json: no such file"):
        read_detections(path, TRUTH)
    row = {"image_id": 11, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}
    path.write_text(json.dumps([row, {**row, "image_id": 10}]))
    read = read_detections(path, TRUTH)
    assert (read.image_index.tolist(), read.class_ids.tolist()) == ([0, 1], [1, 1])
    assert read.boxes[0].tolist() == [1, 2, 4, 6]
    for change, message in (({"image_id": 99}, "image 99 is not in toy"), ({"category_id": 1}, "category 1 is not in")):
        path.write_text(json.dumps([{**row, **change}]))
        with pytest.raises(ValueError, match=message):
            read_detections(path, TRUTH)
    path.write_text('[{"score": 1}]')
    with pytest.raises(ValueError, match="no COCO result file"):
        read_detections(path, TRUTH)
    path.write_text("[]")
    assert len(read_detections(path, TRUTH)) == 0


def near(pixel, colour, tolerance=40):
    return all(abs(int(a) - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


@pytest.mark.parametrize(("place", "kind"), [(0, "correct"), (1, "correct"), (2, "missed")])
def test_drawn_boxes_have_the_colour_of_their_verdict(place, kind):
    """A grey picture of 100 pixels is drawn at 320: the frame lies at 3.2 times the box."""
    judged = judge(TRUTH, DETECTIONS, 0)
    example = choose(TRUTH, DETECTIONS, judged, 6)[place]
    picture = draw_example(np.full((100, 100, 3), 120, np.uint8), TRUTH, DETECTIONS, judged, example)
    assert picture.kind == kind and picture.image.size == (SIDE, SIDE)
    box = TRUTH.boxes[example.object] if kind == "missed" else DETECTIONS.boxes[judged.rows[example.rank]]
    corner = [round(value * SIDE / 100) for value in box[:2]]
    assert near(picture.image.getpixel((corner[0] + 20, corner[1])), COLOURS[kind])
    assert near(picture.image.getpixel((corner[0], corner[1] + 20)), COLOURS[kind])


def test_captions_say_why():
    judged = judge(TRUTH, DETECTIONS, 0)
    image = np.zeros((100, 100, 3), np.uint8)
    captions = [
        draw_example(image, TRUTH, DETECTIONS, judged, example).caption
        for example in choose(TRUTH, DETECTIONS, judged, 6)
    ]
    assert captions == [
        "score 0.90, 1st of 7; IoU 1.00",
        "score 0.40, 5th of 7; IoU 0.90",
        "50 × 20 pixels; no detection of the class in the picture",
    ]


def test_support_fills_its_square():
    image = np.zeros((60, 90, 3), np.uint8)
    image[10:30, 20:50] = (200, 10, 10)
    picture = draw_support(image, (20, 10, 50, 30), "a.jpg")
    assert picture.image.size == (SUPPORT_SIDE, SUPPORT_SIDE)
    middle = SUPPORT_SIDE // 2
    assert near(picture.image.getpixel((middle, middle)), (200, 10, 10))
    assert near(picture.image.getpixel((3, middle)), (0, 0, 0))  # context


def gallery(count=4, name="cat"):
    """Noise, on average 40 units brighter from picture to picture."""
    noise = np.random.default_rng(0).integers(0, 20, (240, 320, 3), dtype=np.uint8)
    pictures = [Picture(Image.fromarray(noise + 40 * i), "score 0.5", "false") for i in range(count)]
    return Gallery("tfa", ("note",), (GalleryRow(name, "AP50 3.0", 12, (pictures[0],), tuple(pictures[1:])),))


def test_pictures_are_embedded_in_order():
    (html,) = render_galleries([gallery()])
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(sources) == 4
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
    assert [round(image[:, :, 0].mean() / 40) for image in images] == [0, 1, 2, 3]
    assert "12 supports" in html and "and 11 more" in html and "AP50 3.0" in html


def test_size_is_bounded():
    (full,) = render_galleries([gallery(6)])
    budget = len(full) // 3
    (small,) = render_galleries([gallery(6)], budget)
    assert len(small) < budget + 3000  # and the text around them
    with pytest.raises(ValueError, match=r"6 pictures take .* MiB at their smallest, more than"):
        render_galleries([gallery(6)], 1000)


def test_names_are_escaped():
    (html,) = render_galleries([gallery(name='<b "x">')])
    assert "<b " not in html and "&lt;b &quot;x&quot;&gt;" in html
