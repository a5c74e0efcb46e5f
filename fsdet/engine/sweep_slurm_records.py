"""Records of a sweep's Slurm jobs, one small file a job, for the call that comes after this one was killed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdet.data.files import save_text_atomic
from fsdet.engine.sweep_run import PlannedRun

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_LATE_SECONDS = 30.0  # how long Slurm's accounting may take to know a new job
# States of Slurm's jobs that may still come to a result.
ALIVE = (
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT",
    "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LiveJob:
    """A job that an earlier call has submitted: submitit's handle, and `runs` and `feeds` as folder -> digest."""

    job: Any
    runs: Mapping[str, str]
    feeds: Mapping[str, str]


class JobRecords:
    """The records of the jobs that were submitted and have not ended.

    Args:
        folder: for submitit's files; the records lie in its subfolder `live`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "live"

    def add(self, job: Any, runs: Mapping[str, str], feeds: Mapping[str, str]) -> None:
        """Write down a submitted job: what it does, and whose weights it makes, as folder -> digest."""
        what = {"job": job.job_id, "tasks": job.num_tasks, "runs": dict(runs), "feeds": dict(feeds)}
        save_text_atomic(json.dumps(what, indent=1) + "\n", self.folder / f"{job.job_id}.json")

    def forget(self, job: Any) -> None:
        """Remove the record of a job that has ended or is cancelled."""
        (self.folder / f"{job.job_id}.json").unlink(missing_ok=True)

    def live(self) -> list[LiveJob]:
        """The recorded jobs that are alive; the others are forgotten."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # another sweep has just forgotten it
                found.append(_read(path, self.folder.parent / "%j"))
        # Submitit asks about all of them at once, and not at every call.
        end = time.monotonic() + _LATE_SECONDS
        while any(item.job.state.upper() == "UNKNOWN" for item in found) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        live = [item for item in found if item.job.state.upper() in ALIVE]
        for item in found:
            if item not in live:
                logger.info("Job %s of an earlier call: %s", item.job.job_id, item.job.state.lower())
                self.forget(item.job)
        return live


def digests(runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Absolute folder -> digest of the recipe."""
    return {os.path.abspath(run.folder): run.digest for run in runs}


def _read(path: Path, folder: Path) -> LiveJob:
    from submitit import SlurmJob

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        job = SlurmJob(folder=folder, job_id=record["job"], tasks=range(record["tasks"]))
        return LiveJob(job, dict(record["runs"]), dict(record["feeds"]))
    except (LookupError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{path} is no record of a Slurm job ({error!r}); cancel job {path.stem} if it is alive, and remove it"
        ) from error
