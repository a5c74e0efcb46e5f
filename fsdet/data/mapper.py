"""Dataset dict -> model input, with randomness that depends on (seed, epoch, record) alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode
from PIL import UnidentifiedImageError

# Class id of a region that must yield neither positives nor negatives (rows behind all real boxes).
IGNORE_CLASS = -1


class ImageError(ValueError):
    """An image file that cannot be read or does not have the size that its annotation states."""

    def __init__(self, text: str) -> None:
        # A loader's worker passes an error on inside the text of its traceback; the error's own text comes last.
        super().__init__(text.rsplit("ImageError: ", 1)[-1].strip())


@contextmanager
def seeded_numpy(*numbers: int) -> Iterator[None]:
    """Seed NumPy's and Python's global generators inside the block and restore them behind it.

    Detectron2's augmentations draw from NumPy's global generator; this makes their draw a function of `numbers`, the
    same in every worker process and after every resume.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed([number % 2**32 for number in numbers])
    random.seed(":".join(str(number) for number in numbers))
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


class _KeepPicture(T.Augmentation):
    """Changes nothing; remembers the picture as it was before the augmentations behind it."""

    def __init__(self) -> None:
        self.picture: np.ndarray | None = None

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """No transform; `image` is (H, W, 3) uint8."""
        self.picture = image
        return T.NoOpTransform()

    def taken(self) -> torch.Tensor:
        """A copy of the picture, (H, W, 3) uint8, which is forgotten."""
        picture, self.picture = self.picture, None
        return torch.tensor(np.ascontiguousarray(picture))


class FewShotMapper(DatasetMapper):
    """Detectron2's mapper with seeded augmentation, ignore regions and errors that name the file.

    A record may carry two keys beside Detectron2's own:

    * "augmentation_seed": ints, usually (seed, epoch, record); without it the global generators are used;
    * "ignore_regions": XYXY boxes in absolute pixels of the original image. In training they follow the real boxes as
      rows of "instances" with `gt_classes` -1 (`IGNORE_CLASS`), in the frame of the network input.
    """

    @configurable
    def __init__(self, *args: Any, keep_original: bool = False, **kwargs: Any) -> None:
        """Make a mapper; usually `FewShotMapper(cfg, is_train)`.

        Args:
            args, kwargs: Detectron2's.
            keep_original: hand on the picture as it was read, for what needs it beside the network input.
        """
        super().__init__(*args, **kwargs)
        self._kept = _KeepPicture() if keep_original else None
        if self._kept:
            self.augmentations = T.AugmentationList([self._kept, *self.augmentations.augs])

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read the image and its annotations.

        Returns: the record with "image" (3, H, W) uint8 in `INPUT.FORMAT` order and, in training, "instances"; with
            `keep_original` also "original_image" (H, W, 3) uint8 in that order.
        Raises: ImageError naming a file that is missing, truncated or of another size.
        """
        record = dict(dataset_dict)
        seed = record.pop("augmentation_seed", None)
        regions = record.pop("ignore_regions", None)
        if self.is_train and regions:
            ignored = [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": IGNORE_CLASS, "iscrowd": 0}
                for box in regions
            ]
            record["annotations"] = [*record.get("annotations", []), *ignored]
        try:
            with nullcontext() if seed is None else seeded_numpy(*seed):
                mapped = super().__call__(record)
        except (OSError, UnidentifiedImageError, SizeMismatchError, SyntaxError) as error:
            raise ImageError(
                f"{record['file_name']}: this image cannot be used ({error}). Replace the file, or remove image "
                f"{record.get('image_id')} from the annotations."
            ) from error
        if self._kept:
            mapped["original_image"] = self._kept.taken()
        return mapped
