"""Evaluated runs compared over their test pictures, from their folders."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from fsdet.engine.setup import load_config
from fsdet.engine.tested_run import compare_runs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def make_run(write_config, tmp_path, squares):
    """Make the folder of an evaluated run that finds every object of some images, and nothing else."""

    def make(name, images, **fewshot):
        fewshot = {"STAGE": "novel", "SHOT": 2, "METHOD": name, **fewshot}
        config = write_config(f"{name}.yaml", FEWSHOT=fewshot, MODEL={"WEIGHTS": "x.pth"})
        folder = tmp_path / name
        (folder / "inference").mkdir(parents=True)
        (folder / "config.yaml").write_text(load_config(config).dump())
        truth = json.loads((squares / "test.json").read_text())
        names = {c["id"]: c["name"] for c in truth["categories"]}
        rows = [
            {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
            for a in truth["annotations"]
            if a["image_id"] in images and (fewshot.get("SETTING") != "fsod" or names[a["category_id"]] == "white")
        ]
        (folder / "inference" / "detections.json").write_text(json.dumps(rows))
        return folder

    return make


def test_two_runs(make_run):
    """All of four images against half of them: 100 and 51 of 101 recalls."""
    everything, half = make_run("everything", (1, 2, 3, 4)), make_run("half", (1, 2))
    at_50, at_75 = compare_runs([everything], [half], draws=50)
    assert (at_50.iou, at_75.iou) == (0.5, 0.75) and at_50.first == at_75.first == 100
    assert at_50.second == pytest.approx(100 * 51 / 101) and 0 <= at_50.low < at_50.difference < at_50.high <= 100
    (both,) = compare_runs([everything, half], [half, half], ious=[0.5], draws=50)
    assert both.difference == pytest.approx(at_50.difference / 2)


@pytest.mark.parametrize("group", ["novel", "base"])
def test_groups_of_classes(make_run, squares, group):
    everything, half = make_run("everything", (1, 2, 3, 4)), make_run("half", (1, 2))
    path = half / "inference" / "detections.json"
    truth = json.loads((squares / "test.json").read_text())
    white = next(c["id"] for c in truth["categories"] if c["name"] == "white")
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row for row in rows if (row["category_id"] == white) == (group == "novel")]))
    (own,) = compare_runs([everything], [half], group=group, ious=[0.5], draws=5)
    assert own.second == pytest.approx(100 * 51 / 101)
    (other,) = compare_runs([everything], [half], group={"novel": "base", "base": "novel"}[group], ious=[0.5], draws=5)
    assert other.second == 0


def test_faults(make_run, tmp_path):
    run, fsod = make_run("gfsod", (1, 2)), make_run("fsod", (1, 2), SETTING="fsod")
    with pytest.raises(ValueError, match=r"fsod: tested on 4 images and the classes \['white'\].*of the same images"):
        list(compare_runs([run], [fsod]))
    with pytest.raises(ValueError, match="no base class, but on"):
        list(compare_runs([fsod], [fsod], group="base"))
    with pytest.raises(ValueError, match="expected all | base | novel"):
        list(compare_runs([run], [run], group="new"))
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.yaml: not found"):
        list(compare_runs([run], [tmp_path / "nowhere"]))
    (run / "inference" / "detections.json").unlink()
    with pytest.raises(FileNotFoundError, match="evaluate the run again"):
        list(compare_runs([run], [run]))


def test_command_line(make_run, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("compare_runs_tool", ROOT / "tools" / "compare_runs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    first, second = make_run("everything", (1, 2, 3, 4)), make_run("half", (1, 2))
    words = ["compare_runs.py", "--first", str(first), "--second", str(second), "--classes", "novel", "--draws", "20"]
    monkeypatch.setattr(sys, "argv", words)
    tool.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("AP50: 100.00 and 50.50, difference +49.50 [") and lines[1].startswith("AP75: ")
    assert lines[2].startswith("In brackets: 95 % of 20 draws")
    monkeypatch.setattr(sys, "argv", [*words[:3], "--second", str(second / "none")])
    with pytest.raises(SystemExit, match=r"error: .*none/config.yaml: not found"):
        tool.main()
