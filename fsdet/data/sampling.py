"""Drawing K-shot samples: the official algorithms, which must stay as they are, and a corrected one.

All samplers draw from a *pool*: for each class the images that show it, as `ClassImage`. They return, for each class
and each number of shots K, the drawn images in file order. Every sample is nested: the 2-shot sample begins with the
1-shot one, and so on.

Source: TFA (Wang et al., ICML 2020) section 4.1 and its released sample lists, which DeFRCN (Qiao et al., ICCV 2021)
uses too. `sample_strict` is ours: the official VOC sampler neither reaches nor keeps to K.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

VOC_SHOTS = (1, 2, 3, 5, 10)
COCO_SHOTS = (1, 2, 3, 5, 10, 30)
STRICT_VERSION = 1  # raise it with every change that alters a draw
UNITS = ("image", "instance")


@dataclass(frozen=True)
class ClassImage:
    """The objects of one class in one image.

    image: image id, a string for VOC and a number for COCO.
    objects: annotation ids (COCO) or positions in the XML file counted from 0 (VOC), in file order; no crowd regions.
    difficult: those of `objects` that are marked difficult.
    """

    image: str | int
    objects: tuple[int, ...]
    difficult: frozenset[int] = frozenset()


Pool = Mapping[str, Sequence[ClassImage]]  # class name -> images, in the order of the annotation files
Draws = dict[str, dict[int, list[ClassImage]]]  # class name -> K -> drawn images, in file order


def voc_pool(images: Iterable[tuple[str, Sequence[tuple[str, bool]]]], classes: Sequence[str]) -> dict:
    """Pool of VOC images.

    Args:
        images: (image id, objects) in the order of the image sets; an object is (class name, is difficult).
        classes: classes of the pool, in the order in which they are drawn. Objects of other classes are passed over.
    """
    pool: dict[str, list[ClassImage]] = {name: [] for name in classes}
    for image, objects in images:
        for name in dict.fromkeys(n for n, _ in objects if n in pool):
            rows = [(i, hard) for i, (n, hard) in enumerate(objects) if n == name]
            pool[name].append(ClassImage(image, tuple(i for i, _ in rows), frozenset(i for i, hard in rows if hard)))
    return pool


def coco_pool(annotations: Iterable[Mapping], names: Mapping[int, str]) -> dict:
    """Pool of COCO annotations; crowd regions are left out.

    Args:
        annotations: COCO annotations in file order, which decides the order of the images.
        names: category id -> class name, in the order in which the classes are drawn.
    """
    found: dict[int, dict[int, list[Mapping]]] = {category: {} for category in names}
    for annotation in annotations:
        if annotation["category_id"] in found and not annotation.get("iscrowd", 0):
            found[annotation["category_id"]].setdefault(annotation["image_id"], []).append(annotation)
    return {
        names[category]: [
            ClassImage(
                image,
                tuple(row["id"] for row in rows),
                frozenset(row["id"] for row in rows if row.get("difficult", 0) or row.get("ignore", 0)),
            )
            for image, rows in images.items()
        ]
        for category, images in found.items()
    }


def sample_voc_legacy(pool: Pool, seed: int, shots: Sequence[int] = VOC_SHOTS) -> Draws:
    """Draw VOC samples with the official algorithm, faults included.

    One generator serves all classes of a seed, so the order of `pool` and all of `shots` are part of the recipe. For
    each K the generator draws as many images as K exceeds the K before, from all images of the class; they are appended
    until these images alone show that many objects. An image may therefore come twice, a list may show more objects
    than K, and a list of many-object images is shorter than K lines. Difficult objects count.

    Args:
        pool: all 20 classes in alphabetical order, with the images of VOC2007 trainval before those of VOC2012.
    Raises: ValueError naming a class with fewer images than an increment of K.
    Source: TFA's preparation script for VOC, with the faults that its users reported.
    """
    generator = random.Random(seed)
    draws: Draws = {}
    for name, images in pool.items():
        taken: list[ClassImage] = []
        draws[name] = {}
        for shot, needed in zip(shots, _increments(shots), strict=True):
            if len(images) < needed:
                raise ValueError(
                    f'The legacy sampler draws {needed} images at once for {shot} shots of "{name}", which has '
                    f"{len(images)}. Ask for fewer shots or draw with the strict sampler."
                )
            objects = 0
            for image in generator.sample(list(images), needed):
                taken.append(image)
                objects += len(image.objects)
                if objects >= needed:
                    break
            draws[name][shot] = list(taken)
    return draws


def sample_coco_legacy(pool: Pool, seed: int, shots: Sequence[int] = COCO_SHOTS) -> Draws:
    """Draw COCO samples with the official algorithm: whole images, exactly K annotations.

    One generator serves all classes of a seed (order of `pool` and all of `shots` are part of the recipe). For each K
    it draws K images over and over; an image enters if it is new and its objects of the class do not exceed K.

    Raises: ValueError naming the class where no image is left that fits; the official script never ends there.
    Source: TFA's preparation script for COCO.
    """
    generator = random.Random(seed)
    draws: Draws = {}
    for name, images in pool.items():
        images = list(images)
        taken: list[ClassImage] = []
        draws[name] = {}
        for shot in shots:
            missing = shot - sum(len(image.objects) for image in taken)
            while missing:
                if len(images) < shot or not any(len(i.objects) <= missing and i not in taken for i in images):
                    raise ValueError(
                        f'The legacy sampler cannot reach {shot} shots of "{name}": it needs {shot} images to draw '
                        f"from and an unused one with at most {missing} instances; the class has {len(images)} images "
                        f"and {_count(images)} instances. Ask for fewer shots or draw with the strict sampler."
                    )
                for image in generator.sample(images, shot):
                    if image in taken or len(image.objects) > missing:
                        continue
                    taken.append(image)
                    missing -= len(image.objects)
                    if not missing:
                        break
            draws[name][shot] = list(taken)
    return draws


def sample_strict(
    images: Sequence[ClassImage],
    shots: Sequence[int],
    *,
    seed: int,
    class_name: str,
    dataset: str,
    unit: str = "image",
    difficult: bool = False,
    named_objects: bool = True,
    source: str = "the pool",
) -> dict[int, list[ClassImage]]:
    """Draw exactly K instances of one class for every K, nested; anything else is an error.

    The images are brought into a random order, which depends on nothing but `dataset`, `seed` and `class_name`: not on
    the order of the annotation file, on other classes or on Python's hash. For each K the walk goes through that order
    and takes an image when all its objects still fit and the rest can be completed to exactly K, for this K and all
    that follow. With unit "image" a sample holds every object of the class in its images that may be drawn, so that
    none of them is left unlabelled there; with "instance" single objects are drawn.

    Args:
        images: images of the class.
        shots: rising numbers of shots.
        dataset: name of the data set, part of the generator's seed.
        unit: "image" or "instance", see above.
        difficult: count difficult objects like others; otherwise they are never drawn.
        named_objects: whether the list that will be written names its objects (COCO) or only its images (VOC text). In
            the second case a reader makes an instance of every object of the class it finds there, difficult ones by
            its own switch, so images with a difficult one are passed over unless `difficult`: K holds either way.
        source: annotation file, for messages.
    Returns: K -> images in file order, `objects` being the drawn ones.
    Raises: ValueError naming class, needed and found instances, source and remedy.
    """
    if unit not in UNITS or (unit == "instance" and not named_objects):
        raise ValueError(
            f'Unit "{unit}" is not possible here; whole images ("image") always are, "instance" needs COCO'
        )
    usable = _usable(images, difficult, named_objects)
    if unit == "instance":
        usable = [replace(image, objects=(i,)) for image in usable for i in image.objects]
    increments = _increments(shots)
    listed = "objects" if named_objects else "images"
    fault = _shortage(images, usable, increments, class_name=class_name, source=source, unit=unit, listed=listed)
    if fault:
        raise ValueError(fault)

    order = sorted(usable, key=lambda image: (str(image.image), image.objects))
    generator_for("strict", STRICT_VERSION, dataset, seed, class_name).shuffle(order)
    sizes = Counter(len(image.objects) for image in order)
    taken: dict[ClassImage, None] = {}
    draws = {}
    for position, shot in enumerate(shots):
        missing = increments[position]
        for image in order:
            size = len(image.objects)
            if size > missing or image in taken:
                continue
            if not _can_complete(sizes - Counter([size]), (missing - size, *increments[position + 1 :])):
                continue
            taken[image] = None
            sizes -= Counter([size])
            missing -= size
        assert missing == 0, "the walk takes only what can be completed"
        draws[shot] = list(taken)
    return draws


def generator_for(*key: str | int) -> random.Random:
    """Generator whose stream depends on the values of `key` alone, on every rank and in every Python process."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def choose_instances(count: int, shot: int, *, split: int, seed: int, class_name: str) -> list[int]:
    """Choose `shot` of `count` instances of a class where a list holds more than were asked for.

    The choice depends on (split, seed, class, count) alone, so all ranks and all runs agree, whatever the state of the
    global generators; for one `count` it is nested over `shot`.

    Returns: rising indices in [0, count); all of them if there are no more than `shot`.
    Raises: ValueError for a negative count or fewer than one shot.
    """
    if count < 0 or shot < 1:
        raise ValueError(f'Cannot choose {shot} of {count} instances of "{class_name}"; expected shot >= 1, count >= 0')
    indices = list(range(count))
    if count > shot:
        generator_for("choose", split, seed, class_name).shuffle(indices)
    return sorted(indices[:shot])


def _count(images: Iterable[ClassImage]) -> int:
    return sum(len(image.objects) for image in images)


def _increments(shots: Sequence[int]) -> tuple[int, ...]:
    """What each K adds to the one before."""
    increments = tuple(shot - before for before, shot in zip((0, *shots[:-1]), shots, strict=True))
    if not shots or any(increment < 1 for increment in increments):
        raise ValueError(f"Numbers of shots must be positive and rise, got {list(shots)}")
    return increments


def _usable(images: Sequence[ClassImage], difficult: bool, named_objects: bool) -> list[ClassImage]:
    """The images and objects that the strict sampler may draw."""
    if difficult:
        return list(images)
    if not named_objects:
        return [image for image in images if not image.difficult]
    kept = (replace(i, objects=tuple(o for o in i.objects if o not in i.difficult)) for i in images)
    return [image for image in kept if image.objects]


def _shortage(
    images: Sequence[ClassImage], usable: Sequence[ClassImage], increments: tuple[int, ...], **names: str
) -> str:
    """What keeps the class from giving exactly K instances for every K, with remedies, or an empty string."""
    needed, found, class_name, source = sum(increments), _count(usable), names["class_name"], names["source"]
    sizes = Counter(len(image.objects) for image in usable)
    if _can_complete(sizes, increments):
        return ""
    reached = next(n for n in reversed(range(len(increments))) if n == 0 or _can_complete(sizes, increments[:n]))
    remedies = ["annotate more"]
    if reached:
        remedies.insert(0, f"ask for K up to {sum(increments[:reached])} (--shots)")
    if _count(images) >= needed and _count(images) > found:
        remedies.append(
            f"take the {_count(images) - found} that are difficult or share a VOC image with such too (--difficult)"
        )
    if found >= needed and names["unit"] == "image" and names["listed"] == "objects":
        remedies.append("draw single instances (--unit instance)")
    remedy = ", or ".join(remedies)
    fault = f'{needed} shots of "{class_name}" need {needed} instances, {source} has {found} that can be drawn'
    if found >= needed:
        counted = ", ".join(f"{number} with {size}" for size, number in sorted(sizes.items()))
        fault += f", but no choice of whole images ({counted}) adds {list(increments)} instances one after the other"
    return f"{fault}. {remedy[0].upper()}{remedy[1:]}."


def _can_complete(sizes: Counter[int], needs: tuple[int, ...]) -> bool:
    """Whether disjoint groups of images, `sizes` telling how many hold n objects, add up to each of `needs` exactly."""
    total = sum(needs)
    # More images of one size than could ever be used would only spoil the cache.
    capped = ((size, min(number, total // size)) for size, number in sorted(sizes.items()) if size <= total)
    return _completes(tuple((size, number) for size, number in capped if number > 0), needs)


@lru_cache(maxsize=1 << 16)
def _completes(sizes: tuple[tuple[int, int], ...], needs: tuple[int, ...]) -> bool:
    if len(needs) == 1:  # one sum: bit n of `sums` tells whether n can be reached
        sums = 1
        for size, number in sizes:
            for _ in range(number):
                sums |= sums << size
        return bool(sums >> needs[0] & 1)
    if needs[0] == 0:
        return _completes(sizes, needs[1:])
    # Large images first: small ones are what later needs are completed with.
    for position in reversed(range(len(sizes))):
        size, number = sizes[position]
        if size > needs[0]:
            continue
        left = ((size, number - 1),) if number > 1 else ()
        if _completes(sizes[:position] + left + sizes[position + 1 :], (needs[0] - size, *needs[1:])):
            return True
    return False
