"""Supports of scenes: one of each class, a picture of the class or an object of another scene.

Source: OS2D (Osokin et al., ECCV 2020) and its release, training data. Unlike there, an object is no support of its own
scene, where it would match itself, unless its class has no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from PIL import Image

from fsdet.data import catalog
from fsdet.data.crops import CropCache, tight_crop
from fsdet.data.mapper import ImageError
from fsdet.data.records import Record
from fsdet.data.support import Support, SupportSet, read_support


def is_difficult(annotation: Record) -> bool:
    """Whether an annotation is no target: marked difficult, or a crowd."""
    return bool(annotation.get("difficult", 0) or annotation.get("iscrowd", 0))


def object_records(scenes: Sequence[Record]) -> list[Record]:
    """Scenes with the objects alone that can be supports: difficult ones only of classes that have no other."""
    plain = {a["category_id"] for scene in scenes for a in scene["annotations"] if not is_difficult(a)}
    return [
        {**s, "annotations": [a for a in s["annotations"] if not is_difficult(a) or a["category_id"] not in plain]}
        for s in scenes
    ]


def build_scene_supports(cfg: Any, scenes: Sequence[Record]) -> SupportSet:
    """All supports that scenes may meet: the pictures of the classes where the data set has them, else objects.

    With INPUT.PATCH.OWN_OBJECTS objects are supports beside the pictures of the classes.

    Raises: ValueError naming the classes that scenes show and that have no support; as `catalog.load_supports`.
    """
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    classes, spec = metadata.thing_classes, metadata.get("spec")
    has_pictures = spec is not None and spec.benchmark == "oneshot"
    records = catalog.load_supports(spec, metadata.sources) if has_pictures else []
    if cfg.INPUT.PATCH.OWN_OBJECTS or not has_pictures:
        records = [*records, *object_records(scenes)]
    pool = SupportSet.from_records(records, classes, "tight", image_format=cfg.INPUT.FORMAT, min_shots=0)
    shown = {a["category_id"] for scene in scenes for a in scene["annotations"] if not a.get("iscrowd", 0)}
    if missing := [classes[class_id] for class_id in sorted(shown) if not pool.shots(classes[class_id])]:
        raise ValueError(
            f"{metadata.name}: no support of the classes {missing}, which its scenes show. Put a picture of each into "
            "FEWSHOT.CLASS_IMAGES, or take objects of the scenes with INPUT.PATCH.OWN_OBJECTS True"
        )
    return pool


class SceneSupports:
    """Draws and cuts the supports of scenes."""

    def __init__(self, pool: SupportSet, *, target: int, cache_mib: int) -> None:
        """Sort the supports by picture.

        Args:
            pool: all supports.
            target: side in pixels of a square with the area of a crop.
            cache_mib: memory for crops, in each process.
        """
        self.classes, self.image_format, self.target = pool.classes, pool.image_format, target
        self.cache = CropCache(cache_mib << 20)
        self._shots = [shots for _, shots in pool]
        self._places: list[dict[str, list[int]]] = [{} for _ in self._shots]
        for shots, places in zip(self._shots, self._places, strict=True):
            for place, support in enumerate(shots):
                places.setdefault(support.file_name, []).append(place)
        self.class_ids = tuple(class_id for class_id, shots in enumerate(self._shots) if shots)

    def draw(self, class_id: int, file_name: str, generator: np.random.Generator) -> Support:
        """One support of a class, each as likely; those from the picture `file_name` only when there is no other."""
        shots, own = self._shots[class_id], self._places[class_id].get(file_name, [])
        if len(own) == len(shots):
            own = []
        place = int(generator.integers(len(shots) - len(own)))
        for gap in own:  # in rising order
            place += gap <= place
        return shots[place]

    def crop(self, support: Support, resample: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
        """The object of a support, (h, w, 3) uint8, to be read only.

        Raises: ImageError naming the file when it cannot be used.
        """
        key = (support.file_name, support.box, resample)
        return self.cache.get(key, lambda: self._cut(support, resample))[0]

    def _cut(self, support: Support, resample: Image.Resampling) -> tuple[np.ndarray, np.ndarray]:
        try:
            picture = read_support(support, self.image_format)
            return tight_crop(picture, support.box, self.target, resample=resample)
        except (OSError, ValueError) as error:
            raise ImageError(f"{support.file_name}: this support picture cannot be used ({error})") from error
