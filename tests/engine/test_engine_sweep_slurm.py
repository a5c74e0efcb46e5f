"""Sweeps as Slurm jobs: submitit's local executor does small stand-ins, and Slurm's own scripts are read, not run.

The jobs import this file, so that it imports nothing heavy.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from fsdet.engine.sweep_run import PlannedRun
from fsdet.engine.sweep_slurm import SlurmJobs, SlurmTask, _jobs, _outcomes, slurm_parameters

submitit = pytest.importorskip("submitit", reason="the optional extra `slurm` is not installed")


def planned(folder, *after, kind="novel"):
    return PlannedRun(kind, "c.yaml", (), None, str(folder), "digest", "row", after=tuple(map(str, after)))


def leave_result(run):
    """Done when all that is waited for is done and its starting weights are made."""
    folder = Path(run.folder)
    folder.mkdir(parents=True)
    if folder.name == "bad":
        raise ValueError("no such shots\n  look elsewhere")
    for other in run.after:
        assert (Path(other) / "result.json").exists(), f"{other} is not done"
    if run.kind == "novel":
        assert folder.with_name("weights").exists(), "no starting weights"
    (folder / "result.json").write_text("{}")


def make_weights(run):
    if run.kind == "novel":
        assert (Path(run.folder).with_name("base") / "result.json").exists()
        Path(run.folder).with_name("weights").write_text("")


@pytest.fixture
def runs(tmp_path):
    """Base, two novel runs, an evaluation of one of them, and one that needs the failing one."""
    names = {name: tmp_path / name for name in ("base", "good", "bad")}
    return [
        planned(names["base"], kind="base"),
        planned(names["good"], names["base"]),
        planned(names["good"] / "calibrated", names["good"], kind="evaluation"),
        planned(names["bad"], names["base"]),
        planned(names["bad"] / "calibrated", names["bad"], kind="evaluation"),
        planned(tmp_path / "later", names["bad"]),
    ]


def test_local_executor_does_the_plan(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    jobs = SlurmJobs("cluster=local,timeout_min=5", tmp_path / "slurm")
    reasons = {run.folder: reason for run, reason in jobs.work_off(runs, leave_result, make_weights)}
    assert [reasons[run.folder] for run in runs[:3]] == ["", "", ""]
    failed = reasons[str(tmp_path / "bad")]
    assert "ValueError: no such shots (" in failed and "_log.err)" in failed
    log = Path(failed.rsplit("(", 1)[1].rstrip(")"))
    assert log.is_relative_to(tmp_path / "slurm") and "look elsewhere" in log.read_text()
    for run in runs[4:]:
        assert reasons[run.folder] == f"needs {tmp_path}/bad, which has no result"
    assert len(list((tmp_path / "slurm").glob("*/*_submitted.pkl"))) == 3  # base, good, bad


def test_one_job_per_run_and_starting_weights_where_their_source_is(runs):
    base, good, bad, later = _jobs(runs, leave_result, make_weights)
    assert (base.runs, base.feeds) == ((runs[0],), (runs[1], runs[3]))
    assert (good.runs, good.feeds) == ((runs[1], runs[2]), ())
    assert (bad.runs, bad.feeds) == ((runs[3], runs[4]), (runs[5],)) and later.runs == (runs[5],)
    (alone,) = _jobs(runs[2:3], leave_result, make_weights)  # its run was done before
    assert (alone.runs, alone.feeds) == ((runs[2],), ())


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins of Slurm's commands: sbatch numbers the jobs from 101 and keeps their scripts."""
    tools, kept = tmp_path / "bin", tmp_path / "kept"
    tools.mkdir()
    kept.mkdir()
    count = f'n=$((101 + $(ls {kept} | wc -l))); cp "$1" {kept}/$n; echo "Submitted batch job $n"'
    for name, body in (("srun", ""), ("sbatch", count), ("scancel", f"echo $1 >> {tmp_path}/cancelled"), ("sacct", "")):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return kept


def test_scripts_name_what_they_wait_for(runs, tmp_path, slurm):
    jobs = SlurmJobs("partition=gpu,timeout_min=90,gpus_per_node=1,array_parallelism=4", tmp_path / "slurm")
    assert jobs.width == 4
    waiting, submitted = _jobs(runs, leave_result, make_weights), {}
    for _ in range(3):
        assert jobs._submit(waiting, submitted, set()) == []
    assert not waiting
    first, array, last = ((slurm / name).read_text() for name in ("101", "102", "103"))
    assert "#SBATCH --partition=gpu\n" in first and "#SBATCH --time=90\n" in first
    assert "dependency" not in first and "--array" not in first
    assert "#SBATCH --dependency=afterok:101\n" in array and "#SBATCH --array=0-1%2\n" in array
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in array
    assert "#SBATCH --dependency=afterok:102_1\n" in last and "--array" not in last
    assert [job.job_id for _, job in submitted.values()] == ["101", "102_0", "102_1", "103"]
    assert not list(tmp_path.glob("weights"))  # made by the base run's job


def test_weights_of_a_finished_base_run_are_made_before_submission(runs, tmp_path, slurm):
    jobs = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "result.json").write_text("{}")
    waiting, submitted = _jobs(runs[1:3], leave_result, make_weights), {}
    assert jobs._submit(waiting, submitted, set()) == []
    assert (tmp_path / "weights").exists() and "dependency" not in (slurm / "101").read_text()


def refuse(run):
    raise ValueError("no base checkpoint")


def test_run_without_weights_is_not_submitted(runs, tmp_path, slurm):
    jobs = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    ended = list(jobs.work_off(runs[1:3], leave_result, refuse))
    assert ended == [(runs[1], "no base checkpoint"), (runs[2], "no base checkpoint")]
    assert not list(slurm.iterdir())


def stop_this_process(run):
    os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_sweep_cancels_its_jobs(runs, tmp_path, slurm):
    jobs = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    with pytest.raises(SystemExit) as stop:
        list(jobs.work_off(runs[:1], leave_result, stop_this_process))
    assert stop.value.code == 143 and (tmp_path / "cancelled").read_text() == "101\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class EndedJob:
    """A job that failed on its node, in a later part than its first run."""

    job_id, state = "7", "FAILED"

    def __init__(self, folder):
        self.paths = submitit.core.utils.JobPaths(folder, self.job_id)
        self.paths.folder.mkdir()
        self.paths.stderr.write_text("srun: starting\nMemoryError: 3 GiB\n")


def test_failure_belongs_to_the_run_that_left_nothing(runs, tmp_path):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "result.json").write_text("{}")
    job, lost = EndedJob(tmp_path / "log"), set()
    outcomes = dict(_outcomes(runs[1:3], job, lost))
    assert outcomes[runs[1]] == "" and lost == {runs[2].folder}
    assert outcomes[runs[2]] == f"job 7 failed: MemoryError: 3 GiB ({job.paths.stderr})"
    assert dict(_outcomes(runs[1:2], job, set()))[runs[1]].startswith("job 7 failed")  # its surgery failed


def test_time_limit_queues_the_same_again(runs):
    task = SlurmTask((runs[0],), (runs[1],), leave_result, make_weights)
    again = task.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function == task


def test_parameters():
    assert slurm_parameters("partition=gpu, timeout_min=60,mem_gb=32,exclude=n1,n2,slurm_qos=low") == {
        "slurm_partition": "gpu",
        "timeout_min": 60,
        "mem_gb": 32,
        "slurm_exclude": "n1,n2",
        "slurm_qos": "low",
    }
    with pytest.raises(ValueError, match="partition=gpu,timeout_min=600"):
        slurm_parameters("gpu")
    with pytest.raises(ValueError, match="add timeout_min"):
        slurm_parameters("partition=gpu")


def test_errors_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="colour"):
        SlurmJobs("timeout_min=1,colour=red,cluster=local", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="srun"):
        SlurmJobs("timeout_min=1", tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="pip install submitit"):
        SlurmJobs("timeout_min=1", tmp_path)
