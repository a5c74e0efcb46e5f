"""Hooks that Detectron2 lacks: an orderly stop on SIGTERM and SIGINT."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """Raised after the checkpoint is saved; the exit status is 128 + the signal's number, as shells report it."""


class GracefulStop(HookBase):
    """On SIGTERM or SIGINT: finish the iteration, save a checkpoint, leave with a known exit status.

    A second signal ends the process at once. Outside the iterations (data set-up, evaluation) the first one does,
    since the newest checkpoint is already on disk then.
    """

    def __init__(self) -> None:
        self.requested = 0  # number of the signal that this process received
        self.agreed = False  # set by the trainer when any process received one
        self._previous: dict[int, Any] = {}

    def before_train(self) -> None:
        """Take over the two signals (only the main thread may)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; the second one is not waited for."""
        if self.requested:
            raise StoppedBySignal(128 + number)
        self.requested = number
        logger.warning("%s received: saving after this iteration", signal.Signals(number).name)

    def after_step(self) -> None:
        """Save and leave once all processes agree."""
        if not self.agreed:
            return
        trainer = self.trainer
        if comm.is_main_process():
            trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        logger.warning("Stopped after iteration %d; continue with --resume", trainer.iter)
        raise StoppedBySignal(128 + (self.requested or signal.SIGTERM))

    def after_train(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
