"""What the set-up installs: Detectron2 works by itself, fsdet leaves it alone, and the set-up steps do as they say."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STOCK = """
import json, sys
import cv2, numpy as np, torch
from detectron2 import model_zoo
from detectron2.data import (
    DatasetCatalog, MetadataCatalog, build_detection_test_loader, build_detection_train_loader
)
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

result = {}
name = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
cfg = model_zoo.get_config(name)
result["zoo"] = [cfg.MODEL.META_ARCHITECTURE, model_zoo.get_config_file(name), model_zoo.get_checkpoint_url(name)]

# Two pictures, two classes. Class "a": right (0.9), wrong (0.8), right (0.7); class "b": one object, never found.
picture = np.full((48, 64, 3), 90, np.uint8)
images, truth = [], []
common = {"category_id": 3, "area": 400, "iscrowd": 0}
for number in (1, 2):
    cv2.imwrite(f"{number}.png", picture)
    images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
    truth.append({**common, "id": number, "image_id": number, "bbox": [10, 10, 20, 20]})
truth.append({**common, "id": 3, "image_id": 1, "category_id": 5, "bbox": [40, 5, 15, 30]})
categories = [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}]
json.dump({"info": {}, "images": images, "annotations": truth, "categories": categories}, open("truth.json", "w"))
register_coco_instances("tiny", {}, "truth.json", ".")

cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("tiny",)
cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TRAIN = 0, 2, (48,)
batch = next(iter(build_detection_train_loader(cfg)))
result["train"] = [len(batch), len(batch[0]["instances"]) > 0, batch[0]["image"].dim()]
result["test"] = [item["image_id"] for items in build_detection_test_loader(cfg, "tiny") for item in items]


def found(boxes, scores):
    instances = Instances((48, 64))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.zeros(len(scores), dtype=torch.int64)
    return instances


evaluator = COCOEvaluator("tiny")
evaluator.reset()
outputs = {1: found([[10, 10, 30, 30], [40, 5, 55, 35]], [0.9, 0.8]), 2: found([[10, 10, 30, 30]], [0.7])}
for number, instances in outputs.items():
    evaluator.process([{"image_id": number}], [{"instances": instances}])
result["metrics"] = evaluator.evaluate()["bbox"]

drawn = Visualizer(picture, MetadataCatalog.get("tiny")).draw_instance_predictions(outputs[1]).get_image()
labelled = Visualizer(picture, MetadataCatalog.get("tiny")).draw_dataset_dict(DatasetCatalog.get("tiny")[0]).get_image()
result["drawn"] = [[list(image.shape), bool((image != 90).any())] for image in (drawn, labelled)]

try:
    from detectron2 import _C as operators
except ImportError:
    operators = None
result["placeholder"] = getattr(operators, "is_placeholder", False)
if result["placeholder"]:
    try:
        operators.box_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))
    except AttributeError as error:
        result["operator"] = str(error)
result["fsdet"] = [module for module in sys.modules if module.split(".")[0] == "fsdet"]
print("RESULT" + json.dumps(result))
"""

UNTOUCHED = """
import importlib, json, os, pkgutil, random, sys
import cv2, numpy, torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog


def state():
    return {
        "config": get_cfg().dump(),
        "data sets": sorted(DatasetCatalog.list()),
        "metadata": sorted(MetadataCatalog.list()),
        "random": str(random.getstate()),
        "numpy": str(numpy.random.get_state()) + str(numpy.get_printoptions()) + str(numpy.geterr()),
        "torch": [
            str(torch.get_rng_state().sum()), str(torch.get_default_dtype()), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        ],
        "opencv": cv2.getNumThreads(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "threads": torch.get_num_interop_threads(),
    }


before = state()
import fsdet

names = [module.name for module in pkgutil.walk_packages(fsdet.__path__, "fsdet.")]
for name in names:
    importlib.import_module(name)
after = state()
print("RESULT" + json.dumps({"modules": names, "changed": [key for key in before if before[key] != after[key]]}))
"""


def run_python(code, folder, *, with_fsdet):
    """Run code in a process of its own and give back what it printed behind RESULT."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DETECTRON2_DATASETS")}
    environment["OMP_NUM_THREADS"] = "1"
    if with_fsdet:
        environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def load_tool(name):
    """A file of tools/ as a module; its folder is on the path, as when it is run."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return module


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return run_python(STOCK, tmp_path_factory.mktemp("stock"), with_fsdet=False)


class TestStockDetectron2:
    """All in a process that never imports fsdet."""

    def test_fsdet_was_not_imported(self, stock):
        assert stock["fsdet"] == []

    def test_model_zoo(self, stock):
        architecture, path, address = stock["zoo"]
        assert architecture == "GeneralizedRCNN"
        assert Path(path).is_file()
        assert address.endswith("model_final_b275ba.pkl")

    def test_coco_evaluator_with_default_arguments(self, stock):
        """Class a: precision 1 at the 51 recalls up to 0.5, then 2/3 at 50; class b: 0."""
        first = 100 * (51 + 50 * 2 / 3) / 101
        metrics = stock["metrics"]
        assert metrics["AP-a"] == pytest.approx(first)
        assert metrics["AP-b"] == 0
        assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == pytest.approx(first / 2)

    def test_loaders(self, stock):
        assert stock["train"] == [2, True, 3]
        assert stock["test"] == [1, 2]

    def test_visualizer(self, stock):
        assert stock["drawn"] == [[[48, 64, 3], True]] * 2

    def test_compiled_operator_says_what_is_missing(self, stock):
        if not stock["placeholder"]:
            pytest.skip("this Detectron2 has compiled operators")
        assert "box_iou_rotated is a compiled operator" in stock["operator"]
        assert "official repository" in stock["operator"]


def test_importing_every_module_changes_nothing_global(tmp_path):
    result = run_python(UNTOUCHED, tmp_path, with_fsdet=True)
    package = ROOT / "fsdet"
    files = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in package.rglob("*.py")}
    expected = {name.removesuffix(".__init__") for name in files} - {"fsdet"}
    assert set(result["modules"]) == expected, "a folder without __init__.py, or a file that cannot be found"
    assert result["changed"] == []


# The lines of Detectron2 v0.6 that the wheel's edits apply to.
SOURCES = {
    "LICENSE": "licence text\n",
    "setup.py": "raise SystemExit('must not be packed')\n",
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/data/transforms/transform.py": "from PIL import Image\nmode = Image.LINEAR\n",
    "detectron2/data/masks.py": "import numpy as np\nkeep = np.bool\nalso = np.bool_\n",
    "detectron2/model_zoo/model_zoo.py": (
        "import os\nimport pkg_resources\n\n\ndef find(path):\n    return pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", path)\n    )\n'
    ),
    "detectron2/model_zoo/configs/a.yaml": "VERSION: 2\n",
    "detectron2/evaluation/coco_evaluation.py": (
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n\n\n"
        "def evaluate(use_fast_impl):\n    return (COCOeval_opt if use_fast_impl else COCOeval)(1)\n"
    ),
    "detectron2/export/__init__.py": "from .api import *\nfrom .flatten import TracingAdapter\n",
}
EDITED = (
    ("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    ("detectron2/data/masks.py", "np.bool\n", "bool\n"),
    ("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", ""),
    ("detectron2/model_zoo/model_zoo.py", "pkg_resources.resource_filename(", "os.path.dirname(os.path.abspath("),
    ("detectron2/evaluation/coco_evaluation.py", "from detectron2.evaluation.fast_eval_api import COCOeval_opt", ""),
    ("detectron2/evaluation/coco_evaluation.py", "(COCOeval_opt if use_fast_impl else COCOeval)", "COCOeval(1)"),
    ("detectron2/export/__init__.py", "from .api import *\nfrom", "except ImportError"),
)


def archive_of(sources, path):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in sources.items():
            member = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


class TestWheel:
    @pytest.fixture
    def builder(self):
        return load_tool("detectron2_wheel")

    def test_every_edit_is_tested_here(self, builder):
        assert len(builder.EDITS) == len(EDITED)

    @pytest.mark.parametrize(("file", "old", "new"), EDITED)
    def test_edit_applies(self, builder, tmp_path, file, old, new):
        text = builder.patched_tree(archive_of(SOURCES, tmp_path / "source.tar.gz"))[file].decode()
        assert old in SOURCES[file]
        assert old not in text
        assert new in text
        compile(text, file, "exec")

    @pytest.mark.parametrize(("file", "old", "new"), EDITED)
    def test_edit_that_does_not_apply_stops_the_build(self, builder, tmp_path, file, old, new):
        changed = {**SOURCES, file: SOURCES[file].replace(old, "changed = 1\n")}
        with pytest.raises(SystemExit, match="no longer applies"):
            builder.patched_tree(archive_of(changed, tmp_path / "source.tar.gz"))

    def test_what_is_packed(self, builder, tmp_path):
        tree = builder.patched_tree(archive_of(SOURCES, tmp_path / "source.tar.gz"))
        assert "setup.py" not in tree
        assert tree["detectron2/model_zoo/configs/a.yaml"] == b"VERSION: 2\n"
        assert "also = np.bool_" in tree["detectron2/data/masks.py"].decode()

    def test_placeholder(self, builder, tmp_path):
        scope = {}
        tree = builder.patched_tree(archive_of(SOURCES, tmp_path / "source.tar.gz"))
        exec(compile(tree["detectron2/_C.py"], "_C.py", "exec"), scope)
        assert scope["has_cuda"]() is False
        with pytest.raises(AttributeError, match="deform_conv_forward is a compiled operator"):
            scope["__getattr__"]("deform_conv_forward")

    def test_wheel_is_valid_and_reproducible(self, builder, tmp_path):
        archive = archive_of(SOURCES, tmp_path / "source.tar.gz")
        first = builder.write_wheel(builder.patched_tree(archive), tmp_path / "first")
        second = builder.write_wheel(builder.patched_tree(archive), tmp_path / "second")
        assert first.read_bytes() == second.read_bytes()
        assert first.name == f"detectron2-{builder.VERSION}-py3-none-any.whl"
        info = f"detectron2-{builder.VERSION}.dist-info"
        with zipfile.ZipFile(first) as wheel:
            content = {name: wheel.read(name) for name in wheel.namelist()}
        rows = [line.split(",") for line in content[f"{info}/RECORD"].decode().splitlines()]
        assert {row[0] for row in rows} == set(content)
        for name, code, size in rows:
            if name == f"{info}/RECORD":
                assert (code, size) == ("", "")
                continue
            digest = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).rstrip(b"=").decode()
            assert (code, int(size)) == (f"sha256={digest}", len(content[name]))
        assert f"Version: {builder.VERSION}" in content[f"{info}/METADATA"].decode()


class TestSetup:
    """The set-up on a made-up checkout, with nothing installed."""

    @pytest.fixture
    def setup(self, tmp_path, monkeypatch):
        module = load_tool("setup_env")
        for name in module.INPUTS:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "STATE", tmp_path / ".setup")
        monkeypatch.setattr(sys, "argv", ["setup_env.py"])
        module.calls = []
        monkeypatch.setattr(module, "set_up", lambda here: module.calls.append(here) or Path(sys.executable))
        return module

    @staticmethod
    def forbid_processes(module, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError(f"started a process: {args}")

        monkeypatch.setattr(module.subprocess, "run", refuse)
        monkeypatch.setattr(module.venv, "create", refuse)

    def test_second_call_does_nothing(self, setup, monkeypatch):
        setup.main()
        assert (setup.STATE / "python").read_text() == sys.executable
        self.forbid_processes(setup, monkeypatch)
        setup.main()
        assert setup.calls == [False]

    @pytest.mark.parametrize("changed", range(4))
    def test_changed_file_means_a_new_setup(self, setup, changed):
        setup.main()
        (setup.ROOT / setup.INPUTS[changed]).write_text("changed")
        setup.main()
        assert setup.calls == [False, False]

    @pytest.mark.parametrize("lost", ["stamp", "python"])
    def test_lost_state_means_a_new_setup(self, setup, lost):
        setup.main()
        (setup.STATE / lost).unlink()
        setup.main()
        assert setup.calls == [False, False]

    def test_vanished_interpreter_means_a_new_setup(self, setup):
        setup.main()
        (setup.STATE / "python").write_text("/nowhere/python")
        setup.main()
        assert setup.calls == [False, False]

    def test_failed_setup_leaves_no_stamp(self, setup, monkeypatch):
        monkeypatch.setattr(setup, "set_up", lambda here: sys.exit("setup: this step failed"))
        with pytest.raises(SystemExit):
            setup.main()
        assert not (setup.STATE / "stamp").exists()

    def test_old_python_is_refused(self, setup, monkeypatch):
        monkeypatch.setattr(setup, "OLDEST", (99, 0))
        with pytest.raises(SystemExit, match="Python 99.0 or newer is needed"):
            setup.main()
        assert setup.calls == []

    def test_python_without_ensurepip_is_refused(self, setup, monkeypatch):
        monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
        self.forbid_processes(setup, monkeypatch)
        with pytest.raises(SystemExit, match="python3-venv"):
            setup.make_venv(setup.ROOT / ".venv")

    def test_complete_interpreter_is_used_as_it_is(self, tmp_path, monkeypatch):
        module = load_tool("setup_env")
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "is_ready", lambda python: python == sys.executable)
        self.forbid_processes(module, monkeypatch)
        monkeypatch.setattr(module, "succeeds", lambda *command: False)  # there is no .venv
        assert module.set_up(here=False) == Path(sys.executable)

    def test_failed_step_stops_with_its_command(self, setup, monkeypatch):
        with pytest.raises(SystemExit, match="-c raise SystemExit"):
            setup.run(sys.executable, "-c", "raise SystemExit(3)")


class TestContinuousIntegration:
    """.ci/run with a stand-in for make that writes down its target."""

    @staticmethod
    def run(folder, failing=""):
        stand_in = folder / "make"
        stand_in.write_text(
            f'#!/bin/sh\nfor target; do :; done\necho "$target" >> "{folder}/targets"\n'
            f'[ "$target" != "{failing}" ] || exit 7\n'
        )
        stand_in.chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        script = str(ROOT / ".ci" / "run")
        done = subprocess.run([script], cwd=folder, env=environment, capture_output=True, text=True, check=False)
        return done, (folder / "targets").read_text().split()

    def test_all_steps_in_order(self, tmp_path):
        done, targets = self.run(tmp_path)
        assert done.returncode == 0, done.stderr
        assert targets == ["setup", "lint", "test", "demo-short"]
        assert "all passed" in done.stdout.splitlines()[-1]

    @pytest.mark.parametrize("failing", ["setup", "lint", "test", "demo-short"])
    def test_first_failure_stops_with_its_code(self, tmp_path, failing):
        done, targets = self.run(tmp_path, failing)
        assert done.returncode == 7
        assert targets[-1] == failing
        assert f"FAILED in: {failing.removesuffix('-short')} " in done.stdout
        assert "all passed" not in done.stdout
