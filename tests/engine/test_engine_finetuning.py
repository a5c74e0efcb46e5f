"""Faster fine-tuning: the keys, the recipes that set them, and that a stopped run goes on as if it had not been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from fsdet.checkpoint.safe_io import load_weights
from fsdet.data.mapper import ImageError
from fsdet.engine.benchmark_parts import fixed_batch, seeded_model
from fsdet.engine.run import run
from fsdet.engine.setup import load_config, on_this_machine
from fsdet.engine.trainer import Trainer, build_detector, make_optimizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SPEED_KEYS = {
    "MODEL.ROI_HEADS.BACKGROUND_KEPT", "MODEL.RPN.NEGATIVES_KEPT", "MODEL.RPN.HEAD_NAME", "MODEL.BACKBONE.CACHE_MIB",
    "MODEL.BACKBONE.CHANNELS_LAST", "SOLVER.FUSED", "DATALOADER.VIEWS",
}  # fmt: skip
ALL_ON = {
    "MODEL": {
        "BACKBONE": {"FREEZE": True, "CACHE_MIB": 1, "CHANNELS_LAST": True},
        "RPN": {"HEAD_NAME": "SparseGradientRPNHead", "NEGATIVES_KEPT": 4},
        "ROI_HEADS": {"BACKGROUND_KEPT": 3},
        "RESNETS": {"NORM": "FrozenBN"},
    },
    "SOLVER": {"FUSED": True, "CHECKPOINT_PERIOD": 1000, "MAX_ITER": 9},
    "DATALOADER": {"VIEWS": 2},
}


def flat(config, prefix=""):
    """Dotted key -> value."""
    result = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


@pytest.mark.parametrize(
    ("plain", "method", "further"),
    [
        ("defrcn/voc_novel", "defrcn", {"MODEL.BACKBONE.FREEZE", "MODEL.ROI_HEADS.BACKWARD_SCALE"}),
        ("defrcn/voc_small_novel", "defrcn", {"MODEL.BACKBONE.FREEZE", "MODEL.ROI_HEADS.BACKWARD_SCALE"}),
        ("tfa/voc_small_cos", "frcn", set()),
    ],
)
def test_fast_recipes_differ_in_what_they_name_alone(plain, method, further):
    opts = ["FEWSHOT.SHOT", "5", "FEWSHOT.SETTING", "fsod"]
    slow, fast = (load_config(str(CONFIGS / f"{plain}{suffix}.yaml"), opts) for suffix in ("", "_fast"))
    before, after = flat(slow), flat(fast)
    changed = {key for key in after if before[key] != after[key]}
    assert changed - SPEED_KEYS == {"FEWSHOT.METHOD", "OUTPUT_DIR"} | further
    assert {"MODEL.ROI_HEADS.BACKGROUND_KEPT", "MODEL.BACKBONE.CACHE_MIB"} <= changed
    assert method == fast.FEWSHOT.BASE_METHOD and fast.FEWSHOT.BASE_RUN == slow.FEWSHOT.BASE_RUN
    assert f"{slow.FEWSHOT.METHOD}_fast" == fast.FEWSHOT.METHOD and fast.MODEL.WEIGHTS == slow.MODEL.WEIGHTS


def test_all_is_off_by_default():
    cfg = flat(load_config(str(CONFIGS / "defrcn" / "voc_novel.yaml"), ["FEWSHOT.SHOT", "1"]))
    assert not any(cfg[key] for key in SPEED_KEYS - {"MODEL.RPN.HEAD_NAME"})
    assert cfg["MODEL.RPN.HEAD_NAME"] == "StandardRPNHead"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.BACKBONE.CACHE_MIB", "64"], "CACHE_MIB is 64, but the backbone trains .* set MODEL.BACKBONE.FREEZE"),
        (["MODEL.ROI_HEADS.BACKGROUND_KEPT", "-1"], "BACKGROUND_KEPT is -1; it cannot be negative"),
        (["DATALOADER.VIEWS", "-2"], "DATALOADER.VIEWS is -2; it cannot be negative"),
    ],
)
def test_values_that_cannot_be_meant(opts, message):
    with pytest.raises(ValueError, match=message):
        load_config(str(CONFIGS / "defrcn" / "voc_novel.yaml"), ["FEWSHOT.SHOT", "1", *opts])


@pytest.mark.parametrize("frozen_rpn", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(write_config, tmp_path, monkeypatch, calm_weights, frozen_rpn):
    """Everything on: the resumed part starts with an empty cache."""
    model = ALL_ON["MODEL"] | {"PROPOSAL_GENERATOR": {"FREEZE": frozen_rpn}}
    whole = write_config("whole.yaml", OUTPUT_DIR=str(tmp_path / "whole"), **{**ALL_ON, "MODEL": model})
    calm = calm_weights(whole)
    run(whole, calm)
    stopped = write_config(**{**ALL_ON, "MODEL": model})
    original = Trainer._forward_backward

    def fail(self, batch):
        if self.iter == 7:
            raise ImageError("broken.jpg: cannot be used")
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_forward_backward", fail)
    with pytest.raises(ImageError, match="broken"):
        run(stopped, calm)
    monkeypatch.undo()
    run(stopped, calm, resume=True)
    one, other = (load_weights(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    start = load_weights(tmp_path / "calm.pth")["model"]
    trained = {name.split(".")[0] for name in one if not torch.equal(one[name], start[name])}
    assert trained == ({"roi_heads"} if frozen_rpn else {"roi_heads", "proposal_generator"})


def test_two_processes_share_the_work(write_config, tmp_path, calm_weights):
    """Each has a cache of its own; weights as after two accumulation passes, up to the order of additions."""
    frozen = ALL_ON["MODEL"] | {"PROPOSAL_GENERATOR": {"FREEZE": True}}
    accumulated = {**ALL_ON["SOLVER"], "ACCUMULATION_STEPS": 2}
    one = write_config(
        "one.yaml", OUTPUT_DIR=str(tmp_path / "one"), **{**ALL_ON, "MODEL": frozen, "SOLVER": accumulated}
    )
    calm = calm_weights(one)
    run(one, calm)
    two = write_config("two.yaml", OUTPUT_DIR=str(tmp_path / "two"), **{**ALL_ON, "MODEL": frozen})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(CONFIGS.parent / "tools" / "train_net.py"), "--config-file", two, *calm]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    single, joined = (load_weights(tmp_path / name / "model_final.pth")["model"] for name in ("one", "two"))
    for name, value in single.items():
        torch.testing.assert_close(value, joined[name], rtol=1e-4, atol=1e-5)


def narrow_config(*opts):
    """DeFRCN's novel stage on a network of a few thousand parameters."""
    narrow = [
        "MODEL.RESNETS.DEPTH",
        "50",
        "MODEL.RESNETS.WIDTH_PER_GROUP",
        "4",
        "MODEL.RESNETS.RES2_OUT_CHANNELS",
        "16",
    ]
    narrow += ["MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "FEWSHOT.SHOT", "1", "SOLVER.BASE_LR", "0.01"]
    return on_this_machine(load_config(str(CONFIGS / "defrcn" / "voc_novel.yaml"), [*narrow, *opts]))


def train(cfg, steps=4):
    """Model and optimizer after a few steps on noise."""
    model, batch = seeded_model(build_detector, cfg).train(), fixed_batch(64)
    optimizer = make_optimizer(cfg, model)
    with EventStorage():
        for number in range(steps):
            torch.manual_seed(number)
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            optimizer.step()
    return model, optimizer


def test_layout_head_and_optimizer_change_no_number():
    """Channels-last weights, the sparse head and fused steps: the same weights up to rounding after four steps."""
    plain, _ = train(narrow_config())
    exact = ["MODEL.BACKBONE.CHANNELS_LAST", "True", "SOLVER.FUSED", "True"]
    fast, optimizer = train(narrow_config(*exact, "MODEL.RPN.HEAD_NAME", "SparseGradientRPNHead"))
    assert fast.backbone.res4[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(group["fused"] for group in optimizer.param_groups)
    start = seeded_model(build_detector, narrow_config()).state_dict()
    state = fast.state_dict()
    moved = [name for name, value in plain.state_dict().items() if not torch.equal(value, start[name])]
    assert any("res4" in name for name in moved) and any("rpn_head.conv.weight" in name for name in moved)
    for name in moved:
        way = plain.state_dict()[name] - start[name]
        torch.testing.assert_close(state[name] - start[name], way, rtol=0, atol=2e-3 * float(way.abs().max()))


def test_loaded_momentum_lies_as_its_parameter():
    """A state saved with another memory format and plain steps: the next fused step is the plain one."""
    plain_model, plain = train(narrow_config())
    cfg = narrow_config("SOLVER.FUSED", "True", "MODEL.BACKBONE.CHANNELS_LAST", "True")
    model = build_detector(cfg)
    model.load_state_dict(plain_model.state_dict())
    trainer = Trainer.__new__(Trainer)
    trainer.cfg, trainer.optimizer = cfg, make_optimizer(cfg, model)
    trainer.scheduler = trainer.grad_scaler = type("Kept", (), {"load_state_dict": lambda self, state: None})()
    state = {"iteration": 0, "seed": 1, "seconds": 0.0, "optimizer": plain.state_dict()}
    trainer.load_state_dict({**state, "scheduler": {}, "grad_scaler": {}})
    assert all(group["fused"] for group in trainer.optimizer.param_groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for (name, p), q in zip(plain_model.named_parameters(), model.parameters(), strict=True):
        if p.grad is not None:
            q.grad = torch.empty_like(q).copy_(p.grad)
        assert torch.equal(p, before[name])
    plain.step()
    trainer.optimizer.step()
    moved = 0
    for (name, p), q in zip(plain_model.named_parameters(), model.parameters(), strict=True):
        moved += not torch.equal(p, before[name])
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
    assert moved > 20
