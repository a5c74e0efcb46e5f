"""Class memories of a run: encoded from its supports, kept beside its result, and taken up where nothing has changed.

A detector that reads supports keeps one memory, its calibration another; each has its own pair of files in the run
folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from fsdet.data.catalog import load_supports, new_report
from fsdet.data.support import SupportSet
from fsdet.engine.setup import dataset_sources, dataset_specs, run_classes
from fsdet.modeling.base import RecallableMemory, SupportConditioned, condition_on_support
from fsdet.modeling.calibration import CalibratedDetector
from fsdet.modeling.class_memory import ClassMemory

logger = logging.getLogger(__name__)

MEMORY = "class_memory"  # files <OUTPUT_DIR>/class_memory.safetensors and .json; a detector's own: class_memory_KIND.*
_EVALUATIONS = ("", "calibrated")  # folders of a run in which an evaluation may have left one


@dataclass(frozen=True)
class _Reader:
    """A part of a detector that reads supports, and the name of its files."""

    part: RecallableMemory
    name: str

    def find(self, folder: str | Path) -> Path | None:
        """Common path of its two files in a run, or None when there are none."""
        paths = (Path(folder) / evaluation / self.name for evaluation in _EVALUATIONS)
        return next((path for path in paths if path.with_name(f"{self.name}.json").is_file()), None)

    def recall(self, path: Path) -> ClassMemory:
        """Read the two files. Raises: ValueError for a memory of another encoder."""
        try:
            return ClassMemory.load(path, encoder=self.part.memory_encoder, kind=self.part.memory_kind)
        except ValueError as error:
            raise ValueError(
                f"{path}.json is no class memory of this detector: {error}. Evaluate the run again, which writes it "
                "anew, or remove it"
            ) from error


def _readers(model: nn.Module) -> list[_Reader]:
    """The parts of a detector whose memory can be kept in files."""
    detector = getattr(model, "module", model)
    readers = []
    if isinstance(detector, CalibratedDetector):
        readers.append(_Reader(detector, MEMORY))
        detector = detector.detector
    if isinstance(detector, RecallableMemory):
        readers.append(_Reader(detector, f"{MEMORY}_{detector.memory_kind}"))
    return readers


def _all_recallable(model: nn.Module) -> bool:
    """Whether every part that reads supports keeps its memory in files."""
    detector = getattr(model, "module", model)
    inner = detector.detector if isinstance(detector, CalibratedDetector) else detector
    return isinstance(inner, RecallableMemory) or not isinstance(inner, SupportConditioned)


def read_supports(cfg: CfgNode) -> SupportSet:
    """The supports of a configuration, its K-shot records or class pictures, read without any registry.

    Raises: FileNotFoundError; ValueError.
    """
    spec, _ = dataset_specs(cfg)
    report = new_report(spec)
    report.quiet = True
    return SupportSet.from_records(load_supports(spec, dataset_sources(cfg), report), run_classes(cfg))


def encode_or_recall(
    model: nn.Module, build_support: Callable[[], SupportSet], folder: str | Path, class_names: Sequence[str] = ()
) -> None:
    """Give a detector its class memory before an evaluation.

    It is kept below `folder`, and only classes whose supports have changed since are encoded again. Where the support
    pictures are absent, the one kept there is taken.

    Args:
        model: any detector; one without memory is left alone.
        build_support: as for `condition_on_support`.
        folder: OUTPUT_DIR.
        class_names: in the order of the detections' class ids; a memory that was edited may have another one.
    Raises: FileNotFoundError when pictures and memory are absent; ValueError for a memory of another network, or
        without one of these classes.
    """
    readers = _readers(model)
    for reader in readers:
        _reuse(reader, folder)
    is_encoded = True
    try:
        if not condition_on_support(model, build_support):
            return
    except FileNotFoundError as error:
        paths = [reader.find(folder) for reader in readers]
        if not paths or None in paths or not _all_recallable(model):
            raise
        for reader, path in zip(readers, paths, strict=True):
            memory = reader.recall(path)
            if class_names and not isinstance(reader.part, CalibratedDetector):  # whose prototypes go by name
                memory = memory.select(class_names)
            reader.part.keep_class_memory(memory)
        logger.warning("Taken as kept: %s; the supports are not here (%s)", ", ".join(map(str, paths)), error)
        is_encoded = False
    # Nobody reads the former one any more. Every process comes by here, also one that lacks the supports.
    comm.synchronize()
    for reader in readers if is_encoded and comm.is_main_process() else ():
        reader.part.class_memory.save(Path(folder) / reader.name)


def _reuse(reader: _Reader, folder: str | Path) -> None:
    """Hand the memory of an earlier evaluation to a part without any; its encoding takes over what still holds."""
    path = Path(folder) / reader.name
    if reader.part.has_class_memory or not path.with_name(f"{reader.name}.json").is_file():
        return
    try:
        reader.part.keep_class_memory(reader.recall(path))
    except (ValueError, FileNotFoundError) as error:  # of another network, damaged, or half of it: encoded anew
        logger.info("The supports are encoded anew: %s", error)


def recall_or_encode(model: nn.Module, cfg: CfgNode, folder: str | Path) -> None:
    """Give a detector the class memory that an evaluation has kept, or encode the supports when there is none.

    Args:
        model: any detector; one without memory is left alone.
        cfg: its configuration, which says where the K-shot data lies.
        folder: of the run; its evaluation "calibrated" is looked into as well.
    Raises: ValueError for a memory of another network, or of other supports than those that the configuration reads
        now; FileNotFoundError when neither memory nor supports are there.
    """
    readers = _readers(model)
    paths = [reader.find(folder) for reader in readers]
    if readers and None not in paths and _all_recallable(model):
        for reader, path in zip(readers, paths, strict=True):
            memory = reader.recall(path)
            _refuse_stale(reader.part, cfg, memory, path)
            reader.part.keep_class_memory(memory)
        return
    try:
        condition_on_support(model, lambda: read_supports(cfg))
    except FileNotFoundError as error:
        files = " and ".join(f"{Path(folder) / reader.name}.json" for reader in readers) or "A class memory"
        without = ", or set TEST.CALIBRATION.ENABLED False" if cfg.TEST.CALIBRATION.ENABLED else ""
        raise FileNotFoundError(
            f"{files} not found, and the supports to make it from are absent: {error}. Evaluate the run where its data "
            f"is (tools/train_net.py --eval-only) and copy the .json and .safetensors files{without}"
        ) from error


def _refuse_stale(part: RecallableMemory, cfg: CfgNode, memory: ClassMemory, path: Path) -> None:
    """Raise ValueError when the K-shot data is here and is not what the memory was made of.

    Classes that were taken out of the memory, or came in later, are of no concern.
    """
    if cfg.FEWSHOT.CHOICE == "official":
        return  # draws other shots each time
    try:
        stale = [name for name in part.stale_classes(memory, read_supports(cfg)) if name in memory]
    except FileNotFoundError as error:
        logger.info("%s is taken as it is: the supports are not here (%s)", path, error)
        return
    if stale:
        raise ValueError(
            f"{path}.json was made of other pictures or boxes than the K-shot data now gives for {stale}. Evaluate the "
            "run again, which writes it anew, or point FEWSHOT.ROOT and FEWSHOT.SAMPLES to the data it was made of"
        )
