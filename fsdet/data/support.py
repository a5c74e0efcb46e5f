"""SupportSet: K-shot dataset dicts -> labelled crops, the second input of support-conditioned detectors.

The set is built from the same dicts that fine-tuning methods train on. What of a picture a method sees is its crop
policy: DeFRCN takes the whole picture and pools the box ("whole"), FewX a square with context of 320 x 320 pixels
("context_square"), OS2D the object alone at a fixed area ("tight"). Pictures are read when a crop is asked for.

Source: DeFRCN (Qiao et al., ICCV 2021); FewX (Fan et al., CVPR 2020) and its release; OS2D (Osokin et al., ECCV 2020).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image

CONTEXT = 16  # px of the source picture on both ends of the long side (FewX)
CROP_SIZE = 320  # px, side of a context square (FewX)
CLASS_IMAGE_SIZE = 240  # px, root of the area of a tight crop (OS2D)


class CropPolicy(Protocol):
    """(picture (H, W, 3) uint8, box XYXY in its pixels) -> (crop (h, w, 3) uint8, box (4,) float32 on the crop)."""

    def __call__(self, image: np.ndarray, box: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Cut the crop of one support."""
        ...


def _long_side(low: int, high: int, limit: int) -> tuple[int, int, int]:
    """Cut on the long side: (start, length, place of the box in it), context on both ends, ended by the border."""
    start, end, place = low - CONTEXT, min(high + CONTEXT, limit), CONTEXT
    if start < 0:
        start, place = 0, place + start
    return start, end - start, place


def _short_side(low: int, high: int, limit: int, length: int) -> tuple[int, int, int, int]:
    """Cut on the short side, centred on the box: (start, end, black pixels before it, place of the box)."""
    centre = int((low + high) / 2)
    start, end = int(centre - length / 2), min(int(centre + length / 2), limit)
    place = math.ceil((length - (high - low)) / 2)
    if start < 0:
        start, place = 0, place + start
    before = int((length - (end - start)) / 2)
    return start, end, before, place + before


def fewx_support_crop(image: np.ndarray, box: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Square crop with 16 pixels of context along the long side of the box, black beyond the border, 320 x 320.

    All numbers are cut to integers as in the release; a very thin box can end without width.

    Args:
        image: (H, W, 3) uint8, channel order kept.
        box: (x0, y0, x1, y1) in pixels of the picture.
    Returns: crop (320, 320, 3) uint8 and box (4,) float32, XYXY in pixels of the crop.
    Raises: ValueError for a box that has no length inside the picture.
    Source: FewX release, support preparation script.
    """
    x0, y0, x1, y1 = (int(value) for value in box)
    height, width = image.shape[:2]
    if x1 - x0 >= y1 - y0:
        left, length, place_x = _long_side(x0, x1, width)
        top, bottom, black_y, place_y = _short_side(y0, y1, height, max(length, 0))
        cut, corner = image[top:bottom, left : left + length], (black_y, 0)
    else:
        top, length, place_y = _long_side(y0, y1, height)
        left, right, black_x, place_x = _short_side(x0, x1, width, max(length, 0))
        cut, corner = image[top : top + length, left:right], (0, black_x)
    if cut.size == 0:
        raise ValueError(
            f"The support box {tuple(box)} leaves nothing of its picture of {width} x {height} pixels (width x height)"
        )
    square = np.zeros((length, length, 3), np.float32)
    square[corner[0] : corner[0] + cut.shape[0], corner[1] : corner[1] + cut.shape[1]] = cut
    crop = cv2.resize(square, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    scale = CROP_SIZE / length
    corners = (place_x, place_y, place_x + x1 - x0, place_y + y1 - y0)
    return crop, np.array([int(value * scale) for value in corners], np.float32)


def area_size(height: int, width: int, target: int = CLASS_IMAGE_SIZE) -> tuple[int, int]:
    """(H, W) with the given ratio and about target² pixels, cut to integers, at least 1.

    Source: OS2D release, resizing of class images.
    """
    ratio = math.sqrt(height / width)
    return max(1, int(target * ratio)), max(1, int(target / ratio))


def tight_crop(
    image: np.ndarray, box: Sequence[float], target: int = CLASS_IMAGE_SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """The object alone, resized to about target² pixels with its ratio kept (antialiased bilinear, as OS2D evaluates).

    Args:
        image: (H, W, 3) uint8.
        box: (x0, y0, x1, y1) in pixels of the picture; widened to whole pixels and cut at the border.
        target: side in pixels of a square of the wanted area.
    Returns: crop (h, w, 3) uint8 and its own extent (0, 0, w, h) as float32.
    Raises: ValueError for a box outside the picture.
    """
    height, width = image.shape[:2]
    x0, y0 = max(math.floor(box[0]), 0), max(math.floor(box[1]), 0)
    x1, y1 = min(math.ceil(box[2]), width), min(math.ceil(box[3]), height)
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"The support box {tuple(box)} leaves nothing of its picture of {width} x {height} pixels (width x height)"
        )
    new_h, new_w = area_size(y1 - y0, x1 - x0, target)
    cut = Image.fromarray(np.ascontiguousarray(image[y0:y1, x0:x1]))
    crop = np.asarray(cut.resize((new_w, new_h), Image.Resampling.BILINEAR))
    return crop, np.array([0, 0, new_w, new_h], np.float32)


def whole_image(image: np.ndarray, box: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The picture as it is, with the box in its pixels."""
    return image, np.asarray(box, np.float32)


CROP_POLICIES: dict[str, CropPolicy] = {
    "context_square": fewx_support_crop,
    "tight": tight_crop,
    "whole": whole_image,
}


@dataclass(frozen=True)
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
        if isinstance(policy, str) and policy not in CROP_POLICIES:
            raise ValueError(f'Unknown crop policy "{policy}"; expected one of {", ".join(CROP_POLICIES)}')
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f'Unknown image format "{image_format}"; expected BGR or RGB')
        self.classes = tuple(classes)
        self.policy: CropPolicy = CROP_POLICIES[policy] if isinstance(policy, str) else policy
        self.image_format = image_format
        self._shots: list[list[Support]] = [[] for _ in self.classes]
        for support in supports:
            if not 0 <= support.class_id < len(self.classes):
                raise ValueError(
                    f"{support.file_name}: class id {support.class_id} of annotation {support.annotation_id} is not in "
                    f"[0, {len(self.classes)}), the classes {list(self.classes)}"
                )
            self._shots[support.class_id].append(support)

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
                tuple(BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)),
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
        for name, shots in zip(self.classes, self._shots, strict=True):
            yield name, tuple(shots)

    def shots(self, class_name: str) -> tuple[Support, ...]:
        """Supports of a class, in the order of the records. Raises: ValueError for an unknown name."""
        if class_name not in self.classes:
            raise ValueError(f'No class "{class_name}" in the support set; it has {list(self.classes)}')
        return tuple(self._shots[self.classes.index(class_name)])

    def crop(self, support: Support) -> SupportCrop:
        """Read the picture of a support and cut it under the policy.

        Raises: FileNotFoundError or ValueError naming the file when it is missing or cannot be decoded.
        """
        try:
            image = read_image(support.file_name, format=self.image_format)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{support.file_name}: picture of support {support.annotation_id} not found; unpack the data set again"
            ) from None
        except OSError as error:
            raise ValueError(f"{support.file_name}: cannot be decoded ({error}); replace the file") from error
        crop, box = self.policy(image, support.box)
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
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        distinct_images: bool = False,
    ) -> dict[str, tuple[Support, ...]]:
        """Draw the supports that one query image meets, from a generator seeded with (seed, epoch, image).

        Args:
            n_way: classes of the episode.
            n_shot: supports of each class.
            seed, epoch, image: seed of the draw; supports from this image are never drawn.
            include: classes that must be there, first in the result (the query's class).
            exclude: classes that must not be drawn (others that the query shows).
            distinct_images: draw every support from another image, over all classes of the episode (FewX).
        Returns: class name -> its supports.
        Raises: ValueError naming class, needed and found when classes or supports do not suffice.
        """
        generator = _generator(seed, epoch, image)
        named = set(include) | set(exclude)
        if unknown := sorted(named - set(self.classes)):
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
            result[name] = self._draw(name, n_shot, used, generator, distinct_images)
        return result

    def _draw(
        self, name: str, n_shot: int, used: set[int | str], generator: np.random.Generator, distinct_images: bool
    ) -> tuple[Support, ...]:
        """`n_shot` supports of a class from images not in `used`, which grows when images must be distinct."""
        shots = [support for support in self.shots(name) if support.image_id not in used]
        taken: list[Support] = []
        for place in generator.permutation(len(shots)):
            if len(taken) == n_shot:
                break
            if distinct_images and shots[place].image_id in used:
                continue
            taken.append(shots[place])
            if distinct_images:
                used.add(shots[place].image_id)
        if len(taken) < n_shot:
            kind = "supports from different images" if distinct_images else "supports from other images"
            raise ValueError(
                f'Class "{name}": {n_shot} {kind} needed, {len(taken)} found of {len(self.shots(name))} shots; ask for '
                "fewer supports or more shots"
            )
        return tuple(taken)


def _generator(seed: int, epoch: int, image: int | str) -> np.random.Generator:
    """Generator of (seed, epoch, image), the same in every process; Python's own hash of a string is not."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{image}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
