"""tools/doctor.py as a command: the page appears and the exit code is right, also where packages are broken."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdet.engine.doctor_finding import FAULT, Finding

ROOT = Path(__file__).resolve().parents[2]


def run_doctor(folder, *arguments, path=None):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DETECTRON2_DATASETS")}
    environment["OMP_NUM_THREADS"] = "1"
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_healthy_installation(tmp_path):
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("fsdet doctor\n\nVersions\n  python")
    assert done.stdout.endswith("ready to run\n")
    assert "VOC2007/Annotations" in done.stdout


@pytest.mark.parametrize(
    ("package", "source", "expected"),
    [
        ("detectron2", 'raise ImportError("libcudart.so.10: cannot open")', "libcudart.so.10"),
        ("torch", 'raise OSError("libtorch_cpu.so: undefined symbol")', "undefined symbol"),
    ],
)
def test_page_appears_where_a_package_is_broken(tmp_path, package, source, expected):
    broken = tmp_path / "broken" / package
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(source + "\n")
    done = run_doctor(tmp_path, path=broken.parent)
    assert done.returncode == 1
    assert expected in done.stdout
    assert done.stdout.endswith("a run would fail\n")
    assert "Traceback" not in done.stderr


def test_config_file_and_values_are_passed_on(tmp_path, monkeypatch, capsys):
    specification = importlib.util.spec_from_file_location("doctor_tool", ROOT / "tools" / "doctor.py")
    tool = importlib.util.module_from_spec(specification)
    monkeypatch.setattr(sys, "path", list(sys.path))
    specification.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--config-file", "nowhere.yaml", "SOLVER.MAX_ITER", "8"])
    seen = []
    fault = Finding("Configuration", "file", "no such config file", FAULT)
    monkeypatch.setattr(tool, "examine", lambda file, opts: seen.append((file, opts)) or [fault])
    assert tool.main() == 1
    assert seen == [("nowhere.yaml", ["SOLVER.MAX_ITER", "8"])]
    assert "no such config file   [fault]" in capsys.readouterr().out
