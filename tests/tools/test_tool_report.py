"""The command line of the report."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_run = load(ROOT / "tests" / "evaluation" / "evaluation_cases.py").make_run
tool = load(ROOT / "tools" / "report.py")


@pytest.fixture
def results(tmp_path):
    for method in ("tfa", "defrcn"):
        for seed in range(2):
            make_run(tmp_path / "runs", method, 1, seed, nap50=20.0 + seed)
    return tmp_path / "runs"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    return tool.main()


def test_prints_a_table(results, monkeypatch, capsys):
    assert call(monkeypatch, results, "--compare", "tfa", "defrcn") == 0
    text = capsys.readouterr().out
    assert "Seeds: 0, 1." in text
    assert "20.50 ± 6.35" in text
    assert "tfa minus DeFRCN (defrcn)" in text


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("a.html", "<!DOCTYPE html>"),
        ("a.md", "## voc"),
        ("a.csv", "benchmark,"),
        ("a.json", "["),
        ("a.txt", "voc split"),
    ],
)
def test_the_suffix_chooses_the_format(results, tmp_path, monkeypatch, capsys, name, beginning):
    output = tmp_path / "out" / name
    assert call(monkeypatch, results, "--output", output) == 0
    assert output.read_text(encoding="utf-8").startswith(beginning)
    assert capsys.readouterr().out == f"{output} written\n"


def test_missing_seeds(results, monkeypatch, capsys):
    next(results.glob("tfa/1shot_seed0_0/result.json")).unlink()
    assert call(monkeypatch, results) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: Rows over different seeds")
    assert "--allow-missing" in message
    assert call(monkeypatch, results, "--allow-missing") == 0
    assert call(monkeypatch, results, "--seeds", "1") == 0
    assert call(monkeypatch, results, "--seeds", "0-1") == 1


def test_seed_lists():
    assert tool.seed_range("0-3,7") == [0, 1, 2, 3, 7]
    for wrong in ("all", "9-0", ""):
        with pytest.raises(tool.argparse.ArgumentTypeError, match="write 0-9 or 0,1,4"):
            tool.seed_range(wrong)


def test_repetitions(results, monkeypatch, capsys):
    make_run(results, "tfa", 1, 0, repeat=1)
    assert call(monkeypatch, results) == 1
    assert "--repeats" in capsys.readouterr().err
    assert call(monkeypatch, results, "--repeats", "1") == 0


def test_place_that_cannot_be_written(results, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert call(monkeypatch, results, "--output", tmp_path / "file" / "a.html") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_as_a_program(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}: no result.json in this folder or below\n"
