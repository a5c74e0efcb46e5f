"""The result file: nothing is lost on the way, and each fault names file and key."""

import json
import math
import pathlib
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_cases import make_run

import fsdet
from fsdet.evaluation import result as module
from fsdet.evaluation.result import (
    collect_versions,
    config_digest,
    git_commit,
    peak_memory_mib,
    read_result,
    split_metrics,
    write_result,
)


def test_round_trip(tmp_path):
    path = make_run(tmp_path, seed=3)
    first = read_result(path)
    write_result(tmp_path / "again.json", first)
    assert read_result(tmp_path / "again.json") == first
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert first.protocol.seed == 3
    assert first.classes["novel"] == ("bird", "cow")
    assert first.schema == 1


def test_nan_and_numpy_values(tmp_path):
    first = read_result(make_run(tmp_path))
    path = tmp_path / "nan.json"
    write_result(path, replace(first, metrics={"AP": np.float64(1.5), "nAP": float("nan")}, iterations=np.int64(7)))
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["metrics"] == {"AP": 1.5, "nAP": None}
    again = read_result(path)
    assert again.metrics["AP"] == 1.5
    assert math.isnan(again.metrics["nAP"])
    assert again.iterations == 7


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = make_run(tmp_path)
    before = path.read_text()
    first = read_result(path)

    def torn(text, file, **_):
        file.write_bytes(b'{"schema": 1, "proto')
        raise OSError("disk full")

    monkeypatch.setattr(pathlib.Path, "write_text", lambda file, text, **_: torn(text, file))
    with pytest.raises(OSError, match="disk full"):
        write_result(path, replace(first, iterations=1))
    assert path.read_text() == before


def test_a_wrong_type_is_not_written(tmp_path):
    first = read_result(make_run(tmp_path))
    with pytest.raises(ValueError, match=r'new.json: key "iterations" must be int, got 1.5'):
        write_result(tmp_path / "new.json", replace(first, iterations=1.5))
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("schema"), 'key "schema" is missing'),
        (lambda d: d.update(schema=2), 'key "schema" is 2, this version of fsdet reads 1'),
        (lambda d: d.pop("metrics"), 'key "metrics" is missing'),
        (lambda d: d["protocol"].pop("method"), 'key "protocol.method" is missing'),
        (lambda d: d["protocol"].update(seed="0"), "key \"protocol.seed\" must be int, got '0'"),
        (lambda d: d["protocol"].update(tta=1), 'key "protocol.tta" must be bool, got 1'),
        (lambda d: d["protocol"].update(shots=1), 'unknown key "protocol.shots"'),
        (lambda d: d["metrics"].update(AP="high"), "key \"metrics.AP\" must be float, got 'high'"),
        (lambda d: d["per_class"]["cow"].update(AP50=True), 'key "per_class.cow.AP50" must be float, got True'),
        (lambda d: d["classes"].update(base=["dog", 5]), r'key "classes.base\[1\]" must be str, got 5'),
        (lambda d: d.update(versions=[]), 'key "versions" must be'),
        (lambda d: d.update(protocol="voc"), 'key "protocol" must be an object'),
        (lambda d: d.update(surprise=1), 'unknown key "surprise"'),
    ],
)
def test_faults_name_file_and_key(tmp_path, change, message):
    path = make_run(tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        read_result(path)
    assert str(path) in str(error.value)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.json: no result file"):
        read_result(tmp_path / "nothing.json")
    (tmp_path / "torn.json").write_text('{"schema": 1,')
    with pytest.raises(ValueError, match=r"torn.json: not a result file"):
        read_result(tmp_path / "torn.json")


def test_split_metrics():
    flat = {"AP": 1.0, "bAP50": 2.0, "APs": 3.0, "AP-hand-saw": 4.0, "AP50-AP": 5.0, "AP75-potted plant": 6.0}
    metrics, per_class = split_metrics(flat)
    assert metrics == {"AP": 1.0, "bAP50": 2.0, "APs": 3.0}
    assert per_class == {"hand-saw": {"AP": 4.0}, "AP": {"AP50": 5.0}, "potted plant": {"AP75": 6.0}}


def test_config_digest_follows_the_recipe_only():
    config = {"SOLVER": {"BASE_LR": 0.1, "STEPS": (1, 2)}, "FEWSHOT": {"SEED": 0, "SHOT": 1}, "OUTPUT_DIR": "a"}
    digest = config_digest(config)
    same = {"OUTPUT_DIR": "b", "FEWSHOT": {"SHOT": 1, "SEED": 7}, "SOLVER": {"STEPS": [1, 2], "BASE_LR": 0.1}}
    assert config_digest(same) == digest
    assert config_digest({**config, "FEWSHOT": {"SEED": 0, "SHOT": 2}}) != digest
    assert config_digest({**config, "SOLVER": {"BASE_LR": 0.2, "STEPS": (1, 2)}}) != digest
    assert config_digest(same, without=()) != config_digest(config, without=())


def test_versions_and_memory():
    versions = collect_versions("cpu")
    assert versions["fsdet"] == fsdet.__version__
    assert versions["torch"] == torch.__version__
    assert {"detectron2", "torchvision", "numpy", "python", "device", "pycocotools"} <= set(versions)
    before = peak_memory_mib()["rss"]
    block = np.ones(200 * 2**20, dtype=np.uint8)
    assert peak_memory_mib()["rss"] >= before
    assert 200 < peak_memory_mib()["rss"] < 100_000
    del block


def test_git_commit_is_of_the_package_not_of_the_folder_around(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "fsdet" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(module.fsdet, "__file__", str(package))
    commit = git_commit()
    assert len(commit) == 40
    package.write_text("# changed")
    assert git_commit() == commit + "+changes"
    installed = tmp_path / ".venv" / "site-packages" / "fsdet" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(module.fsdet, "__file__", str(installed))
    assert git_commit() is None
