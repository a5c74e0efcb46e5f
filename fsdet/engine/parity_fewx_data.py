"""Golden support crops and data rules of FewX: which annotations train, support table, queries and their supports.

Source: FewX (Fan et al., CVPR 2020), official release, data preparation and training data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsdet.data import prepare_fewx
from fsdet.data.coco import CocoReader, full_records
from fsdet.data.crops import CROP_POLICIES
from fsdet.data.episode_draws import LegacyEpisodes
from fsdet.data.queries import QUERY, Query, query_records
from fsdet.data.records import LoadReport
from fsdet.data.splits import COCO_CLASSES, COCO_NOVEL_IDS
from fsdet.data.support import SupportSet
from fsdet.data.support_table import COLUMNS, read_support_table, table_text
from fsdet.engine.parity import Comparison, Ledger, golden_file, read_json, read_npz
from fsdet.engine.parity_fewx_detector import ScaledLedger

GREY_LEVELS = 1.0  # accepted difference of a crop's pixels
IMAGE_FIELDS = ("id", "file_name", "width", "height")
RULES_INPUTS = ("note", "images", "annotation_fields", "annotations", "sampling_shots_per_way")
RULES = (
    "categories", "voc_category_ids", "base_category_ids", "base_split_annotation_ids_in_order",
    "voc_split_annotation_ids_in_order", "ten_shot_annotation_ids_in_order", "ten_shot_pool_ids_in_order",
    "query_records", "sampled_supports",
)  # fmt: skip


def check_crops(folder: Path) -> Iterator[Comparison]:
    """e: the crop of every box, and the box on it."""
    values = read_npz(golden_file(folder, "e_support_crop"))
    outputs = ("crops_hwc_uint8", "crop_boxes")
    ledger = ScaledLedger(values, inputs=("image_hwc_uint8", "boxes_xyxy"), expected=outputs)
    cut = CROP_POLICIES["context_square"]
    crops, boxes = zip(*(cut(values["image_hwc_uint8"], box) for box in values["boxes_xyxy"].tolist()), strict=True)
    yield ledger.within("crops_hwc_uint8", np.stack(crops), GREY_LEVELS)
    yield ledger.within("crop_boxes", np.stack(boxes), 0.0)
    yield from ledger.rest()


def check_rules(folder: Path) -> Iterator[Comparison]:
    """f: splits, 10-shot pick, support tables, query records, and the supports that every one of them gets."""
    golden = read_json(golden_file(folder, "f_data_rules"))
    table = golden.get("support_pool", {})
    values = {name: value for name, value in golden.items() if name != "support_pool"}
    values |= {f"support_pool/{name}": value for name, value in table.items()}
    columns = [f"support_pool/{name}" for name in ("columns", *COLUMNS)]
    ledger = Ledger(values, inputs=RULES_INPUTS, expected=[*RULES, *columns])
    data = _coco(golden)
    base = {**data, "annotations": prepare_fewx.base_annotations(data, COCO_NOVEL_IDS)}
    shots = {**data, "annotations": prepare_fewx.pick_shots(data, COCO_NOVEL_IDS)}
    rows = prepare_fewx.support_rows(base)
    queries = _queries(base)
    computed = {
        "categories": [list(pair) for pair in COCO_CLASSES.items()],
        "voc_category_ids": list(COCO_NOVEL_IDS),
        "base_category_ids": [i for i in COCO_CLASSES if i not in COCO_NOVEL_IDS],
        "base_split_annotation_ids_in_order": _ids(base["annotations"]),
        "voc_split_annotation_ids_in_order": _ids(prepare_fewx.novel_annotations(data, COCO_NOVEL_IDS)),
        "ten_shot_annotation_ids_in_order": _ids(shots["annotations"]),
        "ten_shot_pool_ids_in_order": _ids(prepare_fewx.support_rows(shots)),
        "support_pool/columns": list(COLUMNS),
        **{f"support_pool/{name}": [row[name] for row in rows] for name in COLUMNS},
        "query_records": [_described(record) for record in queries],
        "sampled_supports": _sampled(rows, queries, golden),
    }
    for name, value in computed.items():
        yield ledger.compare(name, value, 0.0)
    yield from ledger.rest()


def _coco(golden: Mapping[str, Any]) -> dict[str, Any]:
    """The COCO json of the file."""
    fields = golden["annotation_fields"]
    return {
        "images": [dict(zip(IMAGE_FIELDS, row, strict=True)) for row in golden["images"]],
        "annotations": [dict(zip(fields, row, strict=True)) for row in golden["annotations"]],
        "categories": [{"id": i, "name": name} for i, name in golden["categories"]],
    }


def _ids(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [row["id"] for row in rows]


def _queries(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Query records of a json, with COCO's 80 contiguous class ids and bare file names."""
    reader = CocoReader(
        Path("f_data_rules"), COCO_CLASSES, list(COCO_CLASSES.values()), lambda name: name, LoadReport(quiet=True)
    )
    return query_records(full_records(data, reader))


def _described(record: Mapping[str, Any]) -> dict[str, Any]:
    objects = record["annotations"]
    return {
        "file_name": record["file_name"],
        "category": record[QUERY].class_id,
        "ann_ids": _ids(objects),
        "iscrowd": [row["iscrowd"] for row in objects],
    }


def _sampled(
    rows: Sequence[Mapping[str, Any]], queries: Sequence[Mapping[str, Any]], golden: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Supports of every query by the legacy draws, from the table as it is written and read."""
    class_ids = {i: place for place, i in enumerate(COCO_CLASSES)}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:  # the reader wants the crops to be there
            crop = Path(folder, row["file_path"])
            crop.parent.mkdir(parents=True, exist_ok=True)
            crop.touch()
        path = Path(folder, "table.csv")
        path.write_text(table_text(rows, path.suffix), encoding="utf-8")
        pool = SupportSet(list(COCO_CLASSES.values()), read_support_table(path, class_ids))
    episodes = LegacyEpisodes(pool, n_shot=golden["sampling_shots_per_way"])
    messages = {row["first_ann_id"]: row.get("error") for row in golden["sampled_supports"]}
    return [_supports_of(episodes, record[QUERY], messages) for record in queries]


def _supports_of(episodes: LegacyEpisodes, query: Query, messages: Mapping[int, str | None]) -> dict[str, Any]:
    """Row of one query; where both sides fail, with the file's words."""
    row: dict[str, Any] = {"first_ann_id": query.annotation_id}
    try:
        supports = episodes.draw(query).supports
    except ValueError as error:
        return {**row, "error": messages.get(query.annotation_id) or str(error)}
    flags = [int(support.class_id != query.class_id) for support in supports]
    return {**row, "support_ann_ids": [support.annotation_id for support in supports], "flags": flags}
