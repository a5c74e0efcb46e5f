"""SupportSet: K-shot dataset dicts -> labelled crops, the second input of support-conditioned detectors.

The set is built from the same dicts that fine-tuning methods train on. What of a picture a method sees is its crop
policy (`crops.py`). Pictures are read when a crop is asked for. `SupportSet.episode` draws the supports that one query
image meets, at a cost that does not grow with the set.

Source: DeFRCN (Qiao et al., ICCV 2021); FewX (Fan et al., CVPR 2020) and its release; OS2D (Osokin et al., ECCV 2020).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import numpy as np
from detectron2.data.detection_utils import read_image

from fsdet.data.crops import (
    CLASS_IMAGE_SIZE,
    CONTEXT,
    CROP_POLICIES,
    CROP_SIZE,
    CropPolicy,
    area_size,
    fewx_support_crop,
    tight_crop,
    whole_image,
)
from fsdet.data.records import xyxy

__all__ = [
    "CLASS_IMAGE_SIZE", "CONTEXT", "CROP_POLICIES", "CROP_SIZE", "CropPolicy", "Support", "SupportCrop", "SupportSet",
    "area_size", "fewx_support_crop", "read_picture", "read_support", "seeded_generator", "tight_crop", "whole_image",
]  # fmt: skip


@dataclass(frozen=True, slots=True)  # slots: a set may hold a hundred thousand, in every loader process
class Support:
    """One labelled example; `box` is XYXY in pixels of the picture file."""

    file_name: str
    image_id: int | str
    annotation_id: int | str | None
    class_id: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class SupportCrop:
    """What a method sees of a support: image (h, w, 3) uint8 and box (4,) float32 XYXY in pixels of that image."""

    image: np.ndarray
    box: np.ndarray
    support: Support


def read_support(support: Support, image_format: str = "BGR") -> np.ndarray:
    """The whole picture of a support, see `read_picture`."""
    return read_picture(support.file_name, image_format, what=f"picture of support {support.annotation_id}")


def read_picture(file_name: str, image_format: str, *, what: str = "picture", remedy: str = "") -> np.ndarray:
    """Read a picture of a data set, turned as its EXIF data says.

    Args:
        file_name: path.
        image_format: channel order, "BGR" or "RGB".
        what: the file shows, for the message when it is missing.
        remedy: a further way out of that.
    Returns: (H, W, 3) uint8.
    Raises: FileNotFoundError or ValueError naming the file when it is missing or cannot be decoded.
    """
    try:
        return read_image(file_name, format=image_format)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file_name}: {what} not found; unpack the data set again{remedy}") from None
    except (OSError, SyntaxError) as error:  # the latter from torn PNG files
        raise ValueError(f"{file_name}: cannot be decoded ({error}); replace the file") from error


class SupportSet:
    """K classes with their shots. Iterating gives (class name, supports) pairs in the order of the class ids."""

    def __init__(
        self,
        classes: Sequence[str],
        supports: Sequence[Support],
        policy: str | CropPolicy = "whole",
        image_format: str = "BGR",
    ) -> None:
        """Group the supports.

        Args:
            classes: K names; the place is the class id.
            supports: in any order, kept within a class.
            policy: name of a crop policy (`CROP_POLICIES`) or a function of the same form.
            image_format: channel order of the crops, "BGR" or "RGB".
        Raises: ValueError for an unknown policy or channel order, or a class id outside [0, K).
        """
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f'Unknown image format "{image_format}"; expected BGR or RGB')
        self.classes = tuple(classes)
        self.policy = _policy_of(policy)
        self.image_format = image_format
        self._class_ids = {name: place for place, name in enumerate(self.classes)}
        shots: list[list[Support]] = [[] for _ in self.classes]
        for support in supports:
            if not 0 <= support.class_id < len(self.classes):
                raise ValueError(
                    f"{support.file_name}: class id {support.class_id} of annotation {support.annotation_id} is not in "
                    f"[0, {len(self.classes)}), the classes {list(self.classes)}"
                )
            shots[support.class_id].append(support)
        self._shots = [tuple(of_class) for of_class in shots]
        found = dict.fromkeys(support.class_id for support in supports)
        self.appearance = tuple(self.classes[class_id] for class_id in found)  # classes as the supports bring them up

    @classmethod
    def from_records(
        cls,
        records: Sequence[dict[str, Any]],
        class_names: Sequence[str],
        policy: str | CropPolicy = "whole",
        *,
        image_format: str = "BGR",
        min_shots: int = 1,
    ) -> SupportSet:
        """Take every annotation of K-shot dataset dicts as a support; crowds are no examples and are passed over.

        Args:
            records: Detectron2 dataset dicts; one or several annotations each.
            class_names: K names; annotations refer to them by "category_id".
            policy, image_format: see the constructor.
            min_shots: supports that every class must have; 0 admits classes without any.
        Raises: ValueError naming the classes that have fewer, with the numbers needed and found.
        """
        supports = [
            Support(
                record["file_name"],
                record["image_id"],
                annotation.get("id"),
                annotation["category_id"],
                xyxy(annotation),
            )
            for record in records
            for annotation in record.get("annotations", ())
            if not annotation.get("iscrowd", 0)
        ]
        support_set = cls(class_names, supports, policy, image_format)
        short = {name: len(shots) for name, shots in support_set if len(shots) < min_shots}
        if short:
            raise ValueError(
                f"Classes with too few supports: {min_shots} needed, found {short}; check the K-shot lists"
            )
        return support_set

    def __len__(self) -> int:
        return sum(map(len, self._shots))

    def __iter__(self) -> Iterator[tuple[str, tuple[Support, ...]]]:
        yield from zip(self.classes, self._shots, strict=True)

    def with_policy(self, policy: str | CropPolicy) -> SupportSet:
        """The same supports under another crop policy. Raises: ValueError for an unknown name."""
        other = copy.copy(self)
        other.policy = _policy_of(policy)
        return other

    def shots(self, class_name: str) -> tuple[Support, ...]:
        """Supports of a class, in the order of the records. Raises: ValueError for an unknown name."""
        return self._shots[self._class_id(class_name)]

    def places(self, class_name: str, image: int | str) -> Sequence[int]:
        """Where in `shots` the supports of a class from one image are. Raises: ValueError for an unknown name."""
        return self._places[self._class_id(class_name)].get(image, ())

    def count_images(self, class_name: str, without: int | str | None = None) -> int:
        """Images that supports of a class come from, but for the image `without`. Raises: as `shots`."""
        places = self._places[self._class_id(class_name)]
        return len(places) - (without in places)

    @cached_property
    def _places(self) -> list[Mapping[int | str, Sequence[int]]]:
        """Image id -> places of its supports, for each class; built once, before the first draw."""
        result: list[Mapping[int | str, Sequence[int]]] = []
        for shots in self._shots:
            places: dict[int | str, list[int]] = {}
            for place, support in enumerate(shots):
                places.setdefault(support.image_id, []).append(place)
            result.append(places)
        return result

    def _class_id(self, class_name: str) -> int:
        if class_name not in self._class_ids:
            raise ValueError(f'No class "{class_name}" in the support set; it has {list(self.classes)}')
        return self._class_ids[class_name]

    def crop(self, support: Support) -> SupportCrop:
        """Read the picture of a support and cut it under the policy.

        Raises: FileNotFoundError or ValueError naming the file when it is missing or cannot be decoded, or when the box
            leaves nothing of the picture.
        """
        picture = read_support(support, self.image_format)
        try:
            crop, box = self.policy(picture, support.box)
        except ValueError as error:
            raise ValueError(f"{support.file_name}: {error}") from error
        return SupportCrop(crop, box, support)

    def crops(self, class_name: str) -> Iterator[SupportCrop]:
        """The crops of a class one after the other, so that one picture is in memory at a time."""
        return map(self.crop, self.shots(class_name))

    def episode(
        self,
        n_way: int,
        n_shot: int,
        *,
        seed: int,
        epoch: int,
        image: int | str,
        query: str = "",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        distinct_images: bool = False,
        repeat: bool = False,
    ) -> dict[str, tuple[Support, ...]]:
        """Draw the supports that one query image meets, from a generator seeded with (seed, epoch, image, query).

        Args:
            n_way: classes of the episode.
            n_shot: supports of each class.
            seed, epoch, image: seed of the draw; supports from this image are never drawn.
            query: tells several queries on one image apart.
            include: classes that must be there, first in the result (the query's class).
            exclude: classes that must not be drawn (others that the query shows).
            distinct_images: draw every support from another image, over all classes of the episode (FewX).
            repeat: fill up a class that does not suffice: first with further supports from images that are taken, then
                with the same supports again.
        Returns: class name -> its supports.
        Raises: ValueError naming class, needed and found when classes or supports do not suffice; with `repeat` one
            support from another image suffices.
        """
        generator = seeded_generator(seed, epoch, f"{image}/{query}" if query else image)
        named = {*include, *exclude}
        if unknown := sorted(named - self._class_ids.keys()):
            raise ValueError(f"No classes {unknown} in the support set; it has {list(self.classes)}")
        others = [name for name in self.classes if name not in named]
        if len(include) > n_way or len(include) + len(others) < n_way:
            raise ValueError(
                f"{n_way} classes needed for an episode, found {len(include)} to include and {len(others)} to draw from"
            )
        drawn = generator.permutation(len(others))[: n_way - len(include)]
        used = {image}
        result = {}
        for name in [*include, *(others[place] for place in drawn)]:
            taken, spare = self._draw(name, n_shot, image, used, generator, distinct_images)
            if repeat and taken + spare:
                taken = [*islice(cycle(taken + spare), n_shot)]
            if len(taken) < n_shot:
                kind = "supports from different images" if distinct_images else "supports from other images"
                raise ValueError(
                    f'Class "{name}": {n_shot} {kind} needed, {len(taken)} found of {len(self.shots(name))} shots; ask '
                    "for fewer supports or more shots"
                )
            result[name] = tuple(taken)
        return result

    def _draw(
        self,
        name: str,
        n_shot: int,
        image: int | str,
        used: set[int | str],
        generator: np.random.Generator,
        distinct_images: bool,
    ) -> tuple[list[Support], list[Support]]:
        """Up to `n_shot` supports of a class from images not in `used`, which grows when images must be distinct.

        Returns: the supports, and further ones from used images that were met on the way, but for the query's `image`.
        """
        shots = self.shots(name)
        taken: list[Support] = []
        spare: list[Support] = []
        for place in _shuffled(len(shots), generator):
            support = shots[place]
            if support.image_id not in used:
                taken.append(support)
                if distinct_images:
                    used.add(support.image_id)
            elif support.image_id != image:
                spare.append(support)
            if len(taken) == n_shot:
                break
        return taken, spare


def _policy_of(policy: str | CropPolicy) -> CropPolicy:
    """A crop policy by name or as it is. Raises: ValueError for an unknown name."""
    if isinstance(policy, str) and policy not in CROP_POLICIES:
        raise ValueError(f'Unknown crop policy "{policy}"; expected one of {", ".join(CROP_POLICIES)}')
    return CROP_POLICIES[policy] if isinstance(policy, str) else policy


def _shuffled(size: int, generator: np.random.Generator) -> Iterator[int]:
    """The numbers below `size` in random order, each drawn when it is asked for.

    A whole permutation would cost more than all that an episode does with its first few entries.
    """
    moved: dict[int, int] = {}  # an array of the numbers in order, of which only the changed places exist
    for last in range(size - 1, -1, -1):
        place = int(generator.integers(last + 1))
        yield moved.get(place, place)
        moved[place] = moved.pop(last, last)


def seeded_generator(seed: int, epoch: int, image: int | str) -> np.random.Generator:
    """Generator of (seed, epoch, image), the same in every process; Python's own hash of a string is not."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{image}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
