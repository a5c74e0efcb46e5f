"""Support tables: the golden table through CSV and JSON, pandas' forms of both, faults by file, row and column."""

import csv
import io
import json
from pathlib import Path

import golden_fewx
import pytest
from PIL import Image

from fsdet.data.support import Support, SupportSet
from fsdet.data.support_table import COLUMNS, read_support_table, table_text

CLASS_IDS = {7: 0, 44: 1}


def row(number, **more):
    path = f"./support/{number}/0000.jpg"
    box = [1.0, 2.0, 30.0, 40.5]
    return {"support_box": box, "category_id": 7, "image_id": 10 + number, "id": number, "file_path": path, **more}


@pytest.fixture
def crops(tmp_path):
    """The crops of rows 1 to 3, 8 x 8 pixels."""
    for number in (1, 2, 3):
        path = tmp_path / "support" / str(number) / "0000.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
    return tmp_path


def written(folder, rows, suffix=".json"):
    path = folder / f"table{suffix}"
    path.write_text(table_text(rows, suffix))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_golden_table(tmp_path, suffix):
    rows = golden_fewx.table_rows()
    for item in rows:
        (tmp_path / item["file_path"]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / item["file_path"]).touch()
    class_ids = {category: place for place, category in enumerate(golden_fewx.RULES["base_category_ids"])}
    supports = read_support_table(written(tmp_path, rows, suffix), class_ids)
    pool = golden_fewx.RULES["support_pool"]
    assert [support.annotation_id for support in supports] == pool["id"]
    assert [support.image_id for support in supports] == pool["image_id"]
    assert [list(support.box) for support in supports] == pool["support_box"]
    assert [golden_fewx.RULES["base_category_ids"][support.class_id] for support in supports] == pool["category_id"]
    assert {Path(support.file_name) for support in supports} == {tmp_path / path for path in pool["file_path"]}


def test_crop_of_a_support_is_its_file(crops):
    support_set = SupportSet("ab", read_support_table(written(crops, [row(1), row(3, category_id=44)]), CLASS_IDS))
    assert [len(shots) for _, shots in support_set] == [1, 1]
    crop = support_set.crop(support_set.shots("b")[0])
    assert crop.image.shape == (8, 8, 3) and crop.box.tolist() == [1, 2, 30, 40.5]


@pytest.mark.parametrize("box", ["[1.0, 2.0, 30.0, 40.5]", "[ 1.   2.  30.  40.5]", "(1, 2, 30, 40.5)"])
def test_csv_as_pandas_writes_it(crops, box):
    """An index column without name, boxes as the text of a list or an array, ids as floats."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["", *COLUMNS, "more"])
    writer.writerow(["0", box, "7.0", "11", "1", "./support/1/0000.jpg", "x"])
    path = crops / "table.CSV"
    path.write_text(text.getvalue())
    file_name = str(crops / "support/1/0000.jpg")
    assert read_support_table(path, CLASS_IDS) == [Support(file_name, 11, 1, 0, (1, 2, 30, 40.5))]


def test_json_as_pandas_writes_it(crops):
    """Slashes come escaped; text stays text, as the annotation file may have such ids."""
    rows = [row(1, image_id="0011", index=4)]
    path = crops / "table.json"
    path.write_text(json.dumps(rows).replace("/", "\\/"))
    (support,) = read_support_table(path, CLASS_IDS, crop_size=8)
    assert (support.image_id, support.annotation_id) == ("0011", 1)


@pytest.mark.parametrize(
    ("change", "column", "expected"),
    [
        ({"support_box": [1, 2, 3]}, "support_box", "four numbers"),
        ({"support_box": [1, 2, float("nan"), 4]}, "support_box", "four numbers"),
        ({"support_box": [5, 2, 4, 4]}, "support_box", "x0 <= x1"),
        ({"support_box": "[a, b, c, d]"}, "support_box", "four numbers"),
        ({"support_box": 7}, "support_box", "four numbers"),
        ({"category_id": 8}, "category_id", r"this run's classes, \[7, 44\]"),
        ({"category_id": 7.5}, "category_id", "this run's classes"),
        ({"image_id": [1]}, "image_id", "a number or a text"),
        ({"id": 2.5}, "id", "a number or a text"),
        ({"id": 1}, "id", "row 1 has the same"),
        ({"file_path": " "}, "file_path", "the path of a crop"),
    ],
)
def test_bad_values_name_file_row_and_column(crops, change, column, expected):
    path = written(crops, [row(1), row(2, **change)])
    with pytest.raises(ValueError, match=rf'table\.json: row 2, column "{column}": got .*{expected}'):
        read_support_table(path, CLASS_IDS)


def test_missing_crop(crops):
    (crops / "support" / "2" / "0000.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r'table\.csv: row 2, column "file_path": there is no crop .*2/0000\.jpg'
    ):
        read_support_table(written(crops, [row(1), row(2)], ".csv"), CLASS_IDS)


def test_crops_of_another_size(crops):
    path = written(crops, [row(1)])
    assert len(read_support_table(path, CLASS_IDS, crop_size=8)) == 1
    with pytest.raises(
        ValueError, match=r"1/0000\.jpg: this crop is 8 x 8 pixels, not 320 x 320; set INPUT.FS.CROP_SIZE"
    ):
        read_support_table(path, CLASS_IDS, crop_size=320)
    (crops / "support" / "1" / "0000.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1/0000\.jpg: cannot be decoded"):
        read_support_table(path, CLASS_IDS, crop_size=8)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("table.pkl", "", "a support table is .csv or .json"),
        ("table.json", "{", "cannot be read as JSON"),
        ("table.json", '{"id": {"0": 1}}', 'expected a list of objects.*orient="records"'),
        ("table.json", "[]", "has no row"),
        (
            "table.json",
            '[{"id": 1, "image_id": 2}]',
            r"row 1 lacks the columns \['support_box', 'category_id', 'file_path'",
        ),
        ("table.csv", "id,image_id\n1,2\n", r"row 1 lacks .*it has \['id', 'image_id'\]"),
        ("table.csv", "", "has no row"),
    ],
)
def test_files_that_are_no_table(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        read_support_table(tmp_path / name, CLASS_IDS)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"table\.csv: there is no such support table.*prepare_fewx"):
        read_support_table(tmp_path / "table.csv", CLASS_IDS)
    with pytest.raises(ValueError, match='written as .csv or .json, got ".pkl"'):
        table_text([], ".pkl")
