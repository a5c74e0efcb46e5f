"""The smoke tests of test_engine_trainer.py on CUDA: python -m pytest -m gpu."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsdet.engine.trainer as trainer
from fsdet.checkpoint.safe_io import load_weights
from fsdet.data.mapper import ImageError
from fsdet.engine.run import run
from fsdet.evaluation.result import read_result

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture
def on_gpu(write_config, tmp_path):
    """Write a config that runs on the GPU, into a folder of the config's name."""

    def write(name, **sections):
        model = {**sections.pop("MODEL", {}), "DEVICE": DEVICE}
        return write_config(f"{name}.yaml", OUTPUT_DIR=str(tmp_path / name), MODEL=model, **sections)

    return write


def weights(folder, name="model_final"):
    return load_weights(folder / f"{name}.pth")["model"]


def last_losses(folder):
    """The last line of metrics.json."""
    return json.loads((folder / "metrics.json").read_text().splitlines()[-1])


# Every anchor and region counts and no norm layer mixes images, so that nothing depends on a draw.
PLAIN = {"RESNETS": {"NORM": "FrozenBN"}, "RPN": {"BATCH_SIZE_PER_IMAGE": 4096, "POSITIVE_FRACTION": 1.0}}


def test_trains_and_evaluates(on_gpu, tmp_path):
    metrics = run(on_gpu("run"))
    assert 0 <= metrics["AP50"] <= 100 and "bAP50" in metrics
    result = read_result(tmp_path / "run" / "result.json")
    assert result.iterations == 6 and set(result.per_class) == {"red", "green", "blue"}
    assert result.peak_memory_mib["cuda"] > 0
    again = ["MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "again")]
    assert run(on_gpu("run"), again, eval_only=True) == pytest.approx(metrics, abs=0.5, nan_ok=True)


def test_first_losses_equal_those_of_the_cpu(on_gpu, calm_weights, tmp_path):
    one = {"MAX_ITER": 1, "STEPS": []}
    calm = calm_weights(on_gpu("gpu", MODEL=PLAIN, SOLVER=one))
    for name, device in (("gpu", DEVICE), ("cpu", "cpu")):
        run(on_gpu(name, MODEL=PLAIN, SOLVER=one), [*calm, "MODEL.DEVICE", device])
    gpu, cpu = last_losses(tmp_path / "gpu"), last_losses(tmp_path / "cpu")
    for name in ("loss_rpn_cls", "loss_rpn_loc"):
        assert gpu[name] == pytest.approx(cpu[name], rel=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(on_gpu, tmp_path, dtype):
    assert "AP50" in run(on_gpu("run", SOLVER={"AMP": {"ENABLED": True, "DTYPE": dtype}}))
    saved = load_weights(tmp_path / "run" / "model_final.pth")
    floats = [value for value in saved["model"].values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in floats)
    assert bool(saved["trainer"]["grad_scaler"]) == (dtype == "float16")  # float16 alone needs its loss scaled


def test_accumulation_is_the_mean_of_the_pieces(on_gpu, calm_weights, tmp_path):
    for passes in (1, 2):
        solver = {"ACCUMULATION_STEPS": passes, "MAX_ITER": 1, "STEPS": [], "BASE_LR": 1e-4}
        config = on_gpu(str(passes), MODEL=PLAIN, SOLVER=solver)
        run(config, calm_weights(config))
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name in one:
        if name.startswith("proposal_generator"):
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-6)


def test_resumes_after_a_failure(on_gpu, calm_weights, tmp_path, monkeypatch):
    """Kernels need not be deterministic on a GPU, so the weights agree roughly, not bit for bit."""
    solver = {"CHECKPOINT_PERIOD": 1000, "BASE_LR": 1e-3}
    whole, broken = on_gpu("whole", MODEL=PLAIN, SOLVER=solver), on_gpu("broken", MODEL=PLAIN, SOLVER=solver)
    calm = calm_weights(whole)
    run(whole, calm)
    original = trainer.Trainer._forward_backward

    def fail(self, batch):
        if self.iter == 4:
            raise ImageError("broken.jpg: cannot be used")
        return original(self, batch)

    monkeypatch.setattr(trainer.Trainer, "_forward_backward", fail)
    with pytest.raises(ImageError):
        run(broken, calm)
    monkeypatch.undo()
    assert load_weights(tmp_path / "broken" / "model_0000003.pth")["iteration"] == 3
    run(broken, calm, resume=True)
    saved = load_weights(tmp_path / "broken" / "model_final.pth")
    assert saved["iteration"] == 5 and saved["trainer"]["scheduler"]["last_epoch"] == 6
    before, one, two = torch.load(tmp_path / "calm.pth")["model"], weights(tmp_path / "whole"), saved["model"]
    moved = sum(float((one[n] - before[n].cpu()).abs().sum()) for n in one if one[n].is_floating_point())
    apart = sum(float((one[n] - two[n]).abs().sum()) for n in one if one[n].is_floating_point())
    assert apart < 0.2 * moved


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_equal_two_accumulation_passes(on_gpu, calm_weights, tmp_path):
    one = on_gpu("one", MODEL=PLAIN, SOLVER={"ACCUMULATION_STEPS": 2})
    calm = calm_weights(one)
    run(one, calm)
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--num-gpus", "2"]
    command += ["--config-file", on_gpu("two", MODEL=PLAIN), *calm]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = last_losses(tmp_path / "one"), last_losses(tmp_path / "two")
    for name in ("loss_rpn_cls", "loss_rpn_loc", "total_loss"):
        assert first[name] == pytest.approx(second[name], rel=0.05)
    assert set(read_result(tmp_path / "two" / "result.json").metrics) >= {"AP50", "bAP50"}
