"""Pictures that a user hands in: which files count as one, and reading them with one clear error."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy, read_image
from PIL import Image, ImageOps

from fsdet.data.mapper import ImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# What Pillow raises on broken, torn and oversized files.
_READ_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)

# A path, a PIL image, or (H, W, 3) uint8 in BGR order, as OpenCV gives.
Source = str | Path | Image.Image | np.ndarray


def is_picture(path: Path) -> bool:
    """Whether a path is a file with the name of a picture; hidden files (macOS leaves "._1.jpg") are none."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_pixels(image: Source, image_format: str) -> np.ndarray:
    """Read a picture, turned as its EXIF data says.

    Args:
        image: path, PIL image, or (H, W, 3) uint8 in BGR order.
        image_format: channel order of the result, "BGR" or "RGB".
    Returns: (H, W, 3) uint8.
    Raises: ImageError naming a file that is missing or broken, or an array of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ImageError(
                f"This array of shape {image.shape} and type {image.dtype} is no picture; expected (H, W, 3) uint8 "
                "in BGR order, as cv2.imread gives"
            )
        return image if image_format == "BGR" else np.ascontiguousarray(image[:, :, ::-1])
    try:
        if isinstance(image, Image.Image):
            return convert_PIL_to_numpy(ImageOps.exif_transpose(image), image_format)
        return read_image(str(image), format=image_format)
    except _READ_ERRORS as error:
        name = getattr(image, "filename", "") or "This picture" if isinstance(image, Image.Image) else image
        raise ImageError(f"{name}: this image cannot be read ({error}). Replace or remove the file.") from error
