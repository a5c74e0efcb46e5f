"""Queries: golden query records, joined K-shot records, crowds and boxes that leave nothing."""

import golden_fewx

from fsdet.data.queries import QUERY, mark_empty_boxes, query_records
from fsdet.data.support import SupportSet


def test_golden_query_records():
    found = [
        {
            "file_name": record["file_name"],
            "category": record[QUERY].class_id,
            "ann_ids": [annotation["id"] for annotation in record["annotations"]],
            "iscrowd": [annotation["iscrowd"] for annotation in record["annotations"]],
        }
        for record in golden_fewx.queries()
    ]
    assert found == golden_fewx.RULES["query_records"]


def annotation(number, class_id, box=(0, 0, 10, 10), crowd=0):
    return {"id": number, "category_id": class_id, "bbox": list(box), "bbox_mode": 0, "iscrowd": crowd}


def record(image, *annotations):
    return {
        "file_name": f"{image}.jpg", "image_id": image, "height": 40, "width": 60, "annotations": list(annotations)
    }  # fmt: skip


def summary(queries):
    return [(q["image_id"], q[QUERY].class_id, q[QUERY].shown, [a["id"] for a in q["annotations"]]) for q in queries]


def test_one_query_for_each_image_and_class():
    crowd = annotation(3, 2, crowd=1)
    first = record(1, annotation(1, 5), annotation(2, 0), crowd, annotation(4, 5))
    assert summary(query_records([first, record(2, annotation(9, 0))])) == [
        (1, 5, (5, 0, 2), [1, 4]),
        (1, 0, (5, 0, 2), [2]),
        (2, 0, (0,), [9]),
    ]
    assert len(first["annotations"]) == 4 and QUERY not in first


def test_mixed_crowds_stay_for_the_mapper_to_drop():
    (query,) = query_records([record(1, annotation(1, 5, crowd=1), annotation(2, 5))])
    assert [a["id"] for a in query["annotations"]] == [1, 2] and query[QUERY].annotation_id == 1


def test_k_shot_records_of_an_image_are_joined():
    """Records of one object each, one of them listed twice; every query knows all classes of its image."""
    records = [record(1, annotation(1, 0)), record(1, annotation(2, 1)), record(1, annotation(3, 0))]
    assert summary(query_records([*records, records[0]])) == [(1, 0, (0, 1), [1, 3]), (1, 1, (0, 1), [2])]


def test_boxes_without_area_inside_are_counted_and_left_out(caplog):
    nan = float("nan")
    bad = [(60, 5, 70, 9), (5, 5, 5, 9), (-9, -9, 0, 5), (nan, 0, 5, 5), (5, 40, 9, 60)]
    records = [record(i, annotation(i, 0, box), annotation(50 + i, 1)) for i, box in enumerate(bad)]
    good = record(99, annotation(99, 0, (59.5, 39.5, 60.5, 40.5)))
    marked = mark_empty_boxes([*records, good], "my set")
    assert "my set: 5 object(s) without area inside their picture left out: 0.jpg: (60, 5, " in caplog.text
    assert summary(query_records(marked)) == [(i, 1, (0, 1), [50 + i]) for i in range(5)] + [(99, 0, (0,), [99])]
    pool = SupportSet.from_records(marked, "ab")
    assert {name: len(shots) for name, shots in pool} == {"a": 1, "b": 5}
    caplog.clear()
    assert mark_empty_boxes(marked, "again") == marked and not caplog.records
