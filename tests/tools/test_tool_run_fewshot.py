"""Command line of the sweep: what it asks for, who does it, and what it exits with."""

import importlib.util
import sys
from pathlib import Path

import pytest

from fsdet.engine.sweep import IncompleteSweep
from fsdet.engine.sweep_run import PlannedRun

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "run_fewshot.py"
VOC, COCO = (str(ROOT / "configs" / "tfa" / f"{name}_cos.yaml") for name in ("voc", "coco"))


@pytest.fixture
def module():
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("run_fewshot_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(module, monkeypatch):
    """Call it with a sweep that only records what it is asked for; returns the sweep, its workers and its limit."""
    asked = []

    def run_sweep(sweep, *, quiet, workers, limit, say):
        assert quiet
        asked.append((sweep, workers, limit))
        return [Path("a.json")]

    monkeypatch.setattr(module, "run_sweep", run_sweep)
    monkeypatch.setattr(module, "write_report", lambda *args, **kwargs: "report")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["run_fewshot.py", *words])
        assert module.main() == 0
        return asked[-1]

    return call


def test_overrides_may_follow_lists(tool):
    sweep, *_ = tool("--novel", "a.yaml", "b.yaml", "--shots", "1", "5", "--seeds", "0", "2", "FEWSHOT.SPLIT", "2")
    assert sweep.novel == ("a.yaml", "b.yaml") and sweep.shots == (1, 5) and sweep.seeds == (0, 2)
    assert sweep.opts == ("FEWSHOT.SPLIT", "2") and sweep.bases == ()


def test_overrides_may_stand_between_options(tool):
    words = ("--novel", "a.yaml", "SOLVER.STEPS", "(3, 4)", "--shots", "1", "--base", "base.yaml", "other.yaml")
    sweep, *_ = tool(*words)
    assert sweep.opts == ("SOLVER.STEPS", "(3, 4)") and sweep.bases == ("base.yaml", "other.yaml")
    assert sweep.seeds == (0,) and sweep.settings == ("gfsod",) and sweep.repeats == 1


def test_a_file_name_in_capitals_is_no_override(tool):
    sweep, *_ = tool("--novel", "Mine/A.yaml", "--seeds", "0", "SEED", "3", "--base", "B.yaml", "--shots", "1")
    assert sweep.novel == ("Mine/A.yaml",) and sweep.bases == ("B.yaml",)
    assert sweep.opts == ("SEED", "3") and sweep.seeds == (0,)


def test_explicit_options_narrow_a_preset(tool):
    sweep, *_ = tool("--novel", COCO, "--preset", "fsrw")
    assert (sweep.shots, sweep.seeds, sweep.settings, sweep.repeats) == ((1, 2, 3, 5, 10, 30), (0,), ("fsod",), 10)
    sweep, *_ = tool("--novel", VOC, "--preset", "tfa", "--seeds", "0-2", "7", "--shots", "10")
    assert (sweep.shots, sweep.seeds, sweep.settings, sweep.repeats) == ((10,), (0, 1, 2, 7), ("gfsod",), 1)
    sweep, *_ = tool("--novel", VOC, "--preset", "fsrw", "--repeats", "3", "--calibration", "both")
    assert sweep.repeats == 3 and sweep.calibration == "both" and sweep.shots == (1, 2, 3, 5, 10)


def test_who_does_the_runs(tool, tmp_path, monkeypatch):
    words = ("--novel", VOC, "--shots", "1")
    _, workers, limit = tool(*words)
    assert workers.slots == ({},) and limit is None  # the machine as it is
    _, workers, limit = tool(*words, "--jobs", "3", "--limit", "2")
    assert workers.width == 3 and limit == 2 and workers.slots[0]["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    _, workers, _ = tool(*words, "--gpus", "1")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in workers.slots] == ["5"]
    pytest.importorskip("submitit")
    _, workers, _ = tool(*words, "--slurm", "cluster=local,timeout_min=9", "FEWSHOT.OUTPUT", str(tmp_path))
    assert workers.folder == tmp_path / "slurm" and workers.parameters["timeout_min"] == 9
    with pytest.raises(SystemExit):
        tool(*words, "--jobs", "2", "--gpus", "all")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shots", "one"), '"one" is no number'),
        (("--shots", "1", "--seeds", "0", "5-2"), '"5-2" is no number and no range'),
        (("--seeds", "0"), "choose --shots"),
        (("--shots", "1", "--jobs", "0"), "0 workers"),
        (("--shots", "1", "--repeats", "0"), "repeats is 0"),
        (("--shots", "1", "OUTPUT_DIR", "here"), "OUTPUT_DIR differs from run to run"),
        (("--shots", "1", "--gpus", "x"), "can be used here"),
    ],
)
def test_failure_is_one_line(tool, words, said):
    with pytest.raises(SystemExit) as stop:
        tool("--novel", "a.yaml", *words)
    assert str(stop.value).startswith("error: ") and said in str(stop.value)


def test_dry_run_prints_the_plan(tool, capsys, tmp_path):
    base = str(ROOT / "configs" / "tfa" / "voc_base.yaml")
    with pytest.raises(SystemExit, match="2 of 2 novel runs lack K-shot lists"):  # found now, not after the base run
        tool(
            "--base",
            base,
            "--novel",
            VOC,
            "--shots",
            "1",
            "--seeds",
            "0-1",
            "--dry-run",
            "FEWSHOT.OUTPUT",
            str(tmp_path),
            "FEWSHOT.ROOT",
            str(tmp_path),
        )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:-1] for line in lines[:3]] == [["to", "do", kind] for kind in ("base", "novel", "novel")]
    assert lines[2].endswith("1shot_seed1") and lines[3] == "3 runs: 3 to do; time left unknown"


def test_missing_runs_are_named_and_never_averaged(module, monkeypatch, capsys, tmp_path):
    """Seed 1 of the 5-shot row failed: its row is reported only where that is asked for."""
    plan = [
        PlannedRun("novel", "a.yaml", (), None, f"{shot}shot_seed{seed}", "d", f"{shot}-shot")
        for shot in (1, 5)
        for seed in (0, 1)
    ]

    def run_sweep(sweep, **_):
        raise IncompleteSweep(plan, {"5shot_seed1": "out of memory"})

    def write_report(results, *output, allow_missing, seeds, repeats, **_):
        assert seeds == (0, 1) and repeats == 1
        reports.append(([path.parent.name for path in results], allow_missing, output))
        return "tables"

    reports = []
    monkeypatch.setattr(module, "run_sweep", run_sweep)
    monkeypatch.setattr(module, "write_report", write_report)
    words = [
        "run_fewshot.py",
        "--novel",
        VOC,
        "--shots",
        "1",
        "5",
        "--seeds",
        "0-1",
        "--report",
        str(tmp_path / "r.html"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert module.main() == 1
    out = capsys.readouterr()
    assert reports == [(["1shot_seed0", "1shot_seed1"], False, ())] and out.out == "tables\n"
    assert "1 of 4 runs have no result" in out.err and "5shot_seed1: out of memory" in out.err
    reports.clear()
    monkeypatch.setattr(sys, "argv", [*words, "--allow-missing"])
    assert module.main() == 0
    three = ["1shot_seed0", "1shot_seed1", "5shot_seed0"]
    assert reports == [(three, True, ()), (three, True, (tmp_path / "r.html",))]
    assert "5shot_seed1: out of memory" in capsys.readouterr().err
