"""Golden data rules of FewX: the synthetic COCO json and what the release makes of it."""

import json
from pathlib import Path

from fsdet.data.coco import CocoReader, full_records
from fsdet.data.queries import query_records
from fsdet.data.records import LoadReport
from fsdet.data.support import Support, SupportSet

RULES = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "fewx" / "f_data_rules.json").read_text(encoding="utf-8")
)
CLASS_NAMES = [name for _, name in RULES["categories"]]


def coco():
    """The json, lists in file order."""
    return {
        "images": [
            {"id": i, "file_name": name, "width": width, "height": height} for i, name, width, height in RULES["images"]
        ],
        "annotations": [dict(zip(RULES["annotation_fields"], row, strict=True)) for row in RULES["annotations"]],
        "categories": [{"id": i, "name": name} for i, name in RULES["categories"]],
    }


def table_rows():
    """The golden support table, row by row."""
    pool = RULES["support_pool"]
    columns = zip(*(pool[column] for column in pool["columns"]), strict=True)
    return [dict(zip(pool["columns"], row, strict=True)) for row in columns]


def support_pool():
    """The golden support table as a set of all 80 classes."""
    places = [i for i, _ in RULES["categories"]]
    supports = [
        Support(
            row["file_path"], row["image_id"], row["id"], places.index(row["category_id"]), tuple(row["support_box"])
        )
        for row in table_rows()
    ]
    return SupportSet(CLASS_NAMES, supports)


def queries():
    """Query records of the golden base split, read as a training reads a json."""
    data, kept = coco(), set(RULES["base_split_annotation_ids_in_order"])
    by_id = {row["id"]: row for row in data["annotations"] if row["id"] in kept}
    data["annotations"] = [by_id[i] for i in RULES["base_split_annotation_ids_in_order"]]
    names = {category["id"]: category["name"] for category in data["categories"]}
    reader = CocoReader(Path("golden"), names, CLASS_NAMES, str, LoadReport("drop"))
    return query_records(full_records(data, reader))
