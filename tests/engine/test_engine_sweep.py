"""Sweeps: base, surgery, methods x shots x seeds; skipping, failing, combining."""

import json
import os
import signal

import pytest

from fsdet.checkpoint.safe_io import load_weights
from fsdet.engine.run import run
from fsdet.engine.sweep import IncompleteSweep, Sweep, run_sweep
from fsdet.engine.sweep_jobs import LocalJobs, cpu_slots
from fsdet.engine.trainer import Trainer
from fsdet.evaluation.result import read_result


@pytest.fixture
def plan(write_config, tmp_path):
    """Config files of a base stage, TFA w/ cos and a novel-only predictor on the tiny set."""
    common = {"OUTPUT_DIR": "", "SOLVER": {"MAX_ITER": 2, "STEPS": [], "WARMUP_ITERS": 0}}
    out = {"OUTPUT": str(tmp_path / "out")}
    novel = {**out, "STAGE": "novel", "BASE_METHOD": "base"}
    cosine = {"ROI_HEADS": {"OUTPUT_LAYER": "cosine"}, "BACKBONE": {"FREEZE": True}}
    return {
        "base": write_config("base.yaml", FEWSHOT={**out, "METHOD": "base"}, **common),
        "cos": write_config("cos.yaml", FEWSHOT={**novel, "METHOD": "cos"}, MODEL=cosine, **common),
        "combine": write_config("c.yaml", FEWSHOT={**novel, "METHOD": "combine", "SURGERY": "combine"}, **common),
        "only": write_config(
            "o.yaml", FEWSHOT={**novel, "METHOD": "only", "SURGERY": "remove", "SETTING": "fsod"}, **common
        ),
    }


def test_sweep_runs_skips_and_reports(plan, tmp_path):
    sweep = Sweep(base=plan["base"], novel=(plan["cos"],), shots=(1, 2), seeds=(0, 1))
    results = run_sweep(sweep)
    assert [str(p.parent.relative_to(tmp_path / "out")) for p in results] == [
        "base/squares/base",
        "cos/squares/gfsod/1shot_seed0",
        "cos/squares/gfsod/1shot_seed1",
        "cos/squares/gfsod/2shot_seed0",
        "cos/squares/gfsod/2shot_seed1",
    ]
    loaded = [read_result(path) for path in results]
    assert loaded[1].config_digest == loaded[2].config_digest != loaded[3].config_digest
    assert loaded[1].protocol.samples_digest != loaded[2].protocol.samples_digest
    assert loaded[1].protocol.base_model == loaded[2].protocol.base_model != ""
    assert {"AP50", "bAP50", "nAP50"} <= set(loaded[1].metrics)
    surgered = load_weights(tmp_path / "out/base/squares/base/model_randinit.pth")
    assert surgered["fsdet"]["classes"] == ["red", "green", "blue", "white"]
    before = [path.stat().st_mtime_ns for path in results]
    assert [path.stat().st_mtime_ns for path in run_sweep(sweep)] == before  # nothing ran again
    changed = Sweep(base=plan["base"], novel=(plan["cos"],), shots=(1,), seeds=(0,), opts=("SOLVER.BASE_LR", "0.02"))
    with pytest.raises(ValueError, match="belongs to another configuration"):
        run_sweep(changed)


def test_sweep_over_both_settings(plan, tmp_path):
    """Novel classes alone start from the base model without its predictor."""
    results = run_sweep(
        Sweep(base=plan["base"], novel=(plan["cos"],), shots=(1,), seeds=(0,), settings=("gfsod", "fsod"))
    )
    alone = read_result(results[2])
    assert alone.protocol.setting == "fsod" and set(alone.per_class) == {"white"} and "bAP50" not in alone.metrics
    head = "roi_heads.box_predictor.cls_score.weight"
    assert [len(load_weights(path.with_name("model_final.pth"))["model"][head]) for path in results] == [4, 5, 2]
    assert (tmp_path / "out/base/squares/base/model_remove_novel.pth").exists()


def test_combine_takes_rows_of_the_same_shots(plan, tmp_path):
    with pytest.raises(ValueError, match="--novel-only"):
        run_sweep(Sweep(base=plan["base"], novel=(plan["combine"],), shots=(1,), seeds=(0,)))
    run_sweep(
        Sweep(base=plan["base"], novel=(plan["combine"],), shots=(1,), seeds=(1,), novel_only=plan["only"]),
    )
    out = tmp_path / "out"
    base = load_weights(out / "base/squares/base/model_final.pth")["model"]
    only = load_weights(out / "only/squares/fsod/1shot_seed1/model_final.pth")["model"]
    both = load_weights(out / "base/squares/base/model_combine_1shot_seed1.pth")["model"]
    name = "roi_heads.box_predictor.cls_score.weight"
    assert both[name][:3].equal(base[name][:3]) and both[name][4].equal(base[name][3])
    assert both[name][3].equal(only[name][0])


def test_failed_run_does_not_stop_the_others(plan, tmp_path):
    sweep = Sweep(base=plan["base"], novel=(plan["cos"],), shots=(1, 5), seeds=(0,))  # there are no 5-shot lists
    with pytest.raises(RuntimeError, match="1 of 3 runs have no result") as error:
        run_sweep(sweep)
    assert "5shot_seed0: " in str(error.value) and "full_box_5shot_red" in str(error.value)
    assert (tmp_path / "out/cos/squares/gfsod/1shot_seed0/result.json").exists()


def test_runs_in_processes_of_their_own(plan, tmp_path):
    """Two at once, one of which fails; its row is reported as missing, the others are complete."""
    sweep = Sweep(base=plan["base"], novel=(plan["cos"],), shots=(1, 5), seeds=(0,))
    with pytest.raises(IncompleteSweep) as error:
        run_sweep(sweep, limit=1)
    assert list(error.value.missing.values()) == ["left for the next call"] * 2
    (base,) = error.value.results
    before = base.stat().st_mtime_ns
    with pytest.raises(IncompleteSweep) as error:
        run_sweep(sweep, quiet=True, workers=LocalJobs(cpu_slots(2)))
    good, bad = (tmp_path / f"out/cos/squares/gfsod/{k}shot_seed0" for k in (1, 5))
    assert error.value.complete == [base, good / "result.json"] and base.stat().st_mtime_ns == before
    ((folder, reason),) = error.value.missing.items()
    assert folder == str(bad) and "FileNotFoundError" in reason and reason.endswith(f"({bad / 'worker.log'})")
    assert "full_box_5shot_red" in reason and not (good / "worker.log").exists()
    assert read_result(good / "result.json").iterations == 2


def test_stopped_sweep_goes_on_where_it_was(plan, tmp_path, monkeypatch):
    """SIGTERM in the second iteration of the novel run: the base run is kept, the novel one resumed."""
    step, base = Trainer.run_step, tmp_path / "out/base/squares/base"

    def step_and_stop(trainer):
        if "cos" in trainer.cfg.OUTPUT_DIR and trainer.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(trainer)

    sweep = Sweep(base=plan["base"], novel=(plan["cos"],), shots=(1,), seeds=(0,), opts=("SOLVER.MAX_ITER", "4"))
    monkeypatch.setattr(Trainer, "run_step", step_and_stop)
    with pytest.raises(SystemExit) as stop:
        run_sweep(sweep)
    assert stop.value.code == 143 and not list((tmp_path / "out/cos").rglob("result.json"))
    before = {path: path.stat().st_mtime_ns for path in base.glob("*.*")}
    steps = []
    monkeypatch.setattr(Trainer, "run_step", lambda trainer: (steps.append(trainer.iter), step(trainer)))
    results = run_sweep(sweep)
    assert steps == [2, 3] and read_result(results[1]).iterations == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_novel_stage_without_surgery(plan, tmp_path):
    run(plan["base"])
    weights = tmp_path / "out/base/squares/base/model_final.pth"
    with pytest.raises(ValueError, match=r"base model that has had no surgery.*\n.*tools/surgery.py randinit"):
        run(plan["cos"], ["FEWSHOT.SHOT", "1", "MODEL.WEIGHTS", str(weights)])
    with pytest.raises(FileNotFoundError, match="train the base stage first"):
        run(plan["cos"], ["FEWSHOT.SHOT", "1"])
    metrics = run(plan["cos"], ["FEWSHOT.SHOT", "1", "MODEL.WEIGHTS", str(weights), "FEWSHOT.RESET_PREDICTOR", "True"])
    assert "nAP50" in metrics


def test_novel_zero_is_explained(plan, tmp_path):
    """Two steps from random weights detect no novel object: the record says what was checked."""
    run_sweep(Sweep(base=plan["base"], novel=(plan["cos"],), shots=(1,), seeds=(0,)))
    result = read_result(tmp_path / "out/cos/squares/gfsod/1shot_seed0/result.json")
    assert result.metrics["nAP"] == 0
    text = result.notes["novel AP is 0"]
    for topic in ("weights", "class", "score", "recall"):
        assert topic in text.lower()
    assert json.loads((tmp_path / "out/cos/squares/gfsod/1shot_seed0/classes.json").read_text())["novel"] == ["white"]
