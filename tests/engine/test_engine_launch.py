"""Where a run is started: this process, several CPU processes, torchrun (also in test_engine_trainer.py)."""

import argparse
import logging
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from fsdet.data.mapper import ImageError
from fsdet.engine.launch import add_launch_arguments, launch
from fsdet.engine.setup import load_config, on_this_machine


def options(*words):
    parser = argparse.ArgumentParser()
    add_launch_arguments(parser)
    return parser.parse_args(list(words))


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def describe(folder, fault=""):
    """Write what this process knows of the others, then fail if asked to."""
    total = torch.tensor([float(comm.get_rank() + 1)])
    dist.all_reduce(total)
    facts = (comm.get_world_size(), comm.get_local_rank(), comm.get_local_size(), int(total))
    (Path(folder) / f"rank{comm.get_rank()}").write_text(" ".join(map(str, facts)))
    if fault:
        raise ImageError(fault)


def refuse(text):
    raise ValueError(text)


def test_one_process_returns_the_result():
    assert launch(lambda a, b: (a, b, comm.get_world_size()), options("--num-gpus", "0"), (1, 2)) == (1, 2, 1)


def test_missing_gpu_costs_one_log_line(write_config, caplog):
    caplog.set_level(logging.WARNING)
    config = write_config(MODEL={"DEVICE": "cuda"})
    assert launch(lambda: on_this_machine(load_config(config)).MODEL.DEVICE, options("--num-gpus", "4"), ()) == "cpu"
    assert [record.getMessage() for record in caplog.records] == ["No GPU found: running on the CPU"]
    caplog.clear()
    assert on_this_machine(load_config(config, ["MODEL.DEVICE", "cpu"])).MODEL.DEVICE == "cpu"
    assert not caplog.records


def test_fewer_gpus_than_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch(lambda: "done", options("--num-gpus", "4"), ()) == "done"
    assert "--num-gpus 4, found 1: running on 1 GPU" in caplog.text
    with pytest.raises(ValueError, match="--num-gpus 4, but this machine has 1"):
        launch(print, options("--num-gpus", "4", "--num-machines", "2"), ())


def test_several_machines_without_what_they_need(monkeypatch):
    with pytest.raises(ValueError, match="start the processes with torchrun"):
        launch(print, options("--num-machines", "2", "--num-gpus", "0"), ())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--dist-url tcp://HOST:PORT"):
        launch(print, options("--num-machines", "2"), ())


def test_gpu_processes_are_left_to_detectron2(monkeypatch):
    """Two GPUs pretended: what reaches Detectron2's own launcher."""
    import fsdet.engine.launch as module

    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(module, "launch_gpus", lambda *args: seen.append(args))
    launch(describe, options("--num-gpus", "2", "--num-machines", "3", "--dist-url", "tcp://host:1"), ("folder",))
    ((call, gpus, machines, rank, url, (faults, main, folder), timeout),) = seen
    assert (gpus, machines, rank, url, main, folder) == (2, 3, 0, "tcp://host:1", describe, "folder")
    with pytest.raises(ValueError, match="broken.jpg"):
        call(faults, refuse, "broken.jpg")
    assert faults.get() == "broken.jpg" and timeout.total_seconds() >= 600


def test_two_cpu_processes_run_and_fail_as_one_would(tmp_path):
    fault = "broken.jpg: this image cannot be used"
    with pytest.raises(ValueError, match=f"^{fault}$"):  # no word of the processes' own tracebacks
        launch(describe, options("--num-processes", "2"), (str(tmp_path), fault))
    facts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert facts == {"rank0": "2 0 2 3", "rank1": "2 1 2 3"}  # world size, local rank, local size, 1 + 2


@pytest.mark.parametrize(
    ("ended", "error", "text"),
    [
        (None, None, ""),
        (ProcessRaisedException("Traceback: a programming fault", 0, 1), ProcessRaisedException, "programming fault"),
        (ProcessExitedException("exit code 143", 0, 1, 128 + signal.SIGTERM), SystemExit, "^143$"),  # an orderly stop
        (ProcessExitedException("killed", 0, 1, -signal.SIGKILL), SystemExit, "^137$"),
    ],
)
def test_how_started_processes_may_end(monkeypatch, ended, error, text):
    def spawn(worker, args, nprocs):
        assert nprocs == 3
        if ended:
            raise ended

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    with pytest.raises(error, match=text) if error else nullcontext():
        launch(print, options("--num-processes", "3"), ())


def test_torchrun_has_started_the_processes(monkeypatch):
    """They join through their environment, whatever --num-gpus says."""
    import fsdet.engine.launch as module

    for name, value in {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(module, "_run_joined", lambda *args, **where: (args, where))
    args, where = launch(describe, options("--num-gpus", "8"), ("folder",))
    assert args == (describe, ("folder",), 2) and where == {"init_method": "env://"}
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one process is a plain start
    assert launch(lambda: "plain", options("--num-gpus", "0"), ()) == "plain"
