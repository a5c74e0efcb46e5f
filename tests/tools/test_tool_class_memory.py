"""The command line of the class memory."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsdet.modeling.class_memory import ClassEntry, ClassMemory

TOOL = Path(__file__).resolve().parents[2] / "tools" / "class_memory.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tool_class_memory", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def paths(tmp_path):
    """Two memories: cow 1, bus 2; and bus 5, art 6."""
    for name, values in {"first": {"cow": 1, "bus": 2}, "second": {"bus": 5, "art": 6}}.items():
        entries = {key: ClassEntry({"prototype": torch.tensor([float(value)])}) for key, value in values.items()}
        ClassMemory(kind="prototypes", encoder="e" * 64, entries=entries).save(tmp_path / name)
    return str(tmp_path / "first"), str(tmp_path / "second")


def values(path):
    memory = ClassMemory.load(path)
    return {name: memory[name].tensors["prototype"].item() for name in memory}


def test_list_and_compare(tool, paths, capsys):
    assert tool(["list", paths[0]]) == 0
    assert capsys.readouterr().out.startswith("prototypes of 2 classes, encoder eeeeeeeeeeee\n")
    assert tool(["compare", *paths]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["bus", "changed", "same", "prototype", "1.000000", "6.00e-01"],
        ["art", "added"],
        ["cow", "removed"],
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rename", "{0}", "cow", "water buffalo/ox"], {"water buffalo/ox": 1, "bus": 2}),
        (["remove", "{0}.json", "cow", "bus"], {}),
        (["copy", "{0}", "--source", "{1}", "art"], {"cow": 1, "bus": 2, "art": 6}),
        (["replace", "{0}", "bus", "--source", "{1}.safetensors"], {"cow": 1, "bus": 5}),
    ],
)
def test_edits(tool, paths, tmp_path, capsys, arguments, expected):
    arguments = [word.format(*paths) for word in arguments]
    before = values(paths[0])
    assert tool([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: {len(expected)} classes written\n"
    assert values(tmp_path / "out") == expected and values(paths[0]) == before
    assert tool(arguments) == 0
    assert values(paths[0]) == expected and values(paths[1]) == {"bus": 5, "art": 6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["remove", "{0}", "cow", "dog"], "No class 'dog'"),
        (["copy", "{0}", "--source", "{1}", "art", "bus"], "'bus' is in this memory already"),
        (["list", "{0}_gone"], "first_gone.json not found"),
        (["list", str(TOOL.parent)], "tools is a folder; name the memory in it"),
    ],
)
def test_faults_change_nothing(tool, paths, capsys, arguments, message):
    assert tool([word.format(*paths) for word in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert values(paths[0]) == {"cow": 1, "bus": 2}


def test_as_a_program(paths):
    done = subprocess.run([sys.executable, str(TOOL), "list", paths[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cow" in done.stdout
