"""The training loop: exact resume, accumulation, two processes, mixed precision, orderly stops, faults."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fsdet.checkpoint.safe_io import load_weights
from fsdet.data.mapper import ImageError
from fsdet.engine import run as engine_run
from fsdet.engine.run import run
from fsdet.evaluation.result import read_result

ROOT = Path(__file__).resolve().parents[2]


def weights(folder, name="model_final"):
    return load_weights(Path(folder) / f"{name}.pth")["model"]


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def losses(folder):
    """Loss of each iteration, from metrics.json (written every 20 iterations and at the end)."""
    return [json.loads(line) for line in (Path(folder) / "metrics.json").read_text().splitlines()]


def start(config, *opts, launcher=(), log=subprocess.DEVNULL):
    command = [sys.executable, *launcher, str(ROOT / "tools" / "train_net.py"), "--config-file", config, *opts]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def wait_for(path, process, seconds=120):
    end = time.time() + seconds
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None and time.time() < end, f"{path.name} never came"
        time.sleep(0.005)


def test_trains_evaluates_and_records(write_config, tmp_path):
    metrics = run(write_config())
    folder = tmp_path / "run"
    assert 0 <= metrics["AP50"] <= 100 and "bAP50" in metrics
    result = read_result(folder / "result.json")
    assert result.protocol.stage == "base" and result.iterations == 6 and result.images_per_step == 4
    assert set(result.per_class) == {"red", "green", "blue"}
    assert json.loads((folder / "classes.json").read_text())["detector"] == ["red", "green", "blue"]
    assert load_weights(folder / "model_final.pth")["fsdet"]["classes"] == ["red", "green", "blue"]
    kept = sorted(p.name for p in folder.glob("model_0*.pth"))
    assert kept == ["model_0000003.pth", "model_0000005.pth"]  # SOLVER.CHECKPOINTS_KEPT


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_run_gives_the_same_weights(write_config, tmp_path, workers):
    """kill -9 after the first checkpoint; aspect grouping and random augmentation are on."""
    solver = {"MAX_ITER": 30, "STEPS": [20]}
    run(write_config("whole.yaml", OUTPUT_DIR=str(tmp_path / "whole"), SOLVER=solver))
    killed = write_config(OUTPUT_DIR=str(tmp_path / "killed"), DATALOADER={"NUM_WORKERS": workers}, SOLVER=solver)
    process = start(killed)
    wait_for(tmp_path / "killed" / "model_0000001.pth", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model_final.pth").exists(), "killed too late to prove anything"
    run(killed, resume=True)
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_two_processes_equal_two_accumulation_passes(write_config, tmp_path, calm_weights):
    """Same losses and weights, up to the order of additions; same evaluation."""
    norm = {"RESNETS": {"NORM": "FrozenBN"}}
    one = write_config("one.yaml", OUTPUT_DIR=str(tmp_path / "one"), MODEL=norm, SOLVER={"ACCUMULATION_STEPS": 2})
    calm = calm_weights(one)
    run(one, calm)
    two = write_config("two.yaml", OUTPUT_DIR=str(tmp_path / "two"), MODEL=norm)
    with (tmp_path / "log").open("w") as log:
        process = start(
            two, *calm, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), log=log
        )
        assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-3000:]
    first, second = losses(tmp_path / "one")[0], losses(tmp_path / "two")[0]
    for name in ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "total_loss"):
        assert first[name] == pytest.approx(second[name], rel=1e-4)
    single, joined = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in single.items():
        torch.testing.assert_close(value, joined[name], rtol=1e-4, atol=1e-5)
    assert read_result(tmp_path / "one" / "result.json").metrics == pytest.approx(
        read_result(tmp_path / "two" / "result.json").metrics, abs=1e-2, nan_ok=True
    )


def test_accumulation_is_the_mean_of_the_pieces(write_config, tmp_path, calm_weights):
    """Without norm layers that mix images, two passes over halves give the gradient of one pass over the whole."""
    # Every anchor and region counts, so that sampling does not depend on the piece.
    frozen = {"RESNETS": {"NORM": "FrozenBN"}, "RPN": {"BATCH_SIZE_PER_IMAGE": 4096, "POSITIVE_FRACTION": 1.0}}
    for passes in (1, 2):
        solver = {"ACCUMULATION_STEPS": passes, "MAX_ITER": 1, "STEPS": [], "BASE_LR": 1e-4}
        config = write_config(OUTPUT_DIR=str(tmp_path / str(passes)), MODEL=frozen, SOLVER=solver)
        run(config, calm_weights(config))
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name in one:
        if name.startswith("proposal_generator"):
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-7)


def test_bfloat16_on_the_cpu(write_config, tmp_path):
    metrics = run(write_config(SOLVER={"AMP": {"ENABLED": True}}))
    assert "AP50" in metrics
    assert all(v.dtype == torch.float32 for v in weights(tmp_path / "run").values() if v.is_floating_point())
    other = str(tmp_path / "other")
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        run(write_config(OUTPUT_DIR=other, SOLVER={"AMP": {"ENABLED": True, "DTYPE": "float16"}}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves_with_a_known_code(write_config, tmp_path, number):
    config = write_config(SOLVER={"MAX_ITER": 100000, "CHECKPOINT_PERIOD": 50000, "STEPS": []})
    process = start(config)
    folder = tmp_path / "run"
    wait_for(folder / "metrics.json", process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    saved = load_weights(folder / (folder / "last_checkpoint").read_text())
    assert saved["iteration"] > 0 and "optimizer" in saved["trainer"]


def test_loss_that_is_not_finite_stops(write_config):
    with pytest.raises(FloatingPointError, match="Lower SOLVER.BASE_LR"):
        run(write_config(SOLVER={"BASE_LR": 1e30, "WARMUP_ITERS": 0}))


def test_truncated_jpeg_in_own_data_is_found_before_training(write_config, tmp_path, squares):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(squares, copy)
    picture = copy / "train" / "3.png"
    picture.write_bytes(picture.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"3\.png"):
        run(write_config(FEWSHOT={"ROOT": str(copy)}))
    assert not list((tmp_path / "run").glob("*.pth"))


def test_failure_in_the_middle_loses_no_iteration(write_config, tmp_path, monkeypatch):
    """A picture that breaks while training runs: the finished iterations are saved, and resuming continues them."""
    import fsdet.engine.trainer as trainer

    config = write_config(SOLVER={"CHECKPOINT_PERIOD": 1000})
    original = trainer.Trainer._forward_backward

    def fail(self, batch):
        if self.iter == 4:
            raise ImageError("broken.jpg: cannot be used")
        return original(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_forward_backward", fail)
    with pytest.raises(ImageError, match="broken"):
        run(config)
    monkeypatch.undo()
    assert load_weights(tmp_path / "run" / "model_0000003.pth")["iteration"] == 3
    whole = write_config("whole.yaml", OUTPUT_DIR=str(tmp_path / "whole"))
    run(whole)
    assert_equal_weights(weights(tmp_path / "whole", "model_0000003"), weights(tmp_path / "run", "model_0000003"))
    run(config, resume=True)
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_resume_refuses_another_recipe_and_accepts_a_longer_one(write_config, tmp_path):
    config = write_config()
    run(config)
    with pytest.raises(ValueError, match="checkpoints of another configuration"):
        run(config, ["SOLVER.BASE_LR", "0.02"], resume=True)
    with pytest.raises(ValueError, match="result of another configuration"):
        run(config, ["SOLVER.BASE_LR", "0.02"])
    run(config, ["SOLVER.MAX_ITER", "8"], resume=True)
    assert read_result(tmp_path / "run" / "result.json").iterations == 8


def test_fresh_training_forgets_former_checkpoints(write_config, tmp_path):
    config = write_config()
    run(config)
    (tmp_path / "run" / "result.json").unlink()
    stale = write_config(SOLVER={"MAX_ITER": 1, "STEPS": [], "CHECKPOINT_PERIOD": 1000})
    run(stale)
    assert load_weights(tmp_path / "run" / (tmp_path / "run" / "last_checkpoint").read_text())["iteration"] == 0


def test_training_time_leaves_evaluations_out(write_config, tmp_path, monkeypatch):
    """On a clock that every evaluation puts forward by an hour."""
    clock, hours = time.perf_counter, []
    monkeypatch.setattr("fsdet.engine.trainer.time.perf_counter", lambda: clock() + 3600 * len(hours))
    evaluate = engine_run.evaluate
    monkeypatch.setattr(engine_run, "evaluate", lambda *args: hours.append(1) or evaluate(*args))
    run(write_config(), ["TEST.EVAL_PERIOD", "2"])
    seconds = read_result(tmp_path / "run" / "result.json").seconds
    assert len(hours) == 3 and seconds["train"] < 3600 <= seconds["eval"]


def test_periodic_evaluation_changes_no_weight(write_config, tmp_path):
    run(write_config("plain.yaml", OUTPUT_DIR=str(tmp_path / "plain")))
    run(write_config("often.yaml", OUTPUT_DIR=str(tmp_path / "often")), ["TEST.EVAL_PERIOD", "2"])
    assert_equal_weights(weights(tmp_path / "plain"), weights(tmp_path / "often"))
    assert sum("bbox/AP50" in line for line in losses(tmp_path / "often")) >= 1
