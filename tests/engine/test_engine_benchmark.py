"""Benchmarks run and compare what they say; no time is asserted."""

import fsdet.engine.benchmark as benchmark
from fsdet.engine.benchmark import BENCHMARKS, Pair, run_benchmarks, time_pair


def test_pairs_are_timed_in_turn():
    calls = []
    pair = time_pair("x", ("a", lambda: calls.append("a")), ("b", lambda: calls.append("b")), rounds=2)
    assert calls == ["a", "b"] * 3
    assert len(pair.first_seconds) == len(pair.second_seconds) == 2


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
