"""A class memory made of drawn shots, tied to the weights of its encoder: what FewX and OS2D share.

A method says which modules encode (`memory_modules`) and what it keeps of one class's supports (`encode_shots`).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fsdet.data.support import Support, SupportSet
from fsdet.modeling.base import RecallableMemory
from fsdet.modeling.class_memory import ClassEntry, ClassMemory
from fsdet.modeling.derived import WeightsKey, weights_key
from fsdet.modeling.digested_shots import draw_shots, stale_classes

logger = logging.getLogger(__name__)


def unread_shots(cfg: CfgNode, section: str) -> list[str]:
    """A line where a novel stage has more shots than TEST_SHOTS of a method's section, so that a test reads a part."""
    shot, read = cfg.FEWSHOT.SHOT, cfg[section].TEST_SHOTS
    if cfg.FEWSHOT.STAGE != "novel" or shot <= read:
        return []
    key = f"{section}.TEST_SHOTS"
    return [f"FEWSHOT.SHOT is {shot}, but {key} {read}: a test would not read further shots; raise {key}"]


class DrawnShotsMemory(RecallableMemory):
    """Mixin of detectors: `class MyDetector(DrawnShotsMemory, nn.Module)`.

    Attributes:
        memory_owner: name of the method, for messages.
        memory_basis: what an entry depends on beside the supports, for messages.
        test_shots: supports of a class, at most.
        seed: of their choice where there are more.
    """

    memory_owner: str
    memory_basis: str
    test_shots: int
    seed: int
    _checked: Any = None  # state of the encoder's weights that the memory was compared with

    @property
    @abstractmethod
    def memory_modules(self) -> tuple[nn.Module, ...]:
        """The modules whose weights decide about an entry."""

    @abstractmethod
    def encode_shots(self, support_set: SupportSet, supports: Sequence[Support]) -> dict[str, Tensor]:
        """What is kept of the supports of one class, which `support_set` reads; without gradients."""

    def encode_support(self, support_set: SupportSet) -> ClassMemory:
        """The entries of every class of a support set, one class at a time.

        Classes of the memory kept last whose supports and encoder have not changed are taken over.

        Returns: memory with the tensors of `encode_shots` for each class, in the order of the set.
        Raises: ValueError for classes without support, a picture that cannot be decoded, and a box that leaves nothing
            of its picture; FileNotFoundError for a missing picture.
        """
        shots = draw_shots(support_set, self.test_shots, self.seed)
        memory = ClassMemory(kind=self.memory_kind, encoder=self.memory_encoder)
        former = self._class_memory
        if former is not None and former.encoder != memory.encoder:
            former = None
        stale = stale_classes(former, shots)
        for name, (supports, digests) in shots.items():
            if name in stale:
                with torch.no_grad():
                    memory.add(name, ClassEntry(self.encode_shots(support_set, supports), digests))
            else:
                memory.add(name, former[name])
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

    def train(self, mode: bool = True) -> Any:
        """Switch the mode; behind a training the memory is compared with the weights again."""
        self._checked = None
        return super().train(mode)

    def checked_memory(self) -> ClassMemory:
        """The memory kept last, compared with the weights where these may have changed.

        Raises: RuntimeError without a memory; ValueError for one that these weights have not made.
        """
        memory: ClassMemory = self.class_memory
        if self._checked is None or self._checked != self._encoder_state():
            self._check_memory(memory)
        return memory

    def _encoder_state(self) -> tuple[WeightsKey, ...] | None:
        """What tells one state of the weights from the next; None, which compares anew, where nothing counts it."""
        keys = tuple(map(weights_key, self.memory_modules))
        return None if None in keys else keys

    def _check_memory(self, memory: ClassMemory) -> None:
        """Refuse a memory that these weights have not made. Raises: ValueError."""
        kind = self.memory_kind
        if memory.kind != kind:
            raise ValueError(
                f"A memory of {memory.kind}; {self.memory_owner} needs one of {kind}, from its encode_support"
            )
        encoder = self.memory_encoder
        if memory.encoder != encoder:
            raise ValueError(
                f"The class memory was made by encoder {memory.encoder}, this detector is {encoder}: "
                f"{self.memory_basis} differ. Encode the supports again (condition_on_support)"
            )
        self._checked = self._encoder_state()
