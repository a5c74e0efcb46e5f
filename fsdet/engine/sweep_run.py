"""What a sweep hands to those who do its runs: the run, its lock, the order of stopping. Imports nothing heavy.

A worker process starts with these few modules and its environment (threads, GPU) set, before PyTorch looks at it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from fsdet.evaluation.run_log import ERROR_LINE, last_lines

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: plain data, which travels to the process that does it.

    Attributes:
        kind: "base", "novel-only" (only feeds a `combine` surgery), "novel", or "evaluation" of a novel run's weights.
        config_file, opts, model: as `fsdet.engine.run.run` takes them.
        folder: its OUTPUT_DIR; no two runs of a plan share one.
        digest: of its recipe, as its result will record it.
        row: what it is averaged in; runs of one row differ in seed and repetition alone.
        after: folders of the planned runs that have to be finished before it.
        iterations: of its training; 0 for an evaluation.
        novel_source: folder of the run that a `combine` surgery takes its novel rows from; "" for none.
    """

    kind: str
    config_file: str
    opts: tuple[str, ...]
    model: str | None
    folder: str
    digest: str
    row: str
    after: tuple[str, ...] = ()
    iterations: int = 0
    novel_source: str = ""


Task = Callable[[PlannedRun], None]


class Workers(Protocol):
    """Who does the runs.

    Attributes:
        width: how many runs are done at once, at most.
    """

    width: int

    def work_off(self, runs: Sequence[PlannedRun], task: Task, prepare: Task) -> Iterator[tuple[PlannedRun, str]]:
        """Do runs, each after those it waits for.

        Args:
            runs: in an order in which they could be done one by one.
            task: does one run; picklable.
            prepare: called before each run, in one process for all runs that may share a file; picklable.
        Yields: each run when it has ended, with "" or the reason why it failed.
        Raises: SystemExit with 128 + the signal's number after SIGTERM or SIGINT, once the workers have ended.
        """
        ...


class RunLockedError(RuntimeError):
    """Another process is doing this run."""


@contextlib.contextmanager
def run_lock(folder: str | Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a run folder, which is made; the system releases it when this process dies, however it dies.

    The lock belongs to this process alone (POSIX): data loader workers that outlive a killed run do not keep it.

    Args:
        folder: run folder.
        wait: seconds to wait for a process that holds it.
    Raises: RunLockedError naming the process that holds it.
    """
    path = Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        end = time.monotonic() + wait
        while not _take(file):
            if time.monotonic() > end:
                file.seek(0)
                raise RunLockedError(f"{folder} is being run by {file.read().strip() or 'another process'}")
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_locked(folder: str | Path) -> bool:
    """Whether another process is doing the run of this folder. Never call it where the lock may be one's own."""
    if not (Path(folder) / LOCK_FILE).exists():
        return False
    with (Path(folder) / LOCK_FILE).open("a") as file:
        return not _take(file)


def _take(file: IO[str]) -> bool:
    """Take the lock of an open file unless another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s: this file system has no locks (%s); start no second sweep here", file.name, error)
    return True


def blocked_by(run: PlannedRun, lost: Collection[str]) -> str:
    """Why a run cannot start, given the folders of the runs that failed; "" when it can."""
    missing = [folder for folder in run.after if folder in lost]
    return f"needs {missing[0]}, which has no result" if missing else ""


def attempt(step: Task, run: PlannedRun) -> str:
    """Call a step in this process; returns "" or its error, which is logged."""
    try:
        step(run)
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        logger.exception("%s failed", run.folder)
        return str(error)
    return ""


class InProcess:
    """One run after the other in this process, which a signal stops as it would stop a single run."""

    width = 1

    def work_off(self, runs: Sequence[PlannedRun], task: Task, prepare: Task) -> Iterator[tuple[PlannedRun, str]]:
        """See `Workers`; the run's own orderly stop raises SystemExit."""
        lost: set[str] = set()
        for run in runs:
            reason = blocked_by(run, lost) or attempt(prepare, run) or attempt(task, run)
            if reason:
                lost.add(run.folder)
            yield run, reason


class Stop:
    """The first stop signal that arrived, or 0."""

    number = 0


@contextlib.contextmanager
def stop_signals(act: Callable[[int], None]) -> Iterator[Stop]:
    """Note SIGTERM and SIGINT and call `act` with each one; in threads other than the main one they act as usual."""
    stop, previous = Stop(), {}

    def receive(number: int, frame: FrameType | None) -> None:
        stop.number = stop.number or number
        act(number)

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def last_line(log: Path, offset: int = 0, *, error: bool = False) -> str:
    """The last line of a log; "" for an empty or missing one.

    Args:
        log: text file.
        offset: bytes to pass over, which belong to an earlier attempt.
        error: prefer the last line that names an error: its message may go on below it.
    """
    if not log.is_file():
        return ""
    lines = [line for line in last_lines(log, offset) if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)] if error else []
    return (errors or lines or [""])[-1].strip()
