"""The class memory of OS2D: templates of the supports of every class, tied to the weights of the backbone.

Source: OS2D (Osokin et al., ECCV 2020), class images. Several supports of a class are ours.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fsdet.data.support import Support, SupportSet
from fsdet.methods.os2d.templates import VIEWS, cut_pictures, view_pictures
from fsdet.modeling.class_memory import module_digest
from fsdet.modeling.drawn_memory import DrawnShotsMemory

KIND = "os2d"
TEMPLATES = "templates"  # tensor of a class: (S * V, 225, D), support by support and within one view by view


class TemplateMemory(DrawnShotsMemory, nn.Module):
    """A detector that keeps templates of supports.

    Attributes:
        backbone: makes the features.
        pixel_mean, pixel_std, input_format: how pictures enter it.
        class_image_size: root of the area of a support, pixels.
        views: see `templates.py`.
    """

    memory_kind = KIND
    memory_owner = "OS2D"
    memory_basis = "weights of the backbone, size or views of the supports"
    backbone: nn.Module
    pixel_mean: Tensor
    pixel_std: Tensor
    input_format: str
    class_image_size: int
    views: str

    @abstractmethod
    def encode_picture(self, picture: np.ndarray) -> Tensor:
        """Template (225, D) of a picture (h, w, 3) uint8, without gradient."""

    @property
    def memory_modules(self) -> tuple[nn.Module, ...]:
        """The backbone."""
        return (self.backbone,)

    @property
    def memory_encoder(self) -> str:
        """Digest of all that a class memory depends on beside the supports."""
        pixels = [self.pixel_mean.flatten().tolist(), self.pixel_std.flatten().tolist()]
        return module_digest(self.backbone, KIND, *pixels, self.input_format, self.class_image_size, self.views)

    def encode_shots(self, support_set: SupportSet, supports: Sequence[Support]) -> dict[str, Tensor]:
        """Templates "templates" (S * V, 225, D) of the supports of one class, one support at a time, on the CPU."""
        pictures = cut_pictures(support_set, supports, self.class_image_size, self.input_format)
        templates = [self.encode_picture(v).cpu() for picture in pictures for v in view_pictures(picture, self.views)]
        return {TEMPLATES: torch.stack(templates)}

    def known_templates(self) -> Iterator[Tensor]:
        """Templates (S, V, 225, D) of each class of the memory, on the CPU.

        Raises: RuntimeError without a memory; ValueError for one that these weights have not made.
        """
        memory = self.checked_memory()
        views = len(VIEWS[self.views])
        return (memory[name].tensors[TEMPLATES].unflatten(0, (-1, views)) for name in memory)
