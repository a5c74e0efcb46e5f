import io
import json
import lzma
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fsdet.data.shrink_voc import shrunk_annotation, shrunk_box, shrunk_picture, shrunk_size

PACKS = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ORIGINAL_BOXES = PACKS / "splits" / "metadetr_fewshot_coco_voc.json.xz"

ANNOTATION = """<annotation>
\t<folder>VOC2007</folder>
\t<filename>000009.jpg</filename>
\t<source><database>The VOC2007 Database</database></source>
\t<owner><flickrid>x</flickrid><name>y</name></owner>
\t<size><width>500</width><height>375</height><depth>3</depth></size>
\t<segmented>0</segmented>
\t<object>
\t\t<name>person</name><pose>Left</pose><truncated>0</truncated><difficult>1</difficult>
\t\t<bndbox><ymax>329</ymax><xmin>258</xmin><ymin>198</ymin><xmax>297</xmax></bndbox>
\t\t<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
\t</object>
</annotation>
"""


def test_size():
    assert shrunk_size(500, 375) == (400, 300)
    assert shrunk_size(333, 500) == (266, 400)
    assert shrunk_size(399, 400) == (399, 400)  # never enlarged
    assert shrunk_size(500, 281, max_side=100) == (100, 56)


def test_box_is_scaled_by_its_edges():
    # Left edge 257 * 0.8 = 205.6, counted from 1: 207. Right edge 297 * 0.8 = 237.6.
    assert shrunk_box((258, 198, 297, 329), (500, 375), (400, 300)) == (207, 159, 238, 263)
    assert shrunk_box((1, 1, 500, 375), (500, 375), (400, 300)) == (1, 1, 400, 300)
    assert shrunk_box((5, 6, 70, 80), (100, 90), (100, 90)) == (5, 6, 70, 80)


def test_annotation_text():
    text = shrunk_annotation(ANNOTATION)
    root = ElementTree.fromstring(text)
    assert [node.tag for node in root] == ["folder", "filename", "source", "size", "segmented", "object"]
    assert [root.findtext(f"size/{key}") for key in ("width", "height", "depth")] == ["400", "300", "3"]
    assert [node.tag for node in root.find("object")] == ["name", "pose", "truncated", "difficult", "bndbox"]
    box = [(node.tag, node.text) for node in root.find("object/bndbox")]
    assert box == [("xmin", "207"), ("ymin", "159"), ("xmax", "238"), ("ymax", "263")]
    assert "\n\t\t<name>person</name>\n" in text and text.endswith("</annotation>\n")


def test_picture(tmp_path):
    path = tmp_path / "a.jpg"
    pixels = np.kron(np.random.default_rng(0).integers(0, 255, (4, 5, 3)), np.ones((60, 60, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    small = Image.open(io.BytesIO(shrunk_picture(path, (300, 240), max_side=150)))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (150, 120))
    centres = np.asarray(small, dtype=int)[15::30, 15::30]
    assert np.abs(centres - pixels[30::60, 30::60]).max() < 12
    with pytest.raises(ValueError, match=r"a.jpg has \(300, 240\) pixels .* says \(240, 300\)"):
        shrunk_picture(path, (240, 300))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a.jpg is no readable picture \(.*\). Unpack"):
        shrunk_picture(path, (300, 240))


@pytest.mark.skipif(
    not (ORIGINAL_BOXES.exists() and (PACKS / "voc_small").exists()), reason="data packs splits and voc_small"
)
def test_rule_gives_the_boxes_of_the_small_set():
    """737 images whose original boxes another published set holds (x = xmin - 1, width = xmax - x)."""
    published = json.loads(lzma.decompress(ORIGINAL_BOXES.read_bytes()))
    originals = {}
    for key in (key for key in published if key.startswith("voc")):
        images = {row[0]: row[1:] for row in published[key]["images"]}
        for _, image, _, (x, y, width, height), _ in published[key]["annotations"]:
            name, *size = images[image]
            originals.setdefault((name, *size), set()).add((x + 1, y + 1, x + width, y + height))
    compared = 0
    for (name, *size), boxes in originals.items():
        path = PACKS / "voc_small" / "Annotations" / Path(name).with_suffix(".xml")
        if not path.is_file():
            continue
        root = ElementTree.parse(path).getroot()
        new_size = shrunk_size(*size)
        assert new_size == (int(root.findtext("size/width")), int(root.findtext("size/height")))
        found = {
            tuple(int(node.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")) for node in root.iter("bndbox")
        }
        assert {shrunk_box(box, tuple(size), new_size) for box in boxes} <= found
        compared += len(boxes)
    assert compared == 1560
