"""Sweeps as Slurm jobs: submitit's local executor does small stand-ins, and Slurm's own scripts are read, not run.

The jobs import this file, so that it imports nothing heavy.
"""

import os
import pickle
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fsdet.engine import sweep_slurm, sweep_slurm_records
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
    assert not (tmp_path / "slurm" / "live").exists()  # nobody else could ask about these jobs


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
    told = {"scancel": f"echo $1 >> {tmp_path}/cancelled", "sacct": f"cat {tmp_path}/states; echo >> {tmp_path}/asked"}
    for name, body in {"srun": "", "sbatch": count, **told}.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(submitit.SlurmJob, "watcher", type(submitit.SlurmJob.watcher)())  # no states of other tests
    for module in (sweep_slurm, sweep_slurm_records):
        monkeypatch.setattr(module, "_LATE_SECONDS", 0.0)
    say_states(tmp_path)
    return kept


def say_states(tmp_path, **states):
    """What sacct answers; `_102_0` stands for job 102_0."""
    lines = [f"{job.removeprefix('_')}|{state}|n1" for job, state in states.items()]
    (tmp_path / "states").write_text("\n".join(["JobID|State|NodeList", *lines, ""]))


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


@pytest.fixture
def killed(runs, tmp_path, slurm):
    """A sweep that was killed after it had submitted all: base 101, good 102_0, bad 102_1, later 103."""
    jobs = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    waiting, submitted = _jobs(runs, leave_result, make_weights), {}
    for _ in range(3):
        jobs._submit(waiting, submitted, set())
    return {job.job_id: job for _, job in submitted.values()}


def take_over(runs, tmp_path):
    """A call after it: its jobs, what it would submit, what it took over, and what it refused."""
    jobs, submitted = SlurmJobs("timeout_min=90", tmp_path / "slurm"), {}
    waiting, refused = jobs._take_over(_jobs(runs, leave_result, make_weights), submitted, set())
    return jobs, waiting, submitted, refused


def records(tmp_path):
    return sorted(path.stem for path in (tmp_path / "slurm" / "live").iterdir())


def end_well(job, *runs):
    for run in runs:
        Path(run.folder).mkdir(parents=True)
        (Path(run.folder) / "result.json").write_text("{}")
    job.paths.result_pickle.write_bytes(pickle.dumps(("success", None)))


def test_repeated_call_waits_for_the_jobs_of_the_killed_one(runs, tmp_path, slurm, killed):
    assert records(tmp_path) == ["101", "102_0", "102_1", "103"]
    say_states(tmp_path, _101="COMPLETING", **{"102_[0-1%2]": "PENDING"}, _103="SUSPENDED")
    end_well(killed["101"], runs[0])
    end_well(killed["102_0"], *runs[1:3])
    end_well(killed["102_1"], *runs[3:5])
    end_well(killed["103"], runs[5])
    again = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    assert list(again.work_off(runs, leave_result, make_weights)) == [(run, "") for run in runs]
    assert len(list(slurm.iterdir())) == 3  # nothing more was submitted
    assert len((tmp_path / "asked").read_text().splitlines()) < 4  # about all jobs at once
    assert records(tmp_path) == []


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED"])
def test_live_jobs_are_not_submitted_again(runs, tmp_path, killed, state, monkeypatch):
    say_states(tmp_path, _101=state)
    monkeypatch.chdir(tmp_path)  # the same folder by another name
    _, waiting, submitted, refused = take_over([replace(runs[0], folder="base")], tmp_path)
    assert (waiting, refused, [job.job_id for _, job in submitted.values()]) == ([], [], ["101"])
    assert records(tmp_path) == ["101"]


@pytest.mark.parametrize("state", ["COMPLETED", "FAILED", "CANCELLED by 7", "TIMEOUT", "NODE_FAIL", None])
def test_dead_and_unknown_jobs_are_forgotten(runs, tmp_path, killed, state):
    say_states(tmp_path, **({"_101": state} if state else {}))
    _, waiting, submitted, refused = take_over(runs[:1], tmp_path)
    assert (submitted, refused, [task.runs for task in waiting]) == ({}, [], [(runs[0],)])
    assert records(tmp_path) == []


def test_accounting_may_lag_behind_a_submission(runs, tmp_path, killed, monkeypatch):
    monkeypatch.setattr(sweep_slurm_records, "_LATE_SECONDS", 20.0)
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        say_states(tmp_path, _101="PENDING", _102_0="PENDING", _102_1="PENDING", _103="PENDING")
        submitit.SlurmJob.watcher.clear()  # instead of the seconds until it asks again

    monkeypatch.setattr(sweep_slurm.time, "sleep", pause)
    _, waiting, submitted, _ = take_over(runs, tmp_path)
    assert (waiting, len(submitted), len(pauses)) == ([], 4, 1)


def test_new_jobs_wait_for_those_taken_over(runs, tmp_path, slurm):
    first = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    first._submit(_jobs(runs, leave_result, make_weights), {}, set())  # killed after the base run's job, 101
    say_states(tmp_path, _101="RUNNING")
    more = planned(tmp_path / "more", tmp_path / "base")  # job 101 does not make its weights
    jobs, waiting, submitted, _ = take_over([*runs, more], tmp_path)
    assert jobs._submit(waiting, submitted, set()) == []
    array = (slurm / "102").read_text()
    assert "#SBATCH --dependency=afterok:101\n" in array and "#SBATCH --array=0-1%2\n" in array
    jobs._submit(waiting, submitted, set())
    assert [task.runs for task in waiting] == [(more,)] and len(list(slurm.iterdir())) == 3
    end_well(submitted.pop(runs[0].folder)[1], runs[0])
    jobs._submit(waiting, submitted, set())
    assert (tmp_path / "weights").exists()  # made here, since the base run has ended
    assert waiting == [] and "dependency" not in (slurm / "104").read_text()


def test_job_of_another_recipe_is_left_alone(runs, tmp_path, slurm, killed):
    say_states(tmp_path, _101="RUNNING", _102_0="PENDING", _102_1="PENDING", _103="PENDING")
    again = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    changed = [replace(runs[0], digest="other"), *runs[1:3]]
    reasons = {run.folder: reason for run, reason in again.work_off(changed, leave_result, make_weights)}
    assert "job 101 of an earlier call (running)" in reasons[runs[0].folder]
    assert "scancel 101" in reasons[runs[0].folder] and "wait for its end" in reasons[runs[0].folder]
    assert reasons[runs[1].folder] == f"needs {tmp_path}/base, which has no result"
    assert len(reasons) == 3 and len(list(slurm.iterdir())) == 3  # nothing more was submitted
    assert records(tmp_path) == ["101", "102_0", "102_1", "103"] and not (tmp_path / "cancelled").exists()


def test_job_that_waits_for_a_dead_one_is_replaced(runs, tmp_path, killed):
    say_states(tmp_path, _101="NODE_FAIL", _102_0="PENDING", _102_1="RUNNING", _103="PENDING")
    _, waiting, submitted, _ = take_over(runs, tmp_path)
    assert [task.runs for task in waiting] == [(runs[0],), tuple(runs[1:3])]
    assert (tmp_path / "cancelled").read_text() == "102_0\n"
    assert [job.job_id for _, job in submitted.values()] == ["102_1", "103"] and records(tmp_path) == ["102_1", "103"]


def test_evaluation_goes_on_in_the_job_of_its_finished_run(runs, tmp_path, killed):
    say_states(tmp_path, _102_0="RUNNING")
    _, waiting, submitted, _ = take_over(runs[2:3], tmp_path)
    assert waiting == [] and [job.job_id for _, job in submitted.values()] == ["102_0"]


def test_evaluation_that_a_live_job_lacks_is_submitted_after_it(runs, tmp_path, slurm):
    first = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    first._submit(_jobs(runs[1:2], leave_result, print), {}, set())  # without --calibration both
    say_states(tmp_path, _101="RUNNING")
    jobs, waiting, submitted, _ = take_over(runs[1:3], tmp_path)
    assert [task.runs for task in waiting] == [(runs[2],)] and submitted[runs[1].folder][0].runs == (runs[1],)
    jobs._submit(waiting, submitted, set())
    assert len(waiting) == 1
    submitted.clear()  # it has ended
    jobs._submit(waiting, submitted, set())
    assert submitted[runs[2].folder][1].job_id == "102"


def test_stopped_sweep_cancels_jobs_taken_over_and_forgets_them(runs, tmp_path, slurm, killed):
    say_states(tmp_path, _101="RUNNING", _102_0="PENDING", _102_1="PENDING", _103="PENDING")
    again = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    with pytest.raises(SystemExit):
        list(again.work_off([runs[0], planned(tmp_path / "alone")], leave_result, stop_this_process))
    assert (tmp_path / "cancelled").read_text() == "101\n104\n"
    assert records(tmp_path) == ["102_0", "102_1", "103"]  # those of others


def test_suspended_job_has_not_ended(runs, tmp_path, killed, monkeypatch):
    monkeypatch.setattr(sweep_slurm, "ASK_SECONDS", 0.0)
    say_states(tmp_path, _101="SUSPENDED")
    jobs, _, submitted, _ = take_over(runs[:1], tmp_path)
    job = submitted[runs[0].folder][1]
    assert job.done() and not jobs._has_ended(job)  # submitit takes it for ended
    say_states(tmp_path, _101="FAILED")
    assert jobs._has_ended(job)


def test_suspended_job_is_waited_for(runs, tmp_path, killed, monkeypatch):
    say_states(tmp_path, _101="SUSPENDED")
    monkeypatch.setattr(sweep_slurm.time, "sleep", lambda seconds: end_well(killed["101"], runs[0]))
    jobs = SlurmJobs("timeout_min=90", tmp_path / "slurm")
    assert list(jobs.work_off(runs[:1], leave_result, make_weights)) == [(runs[0], "")]


def test_broken_record_is_named(runs, tmp_path, killed):
    (tmp_path / "slurm" / "live" / "102_0.json").write_text('{"job": "102_0"}')
    with pytest.raises(ValueError, match=r"live/102_0.json is no record .* cancel job 102_0"):
        take_over(runs, tmp_path)


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
