"""The runs of a sweep as Slurm jobs, through submitit: one array a stage, each waiting for the one before it.

Whoever waits may be killed and started again: the jobs go on without it, what they have finished is skipped the next
time, and those that still wait or run are taken over.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fsdet.engine.sweep_run import PlannedRun, Task, attempt, blocked_by, last_line, stop_signals
from fsdet.engine.sweep_slurm_records import ALIVE, POLL_SECONDS, JobRecords, LiveJob, digests

logger = logging.getLogger(__name__)

# Parameters that submitit knows for every cluster; the others are Slurm's own.
_SHARED = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
ASK_SECONDS = 60.0  # between two questions about a suspended job
_LATE_SECONDS = 30.0  # how long a network file system may take to show a new file


def slurm_parameters(text: str) -> dict[str, Any]:
    """Keyword arguments of submitit's executor, and "cluster", from text such as "partition=gpu,timeout_min=600".

    Raises: ValueError for words that are no KEY=VALUE pairs, and without a time limit (submitit's is 5 minutes).
    """
    values: dict[str, str] = {}
    for word in text.split(","):
        key, separator, value = word.partition("=")
        if separator:
            values[key.strip()] = value.strip()
        elif values:  # "exclude=node1,node2"
            values[next(reversed(values))] += f",{word.strip()}"
        else:
            raise ValueError(f'"{text}" is no list of KEY=VALUE; write e.g. partition=gpu,timeout_min=600')
    if "timeout_min" not in values:
        raise ValueError(f'"{text}" names no time limit; add timeout_min=MINUTES of the longest run')
    return {
        key if key in (*_SHARED, "cluster") or key.startswith("slurm_") else f"slurm_{key}": (
            int(value) if value.isdigit() else value
        )
        for key, value in values.items()
    }


@dataclass(frozen=True)
class SlurmTask:
    """What one job does.

    Attributes:
        runs: done one after the other: a run and the evaluations of its weights.
        feeds: runs whose starting weights are made once `runs` are done.
        task, prepare: as in `Workers.work_off`.
    """

    runs: tuple[PlannedRun, ...]
    feeds: tuple[PlannedRun, ...]
    task: Task
    prepare: Task

    def __call__(self) -> None:
        """Called on the node."""
        for run in self.runs:
            self.task(run)
        for run in self.feeds:
            self.prepare(run)

    def checkpoint(self) -> Any:
        """Called on the node before a time limit or preemption: queue the same again, it resumes from its folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class SlurmJobs:
    """Runs as jobs of a cluster.

    Args:
        text: as `slurm_parameters` reads it; cluster=local runs the jobs on this machine, to try the rest. Such jobs
            are known to the process that started them alone, so that no later one can take them over.
        folder: for submitit's files and logs; every node must see it.
    Raises: ValueError without submitit, without Slurm, and for parameters that submitit does not know.
    """

    def __init__(self, text: str, folder: Path) -> None:
        try:
            import submitit  # noqa: F401 (an optional package)
        except ModuleNotFoundError as error:
            raise ValueError("--slurm needs submitit: pip install submitit") from error
        self.parameters = {"name": "fsdet", **slurm_parameters(text)}
        self.cluster, self.folder = self.parameters.pop("cluster", "slurm"), folder
        self.queues = self.cluster != "local"  # jobs can wait for others, and every process can ask about them
        self.records = JobRecords(folder)
        self._asked = -ASK_SECONDS
        self.width = self.parameters.get("slurm_array_parallelism", 256)  # submitit's default
        try:
            self._executor()
        except (AssertionError, NameError, RuntimeError, ValueError) as error:
            raise ValueError(f"--slurm {text}: {error}") from error

    def _executor(self, needs: Sequence[str] = ()) -> Any:
        """Executor of jobs that start when the jobs `needs` have ended well, and are cancelled if one did not."""
        import submitit

        waiting = {}
        if needs and self.queues:
            waiting["slurm_dependency"] = f"afterok:{':'.join(needs)}"
            waiting["slurm_additional_parameters"] = {"kill-on-invalid-dep": "yes"}
        executor = submitit.AutoExecutor(folder=self.folder / "%j", cluster=self.cluster)
        executor.update_parameters(**self.parameters, **waiting)
        return executor

    def work_off(self, runs: Sequence[PlannedRun], task: Task, prepare: Task) -> Iterator[tuple[PlannedRun, str]]:
        """See `Workers`; after a signal the jobs are cancelled, which Slurm tells them by SIGTERM: they save."""
        lost: set[str] = set()
        submitted: dict[str, tuple[SlurmTask, Any]] = {}  # folder of the first run -> the job's task and handle
        with stop_signals(lambda number: None) as stop:
            waiting, refused = self._take_over(_jobs(runs, task, prepare), submitted, lost)
            yield from refused
            while (waiting or submitted) and not stop.number:
                ended = self._submit(waiting, submitted, lost)
                for folder, (job_task, job) in list(submitted.items()):
                    if self._has_ended(job):
                        del submitted[folder]
                        ended += _outcomes(job_task.runs, job, lost)
                        self.records.forget(job)
                yield from ended
                if not ended:
                    time.sleep(POLL_SECONDS)
            for _, job in submitted.values():
                self._cancel(job)
        if stop.number:
            raise SystemExit(128 + stop.number)

    def _submit(
        self, waiting: list[SlurmTask], submitted: dict[str, tuple[SlurmTask, Any]], lost: set[str]
    ) -> list[tuple[PlannedRun, str]]:
        """Submit what can be queued now, one array per set of jobs waited for; returns the runs that cannot be."""
        failed, arrays = [], {}
        unsubmitted = {job_task.runs[0].folder for job_task in waiting}
        for job_task in list(waiting):
            first = job_task.runs[0]
            reason = blocked_by(first, lost)
            sources = [submitted[folder] for folder in first.after if folder in submitted]
            needs = tuple(job.job_id for _, job in sources)
            # A job that was taken over may know nothing of this run, whose weights are then made here, after its end.
            is_fed = self.queues and any(first in source.feeds for source, _ in sources)
            if not reason and (unsubmitted.intersection(first.after) or (needs and not is_fed)):
                continue
            waiting.remove(job_task)
            reason = reason or ("" if needs else attempt(job_task.prepare, first))
            if reason:
                failed += [(run, reason) for run in job_task.runs]
                lost.update(run.folder for run in job_task.runs)
            else:
                arrays.setdefault(needs, []).append(job_task)
        for needs, members in arrays.items():
            for job_task, job in zip(members, self._executor(needs).submit_array(members), strict=True):
                submitted[job_task.runs[0].folder] = (job_task, job)
                if self.queues:
                    self.records.add(job, digests(job_task.runs), digests(job_task.feeds))
        return failed

    def _take_over(
        self, tasks: Sequence[SlurmTask], submitted: dict[str, tuple[SlurmTask, Any]], lost: set[str]
    ) -> tuple[list[SlurmTask], list[tuple[PlannedRun, str]]]:
        """Leave runs to the live jobs that an earlier call has submitted for them.

        Returns: what is left to submit, and the runs that may not be, since a job of another recipe uses their folder,
            with those that need them.
        """
        live = self.records.live() if self.queues else []
        again: set[str] = set()
        waiting, refused = [], []
        for job_task in tasks:
            parts: dict[LiveJob | None, list[PlannedRun]] = {}
            for run in job_task.runs:
                owner, foreign = _owner(run, live)
                if reason := blocked_by(run, lost) or foreign:
                    lost.add(run.folder)
                    refused.append((run, reason))
                    continue
                if owner and again.intersection(run.after) and owner.job.state.upper() == "PENDING":
                    self._cancel(owner.job)  # it waits for a job that is gone
                    live.remove(owner)
                    owner = None
                if owner is None:
                    again.add(run.folder)
                parts.setdefault(owner, []).append(run)
            for owner, members in parts.items():
                feeds = job_task.feeds if members[0] is job_task.runs[0] else ()
                if owner is None:
                    waiting.append(replace(job_task, runs=tuple(members), feeds=feeds))
                else:
                    known = tuple(run for run in feeds if digests([run]).items() <= owner.feeds.items())
                    part = replace(job_task, runs=tuple(members), feeds=known)
                    submitted[members[0].folder] = (part, owner.job)
        if submitted:
            logger.warning("%d jobs of an earlier call wait or run; they are taken over", len(submitted))
        return waiting, refused

    def _cancel(self, job: Any) -> None:
        job.cancel(check=False)
        self.records.forget(job)  # it needs time to save; the next call shall not wait for it

    def _has_ended(self, job: Any) -> bool:
        """Whether nothing more comes of a job; submitit says so of a suspended one too, and asks no more about it."""
        if not job.done():
            return False
        if job.paths.result_pickle.exists() or job.state.upper() not in ALIVE:
            return True
        if time.monotonic() - self._asked > ASK_SECONDS:
            self._asked = time.monotonic()
            job.watcher.clear()
        return False


def _owner(run: PlannedRun, live: Sequence[LiveJob]) -> tuple[LiveJob | None, str]:
    """The live job that does a run; or why none may, where the folder belongs to a job of another recipe."""
    folder = os.path.abspath(run.folder)
    claims = [item for item in live if folder in item.runs]
    for item in claims:
        if item.runs[folder] != run.digest:
            name, state = item.job.job_id, item.job.state.lower()
            return None, (
                f"job {name} of an earlier call ({state}) does this run with another configuration; cancel it (scancel "
                f"{name}) or wait for its end, and set another FEWSHOT.OUTPUT to keep both"
            )
    return (claims[0] if claims else None), ""


def _jobs(runs: Sequence[PlannedRun], task: Task, prepare: Task) -> list[SlurmTask]:
    """One job per run; an evaluation joins the job of its run, and starting weights are made where their source is."""
    folders = {run.folder for run in runs}
    feeds: dict[str, list[PlannedRun]] = {}
    joined: dict[str, list[PlannedRun]] = {}
    heads = []
    for run in runs:
        sources = [folder for folder in run.after if folder in folders]
        if run.kind == "evaluation" and sources:
            joined.setdefault(sources[-1], []).append(run)
            continue
        heads.append(run)
        if sources:
            feeds.setdefault(sources[-1], []).append(run)
    return [
        SlurmTask((run, *joined.get(run.folder, ())), tuple(feeds.get(run.folder, ())), task, prepare) for run in heads
    ]


def _outcomes(runs: Sequence[PlannedRun], job: Any, lost: set[str]) -> list[tuple[PlannedRun, str]]:
    """What became of the runs of an ended job; those that failed are added to `lost`."""
    answer = job.paths.result_pickle
    says_so = answer.exists() or (job.state.upper() in ("COMPLETED", "FINISHED") and _appears(answer))
    ended_well = says_so and job.exception() is None
    words = last_line(job.paths.stderr, error=True) or "nothing was logged"
    outcomes = []
    for run in runs:
        result = Path(run.folder) / "result.json"
        # In a job that failed, a result is good news about its run unless nothing came after that could have failed.
        is_done = _appears(result) if ended_well else result.exists() and run is not runs[-1]
        failure = f"job {job.job_id} {job.state.lower()}: {words} ({job.paths.stderr})"
        reason = "" if is_done else blocked_by(run, lost) or failure
        if reason:
            lost.add(run.folder)
        outcomes.append((run, reason))
    return outcomes


def _appears(path: Path) -> bool:
    """Wait for a file that another node has written."""
    end = time.monotonic() + _LATE_SECONDS
    while not path.exists():
        if time.monotonic() > end or not path.parent.is_dir():
            return False
        os.listdir(path.parent)  # makes a network file system look again
        time.sleep(POLL_SECONDS)
    return True
