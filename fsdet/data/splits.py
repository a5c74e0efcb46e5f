"""The one table of base and novel classes; nobody else lists a class.

Source: TFA (Wang et al., ICML 2020) section 4 and its released metadata, used unchanged by DeFRCN and later work. The
order of `ClassSplit.all` is part of the protocol, since it decides the rows of the predictor: VOC puts the base classes
first and the novel ones behind, COCO keeps the order of the dataset ids, so that base and novel interleave.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# All 20 classes of PASCAL VOC, alphabetically (the order in which the official sampler visits them).
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Novel classes of the three VOC splits; the other 15 are base.
VOC_NOVEL = {
    1: ("bird", "bus", "cow", "motorbike", "sofa"),
    2: ("aeroplane", "bottle", "cow", "horse", "sofa"),
    3: ("boat", "cat", "motorbike", "sheep", "sofa"),
}

# All 80 classes of COCO: dataset id -> name. Ids run to 90 with gaps.
COCO_CLASSES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip

# The 20 novel ids of COCO are the classes that COCO shares with VOC; the other 60 are base.
COCO_NOVEL_IDS = (1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 44, 62, 63, 64, 67, 72)


@dataclass(frozen=True)
class ClassSplit:
    """Ordered class names of one split: `base`, `novel`, and `all`, whose order is that of the full predictor."""

    base: tuple[str, ...]
    novel: tuple[str, ...]
    all: tuple[str, ...]

    def __post_init__(self) -> None:
        if set(self.base) & set(self.novel):
            raise ValueError(f"Classes that are both base and novel: {sorted(set(self.base) & set(self.novel))}")
        if len(set(self.all)) != len(self.all) or set(self.base) | set(self.novel) != set(self.all):
            raise ValueError("`all` must hold every base and every novel class exactly once")

    def of(self, subset: str) -> tuple[str, ...]:
        """Class names of "base", "novel" or "all", in predictor order."""
        if subset not in ("base", "novel", "all"):
            raise ValueError(f'Unknown subset "{subset}"; expected base, novel or all')
        return getattr(self, subset)


def voc_split(split: int) -> ClassSplit:
    """Class split 1, 2 or 3 of PASCAL VOC: 15 base classes, then 5 novel ones."""
    if split not in VOC_NOVEL:
        raise ValueError(f"VOC has the class splits 1, 2 and 3, got {split}")
    novel = VOC_NOVEL[split]
    base = tuple(name for name in VOC_CLASSES if name not in novel)
    return ClassSplit(base=base, novel=novel, all=base + novel)


def coco_split() -> ClassSplit:
    """The 60/20 split of COCO, every list in the order of the dataset ids."""
    return split_of(COCO_CLASSES.values(), [COCO_CLASSES[i] for i in COCO_NOVEL_IDS])


def split_of(names: Iterable[str], novel: Iterable[str]) -> ClassSplit:
    """Split of any data set: `all` keeps the order of `names`, base is what `novel` leaves.

    Raises: ValueError naming novel classes that the data set does not have.
    """
    names, novel = tuple(names), set(novel)
    unknown = sorted(novel - set(names))
    if unknown:
        raise ValueError(f"Unknown novel classes {unknown}; the data set has {list(names)}")
    return ClassSplit(
        base=tuple(n for n in names if n not in novel), novel=tuple(n for n in names if n in novel), all=names
    )
