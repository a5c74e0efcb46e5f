"""The page about machine, installation and data: what it finds, and what makes it say that a run would fail."""

import importlib
import importlib.metadata
import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fsdet.data import coco
from fsdet.data.spec import DatasetSources
from fsdet.engine import doctor
from fsdet.engine import doctor_data as data
from fsdet.engine import doctor_installation as installation
from fsdet.engine.doctor import examine, guarded, has_faults, render
from fsdet.engine.doctor_finding import FAULT, NOTE, OK, Finding

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CALIBRATED = ["FEWSHOT.STAGE", "novel", "FEWSHOT.SHOT", "1", "TEST.CALIBRATION.ENABLED", "True"]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder, without data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def by_name(findings):
    return {finding.name: finding for finding in findings}


def faults(findings):
    return {finding.name: finding for finding in findings if finding.level == FAULT}


def test_healthy_installation_without_data_has_notes_and_no_fault(place):
    findings = examine()
    assert not has_faults(findings), faults(findings)
    found = by_name(findings)
    assert found["torch"].value == importlib.metadata.version("torch")
    assert found["NMS (torchvision)"].value == "works"
    assert found["VOC 2007"].level == NOTE
    assert found["R-101.pkl"].level == NOTE
    assert found["processor"].value.endswith("core(s)")
    sections = list(dict.fromkeys(finding.section for finding in findings))
    assert sections == ["Versions", "Detectron2", "Device", "Data sets", "Weights", "Disk"]
    assert list(place.iterdir()) == [], "the doctor leaves nothing behind"


def test_every_declared_dependency_is_examined():
    names = [installation.check_package(requirement).name for requirement in installation.declared_requirements()]
    assert {"torch", "torchvision", "pycocotools", "hotcoco", "timm", "safetensors", "numpy"} <= set(names)


def test_detectron2_flavour(monkeypatch):
    placeholder = type("Operators", (), {"is_placeholder": True})
    monkeypatch.setattr(installation.importlib, "import_module", lambda name: placeholder)
    assert installation.flavour() == "pure-Python build without compiled operators"
    monkeypatch.setattr(installation.importlib, "import_module", lambda name: object())
    assert installation.flavour() == "with compiled operators"

    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(installation.importlib, "import_module", broken)
    assert "undefined symbol" in installation.flavour()


class TestFaults:
    """Each makes a run fail, so each is a fault with a remedy."""

    def test_package_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(installation, "first_version", lambda names: None)
        finding = installation.check_package("hotcoco>=1.3")
        assert (finding.level, finding.value) == (FAULT, "not installed")
        assert "make setup" in finding.remedy

    def test_package_that_is_too_old(self, monkeypatch):
        monkeypatch.setattr(installation, "first_version", lambda names: "1.2.9")
        finding = installation.check_package("hotcoco>=1.3")
        assert (finding.level, finding.value) == (FAULT, "1.2.9, expected >=1.3")

    def test_package_that_cannot_be_imported(self, monkeypatch):
        real = importlib.import_module

        def broken(name):
            if name == "cv2":
                raise ImportError("libGL.so.1: cannot open shared object file\nmore")
            return real(name)

        monkeypatch.setattr(installation.importlib, "import_module", broken)
        finding = installation.check_package("opencv-python-headless>=4.8")
        assert finding.level == FAULT
        assert "libGL.so.1" in finding.value
        assert "reinstall opencv-python-headless" in finding.remedy

    def test_torchvision_that_does_not_fit_torch(self, monkeypatch):
        def missing(*args):
            raise RuntimeError("operator torchvision::nms does not exist")

        monkeypatch.setattr("torchvision.ops.nms", missing)
        found = faults(installation.check_detectron2())
        assert list(found) == ["NMS (torchvision)"]
        assert "do not fit together" in found["NMS (torchvision)"].remedy

    def test_nms_that_computes_nonsense(self, monkeypatch):
        monkeypatch.setattr("torchvision.ops.nms", lambda *args: torch.tensor([0, 1]))
        assert "kept boxes [0, 1]" in faults(installation.check_detectron2())["NMS (torchvision)"].value

    def test_roi_align_that_computes_nonsense(self, monkeypatch):
        monkeypatch.setattr("detectron2.layers.ROIAlign.forward", lambda self, x, rois: x[:, :, :2, :2] + 1)
        assert list(faults(installation.check_detectron2())) == ["ROIAlign"]

    def test_broken_model_zoo(self, monkeypatch):
        def missing(path):
            raise ModuleNotFoundError("No module named 'pkg_resources'")

        monkeypatch.setattr("detectron2.model_zoo.get_config_file", missing)
        found = faults(installation.check_detectron2())
        assert list(found) == ["model zoo"]
        assert "setuptools" in found["model zoo"].remedy

    def test_gpu_that_this_torch_does_not_serve(self, monkeypatch):
        facts = type("Facts", (), {"name": "New GPU", "total_memory": 8 * 2**30})

        def refused(*args, **kwargs):
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
        monkeypatch.setattr(torch, "ones", refused)
        finding = faults(installation.check_device())["CUDA 0"]
        assert finding.value.startswith("New GPU, 8.0 GiB")
        assert "no kernel image" in finding.value
        assert "MODEL.DEVICE cpu" in finding.remedy

    @pytest.mark.parametrize(("gib", "level"), [(0.5, FAULT), (5, NOTE), (500, OK)])
    def test_disk(self, place, monkeypatch, gib, level):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(gib * 2**30)))
        finding = by_name(data.check_disk(Path("output")))["free space"]
        assert (finding.value, finding.level) == (f"{gib:.1f} GiB", level)

    def test_output_that_cannot_be_written(self, place, monkeypatch):
        def refused(dir):
            raise PermissionError(f"[Errno 13] Permission denied: {dir}")

        monkeypatch.setattr(tempfile, "TemporaryFile", refused)
        finding = by_name(data.check_disk(Path("output/run")))["output/run/"]
        assert finding.level == FAULT
        assert "OUTPUT_DIR" in finding.remedy

    def test_check_that_breaks_does_not_hide_the_others(self, place, monkeypatch):
        def broken():
            yield Finding("Device", "first", "fine")
            raise OSError("no /proc here")

        monkeypatch.setattr(doctor, "check_device", broken)
        findings = examine()
        assert faults(findings)["check stopped"].value == "OSError: no /proc here"
        assert by_name(findings)["first"].level == OK
        assert findings[-1].section == "Disk"

    def test_small_shared_memory_is_a_note(self, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 64 * 2**20))
        found = by_name(installation.check_device())
        if "shared memory" not in found:
            pytest.skip("this system has no /dev/shm")
        assert found["shared memory"].level == NOTE
        assert "NUM_WORKERS" in found["shared memory"].remedy


def test_data_that_is_there_is_found(place, monkeypatch):
    root = place / "data"
    for name in ("VOC2007/Annotations", "vocsplit/seed0", "vocsplit/seed1", "coco/val2017", "voc_small"):
        (root / name).mkdir(parents=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    found = by_name(data.check_data())
    assert found["folder"].value.endswith("data (from DETECTRON2_DATASETS)")
    assert found["VOC K-shot lists"].value == "vocsplit, 2 seed(s)"
    assert found["COCO test images"].value == "coco/val2017"
    levels = {name: finding.level for name, finding in found.items()}
    assert [name for name, level in levels.items() if level == NOTE] == [
        "VOC 2012", "COCO training list", "COCO test list", "COCO training images", "COCO K-shot lists",
    ]  # fmt: skip
    assert "VOC2012/Annotations" in found["VOC 2012"].value
    assert "prepare_coco.py" in found["COCO K-shot lists"].remedy


def test_places_are_those_of_the_loader():
    places = {name: places for name, places, _ in data.DATASETS}
    assert places["COCO training list"] == coco.LAYOUT["train"]
    assert places["COCO test list"] == coco.LAYOUT["test"]
    sources = DatasetSources(root=Path("x"))
    assert {folder for folder, _ in sources.voc_train} == {"VOC2007", "VOC2012"}
    assert sources.samples_of("voc").name == "vocsplit"
    assert sources.samples_of("coco").name == "cocosplit"


def test_weights_that_are_there_are_found(place):
    (place / "weights").mkdir()
    (place / "weights" / "mine.safetensors").write_bytes(bytes(3 * 2**20))
    (place / "weights" / "R-50.pkl").touch()
    found = by_name(data.check_weights())
    assert found["mine.safetensors"].value == "weights/mine.safetensors, 3 MiB"
    assert (found["R-50.pkl"].level, found["R-50.pkl"].value) == (OK, "weights/R-50.pkl")
    assert found["R-101.pkl"].level == NOTE
    assert "detectron2://ImageNetPretrained/MSRA/R-101.pkl" in found["R-101.pkl"].remedy
    cached = place / "cache/detectron2/ImageNetPretrained/MSRA/R-101.pkl"
    cached.parent.mkdir(parents=True)
    cached.touch()
    found = by_name(data.check_weights())
    assert found["R-101.pkl"].level == OK
    assert "copy it to weights/" in found["R-101.pkl"].value
    (place / "weights" / "resnet101-5d3b4d8f.pth").touch()
    found = by_name(data.check_weights())
    assert found["resnet101-5d3b4d8f.pth"] == Finding(
        "Weights", "resnet101-5d3b4d8f.pth", "weights/resnet101-5d3b4d8f.pth, 0 MiB"
    )


def test_every_weight_file_of_the_shipped_configurations_is_known(place):
    """What is missing is a note that names its users and the remedy, never a fault."""
    configs = "\n".join(path.read_text() for path in CONFIGS.rglob("*.yaml"))
    named = set(re.findall(r'"weights/([^"]+)"', configs))
    found = by_name(data.check_weights())
    assert set(found) == named and "r50_msra_d2_fp16.safetensors" in named
    for name, finding in found.items():
        assert finding.level == NOTE and f"expected as weights/{name}" in finding.value and finding.remedy
    assert "detectron2://ImageNetPretrained/MSRA/R-50.pkl" in found["r50_msra_d2_fp16.safetensors"].remedy
    assert "https://download.pytorch.org/models/resnet50-19c8e357.pth" in found["resnet50-19c8e357.pth"].remedy


def test_cache_is_where_detectron2_looks(place):
    from iopath.common.file_io import get_cache_dir

    address = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert data.download_cache(address).is_relative_to(get_cache_dir())


class TestConfiguration:
    """With a configuration, what it lacks is a fault."""

    def test_complete(self, place, write_config):
        findings = list(data.check_config(write_config(), ["SOLVER.MAX_ITER", "8"]))
        assert faults(findings) == {}
        found = by_name(findings)
        assert found["file"].value.endswith("config.yaml SOLVER.MAX_ITER 8")
        assert found["train data"].value == "custom_train_base, complete"
        assert found["test data"].value == "custom_test_base, complete"
        assert found["weights"].value == "none: the run starts at random"

    @pytest.mark.parametrize(
        ("opts", "name", "words"),
        [
            (["FEWSHOT.TEST_JSON", "nowhere.json"], "test data", "nowhere.json"),
            (["FEWSHOT.STAGE", "novel", "FEWSHOT.SHOT", "9"], "train data", "full_box_9shot_red_trainval.json"),
            (["MODEL.WEIGHTS", "nowhere.pth"], "weights", "nowhere.pth"),
            ([*CALIBRATED, "TEST.CALIBRATION.WEIGHTS", "nowhere.pth"], "calibration", "nowhere.pth"),
            (["SOLVER.MAX_ITR", "8"], "file", "SOLVER.MAX_ITR"),
            (["SOLVER.MAX_ITER", "-1"], "file", "must be positive"),
        ],
    )
    def test_what_is_lacking(self, place, write_config, opts, name, words):
        found = faults(data.check_config(write_config(), opts))
        assert words in found[name].value

    def test_examined_last_and_after_the_rest(self, place, write_config):
        findings = examine(write_config(), ["MODEL.WEIGHTS", "nowhere.pth"])
        assert has_faults(findings)
        assert findings[-1].section == "Configuration"
        assert {f.section for f in findings} >= {"Versions", "Disk"}


def test_home_folder_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(data.shown(tmp_path / "data" / "VOC2007")) == "~/data/VOC2007"


def test_page():
    findings = [
        Finding("Versions", "torch", "2.11.0"),
        Finding("Disk", "free space", "0.1 GiB", FAULT, "free some"),
        Finding("Disk", "output/", "can be written"),
    ]
    assert render(findings).splitlines() == [
        "fsdet doctor",
        "",
        "Versions",
        "  torch       2.11.0",
        "",
        "Disk",
        "  free space  0.1 GiB   [fault]",
        "              -> free some",
        "  output/     can be written",
        "",
        "1 fault(s), 0 note(s): a run would fail",
    ]
    assert has_faults(findings)
    assert render(findings[:1]).endswith("0 fault(s), 0 note(s): ready to run\n")


def test_guarded_keeps_what_was_found_before_the_exception():
    def broken():
        yield Finding("Weights", "a", "fine")
        raise KeyError("b")

    assert [f.level for f in guarded("Weights", broken)] == [OK, FAULT]
