"""The embedded data set of `make demo`: handwritten digits in cluttered scenes, COCO format, made offline in seconds.

The pictures are put together from what scikit-learn ships: 1,797 handwritten digits of 8 x 8 pixels (Alpaydin and
Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998), set with random size, slant, colour and contrast into
crops of two photographs, among letter-like shapes that are not digits. Six digits are base classes, four are novel.
Train and test share neither a handwriting sample nor a part of a photograph.

Every picture comes from its own generator, seeded with (seed, part, picture), so that the same version of this file
makes the same data set however many pictures are asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from PIL import Image

from fsdet.data.prepare import Recipe, draw_coco
from fsdet.data.seeds import write_files

logger = logging.getLogger(__name__)

VERSION = 1  # raise it with every change that alters a pixel, a box or a sample list
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOVEL_CLASSES = ("six", "seven", "eight", "nine")
BASE_CLASSES = tuple(name for name in CLASSES if name not in NOVEL_CLASSES)
SHOTS = (1, 2, 3, 5, 10)
SEEDS = range(10)

MARKER = "quickstart.json"
# What scikit-learn's notes ask to be named wherever a picture is shown.
LICENSE = {
    "id": 1,
    "name": "Backgrounds: photographs by danielbuechele and vultilion, CC BY 2.0, changed",
    "url": "https://creativecommons.org/licenses/by/2.0/",
}
PARTS = {"train": 0, "test": 1}
OBJECTS = (2, 4)  # digits in a picture, both ends included
DISTRACTORS = (1, 4)
SIZES = (18.0, 56.0)  # height of a digit in pixels, drawn evenly in the logarithm
MAX_OVERLAP = 0.2  # of the smaller box
MIXED_TRAIN = 0.2  # fraction of the training pictures that may show novel digits, as unlabelled in base training
CONTRAST = (55.0, 150.0)  # distance in brightness between a digit and the scene under it, 0-255

# Strokes of shapes that are drawn like digits and must not be found, on a grid of 4 x 6 (x right, y down).
LETTERS = (
    (((0, 6), (2, 0), (4, 6)), ((1, 4), (3, 4))),  # A
    (((4, 0), (0, 0), (0, 6), (4, 6)), ((0, 3), (3, 3))),  # E
    (((4, 0), (0, 0), (0, 6)), ((0, 3), (3, 3))),  # F
    (((0, 0), (0, 6)), ((4, 0), (4, 6)), ((0, 3), (4, 3))),  # H
    (((0, 0), (0, 6)), ((4, 0), (0, 3), (4, 6))),  # K
    (((0, 6), (0, 0), (2, 3), (4, 0), (4, 6)),),  # M
    (((0, 6), (0, 0), (4, 6), (4, 0)),),  # N
    (((0, 6), (0, 0), (4, 1), (4, 2), (0, 3)),),  # P
    (((0, 0), (4, 0)), ((2, 0), (2, 6))),  # T
    (((0, 0), (0, 6), (4, 6), (4, 0)),),  # U
    (((0, 0), (1, 6), (2, 3), (3, 6), (4, 0)),),  # W
    (((0, 0), (4, 6)), ((4, 0), (0, 6))),  # X
    (((0, 0), (2, 3), (4, 0)), ((2, 3), (2, 6))),  # Y
    (((2, 0), (2, 6)), ((0, 3), (4, 3))),  # plus
)


@dataclass(frozen=True)
class QuickstartPaths:
    """Where the files of one copy lie. `samples` holds the K-shot lists in the official COCO layout (seedN/...)."""

    root: Path
    train_json: Path
    test_json: Path
    train_images: Path
    test_images: Path
    samples: Path


def _paths(root: Path) -> QuickstartPaths:
    return QuickstartPaths(
        root, root / "train.json", root / "test.json", root / "train", root / "test", root / "samples"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures. Images are (H, W, 3) float32 RGB in 0-255, masks (H, W) float32 in 0-1, boxes (x0, y0, x1, y1) in pixels.
# ---------------------------------------------------------------------------------------------------------------------


def _sample_data() -> ModuleType:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "The quickstart data is made from scikit-learn's samples: pip install scikit-learn"
        ) from error
    return datasets


def load_glyphs(part: str) -> dict[str, np.ndarray]:
    """Handwriting samples of "train" or "test" by class name: (M, 8, 8) float32 ink in 0-1.

    The first two thirds of scikit-learn's list are for training, the rest for the test. The list is ordered by writer,
    so almost every test digit is in a hand that training never saw.
    """
    data = _sample_data().load_digits()
    cut = len(data.target) * 2 // 3
    chosen = slice(None, cut) if part == "train" else slice(cut, None)
    ink, digits = data.images[chosen].astype(np.float32) / 16.0, data.target[chosen]
    return {name: ink[digits == digit] for digit, name in enumerate(CLASSES)}


def load_photographs(part: str) -> list[np.ndarray]:
    """The two photographs scikit-learn ships, (H, W, 3) float32 RGB; the left 60 % for training, the rest for test."""
    cut = 0.6
    photographs = []
    for photograph in _sample_data().load_sample_images().images:
        column = int(photograph.shape[1] * cut)
        half = photograph[:, :column] if part == "train" else photograph[:, column:]
        photographs.append(np.ascontiguousarray(half, dtype=np.float32))
    return photographs


def _background(generator: np.random.Generator, photographs: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """A crop of a photograph with changed scale, direction, colour and contrast, (H, W, 3)."""
    height, width = size
    photograph = photographs[generator.integers(len(photographs))]
    largest = min(photograph.shape[0] / height, photograph.shape[1] / width)
    scale = generator.uniform(0.45, min(largest, 1.6))  # photograph pixels per picture pixel
    crop_h, crop_w = int(height * scale), int(width * scale)
    top = generator.integers(photograph.shape[0] - crop_h + 1)
    left = generator.integers(photograph.shape[1] - crop_w + 1)
    crop = cv2.resize(
        photograph[top : top + crop_h, left : left + crop_w], (width, height), interpolation=cv2.INTER_LINEAR
    )
    if generator.random() < 0.5:
        crop = crop[:, ::-1]
    mean = crop.mean(axis=(0, 1), keepdims=True)
    crop = (crop - mean) * generator.uniform(0.4, 1.1) + generator.uniform(50, 205)
    return crop * generator.uniform(0.75, 1.25, size=3) + generator.normal(0, 4, size=(height, width, 1))


def _draw_letter(generator: np.random.Generator) -> np.ndarray:
    """One shape of LETTERS as coarse as the digits are, so that only its form tells it apart: (8, 8) ink in 0-1."""
    cell = 16  # pixels of the drawing per pixel of the result
    canvas = np.zeros((8 * cell, 8 * cell), np.uint8)
    spread = generator.uniform(0.8, 1.3)
    for stroke in LETTERS[generator.integers(len(LETTERS))]:
        points = np.asarray(stroke, np.float64) + generator.normal(0, 0.2, size=(len(stroke), 2))
        points = (points - (2, 3)) * (cell * spread, cell) + 4 * cell
        cv2.polylines(canvas, [points.round().astype(np.int32)], isClosed=False, color=255, thickness=cell)
    return cv2.resize(canvas.astype(np.float32) / 255.0, (8, 8), interpolation=cv2.INTER_AREA)


def _warp(generator: np.random.Generator, ink: np.ndarray, height: float) -> np.ndarray:
    """Enlarge an (8, 8) drawing to about `height` pixels with random slant, width and turn; returns a tight mask."""
    side = int(math.ceil(height * 2.2))
    turn = math.radians(generator.uniform(-20, 20))  # small enough that a six never becomes a nine
    slant, stretch = generator.uniform(-0.25, 0.25), generator.uniform(0.8, 1.25)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = height / 8.0 * rotation @ np.array([[stretch, slant], [0.0, 1.0]])
    shift = side / 2.0 - matrix @ np.array([3.5, 3.5])
    mask = cv2.warpAffine(ink, np.hstack([matrix, shift[:, None]]), (side, side), flags=cv2.INTER_CUBIC)
    mask = np.clip((mask - 0.25) / 0.4, 0.0, 1.0)  # turns the blur of the enlargement into an edge
    rows, columns = np.flatnonzero(mask.max(axis=1) > 0.5), np.flatnonzero(mask.max(axis=0) > 0.5)
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    generator: np.random.Generator, mask: np.ndarray, taken: Sequence[tuple], size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """A box of the mask's size that overlaps the taken ones by MAX_OVERLAP at most; None when there is no room."""
    h, w = mask.shape
    if h > size[0] or w > size[1]:
        return None
    for _ in range(20):
        y, x = int(generator.integers(size[0] - h + 1)), int(generator.integers(size[1] - w + 1))
        box = (x, y, x + w, y + h)
        if all(_overlap(box, other) <= MAX_OVERLAP for other in taken):
            return box
    return None


def _overlap(a: tuple, b: tuple) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(w, 0) * max(h, 0) / smaller


def _paint(generator: np.random.Generator, image: np.ndarray, mask: np.ndarray, box: tuple) -> None:
    """Blend a mask into the image in a random colour that stands out from the scene under it by CONTRAST."""
    x0, y0, x1, y1 = box
    region = image[y0:y1, x0:x1]
    under = float(region.mean())
    contrast = generator.uniform(*CONTRAST)
    darker = generator.random() < 0.5
    if under < contrast:
        darker = False
    elif under > 255 - contrast:
        darker = True
    colour = under + (-contrast if darker else contrast) + generator.normal(0, 30, size=3)
    shade = 1 + generator.uniform(-0.15, 0.15) * np.linspace(-1, 1, mask.shape[0], dtype=np.float32)
    opacity = (mask * generator.uniform(0.8, 1.0))[..., None]
    region *= 1 - opacity
    region += opacity * colour * shade[:, None, None]


def _count(generator: np.random.Generator, limits: tuple[int, int]) -> int:
    return int(generator.integers(limits[0], limits[1] + 1))


def make_scene(
    generator: np.random.Generator,
    glyphs: dict[str, np.ndarray],
    photographs: Sequence[np.ndarray],
    size: tuple[int, int],
) -> tuple[np.ndarray, list[tuple[str, tuple[int, int, int, int]]]]:
    """One picture: digits of the classes in `glyphs` among letter-like shapes.

    Args:
        generator: source of all randomness.
        glyphs: class name -> (M, 8, 8) ink in 0-1.
        photographs: (H, W, 3) arrays from which the background is cut.
        size: (H, W) of the picture in pixels.
    Returns: (H, W, 3) uint8 RGB and (class name, box) of each digit, boxes (x0, y0, x1, y1) in pixels around the ink.
    """
    image = _background(generator, photographs, size)
    names = list(glyphs)
    shapes: list[str | None] = [names[generator.integers(len(names))] for _ in range(_count(generator, OBJECTS))]
    shapes += [None] * _count(generator, DISTRACTORS)
    taken: list[tuple] = []
    objects = []
    for name in shapes:
        ink = _draw_letter(generator) if name is None else glyphs[name][generator.integers(len(glyphs[name]))]
        mask = _warp(generator, ink, math.exp(generator.uniform(*np.log(SIZES))))
        box = _place(generator, mask, taken, size)
        if box is None:
            continue
        _paint(generator, image, mask, box)
        taken.append(box)
        if name is not None:
            objects.append((name, box))
    return np.clip(image.round(), 0, 255).astype(np.uint8), objects


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def make_quickstart(
    root: Path,
    *,
    train_images: int = 500,
    test_images: int = 120,
    size: tuple[int, int] = (128, 160),
    seed: int = 0,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
) -> QuickstartPaths:
    """Make the data set in `root`, or return at once when a whole, equal copy is there.

    The folder appears complete or not at all: it is made beside its place and renamed. A stale copy is replaced; a
    folder that this function has not made is never touched.

    Args:
        root: folder of the copy.
        train_images, test_images: numbers of pictures.
        size: (H, W) of a picture in pixels, each 64-256.
        seed: of the pictures; the K-shot seeds are `seeds`.
        shots, seeds: which K-shot lists to draw. Every class needs max(shots) objects in the training pictures.
    Raises: ValueError for a value out of range or too few pictures for `shots`; FileExistsError for a folder in use;
        ImportError when scikit-learn is missing.
    """
    if min(train_images, test_images) < 1 or not all(64 <= side <= 256 for side in size):
        raise ValueError(
            f"Expected at least one picture of each part and sides of 64-256 pixels; got {train_images} training and "
            f"{test_images} test pictures of {size[0]} x {size[1]}"
        )
    recipe = {
        "version": VERSION,
        "train_images": train_images,
        "test_images": test_images,
        "size": list(size),
        "seed": seed,
        "shots": list(shots),
        "seeds": list(seeds),
    }
    root = Path(root)
    if _is_current(root, recipe):
        return _paths(root)
    if root.exists() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise FileExistsError(f"{root} holds other files; name a new or empty folder for the quickstart data")
    partial = root.parent / f".{root.name}.{os.getpid()}.partial"
    try:
        _build(_paths(partial), recipe)
        if root.exists():
            shutil.rmtree(root)
        partial.rename(root)
    except OSError:
        if not _is_current(root, recipe):  # else another process has made the same copy meanwhile
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("Made %d training and %d test pictures in %s", train_images, test_images, root)
    return _paths(root)


def _build(paths: QuickstartPaths, recipe: dict[str, Any]) -> None:
    """Write everything, the marker last."""
    paths.root.mkdir(parents=True)
    for part in PARTS:
        _write_part(paths, part, recipe[f"{part}_images"], tuple(recipe["size"]), recipe["seed"])
    # Whole images: a drawn picture leaves no other object of its class unlabelled.
    draw = Recipe(tuple(recipe["seeds"]), tuple(recipe["shots"]), unit="image", dataset="quickstart")
    write_files(draw_coco(paths.train_json, paths.samples, draw))
    marker = {**recipe, "digest": content_digest(paths.root)}
    (paths.root / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def _is_current(root: Path, recipe: dict[str, Any]) -> bool:
    """Whether `root` holds a copy made by this recipe that nobody has changed since."""
    try:
        marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return marker == {**recipe, "digest": marker.get("digest")} and marker["digest"] == content_digest(root)


def content_digest(root: Path) -> str:
    """SHA-256 over the relative paths and contents of all files below `root`, the marker left out."""
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != MARKER):
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _write_part(paths: QuickstartPaths, part: str, count: int, size: tuple[int, int], seed: int) -> None:
    """Write the pictures of one part as PNG (every decoder gives the same pixels) and its COCO json."""
    json_file, folder = getattr(paths, f"{part}_json"), getattr(paths, f"{part}_images")
    glyphs, photographs = load_glyphs(part), load_photographs(part)
    base_glyphs = {name: glyphs[name] for name in BASE_CLASSES}
    folder.mkdir()
    images, annotations = [], []
    for number in range(1, count + 1):
        generator = np.random.default_rng((seed, PARTS[part], number))
        with_novel = part == "test" or generator.random() < MIXED_TRAIN
        pixels, objects = make_scene(generator, glyphs if with_novel else base_glyphs, photographs, size)
        name = f"{part}_{number:05d}.png"
        Image.fromarray(pixels).save(folder / name, compress_level=1)
        images.append({"id": number, "file_name": name, "height": size[0], "width": size[1], "license": 1})
        for class_name, box in objects:
            annotations.append(_annotation(len(annotations) + 1, number, class_name, box))
    content = {
        "info": {
            "description": f"fsdet quickstart, {part} part: handwritten digits in scenes",
            "version": str(VERSION),
        },
        "licenses": [LICENSE],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)],
    }
    json_file.write_text(json.dumps(content), encoding="utf-8")


def _annotation(number: int, image_id: int, name: str, box: tuple[int, int, int, int]) -> dict[str, Any]:
    width, height = box[2] - box[0], box[3] - box[1]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CLASSES.index(name) + 1,
        "bbox": [box[0], box[1], width, height],
        "area": width * height,
        "iscrowd": 0,
    }
