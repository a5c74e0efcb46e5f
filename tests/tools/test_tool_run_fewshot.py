"""Command line of the sweep: overrides may follow list options."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_fewshot.py"


@pytest.fixture
def tool(monkeypatch):
    """The tool as a module, with a sweep that only records what it is asked for."""
    spec = importlib.util.spec_from_file_location("run_fewshot_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = []
    monkeypatch.setattr(module, "run_sweep", lambda sweep: asked.append(sweep) or [Path("a.json")])
    monkeypatch.setattr(module, "write_report", lambda *args, **kwargs: "report")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["run_fewshot.py", *words])
        module.main()
        return asked[-1]

    return call


def test_overrides_may_follow_lists(tool):
    sweep = tool("--novel", "a.yaml", "b.yaml", "--shots", "1", "5", "--seeds", "0", "2", "FEWSHOT.SPLIT", "2")
    assert sweep.novel == ("a.yaml", "b.yaml") and sweep.shots == (1, 5) and sweep.seeds == (0, 2)
    assert sweep.opts == ("FEWSHOT.SPLIT", "2") and sweep.base is None


def test_overrides_may_stand_between_options(tool):
    sweep = tool("--novel", "a.yaml", "SOLVER.STEPS", "(3, 4)", "--shots", "1", "--base", "base.yaml")
    assert sweep.opts == ("SOLVER.STEPS", "(3, 4)") and sweep.base == "base.yaml" and sweep.seeds == (0,)


def test_a_file_name_in_capitals_is_no_override(tool):
    sweep = tool("--novel", "Mine/A.yaml", "--seeds", "0", "SEED", "3", "--base", "B.yaml", "--shots", "1")
    assert sweep.novel == ("Mine/A.yaml",) and sweep.base == "B.yaml"
    assert sweep.opts == ("SEED", "3") and sweep.seeds == (0,)


def test_failure_is_one_line(tool, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        tool("--novel", "a.yaml", "--shots", "one")
    assert "error" in str(stop.value)
