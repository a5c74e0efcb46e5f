"""Stopped and resumed runs: signals to every process at once, and which checkpoints stay."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdet.checkpoint.safe_io import load_weights
from fsdet.engine.run import run

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_net.py"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group_saves_and_leaves(write_config, tmp_path, number):
    """The loader's workers receive it too and must not take the main process down before it has saved."""
    solver = {"MAX_ITER": 100000, "CHECKPOINT_PERIOD": 50000, "STEPS": []}
    config = write_config(SOLVER=solver, DATALOADER={"NUM_WORKERS": 2})
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL.parents[1])}
    folder, end = tmp_path / "run", time.time() + 120
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(TOOL), "--config-file", config],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    metrics = folder / "metrics.json"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.time() < end, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 128 + number, (tmp_path / "log").read_text()[-3000:]
    assert load_weights(folder / (folder / "last_checkpoint").read_text())["iteration"] > 0
    with pytest.raises(ProcessLookupError):  # no worker is left behind
        os.killpg(process.pid, 0)


def test_resumed_run_keeps_as_many_checkpoints(write_config, tmp_path):
    for length in (6, 12):
        run(write_config(SOLVER={"MAX_ITER": length, "CHECKPOINTS_KEPT": 2}), resume=True)
    kept = sorted(path.name for path in (tmp_path / "run").glob("model_0*.pth"))
    assert kept == ["model_0000009.pth", "model_0000011.pth"]
