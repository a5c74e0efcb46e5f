"""The doctor's checks of the installation: packages, Detectron2, devices.

Nothing that may be broken is imported at the top; each check imports what it examines.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsdet
from fsdet.engine.doctor_finding import FAULT, GIB, NOTE, SETUP_REMEDY, Finding, describe

ROOT = Path(fsdet.__file__).resolve().parent.parent  # the checkout, where fsdet is installed in editable form
OLDEST_PYTHON = (3, 11)
SHARED_MEMORY_NOTE_GIB = 0.5  # loader workers pass batches through it; containers often have 64 MB
DETECTRON2_REMEDY = "run `make setup`; docs/getting-started.md describes the official git route"

# Import names that differ from the names of the distributions; OpenCV has several, any of which will do.
IMPORT_NAMES = {"opencv-python-headless": "cv2"}
OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")


def check_versions() -> Iterator[Finding]:
    """Python, fsdet with its commit, and every package that fsdet depends on: present, importable, new enough."""
    value = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("Versions", "python", value, FAULT, "fsdet needs Python 3.11 or newer: make PYTHON=... setup")
    else:
        yield Finding("Versions", "python", value)
    yield Finding("Versions", "fsdet", f"{fsdet.__version__}, commit {git_commit(ROOT)}")
    for requirement in declared_requirements():
        yield check_package(requirement)


def declared_requirements() -> list[str]:
    """The lines of fsdet's dependency list: from pyproject.toml in a checkout, else from the installed metadata."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text())["project"]["dependencies"]
    return [line for line in importlib.metadata.requires("fsdet") or [] if "extra ==" not in line]


def check_package(requirement: str) -> Finding:
    """Version of one dependency, and whether it can be imported and is one that fsdet accepts."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    name = wanted.name
    version = first_version(OPENCV if name in OPENCV else (name,))
    if version is None:
        return Finding("Versions", name, "not installed", FAULT, SETUP_REMEDY)
    try:
        importlib.import_module(IMPORT_NAMES.get(name, name))
    except Exception as error:  # a broken binary raises anything from ImportError to RuntimeError
        remedy = f"reinstall {name}: {SETUP_REMEDY}"
        return Finding("Versions", name, f"{version}, cannot be imported ({describe(error)})", FAULT, remedy)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding("Versions", name, f"{version}, expected {wanted.specifier}", FAULT, SETUP_REMEDY)
    return Finding("Versions", name, version)


def first_version(names: Sequence[str]) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def git_commit(folder: Path) -> str:
    """Short hash of the checkout's commit, with "+changes" for a changed tree; "unknown" without git."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+changes", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def check_detectron2() -> Iterator[Finding]:
    """Detectron2's version and flavour, and whether the parts that fsdet stands on work."""
    try:
        import detectron2
    except ImportError as error:
        yield Finding("Detectron2", "detectron2", describe(error), FAULT, DETECTRON2_REMEDY)
        return
    yield Finding("Detectron2", "detectron2", f"{first_version(['detectron2']) or detectron2.__version__}, {flavour()}")
    parts = (
        ("NMS (torchvision)", probe_nms, "torch and torchvision do not fit together; " + SETUP_REMEDY),
        ("ROIAlign", probe_roi_align, DETECTRON2_REMEDY),
        ("COCO evaluation", lambda: importlib.import_module("detectron2.evaluation").COCOEvaluator, DETECTRON2_REMEDY),
        ("model zoo", probe_model_zoo, "model_zoo needs setuptools < 81 (pkg_resources), or: " + DETECTRON2_REMEDY),
    )
    for name, probe, remedy in parts:
        try:
            probe()
        except Exception as error:  # as in check_package
            yield Finding("Detectron2", name, describe(error), FAULT, remedy)
        else:
            yield Finding("Detectron2", name, "works")


def flavour() -> str:
    """Whether this Detectron2 has compiled operators (rotated boxes, deformable convolution)."""
    try:
        operators = importlib.import_module("detectron2._C")
    except ImportError as error:
        return f"without compiled operators ({describe(error)})"
    if getattr(operators, "is_placeholder", False):
        return "pure-Python build without compiled operators"
    return "with compiled operators"


def probe_nms() -> None:
    """Suppress one of two equal boxes; raises where torchvision's operators do not fit torch."""
    import torch
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0]])
    kept = nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist()
    if kept != [1]:
        raise RuntimeError(f"kept boxes {kept} of two equal ones, expected [1]")


def probe_roi_align() -> None:
    """Pool a constant map with Detectron2's ROIAlign; the result must be that constant."""
    import torch
    from detectron2.layers import ROIAlign

    pooled = ROIAlign((2, 2), 1.0, 0)(torch.full((1, 1, 8, 8), 3.0), torch.tensor([[0.0, 1.0, 1.0, 6.0, 6.0]]))
    if not torch.allclose(pooled, torch.full((1, 1, 2, 2), 3.0)):
        raise RuntimeError(f"ROIAlign of a map of threes gave {pooled.flatten().tolist()}")


def probe_model_zoo() -> None:
    """Find one of Detectron2's own configuration files."""
    from detectron2 import model_zoo

    model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")


def check_device() -> Iterator[Finding]:
    """GPUs, processor cores, memory, and the shared memory that loader workers use."""
    yield from check_cuda()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("Device", "processor", f"{cores} core(s)")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = (page * os.sysconf(name) / GIB for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        yield Finding("Device", "memory", f"{total:.1f} GiB, {free:.1f} GiB of it unused")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free / GIB
        remedy = "loader workers may die: set DATALOADER.NUM_WORKERS 0, or give the container more (--shm-size)"
        small = size < SHARED_MEMORY_NOTE_GIB
        yield Finding("Device", "shared memory", f"{size:.1f} GiB free", *((NOTE, remedy) if small else ()))


def check_cuda() -> Iterator[Finding]:
    """Every CUDA device, with a small product computed on it."""
    import torch

    if not torch.cuda.is_available():
        why = "no GPU: runs use the CPU"
        if torch.version.cuda and shutil.which("nvidia-smi"):
            remedy = (
                f"this torch is built for CUDA {torch.version.cuda}; see whether nvidia-smi shows a new enough driver"
            )
            yield Finding("Device", "CUDA", why, NOTE, remedy)
        else:
            yield Finding("Device", "CUDA", why)
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        value = f"{facts.name}, {facts.total_memory / GIB:.1f} GiB, CUDA {torch.version.cuda}"
        try:
            torch.ones(2, 2, device=f"cuda:{index}").mm(torch.ones(2, 2, device=f"cuda:{index}")).sum().item()
        except RuntimeError as error:
            remedy = "this torch does not serve the GPU: install one for its CUDA version, or set MODEL.DEVICE cpu"
            yield Finding("Device", f"CUDA {index}", f"{value}: {describe(error)}", FAULT, remedy)
        else:
            yield Finding("Device", f"CUDA {index}", value)
