"""The runs of a sweep as processes of this machine: several on the CPU, or one per GPU.

A run with a process of its own takes no other with it when it dies (a signal, memory that is gone).
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from fsdet.engine.sweep_run import PlannedRun, Task, attempt, blocked_by, last_line, stop_signals

logger = logging.getLogger("fsdet.engine.sweep_jobs")  # a worker runs this file as __main__

WORKER_LOG = "worker.log"
POLL_SECONDS = 0.2


class LocalJobs:
    """Runs side by side on this machine, each in a process of its own.

    Args:
        slots: environment variables of each worker, from `cpu_slots` or `gpu_slots`; one run at a time in each.
    """

    def __init__(self, slots: Sequence[Mapping[str, str]] = ({},)) -> None:
        self.slots = tuple(slots)
        self.width = len(self.slots)

    def work_off(self, runs: Sequence[PlannedRun], task: Task, prepare: Task) -> Iterator[tuple[PlannedRun, str]]:
        """See `Workers`; each signal is passed on once to every worker, which saves and leaves."""
        waiting, lost = list(runs), set()
        active: list[_Worker] = []
        free = list(self.slots)
        with stop_signals(lambda number: _send(active, number)) as stop:
            try:
                while active or (waiting and not stop.number):
                    ended = [] if stop.number else _start_ready(waiting, lost, active, free, task, prepare)
                    if stop.number:  # one that had just been started may have missed it
                        _send([worker for worker in active if not worker.signalled], stop.number)
                    for worker in [worker for worker in active if worker.process.poll() is not None]:
                        active.remove(worker)
                        free.append(worker.slot)
                        ended.append((worker.run, worker.finish()))
                    for run, reason in ended:
                        if reason:
                            lost.add(run.folder)
                        yield run, reason
                    if not ended:
                        time.sleep(POLL_SECONDS)
            finally:  # nothing is left here unless the caller has given up
                _send(active, signal.SIGTERM)
                for worker in active:
                    worker.process.wait()
        if stop.number:
            raise SystemExit(128 + stop.number)


def _start_ready(
    waiting: list[PlannedRun],
    lost: set[str],
    active: list[_Worker],
    free: list[Mapping[str, str]],
    task: Task,
    prepare: Task,
) -> list[tuple[PlannedRun, str]]:
    """Move runs from `waiting` to `active` as far as slots and prerequisites allow; returns those that cannot start."""
    failed = []
    unfinished = {other.folder for other in waiting} | {worker.run.folder for worker in active}
    for run in list(waiting):
        reason = blocked_by(run, lost)
        if not reason and (not free or unfinished.intersection(run.after)):
            continue
        waiting.remove(run)
        reason = reason or attempt(prepare, run)
        if not reason:
            try:
                active.append(_Worker(run, task, free[0]))
                free.pop(0)
                continue
            except OSError as error:
                reason = f"cannot be started: {error}"
        failed.append((run, reason))
        lost.add(run.folder)
    return failed


def _send(workers: Sequence[_Worker], number: int) -> None:
    """Pass a signal on."""
    for worker in workers:
        worker.signalled = True
        worker.process.send_signal(number)


class _Worker:
    """A process that does one run. It has a session of its own, so that Ctrl-C reaches it through the sweep alone."""

    def __init__(self, run: PlannedRun, task: Task, slot: Mapping[str, str]) -> None:
        self.run, self.slot, self.signalled = run, slot, False
        self.log = Path(run.folder) / WORKER_LOG
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **slot}
        with self.log.open("ab") as log:
            self.offset = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fsdet.engine.sweep_jobs"],
                env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        with contextlib.suppress(BrokenPipeError):  # it is dead already, and its status will say so
            self.process.stdin.write(pickle.dumps((task, run)))
            self.process.stdin.flush()

    def finish(self) -> str:
        """After its end: close its files; returns "" or what became of it, with the last words of its log."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code, log, run_log = self.process.returncode, self.log, self.log.with_name("log.txt")
        words = last_line(log, self.offset, error=True)
        if run_log.is_file() and (code < 0 or not words):
            log, words = run_log, last_line(run_log)  # a signal leaves no error; this says how far the run came
        if not self.log.stat().st_size:
            self.log.unlink()
        if code == 0 or code > 128:
            return f"stopped by {_signal_name(code - 128)}, can be resumed" if code else ""
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        what = f"killed by {_signal_name(-code)}{memory}" if code < 0 else f"exit status {code}"
        return f"{what}: {words or 'nothing was logged'} ({log})"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def cpu_slots(jobs: int) -> tuple[dict[str, str], ...]:
    """Environments of `jobs` CPU workers that share the cores; an OMP_NUM_THREADS of the user's is kept.

    Raises: ValueError for less than one worker.
    """
    if jobs < 1:
        raise ValueError(f"{jobs} workers; at least 1 is needed")
    return ({**_threads(jobs), "CUDA_VISIBLE_DEVICES": ""},) * jobs


def gpu_slots(wanted: str) -> tuple[dict[str, str], ...]:
    """Environments of one worker per GPU.

    Args:
        wanted: "all", or numbers as PyTorch counts the GPUs that this process may use, e.g. "0,2".
    Raises: ValueError for GPUs that are not there.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch  # slow to import, and only needed here

        names = [str(number) for number in range(torch.cuda.device_count())]
    else:
        names = list(takewhile(lambda name: name != "-1", filter(None, visible.split(","))))  # -1 ends it, for CUDA too
    numbers = range(len(names)) if wanted == "all" else [int(n) if n.isdigit() else -1 for n in wanted.split(",")]
    if not names or not all(0 <= number < len(names) for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f'GPUs "{wanted}": {len(names)} can be used here; write "all" or numbers from 0, each once')
    return tuple({**_threads(len(numbers)), "CUDA_VISIBLE_DEVICES": names[number]} for number in numbers)


def _threads(jobs: int) -> dict[str, str]:
    """Each worker's share of the cores; threads that wait sleep, since others can use the core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))
    passive = os.environ.get("OMP_WAIT_POLICY", "passive")
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": passive}


def _end_with_sweep() -> None:
    """Ask this process for an orderly stop when the sweep is gone: its end of the pipe closes with it."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def work() -> None:
    """Main function of a worker: do the run that comes in through the standard input."""
    task, run = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_sweep, daemon=True).start()
    try:
        task(run)
    except Exception:
        logger.exception("%s failed", run.folder)  # to this worker's log and, once it is open, to the run's
        sys.exit(1)


if __name__ == "__main__":
    work()
