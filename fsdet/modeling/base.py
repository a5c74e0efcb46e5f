"""The contract between the engine and detectors that read a support set.

A method differs from a plain detector in what `encode_support` keeps of the K-shot examples and which head reads it.
Detectors without a memory (Faster R-CNN, TFA) do not implement the contract and keep nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fsdet.data.support import SupportSet
    from fsdet.modeling.class_memory import ClassMemory


class SupportConditioned(ABC):
    """Mixin of detectors with a class memory: `class MyDetector(SupportConditioned, GeneralizedRCNN)`.

    The memory is whatever the method's heads need (prototypes, feature maps, word vectors). It belongs to one
    evaluation, so it stays outside the state dict and is not moved or cast with the module.
    """

    _class_memory: Any = None

    @abstractmethod
    def encode_support(self, support_set: SupportSet) -> Any:
        """Return the class memory of a support set; called in evaluation mode and without gradients."""

    @property
    def has_class_memory(self) -> bool:
        """Whether a memory is kept."""
        return self._class_memory is not None

    @property
    def class_memory(self) -> Any:
        """The memory kept last. Raises RuntimeError when nothing has been encoded yet."""
        if self._class_memory is None:
            raise RuntimeError(
                f"{type(self).__name__} has no class memory: call condition_on_support(model, ...) before inference"
            )
        return self._class_memory

    def keep_class_memory(self, memory: Any) -> None:
        """Replace the memory (None forgets it)."""
        # Around nn.Module.__setattr__, which would register a module or parameter and put it into checkpoints.
        object.__setattr__(self, "_class_memory", memory)


class RecallableMemory(SupportConditioned):
    """A detector whose memory is a `ClassMemory`, so that it can be kept in files and taken up again.

    Attributes:
        memory_kind: what its entries are (`ClassMemory.kind`).
    """

    memory_kind: str

    @property
    @abstractmethod
    def memory_encoder(self) -> str:
        """Digest of all that the entries depend on beside the supports."""

    @abstractmethod
    def stale_classes(self, memory: ClassMemory, support_set: SupportSet) -> list[str]:
        """Classes whose entry in `memory` is missing, or was made of other pictures or boxes than these."""


def condition_on_support(model: nn.Module, build_support: Callable[[], SupportSet]) -> bool:
    """Encode the support set once, before an evaluation.

    Args:
        model: a detector, or one wrapped by DistributedDataParallel.
        build_support: makes the support set; not called when the detector keeps no memory.

    Returns:
        Whether the detector keeps a class memory.
    """
    detector = getattr(model, "module", model)
    if not isinstance(detector, SupportConditioned):
        return False
    was_training = detector.training
    detector.eval()
    try:
        with torch.no_grad():
            detector.keep_class_memory(detector.encode_support(build_support()))
    finally:
        detector.train(was_training)
    return True
