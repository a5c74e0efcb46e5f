"""Detect objects in images and folders: drawn pictures and one JSON file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsdet.data.files import save_text_atomic
from fsdet.data.mapper import ImageError
from fsdet.data.pictures import IMAGE_SUFFIXES, is_picture
from fsdet.engine.detection import Detection
from fsdet.engine.predictor import Predictor

logger = logging.getLogger(__name__)


def find_images(inputs: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """Image files named by `inputs` or lying below folders among them, as (file, name for its result).

    Raises: FileNotFoundError for an input that does not exist and when no image is found.
    """
    found: list[tuple[Path, Path]] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            found += [(path, path.relative_to(entry)) for path in sorted(entry.rglob("*")) if is_picture(path)]
        elif entry.is_file():
            found.append((entry, Path(entry.name)))
        else:
            raise FileNotFoundError(f"{entry}: no such image or folder")
    if not found:
        raise FileNotFoundError(
            f"No image in {', '.join(map(str, inputs))}; looked for {', '.join(IMAGE_SUFFIXES)} in all sub-folders"
        )
    taken: set[Path] = set()
    unique = []
    for path, name in found:
        wanted, number = name, 2
        while name in taken:
            name, number = wanted.with_name(f"{wanted.stem}_{number}{wanted.suffix}"), number + 1
        taken.add(name)
        unique.append((path, name))
    return unique


def predict_files(
    predictor: Predictor, inputs: Sequence[str | Path], output: str | Path, *, batch_size: int = 8
) -> dict[str, Any]:
    """Detect objects in images and folders; write drawn pictures and one JSON file.

    `output` receives the pictures below "pictures", in the folder structure of the inputs, and "detections.json":
    `images` (id, file_name, height, width), `detections` as COCO results (image_id, category_id, bbox [x, y, width,
    height] in pixels, score) with `category_name`, `categories` (id, name; the ids count the detector's classes from
    0), and `failed` (file_name, error): a broken image is listed and the rest goes on.

    Args:
        predictor: detector to use.
        inputs: image files and folders (searched with their sub-folders).
        output: folder to write.
        batch_size: images in the network at once, at most.
    Returns: the content of detections.json.
    Raises: FileNotFoundError for a missing input; ImageError when not one image can be read.
    """
    if batch_size < 1:
        raise ValueError(f"The batch size is a number of images from 1 up, got {batch_size}")
    files, output = find_images(inputs), Path(output)
    content: dict[str, Any] = {
        "threshold": predictor.threshold,
        "categories": [{"id": number, "name": name} for number, name in enumerate(predictor.class_names)],
        "images": [],
        "detections": [],
        "failed": [],
    }
    for first in range(0, len(files), batch_size):
        readable = []
        for path, name in files[first : first + batch_size]:
            try:
                readable.append((path, name, predictor.read(path)))
            except ImageError as error:
                logger.warning("%s", error)
                content["failed"].append({"file_name": str(path), "error": str(error)})
        for (path, name, pixels), found in zip(readable, predictor.detect([r[2] for r in readable]), strict=True):
            _append(content, path, pixels.shape[:2], found)
            target = (
                output / "pictures" / (name if name.suffix.lower() == ".jpg" else name.with_name(f"{name.name}.jpg"))
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            predictor.draw_pixels(pixels, found).save(target, quality=92)
    if not content["images"]:
        raise ImageError(f"None of the {len(files)} image(s) can be read; the first: {content['failed'][0]['error']}")
    output.mkdir(parents=True, exist_ok=True)
    save_text_atomic(json.dumps(content, indent=1, ensure_ascii=False) + "\n", output / "detections.json")
    return content


def _append(content: dict[str, Any], path: Path, size: tuple[int, int], found: Sequence[Detection]) -> None:
    """Add one picture and its detections."""
    number = len(content["images"]) + 1
    content["images"].append({"id": number, "file_name": str(path), "height": size[0], "width": size[1]})
    for detection in found:
        x0, y0, x1, y1 = detection.box
        content["detections"].append(
            {
                "image_id": number,
                "category_id": detection.class_id,
                "category_name": detection.class_name,
                "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(detection.score, 5),
            }
        )
