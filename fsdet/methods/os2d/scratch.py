"""Memory that one piece of work after the other uses.

The system hands out fresh memory page by page, and clears each page first. For intermediate results of some megabytes,
made anew for every class, that took a fifth of the time of the whole head.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_MOST_HELD = 6_000_000  # numbers of a buffer that is kept, 24 MB; a huge scene must not hold its memory for ever


class Scratch(threading.local):
    """Buffers by name, in single precision on the CPU; every thread has its own."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor with any content, whose memory the next call with this name takes again."""
        size = math.prod(shape)
        if size > _MOST_HELD:
            return torch.empty(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # ordinary memory, whatever the mode of the first call is
                held = self._held[name] = torch.empty(size)
        return held[:size].view(shape)
