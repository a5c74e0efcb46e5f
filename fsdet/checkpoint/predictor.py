"""Find the box predictor inside a state dict and count its classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# "roi_heads.box_predictor.", or "roi_heads.box_predictor.0." and so on for a cascade.
_CLASSIFIER = re.compile(r"((?:.*\.)?box_predictor\.(?:\d+\.)?)cls_score\.weight")


def predictor_prefixes(state_dict: Mapping[str, Any]) -> list[str]:
    """Name prefixes, up to the last dot, of every box predictor in a state dict, sorted."""
    found = (_CLASSIFIER.fullmatch(name) for name in state_dict)
    return sorted(match[1] for match in found if match)


def predictor_classes(state_dict: Mapping[str, Any]) -> int | None:
    """Number of foreground classes of a checkpoint's box predictor; None where there is none (a backbone, "remove").

    Args:
        state_dict: name -> tensor or array. The classifier has one row per class and a last one for background.
    """
    prefixes = predictor_prefixes(state_dict)
    return state_dict[prefixes[0] + "cls_score.weight"].shape[0] - 1 if prefixes else None


def recorded_classes(checkpoint: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Ordered class names that a checkpoint of this project records under "fsdet"; None where it records none."""
    record = checkpoint.get("fsdet")
    classes = record.get("classes") if isinstance(record, Mapping) else None
    return tuple(classes) if classes else None


def first_difference(recorded: tuple[str, ...], given: tuple[str, ...]) -> str:
    """One phrase that says where two class lists part."""
    for row, (old, new) in enumerate(zip(recorded, given, strict=False)):
        if old != new:
            return f'row {row} is "{old}" in the file and "{new}" in the list given'
    return f"the file has {len(recorded)} classes, the list given {len(given)}"
