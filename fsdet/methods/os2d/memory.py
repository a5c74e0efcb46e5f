"""The class memory of OS2D: templates of the supports of every class, tied to the weights of the backbone.

Source: OS2D (Osokin et al., ECCV 2020), class images. Several supports of a class are ours.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fsdet.data.support import SupportSet
from fsdet.methods.os2d.templates import VIEWS, cut_pictures, view_pictures
from fsdet.modeling.base import RecallableMemory
from fsdet.modeling.class_memory import ClassEntry, ClassMemory, module_digest
from fsdet.modeling.derived import weights_key
from fsdet.modeling.digested_shots import draw_shots, stale_classes

logger = logging.getLogger(__name__)

KIND = "os2d"
TEMPLATES = "templates"  # tensor of a class: (S * V, 225, D), support by support and within one view by view


class TemplateMemory(RecallableMemory, nn.Module):
    """A detector that keeps templates of supports.

    Attributes:
        backbone: makes the features.
        pixel_mean, pixel_std, input_format: how pictures enter it.
        class_image_size: root of the area of a support, pixels.
        views: see `templates.py`.
        test_shots: supports of a class, at most.
        seed: of their choice where there are more.
    """

    memory_kind = KIND
    backbone: nn.Module
    pixel_mean: Tensor
    pixel_std: Tensor
    input_format: str
    class_image_size: int
    views: str
    test_shots: int
    seed: int
    _checked: Any = None  # state of the backbone that the memory was compared with

    @abstractmethod
    def encode_picture(self, picture: np.ndarray) -> Tensor:
        """Template (225, D) of a picture (h, w, 3) uint8, without gradient."""

    @property
    def memory_encoder(self) -> str:
        """Digest of all that a class memory depends on beside the supports."""
        pixels = [self.pixel_mean.flatten().tolist(), self.pixel_std.flatten().tolist()]
        return module_digest(self.backbone, KIND, *pixels, self.input_format, self.class_image_size, self.views)

    def encode_support(self, support_set: SupportSet) -> ClassMemory:
        """Templates of every class of a support set, one support at a time.

        Classes of the memory kept last whose supports and encoder have not changed are taken over.

        Returns: memory with "templates" (S * V, 225, D) for each class, in the order of the set.
        Raises: ValueError for classes without support, a picture that cannot be decoded, and a box that leaves nothing
            of its picture; FileNotFoundError for a missing picture.
        """
        shots = draw_shots(support_set, self.test_shots, self.seed)
        memory = ClassMemory(kind=KIND, encoder=self.memory_encoder)
        former = self._class_memory
        if former is not None and former.encoder != memory.encoder:
            former = None
        stale = stale_classes(former, shots)
        for name, (supports, digests) in shots.items():
            if name not in stale:
                memory.add(name, former[name])
                continue
            pictures = cut_pictures(support_set, supports, self.class_image_size, self.input_format)
            templates = [
                self.encode_picture(v).cpu() for picture in pictures for v in view_pictures(picture, self.views)
            ]
            memory.add(name, ClassEntry({TEMPLATES: torch.stack(templates)}, digests))
        logger.info("Encoded the supports of %d classes, %d unchanged", len(stale), len(shots) - len(stale))
        return memory

    def stale_classes(self, memory: ClassMemory, support_set: SupportSet) -> list[str]:
        """Classes of a support set whose entry in `memory` is missing or made of other pictures or boxes."""
        return stale_classes(memory, draw_shots(support_set, self.test_shots, self.seed))

    def keep_class_memory(self, memory: ClassMemory | None) -> None:
        """Take the classes for the inferences to come (None forgets them).

        Raises: ValueError for a memory of another kind or encoder.
        """
        if memory is not None:
            self._check_memory(memory)
        super().keep_class_memory(memory)

    def train(self, mode: bool = True) -> TemplateMemory:
        """Switch the mode; behind a training the memory is compared with the weights again."""
        self._checked = None
        return super().train(mode)

    def known_templates(self) -> Iterator[Tensor]:
        """Templates (S, V, 225, D) of each class of the memory, on the CPU.

        Raises: RuntimeError without a memory; ValueError for one that these weights have not made.
        """
        memory: ClassMemory = self.class_memory
        if self._checked is None or self._checked != weights_key(self.backbone):
            self._check_memory(memory)
        views = len(VIEWS[self.views])
        return (memory[name].tensors[TEMPLATES].unflatten(0, (-1, views)) for name in memory)

    def _check_memory(self, memory: ClassMemory) -> None:
        """Refuse a memory that these weights have not made. Raises: ValueError."""
        if memory.kind != KIND:
            raise ValueError(f"A memory of {memory.kind}; OS2D needs one of {KIND}, from its encode_support")
        encoder = self.memory_encoder
        if memory.encoder != encoder:
            raise ValueError(
                f"The class memory was made by encoder {memory.encoder}, this detector is {encoder}: weights of the "
                "backbone, size or views of the supports differ. Encode the supports again (condition_on_support)"
            )
        self._checked = weights_key(self.backbone)
