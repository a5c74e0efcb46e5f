"""Drawn boxes lie where they should, labels stay inside and apart, sheets hold every picture."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fsdet.data import drawing
from fsdet.data.drawing import Mark, Section, class_colours, contact_sheet, crop_around, draw_marks, load_font

GREY = (128, 128, 128)


def plain(width, height, colour=GREY):
    return Image.new("RGB", (width, height), colour)


def changed(drawn, colour=GREY):
    """Bounding box (x0, y0, x1, y1) of everything that is not the background, ends excluded."""
    rows, columns = np.nonzero((np.asarray(drawn) != colour).any(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_a_box_is_drawn_in_its_place_and_the_picture_is_left_alone():
    image = plain(500, 450)
    drawn = draw_marks(image, [Mark((100, 120, 300, 220), colour=(255, 0, 0))])
    assert drawn.size == image.size and (np.asarray(image) == GREY).all()
    pixels = np.asarray(drawn)
    for x, y in ((100, 150), (300, 150), (200, 120), (200, 220)):
        assert tuple(pixels[y, x]) == (255, 0, 0)
    assert tuple(pixels[170, 200]) == GREY, "the inside stays as it is"
    assert changed(drawn) == (99, 119, 302, 222), "the box and its rim of one pixel"


def test_small_pictures_are_enlarged_by_a_whole_factor_and_boxes_follow():
    mark = Mark((10, 20, 50, 60), colour=(0, 255, 0))
    drawn = draw_marks(plain(160, 128), [mark], min_side=400)
    assert drawn.size == (640, 512)
    assert tuple(np.asarray(drawn)[80, 120]) == (0, 255, 0)
    assert draw_marks(plain(160, 128), [mark], min_side=0).size == (160, 128)
    assert draw_marks(plain(20, 20), [mark], min_side=10**6).size == (160, 160), "at most eight times"


@pytest.mark.parametrize(
    "box", [(0, 0, 60, 40), (440, 0, 500, 40), (0, 410, 60, 450), (-50, -50, 900, 900), (9, 9, 9, 9)]
)
def test_labels_stay_inside_the_picture(box, monkeypatch):
    places = []
    original = drawing._draw_label

    def spy(*args):
        places.append(original(*args))
        return places[-1]

    monkeypatch.setattr(drawing, "_draw_label", spy)
    draw_marks(plain(500, 450), [Mark(box, "a rather long class name 98%")])
    ((x0, y0, x1, y1),) = places
    assert 0 <= x0 < x1 <= 500 and 0 <= y0 < y1 <= 450
    assert x1 - x0 >= load_font(14).getlength("a rather long class name 98%")


def test_labels_of_equal_boxes_do_not_cover_each_other(monkeypatch):
    places = []
    original = drawing._draw_label
    monkeypatch.setattr(drawing, "_draw_label", lambda *args: places.append(original(*args)) or places[-1])
    draw_marks(plain(500, 450), [Mark((100, 100, 300, 300), name) for name in ("cat 91%", "dog 40%", "cow 12%")])
    assert len(places) == 3
    for i, a in enumerate(places):
        for b in places[:i]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_text_is_readable_on_every_class_colour():
    def luminance(colour):  # of WCAG 2
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in class_colours([str(i) for i in range(80)]).values():
        light, dark = sorted((luminance(colour), luminance(drawing._readable_on(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 3.5, colour


def test_colours_are_fixed_by_position_and_neighbours_differ():
    names = [f"class {i}" for i in range(20)]
    colours = class_colours(names)
    assert class_colours(names[:5]) == {name: colours[name] for name in names[:5]}
    assert len(set(colours.values())) == 20
    for a, b in zip(names, names[1:], strict=False):
        assert np.abs(np.subtract(colours[a], colours[b])).sum() > 150


def test_letters_beyond_ascii_have_shapes_of_their_own():
    def shape(text):
        picture = plain(60, 40, (0, 0, 0))
        ImageDraw.Draw(picture).text((5, 5), text, font=load_font(24), fill=(255, 255, 255))
        return picture.tobytes()

    letters = ["é", "ß", "ж", "Ω", "ş", "?", "□"]
    assert len({shape(letter) for letter in letters}) == len(letters)


def test_the_picture_may_have_any_mode():
    for mode in ("L", "RGBA", "P", "1"):
        drawn = draw_marks(Image.new(mode, (450, 450)), [Mark((10, 60, 90, 90), "x", (250, 200, 0))])
        assert drawn.mode == "RGB" and tuple(np.asarray(drawn)[60, 50]) == (250, 200, 0)


def test_crop_around_is_square_and_stays_inside_where_it_can():
    image = plain(100, 80, (10, 200, 30))
    image.putpixel((0, 30), (255, 0, 0))
    crop = np.asarray(crop_around(image, (0, 30, 20, 70), margin=0.25))
    assert crop.shape == (60, 60, 3), "40 pixels and a quarter of them on each side"
    assert tuple(crop[10, 0]) == (255, 0, 0), "moved inwards: x from 0 to 60, y from 20 to 80"
    assert not (crop == drawing.EMPTY).all(axis=2).any()
    assert crop_around(image, (40, 30, 60, 50), margin=0).size == (20, 20)
    larger = np.asarray(crop_around(image, (10, 0, 90, 80), margin=0.125))
    assert larger.shape == (100, 100, 3)
    assert (larger[:10] == drawing.EMPTY).all() and (larger[-10:] == drawing.EMPTY).all()
    assert not (larger[10:90] == drawing.EMPTY).all(axis=2).any()


def test_contact_sheet_shows_every_picture_above_its_caption():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
    support = Section([plain(40, 40, c) for c in colours[:2]], ["one", "two"], "Support", columns=2)
    query = Section([plain(160, 120, c) for c in colours[2:]], title="Queries", columns=2)
    sheet = contact_sheet([support, query], title="A sheet", width=600)
    assert sheet.width == 600 and sheet.mode == "RGB"
    pixels, tile = np.asarray(sheet), (600 - 3 * drawing.GAP) // 2
    corners = []
    for colour, height in zip(colours, (tile, tile, *(round(tile * 0.75),) * 3), strict=True):
        rows, columns = np.nonzero((pixels == colour).all(axis=2))
        assert rows.size == pytest.approx(tile * height, rel=0.02), "shown whole, in the shape it has"
        corners.append((columns.min(), rows.min()))
    (x0, y0), (x1, y1), (x2, y2), (x3, y3), (x4, y4) = corners
    assert (y0, y2, x2, x3) == (y1, y3, x0, x1) and x4 == x0 and y0 < y2 < y4 and x0 < x1
    assert (pixels[y0 + tile : y2] != 255).any(), "captions between the rows"


def test_contact_sheet_shortens_captions_and_pads_tall_pictures():
    sheet = contact_sheet(
        [Section([plain(20, 200, (9, 9, 9))], ["far too long a caption " * 20], columns=3)], width=300
    )
    text = np.asarray(sheet)[:, 12 + (300 - 4 * 12) // 3 :]
    assert (text == 255).all(), "nothing reaches beyond the column"


def test_faulty_sections_are_refused():
    with pytest.raises(ValueError, match='Section "S" has 2 pictures, 1 captions and 4 columns'):
        contact_sheet([Section([plain(9, 9)] * 2, ["one"], "S")])
    with pytest.raises(ValueError, match="at least one column"):
        contact_sheet([Section([plain(9, 9)], columns=0)])
