"""The doctor's checks of what a run reads and writes: data sets, weights, disk, and the needs of one configuration."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from fsdet.engine.doctor_finding import FAULT, GIB, NOTE, OK, Finding, describe, one_line

# Free disk below the first figure stops a run (a checkpoint of R-101 with its optimizer state is 0.5 GB, written whole
# before it replaces the old one); below the second one the page says so.
DISK_FAULT_GIB, DISK_NOTE_GIB = 1.0, 10.0

# What is looked for below the data folder: label, paths of which one must be there, remedy.
DATASETS = (
    ("VOC 2007", ("VOC2007/Annotations",), "unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar"),
    ("VOC 2012", ("VOC2012/Annotations",), "unpack VOCtrainval_11-May-2012.tar"),
    ("VOC K-shot lists", ("vocsplit",), "datasets/prepare_voc.py draws them, or take the official ones"),
    ("VOC, small set", ("voc_small",), "datasets/prepare_voc_small.py makes it from VOC 2007"),
    (
        "COCO training list",
        ("cocosplit/datasplit/trainvalno5k.json", "coco/annotations/instances_train2017.json"),
        "take TFA's datasplit, or unpack the 2017 annotations",
    ),
    (
        "COCO test list",
        ("cocosplit/datasplit/5k.json", "coco/annotations/instances_val2017.json"),
        "take TFA's datasplit, or unpack the 2017 annotations",
    ),
    ("COCO training images", ("coco/trainval2014", "coco/train2014", "coco/train2017"), "unpack the images"),
    ("COCO test images", ("coco/val2014", "coco/trainval2014", "coco/val2017"), "unpack the images"),
    ("COCO K-shot lists", ("cocosplit",), "datasets/prepare_coco.py draws them, or take the official ones"),
)
# ImageNet backbones that the shipped configurations start from: file in weights/ -> Detectron2's name of it.
BACKBONES = {name: f"detectron2://ImageNetPretrained/MSRA/{name}" for name in ("R-50.pkl", "R-101.pkl")}
_TORCHVISION = "put https://download.pytorch.org/models/{} there"
# The other weight files that shipped configurations name: file in weights/, what uses it, remedy.
WEIGHTS = (
    (
        "r50_msra_d2_fp16.safetensors",
        "the small recipes (--model r50_fpn_small, r50_c4_small)",
        f"it is not shipped; set MODEL.WEIGHTS {BACKBONES['R-50.pkl']}, and where it calibrates "
        "TEST.CALIBRATION.NETWORK resnet101 with the file below, or TEST.CALIBRATION.ENABLED False",
    ),
    (
        "resnet101-5d3b4d8f.pth",
        "calibration (configs/defrcn/*_novel), OS2D V1",
        f"{_TORCHVISION.format('resnet101-5d3b4d8f.pth')}; DeFRCN also runs with TEST.CALIBRATION.ENABLED False",
    ),
    ("resnet50-19c8e357.pth", "OS2D V2", _TORCHVISION.format("resnet50-19c8e357.pth")),
)
WEIGHT_SUFFIXES = (".pkl", ".pth", ".safetensors")


def data_folder() -> Path:
    """The folder that holds the data sets: $DETECTRON2_DATASETS, else ./datasets."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def check_data() -> Iterator[Finding]:
    """Which of the known data sets are there. What is missing is a note, since no run needs them all."""
    folder = data_folder()
    source = "DETECTRON2_DATASETS" if "DETECTRON2_DATASETS" in os.environ else "./datasets"
    if folder.is_dir():
        yield Finding("Data sets", "folder", f"{shown(folder)} (from {source})")
    else:
        remedy = "create it, or let DETECTRON2_DATASETS name another one; `make demo` needs none"
        yield Finding("Data sets", "folder", f"{shown(folder)} (from {source}) does not exist", NOTE, remedy)
    for name, places, remedy in DATASETS:
        found = next((place for place in places if (folder / place).exists()), None)
        if found is None:
            value = "missing, expected there as " + " or ".join(places)
            yield Finding("Data sets", name, value, NOTE, f"{remedy} (datasets/README.md)")
        else:
            seeds = len(list((folder / found).glob("seed*")))  # K-shot lists lie in seed0, seed1, ...
            yield Finding("Data sets", name, found + (f", {seeds} seed(s)" if seeds else ""))


def check_weights() -> Iterator[Finding]:
    """Weights that are at hand: the folder weights/, and the cache of Detectron2's downloads.

    What shipped configurations name and is missing is a note, since no run needs them all.
    """
    folder = Path("weights")
    others = [p for p in folder.glob("*") if p.suffix in WEIGHT_SUFFIXES and p.name not in BACKBONES]
    for path in sorted(others):
        yield Finding("Weights", path.name, f"{path}, {path.stat().st_size / 2**20:.0f} MiB")
    for name, address in BACKBONES.items():
        cached = download_cache(address)
        if (folder / name).is_file():
            yield Finding("Weights", name, f"{folder / name}")
        elif cached.is_file():
            yield Finding("Weights", name, f"{shown(cached)}: copy it to {folder}/, or set MODEL.WEIGHTS {address}")
        else:
            remedy = f"put it there, or set MODEL.WEIGHTS {address}, which the first run downloads"
            yield Finding("Weights", name, f"missing, expected as {folder / name}", NOTE, remedy)
    for name, users, remedy in WEIGHTS:
        if not (folder / name).is_file():
            value = f"missing, expected as {folder / name} by {users}"
            yield Finding("Weights", name, value, NOTE, f"{remedy} (docs/datasets.md, Weights)")


def download_cache(address: str) -> Path:
    """Where Detectron2 keeps the file behind a detectron2:// address after downloading it."""
    cache = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    return cache / "detectron2" / address.removeprefix("detectron2://")


def shown(path: Path) -> Path:
    """The absolute path, with the home folder as "~", so that a pasted page does not tell the user's name."""
    path = path.absolute()
    home = Path("~").expanduser()
    return Path("~") / path.relative_to(home) if path.is_relative_to(home) and path != home else path


def check_disk(output: Path) -> Iterator[Finding]:
    """Free space and write access of the folder that receives a run's files; nothing is left behind there."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        remedy = "give yourself write access there, or set OUTPUT_DIR to another folder"
        yield Finding("Disk", f"{output}/", f"cannot be written: {describe(error)}", FAULT, remedy)
    else:
        yield Finding("Disk", f"{output}/", "can be written")
    free = shutil.disk_usage(place).free / GIB
    remedy = "a run needs room for checkpoints: free some, or set OUTPUT_DIR to another disk"
    level = FAULT if free < DISK_FAULT_GIB else NOTE if free < DISK_NOTE_GIB else OK
    yield Finding("Disk", "free space", f"{free:.1f} GiB", level, "" if level == OK else remedy)


def check_config(config_file: str, opts: list[str]) -> Iterator[Finding]:
    """What one configuration needs: its data sets, K-shot lists, weights, device and output folder."""
    from fsdet.data.catalog import check_sources
    from fsdet.engine.calibrated import check_calibration, is_calibrated
    from fsdet.engine.preflight import check_weights
    from fsdet.engine.setup import dataset_sources, dataset_specs, load_config

    section = "Configuration"
    try:
        cfg = load_config(config_file, opts)
    except (OSError, ValueError) as error:
        yield Finding(section, "file", one_line(error), FAULT, "mend the file or the KEY VALUE pairs")
        return
    yield Finding(section, "file", " ".join([config_file, *opts]))
    sources = dataset_sources(cfg)
    needs = [
        (f"{spec.part} data", f"{spec.name}, complete", partial(check_sources, spec, sources))
        for spec in dataset_specs(cfg)
    ]
    needs.append(("weights", str(cfg.MODEL.WEIGHTS) or "none: the run starts at random", partial(check_weights, cfg)))
    if is_calibrated(cfg):
        needs.append(("calibration", str(cfg.TEST.CALIBRATION.WEIGHTS), partial(check_calibration, cfg)))
    for name, value, check in needs:
        try:
            check()
        except (OSError, ValueError) as error:
            yield Finding(section, name, one_line(error), FAULT)
        else:
            yield Finding(section, name, value)
    device = str(cfg.MODEL.DEVICE)
    if device.startswith("cuda") and not importlib.import_module("torch").cuda.is_available():
        yield Finding(section, "device", f"{device}, but no GPU is seen: the run falls back to the CPU", NOTE)
    else:
        yield Finding(section, "device", device)
    for finding in check_disk(Path(cfg.OUTPUT_DIR)):
        yield replace(finding, section=section)
