"""Benchmarks run and compare what they say; no time is asserted."""

import subprocess
import sys

import torch

import fsdet.engine.benchmark as benchmark
from fsdet.engine import benchmark_defrcn
from fsdet.engine.benchmark import BENCHMARKS, run_benchmarks
from fsdet.engine.benchmark_parts import Pair, measure_pair


def test_pairs_are_timed_in_turn():
    calls = []
    pair = measure_pair("x", ("a", lambda: calls.append("a")), ("b", lambda: calls.append("b")), rounds=2)
    assert calls == ["a", "b"] * 3
    assert len(pair.first_costs) == len(pair.second_costs) == 2


def test_ratio_is_the_median_of_the_rounds():
    pair = Pair("x", "a", "b", (1.0, 2.0, 1.0), (3.0, 2.0, 2.0))
    assert pair.ratio == 2.0 and "2.00x" in pair.line()


def test_evaluator_pair_computes_equal_numbers():
    (_, fast), (_, slow) = BENCHMARKS["evaluator"](100)
    assert (fast() == slow()).all()


def test_model_pairs_run(monkeypatch):
    narrow = ("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16")
    narrow += ("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16")
    original = benchmark._config
    monkeypatch.setattr(benchmark, "_config", lambda size, *opts: original(size, *narrow, *opts))
    lines = [pair.line() for pair in run_benchmarks(["tfa-freeze", "heads", "precision"], rounds=1, size=64)]
    assert len(lines) == 3


def test_memory_is_what_the_work_adds():
    """In a process of its own: what earlier tests have left in the heap is memory that is used again."""
    code = (
        "import torch; from fsdet.engine.benchmark_parts import peak_mib; held = torch.ones(2**20);"
        "print(peak_mib(lambda: torch.ones(2**24).sum()))"  # 64 MiB
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 60 < float(printed) < 80


def test_calibration_pair_detects_the_same(monkeypatch, narrow):
    """On a narrow network; the pair itself compares the two sides before it is timed."""
    narrow += ("MODEL.RPN.POST_NMS_TOPK_TEST", "50")
    original = benchmark_defrcn._config
    monkeypatch.setattr(benchmark_defrcn, "_config", lambda file, size, *opts: original(file, size, *narrow, *opts))
    (_, ours), (_, plain) = BENCHMARKS["calibration"](64)
    calibrated, raw = ours(), plain()
    assert len(calibrated) == len(raw) > 0 and not torch.equal(calibrated.scores, raw.scores)
    lines = [pair.line() for pair in run_benchmarks(["defrcn-train"], rounds=1, size=64, threads=1)]
    assert len(lines) == 1


def test_finetuning_pairs_run(monkeypatch, narrow):
    """Both recipes keep the filled quota of eight foreground regions; the fast one computes fewer of the others."""
    original, built = benchmark_defrcn._config, []
    monkeypatch.setattr(benchmark_defrcn, "_config", lambda file, size, *opts: original(file, size, *narrow, *opts))
    build = benchmark_defrcn.build_detector
    monkeypatch.setattr(benchmark_defrcn, "build_detector", lambda cfg: built.append(build(cfg)) or built[-1])
    lines = [pair.line() for pair in run_benchmarks(["finetune", "finetune-fast"], rounds=1, size=96, threads=1)]
    assert len(lines) == 2
    (_, fast), (_, slow) = BENCHMARKS["finetune-small"](96)
    counts = []
    for model in built[-2:]:
        model.roi_heads.res5.register_forward_hook(lambda module, args, output: counts.append(len(output)))
    fast()
    slow()
    assert counts == [4 * (8 + 6), 4 * 32]
