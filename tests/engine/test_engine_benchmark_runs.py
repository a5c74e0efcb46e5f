"""Costs of finished runs: one that was fine-tuned, and one that learns its classes from examples."""

import pytest
import test_engine_open_classes as examples
from test_engine_predictor import NOVEL

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.engine import benchmark_runs
from fsdet.engine.benchmark_runs import run_costs
from fsdet.engine.predictor import Predictor
from fsdet.engine.run import prepare
from fsdet.engine.setup import load_config
from fsdet.engine.trainer import build_detector

make_run = examples.make_run
NAMES = ["red", "green", "blue", "white"]


@pytest.fixture
def fine_tuned(write_config, tmp_path):
    """Folder such as a fine-tuning leaves, with random weights."""
    config = write_config(FEWSHOT=NOVEL, MODEL={"WEIGHTS": "unused.pth", "DEVICE": "cpu"})
    cfg = prepare(load_config(config))
    FewShotCheckpointer(build_detector(cfg), cfg.OUTPUT_DIR, metadata={"classes": NAMES}).save("model_final")
    return tmp_path / "run"


def test_a_fine_tuned_run(fine_tuned, squares, monkeypatch):
    seen = []
    detect = Predictor.detect

    def counted(self, images):
        seen.append(len(images))
        return detect(self, images)

    monkeypatch.setattr(Predictor, "detect", counted)
    first, second = run_costs([fine_tuned, fine_tuned], [squares / "test"], rounds=2, limit=3)
    assert seen == [1] * (3 * 3 * 2)  # (2 counted rounds + 1) x 3 pictures x 2 runs, one picture at a time
    assert first.run == second.run == str(fine_tuned) and first.classes == 4
    assert 0 < first.picture < 60 and first.memory > 50
    assert first.learning is None and first.training is None and "not recorded" in first.line()


def test_recorded_training(fine_tuned, squares, monkeypatch):
    monkeypatch.setattr(benchmark_runs, "in_a_process", lambda *args: 123.0)
    monkeypatch.setattr(benchmark_runs, "read_result", lambda path: type("R", (), {"seconds": {"train": 61.0}}))
    (fine_tuned / "result.json").write_text("{}")
    (cost,) = run_costs([fine_tuned], [squares / "test"], rounds=1, limit=1)
    assert cost.training == 61 and cost.line().split()[-6:-1] == ["MiB", "61", "s", "for", "all"]


def test_a_run_that_reads_examples(make_run, squares, monkeypatch):
    """Every class is learnt anew in every round, under a name that it does not keep."""
    folder = make_run()
    monkeypatch.setattr(benchmark_runs, "in_a_process", lambda *args: 123.0)
    names, learnt, learn = [], [], Predictor.learn

    def counted(self, given):
        names.append(self.class_names)
        ((name, examples),) = given.items()
        learnt.append((name, len(examples)))
        assert name not in self.class_names
        return learn(self, given)

    monkeypatch.setattr(Predictor, "learn", counted)
    monkeypatch.setattr(benchmark_runs, "cpu_seconds", lambda work: (work(), 8.0)[1])
    (cost,) = run_costs([folder], [squares / "test"], rounds=2, limit=1)
    assert len(learnt) == 3 * cost.classes and len(set(names)) == 1
    assert all(count > 0 for _, count in learnt) and len(set(learnt)) == cost.classes
    assert cost.learning == cost.picture == 8 and "8.00 s a class" in cost.line()


def test_nothing_is_measured_with_a_faulty_run(fine_tuned, squares, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(run_costs([fine_tuned, tmp_path / "nowhere"], [squares / "test"]))
    with pytest.raises(FileNotFoundError, match="No image"):
        list(run_costs([fine_tuned], [tmp_path / "run"]))
