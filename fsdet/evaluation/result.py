"""The record of one run, `result.json`: metrics, the protocol they belong to, and what is needed to trust them.

A number without its protocol cannot be compared, so both travel in one file; `report.py` groups files by protocol and
never averages over two of them. Metrics that have no value (a class without objects) are null in the file, nan here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import re
import resource
import subprocess
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
import torchvision

import fsdet
from fsdet.data.files import save_text_atomic

SCHEMA_VERSION = 1

_PROC_STATUS = Path("/proc/self/status")

# Config keys that say where, on what and with which draw a run was made, not which recipe it followed. Runs of one
# recipe with other seeds share a digest only without them.
RUN_KEYS = (
    "OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "DATASETS", "CUDNN_BENCHMARK", "DATALOADER.NUM_WORKERS",
    "MODEL.DEVICE", "MODEL.WEIGHTS", "SOLVER.CHECKPOINT_PERIOD", "FEWSHOT.SEED", "FEWSHOT.REPEAT", "FEWSHOT.ROOT",
    "FEWSHOT.SAMPLES", "FEWSHOT.TRAIN_JSON", "FEWSHOT.TRAIN_IMAGES", "FEWSHOT.TEST_JSON", "FEWSHOT.TEST_IMAGES",
    "FEWSHOT.CLASS_IMAGES", "TEST.CALIBRATION.WEIGHTS",
)  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """What a number stands for. Results are averaged only where all fields but the last three agree.

    Attributes:
        benchmark: "voc", "coco" or the name of an own data set.
        test_set: label of the evaluated set; distinguishes a subset from the official one.
        test_images: number of images evaluated.
        split: class split (VOC: 1-3).
        setting: "gfsod" (base and novel classes at test) or "fsod" (novel only).
        stage: "base" or "novel".
        method: name of the method.
        shot: K; 0 in the base stage.
        evaluation: style, e.g. "coco", "voc-11point", "voc-area".
        backbone: e.g. "R50-FPN".
        pretraining: where the backbone's weights come from.
        sampling: how the K-shot lists were drawn: "legacy", "strict", "unrecorded" (lists without a
            manifest, as the official ones), or "none".
        choice: which K of a longer list are taken: "seeded" or "official".
        records: K-shot record, "instance" or "image".
        leak: unlabelled novel objects in base images: "background", "drop" or "ignore".
        difficult: VOC training keeps difficult objects.
        tta: test-time augmentation.
        calibration: scores rescored at test time, e.g. "pcb resnet101:5d3b4d8f 0.5" (network, sha256 of its file,
            weight of the detector's score); "" for none.
        proposals: regions per image that the ROI heads score at test time; 0 where that was not recorded, and for a
            detector without regions.
        base_model: label of the base-stage model that all seeds start from; "" for none. Two base models can differ by
            five points of novel AP50 (TFA's tracker), which no average over K-shot seeds shows.
        seed: draw of the K-shot lists.
        repeat: counts independent repetitions of one seed, from 0 (DeFRCN repeats seed 0 ten times).
        samples_digest: sha256 over the K-shot files used; None in the base stage.
    """

    benchmark: str
    test_set: str
    test_images: int
    split: int
    setting: str
    stage: str
    method: str
    shot: int
    evaluation: str
    backbone: str
    pretraining: str
    sampling: str = "none"
    choice: str = "seeded"
    records: str = "instance"
    leak: str = "background"
    difficult: bool = True
    tta: bool = False
    calibration: str = ""
    proposals: int = 0
    base_model: str = ""
    seed: int = 0
    repeat: int = 0
    samples_digest: str | None = None

    def group(self) -> tuple[tuple[str, Any], ...]:
        """All fields that runs must share to be averaged."""
        return tuple((k, v) for k, v in asdict(self).items() if k not in ("seed", "repeat", "samples_digest"))


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes:
        protocol: what the metrics stand for.
        classes: names of the evaluated "base" and "novel" classes.
        metrics: over all, base (b) and novel (n) classes, in percent: "AP50", "bAP50", "nAP50", ...
        per_class: class name -> {"AP", "AP50", "AP75"} in percent.
        config_digest: sha256 from `config_digest`.
        versions: from `collect_versions`.
        seconds: wall time of "train" and "eval".
        peak_memory_mib: from `peak_memory_mib`: "rss" and, on a GPU, "cuda".
        train_images: size of the training set.
        iterations: optimizer steps done.
        images_per_step: images behind one optimizer step, over all processes and accumulations.
        git_commit: commit of the checkout, with "+changes" when files differ from it; None outside a checkout.
        notes: free text by topic, e.g. a diagnosis.
    """

    protocol: Protocol
    classes: dict[str, tuple[str, ...]]
    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    config_digest: str
    versions: dict[str, str]
    seconds: dict[str, float]
    peak_memory_mib: dict[str, float]
    train_images: int
    iterations: int
    images_per_step: int
    git_commit: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION


def write_result(path: str | Path, result: RunResult) -> None:
    """Write a result as JSON, all at once or not at all; folders are made.

    Raises: ValueError where the result does not follow the schema (nothing is written).
    """
    path = Path(path)
    data = _plain(asdict(result))
    _build(path, RunResult, data)  # a wrong type is found by the writer, not by the report months later
    save_text_atomic(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n", path)


def read_result(path: str | Path) -> RunResult:
    """Read a result and check every key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, another schema version, or a missing, unknown or wrongly typed key; names file and key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no result file; a finished run writes one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a result file, {error}") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise ValueError(f'{path}: key "schema" is missing; is this a result of fsdet?')
    if data["schema"] != SCHEMA_VERSION:
        raise ValueError(
            f'{path}: key "schema" is {data["schema"]!r}, this version of fsdet reads {SCHEMA_VERSION}; '
            "evaluate the run again or use the version that wrote it"
        )
    return _build(path, RunResult, data)


def split_metrics(flat: Mapping[str, float]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Part an evaluator's flat dict into `RunResult.metrics` and `RunResult.per_class`."""
    metrics, per_class = {}, {}
    for key, value in flat.items():
        single = re.match(r"(AP\d*[sml]?)-(.+)", key)
        if single:
            per_class.setdefault(single[2], {})[single[1]] = float(value)
        else:
            metrics[key] = float(value)
    return metrics, per_class


def config_digest(config: Mapping[str, Any], without: Sequence[str] = RUN_KEYS) -> str:
    """sha256 over a config's keys and values (order does not matter), leaving out keys and their sub-keys."""
    flat = {
        key: value
        for key, value in _flatten(config)
        if not any(key == name or key.startswith(name + ".") for name in without)
    }
    return hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()


def collect_versions(device: str = "cpu") -> dict[str, str]:
    """Versions of everything that can move a number, and the name of the device computed on."""
    versions = {
        "fsdet": fsdet.__version__,
        "detectron2": detectron2.__version__,
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device_name(device),
    }
    for package in ("pycocotools", "hotcoco", "timm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.startswith("cuda") and torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def peak_memory_mib() -> dict[str, float]:
    """Peak memory since `reset_peak_memory`, in MiB: "rss" and, where CUDA was used, "cuda" (largest device)."""
    high_water = re.search(r"VmHWM:\s*(\d+) kB", _PROC_STATUS.read_text()) if _PROC_STATUS.is_file() else None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB on Linux
    rss = int(high_water[1]) * 1024 if high_water else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    memory = {"rss": rss / 2**20}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["cuda"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20
    return memory


def reset_peak_memory() -> None:
    """Start to count peak memory anew, for several runs in one process; where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def git_commit() -> str | None:
    """Commit of the checkout that this package lies in; None when installed elsewhere or without git."""
    package = Path(fsdet.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None  # site-packages of an environment that lies inside somebody's checkout
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _device_name(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in config.items():
        pairs.extend(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)])
    return pairs


def _plain(value: Any) -> Any:
    """JSON-ready copy: NumPy scalars become numbers, tuples lists, and numbers that are not finite null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _build(path: Path, cls: type, data: Any, where: str = "") -> Any:
    """Make a dataclass from JSON, with errors that name file and key."""
    if not isinstance(data, dict):
        raise ValueError(f'{path}: key "{where[:-1]}" must be an object, got {data!r}')
    known = {item.name: item for item in fields(cls)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f'{path}: unknown key "{where}{unknown[0]}"; known are {sorted(known)}')
    hints = typing.get_type_hints(cls)
    values = {}
    for name, item in known.items():
        if name in data:
            values[name] = _convert(path, f"{where}{name}", data[name], hints[name])
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f'{path}: key "{where}{name}" is missing')
    return cls(**values)


def _convert(path: Path, key: str, value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Protocol:
        return _build(path, Protocol, value, key + ".")
    if origin is types.UnionType:
        return None if value is None else _convert(path, key, value, arguments[0])
    if origin is dict and isinstance(value, dict):
        return {name: _convert(path, f"{key}.{name}", item, arguments[1]) for name, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(path, f"{key}[{i}]", item, arguments[0]) for i, item in enumerate(value))
    if hint is float and value is None:
        return math.nan
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ValueError(f'{path}: key "{key}" must be {getattr(hint, "__name__", hint)}, got {value!r}')
