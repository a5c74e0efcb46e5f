"""What a sweep plans: presets, bases, repetitions, other calibration; its table and the time left."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fsdet.engine import sweep as engine_sweep
from fsdet.engine.setup import load_config
from fsdet.engine.sweep import IncompleteSweep, Sweep, make_plan, run_sweep
from fsdet.engine.sweep_plan import check_shots, sweep_output
from fsdet.engine.sweep_presets import PRESETS, published_shots
from fsdet.engine.sweep_progress import duration, finished_result, plan_table, seconds_left, state
from fsdet.engine.sweep_run import PlannedRun
from fsdet.evaluation.result import Protocol, RunResult, write_result

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VOC, COCO, ONLY = (str(CONFIGS / "tfa" / f"{name}.yaml") for name in ("voc_cos", "coco_cos", "coco_novel_only"))


def write_done(run, seconds=(10.0, 1.0), iterations=5, **metrics):
    """The result of a planned run, as a finished one leaves it."""
    protocol = Protocol("squares", "test", 4, 1, "gfsod", "novel", "cos", 1, "coco", "R50-FPN", "")
    result = RunResult(
        protocol=protocol,
        classes={"base": ("red",), "novel": ("white",)},
        metrics={"nAP50": 1.0, **metrics},
        per_class={},
        config_digest=run.digest,
        versions={},
        seconds=dict(zip(("train", "eval"), seconds, strict=True)),
        peak_memory_mib={},
        train_images=1,
        iterations=iterations,
        images_per_step=1,
    )
    write_result(Path(run.folder) / "result.json", result)


@pytest.fixture
def files(write_config, tmp_path):
    """Two families of methods on the tiny set: a base and a novel stage each."""
    out = {"OUTPUT": str(tmp_path / "out")}
    made = {}
    for family in ("a", "b"):
        made[f"{family}_base"] = write_config(f"{family}_base.yaml", OUTPUT_DIR="", FEWSHOT={**out, "METHOD": family})
        novel = {**out, "METHOD": f"{family}_ft", "BASE_METHOD": family, "STAGE": "novel"}
        made[family] = write_config(f"{family}.yaml", OUTPUT_DIR="", FEWSHOT=novel)
    return made


def short(plan, tmp_path):
    return [Path(run.folder).relative_to(tmp_path / "out").as_posix() for run in plan]


# Presets


@pytest.mark.parametrize(
    ("name", "setting", "repeats", "config", "shots"),
    [
        ("fsrw", "fsod", 10, VOC, (1, 2, 3, 5, 10)),
        ("tfa", "gfsod", 1, COCO, (1, 2, 3, 5, 10, 30)),
        ("fsod-seeds", "fsod", 1, VOC, (1, 2, 3, 5, 10)),
    ],
)
def test_presets_are_the_published_protocols(name, setting, repeats, config, shots, monkeypatch, tmp_path):
    """DeFRCN's run scripts: every published K, seed 0 ten times or seeds 0 to 9."""
    preset = PRESETS[name]
    assert published_shots([config]) == shots
    monkeypatch.setattr("fsdet.engine.sweep_plan._Plan._check_base", lambda *args: None)
    sweep = Sweep(None, (config,), shots, preset.seeds, preset.settings, repeats=preset.repeats, novel_only=ONLY)
    plan = [run for run in make_plan(replace(sweep, opts=("FEWSHOT.OUTPUT", str(tmp_path)))) if run.kind == "novel"]
    assert len(plan) == len({run.folder for run in plan}) == 10 * len(shots) and len({run.row for run in plan}) == len(
        shots
    )
    configs = [load_config(run.config_file, run.opts) for run in plan]
    assert {cfg.FEWSHOT.SETTING for cfg in configs} == {setting} and {cfg.FEWSHOT.SHOT for cfg in configs} == set(shots)
    draws = {(cfg.FEWSHOT.SEED, cfg.FEWSHOT.REPEAT, cfg.SEED) for cfg in configs}
    if repeats == 10:
        assert draws == {(0, n, 1 + 1000 * n) for n in range(10)}
        assert Path(plan[3].folder).name == "1shot_seed0_repeat3"
        assert len({run.digest for run in plan}) == len(shots)  # repetitions are averaged
    else:
        assert draws == {(n, 0, 1) for n in range(10)}


def test_preset_of_own_data_needs_shots(files):
    with pytest.raises(ValueError, match="own data has no published numbers of shots"):
        published_shots([files["a"]])
    with pytest.raises(ValueError, match="several benchmarks"):
        published_shots([VOC, COCO])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"seeds": ()}, "seeds is empty"),
        ({"calibration": "on"}, 'calibration is "on"'),
        ({"opts": ("MODEL.WEIGHTS", "R-101.pkl")}, "would not start from their base run"),
        ({"base": ("a.yaml", "b.yaml"), "opts": ("FEWSHOT.INIT", "a")}, "also for the one that it names"),
    ],
)
def test_sweep_without_sense(wrong, said):
    with pytest.raises(ValueError, match=said):
        replace(Sweep("base.yaml", ("novel.yaml",), (1,), (0,)), **wrong)


# The plan


def test_each_novel_run_waits_for_its_own_base(files, tmp_path):
    sweep = Sweep((files["a_base"], files["b_base"]), (files["b"], files["a"]), (1,), (0, 1))
    plan = make_plan(sweep)
    novel = ["b_ft/squares/gfsod/1shot_seed0", "b_ft/squares/gfsod/1shot_seed1"]
    assert short(plan, tmp_path) == [
        "a/squares/base",
        "b/squares/base",
        *novel,
        *(n.replace("b", "a", 1) for n in novel),
    ]
    assert [run.after for run in plan] == [(), (), *((plan[1].folder,),) * 2, *((plan[0].folder,),) * 2]
    assert sweep_output(sweep) == tmp_path / "out"


def test_base_that_is_nowhere(files, tmp_path):
    with pytest.raises(ValueError, match=r"b.yaml starts from .*b/squares/base .*planned are: .*a/squares/base"):
        make_plan(Sweep(files["a_base"], (files["a"], files["b"]), (1,), (0,)))
    done = tmp_path / "out/b/squares/base/model_final.pth"
    done.parent.mkdir(parents=True)
    done.touch()
    assert len(make_plan(Sweep(files["a_base"], (files["a"], files["b"]), (1,), (0,)))) == 3
    own = Sweep(None, (files["a"],), (1,), (0,), opts=("MODEL.WEIGHTS", "zoo.pth"))
    assert len(make_plan(own)) == 1  # the run's own check says whether they are there


def test_two_runs_never_share_a_folder(files, write_config, tmp_path):
    twin = write_config("twin.yaml", OUTPUT_DIR="", FEWSHOT=load_yaml(files["a"])["FEWSHOT"])
    with pytest.raises(ValueError, match=r"a.yaml .*twin.yaml .*would both write to .*a_ft/squares/gfsod/1shot_seed0"):
        make_plan(Sweep(files["a_base"], (files["a"], twin), (1,), (0,)))
    fixed = write_config("fixed.yaml", FEWSHOT=load_yaml(files["a"])["FEWSHOT"])  # names a folder for all its runs
    with pytest.raises(ValueError, match=r"fixed.yaml .*SEED 0 and .*SEED 1 would both write to .*/run"):
        make_plan(Sweep(files["a_base"], (fixed,), (1,), (0, 1)))
    for key, remedy in (("OUTPUT_DIR", "FEWSHOT.OUTPUT"), ("FEWSHOT.SEED", "--seeds")):
        with pytest.raises(ValueError, match=f"{key} differs from run to run.*{remedy}"):
            Sweep(None, (files["a"],), (1,), (0, 1), opts=(key, "1"))


def load_yaml(path):
    import yaml

    return yaml.safe_load(Path(path).read_text())


def test_combine_source_is_planned_once_a_draw(files, write_config, tmp_path):
    novel = load_yaml(files["a"])["FEWSHOT"]
    combine = write_config("c.yaml", OUTPUT_DIR="", FEWSHOT={**novel, "METHOD": "c", "SURGERY": "combine"})
    only = write_config("o.yaml", OUTPUT_DIR="", FEWSHOT={**novel, "METHOD": "o", "SETTING": "fsod"})
    sweep = Sweep(files["a_base"], (combine,), (1,), (0, 1), novel_only=only, repeats=2)
    plan = make_plan(sweep)
    base, first, run, again, second, *_ = plan
    assert [p.kind for p in plan] == ["base", "novel-only", "novel", "novel", "novel-only", "novel", "novel"]
    assert run.after == again.after == (base.folder, first.folder) and run.novel_source == first.folder
    assert first.after == (base.folder,) and second.folder.endswith("o/squares/fsod/1shot_seed1")
    # Asked for as a method of its own, it is a result as well.
    both = make_plan(replace(sweep, novel=(combine, only), settings=("gfsod", "fsod"), repeats=1))
    assert [p.kind for p in both if p.folder == first.folder] == ["novel"]


# Evaluations with the other calibration


@pytest.mark.parametrize(("enabled", "name"), [("False", "calibrated"), ("True", "uncalibrated")])
def test_other_calibration_reuses_the_weights(files, tmp_path, monkeypatch, enabled, name):
    opts = ("TEST.CALIBRATION.ENABLED", enabled)
    sweep = Sweep(files["a_base"], (files["a"],), (1,), (0, 1), calibration="both", opts=opts)
    plan = make_plan(sweep)
    run, other = plan[1], plan[2]
    assert other.folder == f"{run.folder}/{name}" and other.after == (run.folder,) and other.iterations == 0
    cfg = load_config(other.config_file, other.opts)
    assert Path(run.folder) / "model_final.pth" == Path(cfg.MODEL.WEIGHTS)
    assert cfg.TEST.CALIBRATION.ENABLED is (name == "calibrated")
    assert cfg.FEWSHOT.SHOT == 1 and other.digest == plan[4].digest != run.digest
    calls = []

    def do_run(config_file, opts, model, *, resume, eval_only, quiet):
        planned = next(p for p in plan if p.opts == tuple(opts))
        calls.append((Path(planned.folder).name, resume, eval_only))
        write_done(planned)

    monkeypatch.setattr(engine_sweep, "do_run", do_run)
    monkeypatch.setattr(engine_sweep, "check_shots", lambda plan, done: None)
    results = run_sweep(sweep)
    assert [path.parent.as_posix() for path in results] == [p.folder for p in plan]
    first = [("base", True, False), ("1shot_seed0", True, False), (name, False, True), ("1shot_seed1", True, False)]
    assert calls == [*first, (name, False, True)]
    (Path(other.folder) / "result.json").unlink()
    calls.clear()
    run_sweep(sweep)
    assert calls == [(name, False, True)]


# What is done


def test_incomplete_rows_are_named_and_left_out(files, tmp_path):
    plan = make_plan(Sweep(files["a_base"], (files["a"],), (1, 2), (0, 1)))
    error = IncompleteSweep(plan, {plan[3].folder: "killed"})
    kept = [path.parent.as_posix() for path in error.complete]
    assert kept == [plan[0].folder, plan[1].folder, plan[2].folder]  # 2-shot lacks seed 0, so seed 1 is not averaged
    assert len(error.results) == 4 and error.missing == {plan[3].folder: "killed"}
    assert "1 of 5 runs have no result" in str(error) and f"{plan[3].folder}: killed" in str(error)
    left = {run.folder: "left for the next call" for run in plan[1:3]}
    error = IncompleteSweep(plan, {**left, plan[3].folder: "killed"})
    assert str(error).endswith(f"these:\n  {plan[3].folder}: killed\n  2 left for the next call")
    assert set(error.missing) == {run.folder for run in plan[1:4]}


def test_table_shows_the_state_on_disk(files, tmp_path):
    plan = make_plan(Sweep(files["a_base"], (files["a"],), (1,), (0, 1, 2)))
    assert {state(run) for run in plan} == {"to do"} and plan_table(plan, 1).endswith(
        "4 runs: 4 to do; time left unknown"
    )
    write_done(plan[0])
    write_done(replace(plan[1], digest="of another recipe"))
    Path(plan[2].folder).mkdir(parents=True)
    (Path(plan[2].folder) / "last_checkpoint").write_text("model_0000001.pth")
    lines = plan_table(plan, 2).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[:4]] == ["done", "conflict", "resumable", "to do"]
    assert lines[3].endswith(plan[3].folder) and lines[4].startswith(
        "4 runs: 1 done, 1 conflict, 1 resumable, 1 to do; "
    )
    with pytest.raises(ValueError, match="belongs to another configuration"):
        finished_result(plan[1])


def test_time_left_follows_runs_alike(tmp_path):
    def run(kind, config, iterations):
        return PlannedRun(
            kind, config, (), None, str(tmp_path / f"{kind}{config}{iterations}"), "d", "r", iterations=iterations
        )

    base, one, ten = run("base", "b", 100), run("novel", "x", 10), run("novel", "x", 100)
    other, check = run("novel", "y", 50), run("evaluation", "x", 0)
    for finished, seconds in ((base, (1000.0, 7.0)), (one, (20.0, 3.0))):
        write_done(finished, seconds, finished.iterations)
    assert seconds_left([ten], {}, 1) is None and seconds_left([], {}, 1) == 0
    done = {base: finished_result(base)}
    assert seconds_left([one, ten, other, check], done, 1) == (10 + 100 + 50) * 10 + 4 * 7  # the base run's speed
    done[one] = finished_result(one)
    expected = 100 * 2 + 3 + 50 * 2 + 3 + 0 + (7 + 3) / 2  # an evaluation is like no run that is done
    assert [seconds_left([ten, other, check], done, width) for width in (1, 2, 50)] == [
        expected,
        expected / 2,
        expected / 3,
    ]
    assert [duration(s) for s in (0, 89, 90, 5369, 5371, 11111)] == [
        "0 s",
        "89 s",
        "2 min",
        "89 min",
        "1 h 30 min",
        "3 h 05 min",
    ]


def test_missing_lists_are_named_before_the_base_run(files, tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"1 of 1 novel runs lack K-shot lists.*full_box_5shot_red"):
        run_sweep(Sweep(files["a_base"], (files["a"],), (5,), (0,)))
    assert not (tmp_path / "out").exists()
    check_shots(make_plan(Sweep(files["a_base"], (files["a"],), (1, 5), (0,))), ())
    assert "1 of 2 novel runs lack K-shot lists and will fail" in caplog.text


def test_limit_of_nothing(files):
    with pytest.raises(ValueError, match="A limit of 0 runs"):
        run_sweep(Sweep(files["a_base"], (files["a"],), (1,), (0,)), limit=0)


def test_speech_is_one_line_a_run(files, monkeypatch):
    """Failed and finished runs, with the count so far and the time left."""
    sweep = Sweep(files["a_base"], (files["a"],), (1,), (0, 1))
    plan = make_plan(sweep)

    def do_run(config_file, opts, model, **_):
        if opts == plan[1].opts:
            raise RuntimeError("no memory")
        write_done(next(run for run in plan if run.opts == tuple(opts)), (30.0, 2.0), 6, nAP50=12.34, bAP50=56.0)

    monkeypatch.setattr(engine_sweep, "do_run", do_run)
    said = []
    with pytest.raises(IncompleteSweep):
        run_sweep(sweep, say=said.append)
    assert said == [
        "3 runs, 0 done; time left unknown",
        f"[1/3] {plan[0].folder}: nAP50 12.3, bAP50 56.0 (32 s); about 64 s left",
        f"[2/3] {plan[1].folder}: NO RESULT, no memory; about 32 s left",
        f"[3/3] {plan[2].folder}: nAP50 12.3, bAP50 56.0 (32 s); nothing left to do",
    ]
    assert json.loads((Path(plan[2].folder) / "result.json").read_text())["iterations"] == 6
