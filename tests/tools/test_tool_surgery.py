"""The commands of surgery and conversion, from arguments to files."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsdet.checkpoint.safe_io import load_weights, save_atomic
from fsdet.data.splits import coco_split, voc_split

TOOLS = Path(__file__).resolve().parents[2] / "tools"
CLS = "roi_heads.box_predictor.cls_score.weight"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def surgery():
    return load_tool("surgery").main


def write(path, classes, offset=0.0, record=None):
    rows = torch.arange(classes + 1.0)[:, None].repeat(1, 8) + offset
    state = {
        "backbone.w": torch.ones(1),
        CLS: rows,
        "roi_heads.box_predictor.bbox_pred.weight": rows[:-1].repeat_interleave(4, 0),
    }
    save_atomic({"model": state, "iteration": 5} | ({"fsdet": {"classes": record}} if record else {}), path)
    return str(path)


@pytest.mark.parametrize(("name", "split"), [("voc2", voc_split(2)), ("coco", coco_split())])
def test_randinit_and_combine_by_split(tmp_path, surgery, capsys, name, split):
    base = write(tmp_path / "base.pth", len(split.base))
    novel = write(tmp_path / "novel.pth", len(split.novel), offset=1000.0)
    output = tmp_path / "out" / "model.pth"
    assert surgery(["randinit", "--src", base, "--split", name, "--output", str(output), "--seed", "1"]) == 0
    assert f"predictor with {len(split.all)} classes" in capsys.readouterr().out
    weight = load_weights(output)["model"][CLS]
    assert [int(weight[split.all.index(c), 0]) for c in split.base] == list(range(len(split.base)))

    assert surgery(["combine", "--src", base, "--novel-src", novel, "--split", name, "--output", str(output)]) == 0
    weight = load_weights(output)["model"][CLS]
    assert [int(weight[split.all.index(c), 0]) for c in split.novel] == [1000 + i for i in range(len(split.novel))]
    assert load_weights(output)["fsdet"]["classes"] == list(split.all)


def test_own_classes(tmp_path, surgery, capsys):
    base = write(tmp_path / "base.pth", 2, record=["cat", "dog"])
    (tmp_path / "all.txt").write_text("cow\ncat\ndog\n")
    output = tmp_path / "out.safetensors"
    assert (
        surgery(["randinit", "--src", base, "--target-classes", str(tmp_path / "all.txt"), "--output", str(output)])
        == 0
    )
    assert load_weights(output)["model"][CLS][1:, 0].tolist() == [0, 1, 2]
    faulty = ["--source-classes", "dog,cat", "--target-classes", "cow,cat,dog", "--output", str(output)]
    assert surgery(["randinit", "--src", base, *faulty]) == 1
    assert "base.pth" in (message := capsys.readouterr().err) and 'row 0 is "cat" in the file' in message


def test_faults_are_one_line_and_exit_1(tmp_path, surgery, capsys):
    arguments = ["remove", "--src", str(tmp_path / "gone.pth"), "--output", str(tmp_path / "out.pth")]
    assert surgery(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("surgery: Weight file") and message.count("\n") == 1
    with pytest.raises(SystemExit):
        surgery(["remove", "--output", "out.pth"])
    assert surgery([*arguments, "--target-classes", "missing.txt"]) == 1
    assert "missing.txt not found" in capsys.readouterr().err


def test_the_command_itself(tmp_path):
    base = write(tmp_path / "base.pth", 15)
    command = [sys.executable, str(TOOLS / "surgery.py"), "remove", "--src", base, "--output", str(tmp_path / "o.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(load_weights(tmp_path / "o.pth")["model"]) == ["backbone.w"]


def test_convert(tmp_path, capsys):
    convert = load_tool("convert_checkpoint").main
    state = {"module.roi_heads.box_head.fc1.weight": torch.ones(2, 2), "pixel_mean": torch.ones(3)}
    save_atomic({"model": state}, tmp_path / "official.pth")
    output = tmp_path / "ours.safetensors"
    arguments = ["--table", "tfa", "--src", str(tmp_path / "official.pth"), "--output", str(output)]
    assert convert(arguments) == 0
    assert "1 keys renamed, 1 dropped on purpose" in capsys.readouterr().out
    assert list(load_weights(output)["model"]) == ["roi_heads.box_head.fc1.weight"]

    save_atomic({"model": {**state, "strange.w": torch.ones(1)}}, tmp_path / "official.pth")
    output.unlink()
    assert convert(arguments) == 1
    assert "no row of the table takes strange.w" in capsys.readouterr().err and not output.exists()
    assert convert([*arguments, "--allow-unmatched"]) == 0 and output.exists()
