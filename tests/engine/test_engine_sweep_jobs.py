"""Workers of a sweep as processes: order, failures, stops, locks, environments. The runs are small stand-ins.

The workers import this file, so that it imports nothing heavy.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdet.engine.sweep_jobs import LocalJobs, cpu_slots, gpu_slots
from fsdet.engine.sweep_run import InProcess, PlannedRun, RunLockedError, is_locked, last_line, run_lock

PATIENCE = 60  # seconds; the tests wait for a small part of it


def planned(folder, *after, kind="novel"):
    return PlannedRun(kind, "c.yaml", (), None, str(folder), "digest", "row", after=tuple(map(str, after)))


def wait_for(path, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} is not there"
        time.sleep(0.02)


def nothing(run):
    pass


def leave_result(run):
    """Done when all that is waited for is done, else an error; notes the environment. A base run takes its time."""
    for folder in run.after:
        assert (Path(folder) / "result.json").exists(), f"{folder} is not done"
    time.sleep(0.5 if run.kind == "base" else 0.0)
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    (Path(run.folder) / "result.json").write_text(json.dumps({name: os.environ.get(name) for name in names}))


def meet(run):
    """Ends only when the other run of the pair is there at the same time."""
    leave_result(run)
    for name in ("left", "right"):
        if Path(run.folder).name in ("left", "right"):
            wait_for(Path(run.folder).with_name(name) / "result.json")


def misbehave(run):
    name = Path(run.folder).name
    (Path(run.folder) / "log.txt").write_text("starting\niteration 7\n")
    if name == "raises":
        raise ValueError("no such shots\n  look elsewhere")
    if name == "dies":
        os.write(2, b"a warning of no matter\n")
        os.kill(os.getpid(), signal.SIGKILL)
    leave_result(run)


def train(run):
    """Runs until a signal, then saves as a training does; a second signal would have stopped it from saving."""
    received, end = [], time.monotonic() + PATIENCE
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(int(number)))
    (Path(run.folder) / "started").write_text(str(os.getpid()))
    while not received and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)
    (Path(run.folder) / "saved").write_text(" ".join(map(str, received)))
    sys.exit(128 + received[0])


def refuse(run):
    if Path(run.folder).name == "unprepared":
        raise ValueError("no base checkpoint")


@pytest.mark.parametrize("workers", [InProcess(), LocalJobs(({"OMP_NUM_THREADS": "3"},) * 2)], ids=["here", "apart"])
def test_runs_wait_for_what_they_need(tmp_path, workers):
    for name in ("base", "a", "b", "a2"):
        (tmp_path / name).mkdir()
    runs = [planned(tmp_path / "base", kind="base"), *(planned(tmp_path / name, tmp_path / "base") for name in "ab")]
    runs.append(planned(tmp_path / "a2", tmp_path / "a"))
    ended = list(workers.work_off(runs, leave_result, nothing))
    assert sorted(run.folder for run, reason in ended) == sorted(run.folder for run in runs)
    assert [reason for run, reason in ended] == [""] * 4 and ended[0][0] == runs[0]
    if workers.width == 2:
        assert json.loads((tmp_path / "b" / "result.json").read_text())["OMP_NUM_THREADS"] == "3"
        assert not list(tmp_path.rglob("worker.log"))  # nothing was said


def test_runs_are_side_by_side(tmp_path):
    runs = [planned(tmp_path / "left"), planned(tmp_path / "right")]
    assert [reason for _, reason in LocalJobs(cpu_slots(2)).work_off(runs, meet, nothing)] == ["", ""]


def test_a_failed_run_stops_only_those_that_need_it(tmp_path):
    names = ("raises", "dies", "unprepared", "fine")
    runs = [planned(tmp_path / name) for name in names]
    runs += [planned(tmp_path / "later", tmp_path / "dies"), planned(tmp_path / "last", tmp_path / "later")]
    reasons = {Path(run.folder).name: text for run, text in LocalJobs(({},) * 2).work_off(runs, misbehave, refuse)}
    assert reasons["fine"] == ""
    assert reasons["raises"] == f"exit status 1: ValueError: no such shots ({tmp_path}/raises/worker.log)"
    assert reasons["dies"] == f"killed by SIGKILL (out of memory?): iteration 7 ({tmp_path}/dies/log.txt)"
    assert reasons["unprepared"] == "no base checkpoint" and not (tmp_path / "unprepared").exists()
    assert reasons["later"] == f"needs {tmp_path}/dies, which has no result"
    assert reasons["last"] == f"needs {tmp_path}/later, which has no result"


def test_one_process_goes_on_after_a_failure(tmp_path):
    for name in ("raises", "fine"):
        (tmp_path / name).mkdir()
    runs = [planned(tmp_path / "raises"), planned(tmp_path / "later", tmp_path / "raises"), planned(tmp_path / "fine")]
    reasons = [reason for _, reason in InProcess().work_off(runs, misbehave, refuse)]
    assert reasons == ["no such shots\n  look elsewhere", f"needs {tmp_path}/raises, which has no result", ""]


def drive(folder):
    """A sweep of three runs on two workers, in a process that the test can kill."""
    runs = [planned(Path(folder) / name) for name in "abc"]
    for run, reason in LocalJobs(({},) * 2).work_off(runs, train, nothing):
        with (Path(folder) / "ended").open("a") as file:
            file.write(f"{Path(run.folder).name}: {reason}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_sweep_ends_its_workers_in_order(tmp_path, number):
    """Also after kill -9, which the sweep itself cannot notice: its workers do."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = f"import sys, {__name__} as me; me.drive(sys.argv[1])"
    sweep = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, start_new_session=True)
    for name in "ab":
        wait_for(tmp_path / name / "started")
    os.killpg(sweep.pid, number)  # as a terminal does
    assert sweep.wait(PATIENCE) == (-number if number == signal.SIGKILL else 128 + number)
    for name in "ab":
        wait_for(tmp_path / name / "saved")
        sent = signal.SIGTERM if number == signal.SIGKILL else number
        assert (tmp_path / name / "saved").read_text() == str(int(sent))
        assert_gone(int((tmp_path / name / "started").read_text()))
    assert not (tmp_path / "c").exists()
    if number == signal.SIGTERM:
        ended = sorted((tmp_path / "ended").read_text().splitlines())
        assert ended == ["a: stopped by SIGTERM, can be resumed", "b: stopped by SIGTERM, can be resumed"]


def assert_gone(pid):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"{pid} lives")


def test_caller_that_gives_up_leaves_no_worker(tmp_path):
    (tmp_path / "quick").mkdir()
    runs = [planned(tmp_path / "endless"), planned(tmp_path / "quick")]
    sweep = LocalJobs(({},) * 2).work_off(runs, train_or_end, nothing)
    run, reason = next(sweep)
    assert run == runs[1] and reason == ""
    sweep.close()
    assert (tmp_path / "endless" / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def train_or_end(run):
    if Path(run.folder).name == "endless":
        train(run)
    wait_for(Path(run.folder).with_name("endless") / "started")


# Locks


HOLD = """
import os, sys, time
from fsdet.engine.sweep_run import run_lock
with run_lock(sys.argv[1]):
    if os.fork():  # the parent; its child lives on, as a loader worker may
        open(sys.argv[1] + "/held", "w").write(str(os.getpid()))
    time.sleep(60)
"""


def test_a_run_is_done_by_one_process(tmp_path):
    folder = tmp_path / "run"
    assert not is_locked(folder) and not folder.exists()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=environment, start_new_session=True)
    try:
        wait_for(folder / "held")
        with (
            pytest.raises(RunLockedError, match=rf"{folder} is being run by process {holder.pid} on "),
            run_lock(folder),
        ):
            pass
        assert is_locked(folder)
        holder.kill()
        holder.wait()
        assert not is_locked(folder)
        with run_lock(folder):  # nobody has to clean up
            assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_waiting_for_a_lock(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=environment, start_new_session=True)
    wait_for(tmp_path / "held")
    started = time.monotonic()
    with pytest.raises(RunLockedError), run_lock(tmp_path, wait=0.2):
        pass
    assert time.monotonic() - started >= 0.2
    os.killpg(holder.pid, signal.SIGKILL)
    with run_lock(tmp_path, wait=PATIENCE):
        pass
    holder.wait()


# Environments and logs


def test_cpu_workers_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [slot["OMP_NUM_THREADS"] for slot in cpu_slots(3)] == ["2", "2", "2"]
    assert cpu_slots(16)[0]["OMP_NUM_THREADS"] == "1" and cpu_slots(1)[0]["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert cpu_slots(2)[1]["OMP_NUM_THREADS"] == "5"
    with pytest.raises(ValueError, match="0 workers"):
        cpu_slots(0)


def test_gpus_are_counted_among_the_visible_ones(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-77,6")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots("all")] == ["4", "GPU-77", "6"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots("2,0")] == ["6", "4"]
    for wanted in ("3", "0,0", "a", "0,"):
        with pytest.raises(ValueError, match="3 can be used here"):
            gpu_slots(wanted)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        with pytest.raises(ValueError, match="0 can be used here"):
            gpu_slots("all")
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots("all")] == ["0", "1"]


def test_worker_starts_without_pytorch():
    """Threads and GPU are set in its environment, which PyTorch reads when it is imported."""
    code = "import sys, fsdet.engine.sweep_jobs, fsdet.engine.sweep_slurm; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_last_words_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("torch.OutOfMemoryError: old\n")
    offset = log.stat().st_size
    with log.open("a") as file:
        file.write("[10:00] start\nTraceback:\n  x\nRuntimeError: CUDA\ncompile with\n\n")
    assert last_line(log, offset) == "compile with"
    assert last_line(log, offset, error=True) == "RuntimeError: CUDA"
    assert last_line(log, log.stat().st_size, error=True) == ""
