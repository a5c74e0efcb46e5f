"""A gallery from a run's folder: what it gathers, and what it says where something is missing."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fsdet.engine.gallery import gather_gallery
from fsdet.engine.setup import load_config
from fsdet.evaluation.report_gallery import SUPPORT_SIDE
from fsdet.evaluation.result import read_result


@pytest.fixture
def run_folder(write_config, tmp_path, squares):
    """A 2-shot run as an evaluation leaves it, untrained: every white square of the first three pictures is found."""
    config = write_config(FEWSHOT={"STAGE": "novel", "SHOT": 2, "METHOD": "found"}, MODEL={"WEIGHTS": "x.pth"})
    cfg = load_config(config)
    folder = tmp_path / "run"
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    truth = json.loads((squares / "test.json").read_text())
    rows = [
        {"image_id": a["image_id"], "category_id": 4, "bbox": a["bbox"], "score": 1 - 0.1 * a["image_id"]}
        for a in truth["annotations"]
        if a["category_id"] == 4 and a["image_id"] <= 3
    ]
    (folder / "inference" / "detections.json").write_text(json.dumps(rows))
    return folder


def test_supports_beside_detections(run_folder):
    gallery = gather_gallery(run_folder)
    assert gallery.title == "found, 2-shot, seed 0"
    (row,) = gallery.rows
    assert (row.name, row.shots, len(row.supports)) == ("white", 2, 2)
    assert row.facts == "3 of 4 objects in the test set found by some detection · 3 detections of any score"
    assert [picture.kind for picture in row.examples] == ["correct", "correct", "correct", "missed"]
    assert row.examples[0].caption == "score 0.90, 1st of 3; IoU 1.00"
    middle = SUPPORT_SIDE // 2
    for support in row.supports:  # a white square in the middle of its crop
        assert np.asarray(support.image)[middle, middle].min() > 230


def test_what_is_shown_can_be_chosen(run_folder):
    (row,) = gather_gallery(run_folder, classes=["white"], examples=2, supports=1).rows
    assert (row.shots, len(row.supports), len(row.examples)) == (2, 1, 2)
    with pytest.raises(ValueError, match=r'config.yaml: no novel class "red"; this run has \[\'white\'\]'):
        gather_gallery(run_folder, classes=["red"])


def test_evaluation_inside_a_run(run_folder):
    """RUN/calibrated has its own detections, and its run's configuration."""
    shutil.move(run_folder / "inference", run_folder / "calibrated" / "inference")
    assert len(gather_gallery(run_folder / "calibrated").rows[0].examples) == 4


def test_missing_files(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.yaml: not found; name the folder of an evaluated run"):
        gather_gallery(tmp_path / "other" / "nowhere")
    shutil.rmtree(run_folder / "inference")
    with pytest.raises(FileNotFoundError, match=r"detections.json: not found; evaluate .*config.yaml --eval-only"):
        gather_gallery(run_folder)


def test_missing_data(run_folder, tmp_path, squares):
    with pytest.raises(FileNotFoundError, match="gone"):
        gather_gallery(run_folder, data_root=tmp_path / "gone")
    moved = tmp_path / "moved"
    shutil.copytree(squares, moved)
    assert gather_gallery(run_folder, data_root=moved).rows[0].shots == 2
    (moved / "test" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1.png: picture not found; unpack"):
        gather_gallery(run_folder, data_root=moved)


def test_base_run_has_nothing_to_show(write_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(load_config(write_config()).dump())
    with pytest.raises(ValueError, match="a base run has no novel classes"):
        gather_gallery(tmp_path / "run")


def test_supports_must_be_those_of_the_result(run_folder, make_result):
    path = make_result(run_folder, samples_digest="f" * 64)
    with pytest.raises(ValueError, match=r"seed0: these K-shot lists are not those that .*result.json was made with"):
        gather_gallery(run_folder)
    assert read_result(path).protocol.samples_digest == "f" * 64


def test_figures_come_from_the_result(run_folder, make_result):
    make_result(run_folder, samples_digest=None, calibration="pcb resnet101 0.5")
    gallery = gather_gallery(run_folder)
    assert gallery.title == "found + pcb resnet101 0.5, 2-shot, seed 0"
    assert gallery.rows[0].facts.startswith("AP50 75.0 · 3 of 4 objects")


@pytest.fixture
def make_result():
    """Write a result of the squares into a folder; keyword arguments go to the protocol."""
    from fsdet.evaluation.result import Protocol, RunResult, write_result

    def make(folder, **changes):
        protocol = Protocol(
            benchmark="squares", test_set="custom_test_all:test", test_images=4, split=1, setting="gfsod",
            stage="novel", method="found", shot=2, evaluation="coco", backbone="R50-FPN", pretraining="", **changes,
        )  # fmt: skip
        result = RunResult(
            protocol=protocol,
            classes={"base": ("red", "green", "blue"), "novel": ("white",)},
            metrics={"nAP50": 75.0},
            per_class={"white": {"AP": 60.0, "AP50": 75.0, "AP75": 70.0}},
            config_digest="ab" * 32, versions={}, seconds={}, peak_memory_mib={},
            train_images=1, iterations=1, images_per_step=1,
        )  # fmt: skip
        write_result(folder / "result.json", result)
        return folder / "result.json"

    return make


def test_one_command_writes_page_and_tables(run_folder, make_result, tmp_path, monkeypatch, capsys):
    make_result(run_folder, samples_digest=None)
    path = Path(__file__).resolve().parents[2] / "tools" / "report.py"
    spec = importlib.util.spec_from_file_location("loaded_report_tool", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    words = [run_folder, "--output", tmp_path / "report", "--gallery", run_folder, "--gallery-images", 1]
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    assert tool.main() == 0
    assert capsys.readouterr().out.split() == [
        word
        for name in ("index.html", "report.md", "report.csv")
        for word in (str(tmp_path / "report" / name), "written")
    ]
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 3  # two supports and one picture
    assert "Gallery: found, 2-shot, seed 0" in page
    for words, message in (
        ([run_folder, "--gallery", run_folder], "Only an HTML page shows a gallery"),
        ([run_folder, "--gallery", tmp_path / "x", "--output", tmp_path / "a.html"], "x/config.yaml: not found"),
        ([run_folder, "--also", "md"], "--also writes files beside --output"),
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        assert tool.main() == 1
        assert message in capsys.readouterr().err
