"""The supports of a FewX class at test time: which of them, and from which crops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fsdet.data.support import Support, SupportSet, fewx_support_crop, seeded_generator
from fsdet.modeling.digested_shots import DigestedShots, digest_shots


def draw_supports(support_set: SupportSet, limit: int, seed: int) -> DigestedShots:
    """At most `limit` supports of every class, and their digests.

    Which ones of a class with more is drawn with (seed, class name); their order stays.

    Raises: ValueError naming the classes without any support; FileNotFoundError for a missing picture.
    """
    if empty := [name for name, shots in support_set if not shots]:
        raise ValueError(
            f"No support for the classes {empty}, so nothing tells what they look like. Add examples of them (crowd "
            "boxes do not count), or leave them out of the support set"
        )
    return digest_shots({name: _draw(shots, limit, seed, name) for name, shots in support_set})


def _draw(shots: Sequence[Support], limit: int, seed: int, name: str) -> tuple[Support, ...]:
    if len(shots) <= limit:
        return tuple(shots)
    places = seeded_generator(seed, 0, name).permutation(len(shots))[:limit]
    return tuple(shots[place] for place in sorted(places))


def cut_crops(
    support_set: SupportSet, supports: Sequence[Support], size: int, image_format: str
) -> tuple[Tensor, Tensor]:
    """The context squares of supports.

    Args:
        support_set: which reads the pictures.
        supports: S of them.
        size: side of a crop in pixels.
        image_format: channel order that the detector reads, "BGR" or "RGB".
    Returns: crops (S, 3, size, size) uint8 and boxes (S, 4) XYXY in their pixels.
    Raises: FileNotFoundError or ValueError naming a picture that is missing or cannot be decoded, or a box that leaves
        nothing of its picture.
    """
    squares = support_set.with_policy(partial(fewx_support_crop, size=size))
    images, boxes = [], []
    for support in supports:
        try:
            crop = squares.crop(support)
        except ValueError as error:
            if support.file_name in str(error):
                raise
            raise ValueError(f"{support.file_name}: {error}") from error
        images.append(crop.image if support_set.image_format == image_format else crop.image[..., ::-1])
        boxes.append(crop.box)
    stacked = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    return torch.from_numpy(stacked), torch.from_numpy(np.stack(boxes))
