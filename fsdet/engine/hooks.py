"""Hooks that Detectron2 lacks: an orderly stop on SIGTERM and SIGINT."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class StoppedBySignal(SystemExit):
    """Raised after the checkpoint is saved; the exit status is 128 + the signal's number, as shells report it."""


class EvaluationHook(EvalHook):
    """Detectron2's evaluation hook, without the last evaluation when training ends by an error or a stop."""

    def after_train(self) -> None:
        """Evaluate after a finished training only."""
        if sys.exc_info()[0] is None:
            super().after_train()


class GracefulStop(HookBase):
    """On SIGTERM or SIGINT: finish the iteration, save a checkpoint, leave with a known exit status.

    Between two iterations (an evaluation may run there for hours) it saves and leaves at once, and so does a second
    signal, without saving. Before and after training the signals act as usual: nothing would be lost.
    """

    def __init__(self) -> None:
        self.requested = 0  # number of the signal that this process received
        self.agreed = False  # set by the trainer when any process received one
        self._previous: dict[int, Any] = {}
        self._is_between_steps = False

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
        if self._is_between_steps:
            self._save_and_leave()
        logger.warning("%s received: saving after this iteration", signal.Signals(number).name)

    def before_step(self) -> None:
        """The weights are about to change: from here a signal waits for the end of the iteration."""
        self._is_between_steps = False

    def after_step(self) -> None:
        """Save and leave once all processes agree."""
        if self.agreed:
            self._save_and_leave()
        self._is_between_steps = True

    def _save_and_leave(self) -> None:
        trainer = self.trainer
        if comm.is_main_process():
            trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        logger.warning("Stopped after iteration %d; continue with --resume", trainer.iter)
        raise StoppedBySignal(128 + (self.requested or signal.SIGTERM))

    def after_train(self) -> None:
        """Give the signals back."""
        self._is_between_steps = False
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
