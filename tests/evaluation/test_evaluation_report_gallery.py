"""How judged detections are marked, drawn and embedded."""

import base64
import io
import re

import numpy as np
import pytest
from judged_cases import DETECTIONS, TRUTH
from PIL import Image

from fsdet.evaluation.matching import judge
from fsdet.evaluation.report_choice import choose
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
