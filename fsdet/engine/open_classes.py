"""Classes that a detector learns from examples alone: which detectors can, examples of any form, and their memory.

A detector with open classes reads supports (`RecallableMemory`) and has no weights of any class, so that its class
memory says which classes it detects, in which order. Configurations mark it by FEWSHOT.SURGERY none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from PIL import Image
from torch import nn

from fsdet.data.pictures import Source, read_pixels
from fsdet.data.records import box_fault
from fsdet.data.support import Support, SupportSet
from fsdet.data.support_folder import read_support_folder
from fsdet.modeling.base import RecallableMemory
from fsdet.modeling.calibration import CalibratedDetector
from fsdet.modeling.class_memory import ClassMemory

# A picture that is the object as a whole, or (picture, box) with the box XYXY in pixels of the picture as it is shown.
Example = Source | tuple[Source, Sequence[float]]
# Class name -> examples; or a support folder (see `read_support_folder`); or a support set.
Examples = Mapping[str, Sequence[Example]] | str | Path | SupportSet

_SHORT = 12  # characters of a digest in messages


def has_open_classes(cfg: CfgNode, model: nn.Module | None = None) -> bool:
    """Whether a detector learns classes from examples alone.

    Args:
        cfg: its configuration.
        model: the detector as it predicts, a calibrated one has the classes of its prototypes; None: not built yet.
    """
    if cfg.FEWSHOT.SURGERY != "none" or isinstance(model, CalibratedDetector):
        return False
    return _reads_supports(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE))


def _reads_supports(architecture: object) -> bool:
    return isinstance(architecture, type) and issubclass(architecture, RecallableMemory)


def require_open_classes(cfg: CfgNode, model: nn.Module | None = None) -> None:
    """Raise ValueError with the remedy unless `has_open_classes`."""
    if not has_open_classes(cfg):
        others = sorted(name for name, architecture in META_ARCH_REGISTRY if _reads_supports(architecture))
        raise ValueError(
            f'The classes of this detector ("{cfg.FEWSHOT.METHOD}", MODEL.META_ARCHITECTURE '
            f"{cfg.MODEL.META_ARCHITECTURE}, FEWSHOT.SURGERY {cfg.FEWSHOT.SURGERY}) are in its weights: it reads no "
            "examples, so fine-tune it on the new classes (tools/train_net.py). Detectors that learn classes from "
            f"examples alone: {', '.join(others)}"
        )
    if isinstance(model, CalibratedDetector):
        raise ValueError(
            "The calibration of this run has prototypes of the run's classes alone; load it with "
            "TEST.CALIBRATION.ENABLED False to exchange classes"
        )


def memory_with(model: RecallableMemory, support_set: SupportSet) -> ClassMemory:
    """The class memory of a detector with the classes of a support set added, or exchanged in their places.

    Args:
        model: detector with open classes in evaluation mode; its own memory stays as it is.
        support_set: examples of the classes.
    Returns: a new memory.
    """
    with torch.no_grad():
        fresh: ClassMemory = model.encode_support(support_set)
    if not model.has_class_memory:
        return fresh
    former: ClassMemory = model.class_memory
    merged = former.select(former.names)
    for name in fresh:
        (merged.replace if name in merged else merged.add)(name, fresh[name])
    return merged


def check_memory(model: RecallableMemory, memory: ClassMemory, path: str | Path) -> None:
    """Raise ValueError with the remedy unless this detector has made the memory, with the weights it has now."""
    here = (model.memory_kind, model.memory_encoder)
    if (memory.kind, memory.encoder) != here:
        raise ValueError(
            f"{path}: this memory ({memory.kind}, encoder {memory.encoder[:_SHORT]}) was made by another detector than "
            f"this one ({here[0]}, encoder {here[1][:_SHORT]}): its weights or settings differ. Name the run that has "
            "made it, or make it anew from the examples (--support DIR --save-memory FILE)"
        )
    if not len(memory):
        raise ValueError(f"{path}: this memory has no class; make it anew from examples")


@contextmanager
def support_set_of(examples: Examples, image_format: str) -> Iterator[SupportSet]:
    """Support set of examples of any form; pictures in memory lie in a temporary folder inside the block.

    Args:
        examples: see `Examples`.
        image_format: channel order of the crops, "BGR" or "RGB"; a given support set keeps its own.
    Raises: ImageError for a broken picture; ValueError for a class without examples or a box that does not fit its
        picture; as `read_support_folder`.
    """
    if isinstance(examples, SupportSet):
        yield examples
    elif isinstance(examples, str | Path):
        yield read_support_folder(examples, image_format=image_format)
    elif not examples:
        raise ValueError('No class to learn; expected class names with their examples, such as {"mug": ["mug.jpg"]}')
    else:
        with tempfile.TemporaryDirectory(prefix="fsdet_examples_") as folder:
            supports = [
                _support(example, name, class_id, Path(folder) / f"{class_id}_{number}.png")
                for class_id, (name, shots) in enumerate(examples.items())
                for number, example in enumerate(_several(name, shots))
            ]
            yield SupportSet(list(examples), supports, image_format=image_format)


def _several(name: str, shots: Sequence[Example]) -> Sequence[Example]:
    if isinstance(shots, Source | tuple) or not len(shots):
        raise ValueError(f'Class "{name}" needs a list of examples, pictures or (picture, box); got {_short(shots)}')
    return shots


def _support(example: Example, name: str, class_id: int, place: Path) -> Support:
    """One example; a picture in memory is written to `place`, without loss."""
    picture, box = example if isinstance(example, tuple) else (example, None)
    pixels = read_pixels(picture, "RGB")
    height, width = pixels.shape[:2]
    corners = (0.0, 0.0, float(width), float(height)) if box is None else tuple(float(value) for value in box)
    if len(corners) != 4 or box_fault(corners, height, width):
        raise ValueError(
            f'Class "{name}": the box {corners} has no area inside its picture {_short(picture)} of {width} x {height} '
            "pixels (width x height); expected (x0, y0, x1, y1) in these pixels"
        )
    if not isinstance(picture, str | Path):
        Image.fromarray(pixels).save(place)
        picture = place
    return Support(str(picture), str(picture), None, class_id, corners)


def _short(value: object) -> str:
    """Words for a message: paths as they are, pixels by their type alone."""
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}"
    return type(value).__name__ if isinstance(value, Image.Image) else repr(value)[:200]
