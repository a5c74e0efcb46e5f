"""Queries of episodic training: dataset dicts -> one record for each image and class.

Source: FewX (Fan et al., CVPR 2020) and its release, training data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from fsdet.data.crops import has_area_inside
from fsdet.data.records import SHOWN, Record, join_pictures, xyxy

logger = logging.getLogger(__name__)

QUERY = "query"  # key of a record that holds its `Query`


@dataclass(frozen=True)
class Query:
    """What the draw of an episode needs to know of a query record.

    Attributes:
        image_id: of its image.
        class_id: the one class of its boxes.
        shown: class ids of everything that the image is labelled with, crowds included.
        annotation_id: of its first annotation.
    """

    image_id: int | str
    class_id: int
    shown: tuple[int, ...]
    annotation_id: int | str | None


def mark_empty_boxes(records: Sequence[Record], name: str) -> list[Record]:
    """Make crowds of objects whose box has no area inside the picture; they are counted and logged.

    The picture still shows their class, but they can be neither target nor support.

    Args:
        records: dataset dicts; of the pictures only the stated width and height are looked at.
        name: of the data set, for the log.
    """
    result, found = [], []
    for record in records:
        annotations = record.get("annotations", ())
        marked = [{**a, "iscrowd": 1} if _is_empty(a, record) else a for a in annotations]
        empty = [f"{record['file_name']}: {xyxy(a)}" for a, b in zip(annotations, marked, strict=True) if a is not b]
        result.append({**record, "annotations": marked} if empty else record)
        found += empty
    if found:
        logger.warning(
            "%s: %d object(s) without area inside their picture left out: %s", name, len(found), listed(found)
        )
    return result


def _is_empty(annotation: Record, record: Record) -> bool:
    """Whether an object that is no crowd leaves nothing of its picture."""
    return not annotation.get("iscrowd", 0) and not has_area_inside(xyxy(annotation), record["height"], record["width"])


def query_records(records: Sequence[Record]) -> list[Record]:
    """Split records into queries: one for each image and class, with the boxes of that class alone.

    Records of the same image (K-shot sets have one for each object) are joined first. Crowds stay in the record, where
    the mapper drops them; a class that an image shows as crowd alone makes no query.

    Args:
        records: dataset dicts.
    Returns: dataset dicts with a `Query` under "query", in the order of the images; within an image in that of the
        annotations.
    """
    queries = []
    for image in join_pictures(records):
        by_class: dict[int, list[Record]] = {}
        for annotation in image["annotations"]:
            by_class.setdefault(annotation["category_id"], []).append(annotation)
        for class_id, objects in by_class.items():
            if not all(annotation.get("iscrowd", 0) for annotation in objects):
                query = Query(image["image_id"], class_id, tuple(by_class), objects[0].get("id"))
                queries.append({**image, "annotations": objects, QUERY: query})
    return queries


def listed(items: Sequence[str], limit: int = SHOWN) -> str:
    """Items in one line, cut at `limit`."""
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more
