"""The runs of a sweep as Slurm jobs, through submitit: one array a stage, each waiting for the one before it.

Whoever waits may be killed and started again; the jobs go on without it, and what they finish is skipped the next time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdet.engine.sweep_run import PlannedRun, Task, attempt, blocked_by, last_line, stop_signals

logger = logging.getLogger(__name__)

# Parameters that submitit knows for every cluster; the others are Slurm's own.
_SHARED = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
POLL_SECONDS = 1.0
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
        text: as `slurm_parameters` reads it; cluster=local runs the jobs on this machine, to try the rest.
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
        self.queues = self.cluster != "local"  # jobs can be told to wait for others
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
        waiting = _jobs(runs, task, prepare)
        lost: set[str] = set()
        submitted: dict[str, tuple[SlurmTask, Any]] = {}  # folder of the first run -> the job's task and handle
        with stop_signals(lambda number: None) as stop:
            while (waiting or submitted) and not stop.number:
                ended = self._submit(waiting, submitted, lost)
                for folder, (job_task, job) in list(submitted.items()):
                    if job.done():
                        del submitted[folder]
                        ended += _outcomes(job_task.runs, job, lost)
                yield from ended
                if not ended:
                    time.sleep(POLL_SECONDS)
            for _, job in submitted.values():
                job.cancel(check=False)
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
            needs = tuple(submitted[folder][1].job_id for folder in first.after if folder in submitted)
            if not reason and (unsubmitted.intersection(first.after) or (needs and not self.queues)):
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
        return failed


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
