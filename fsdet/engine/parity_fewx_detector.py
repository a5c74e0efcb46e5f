"""Golden detector of FewX: a narrow ResNet-50 C4 with the released names, and the tolerances of its golden files.

The model is the one that training builds from configs/fewx, made narrower; the weights reach it through the rename
table that loads released checkpoints. The other `parity_fewx_*` modules compare what it computes.

Source: FewX (Fan et al., CVPR 2020), official release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from fsdet.checkpoint.rename import TABLES, rename
from fsdet.engine.parity import Comparison, Ledger, failure, golden_file, read_npz
from fsdet.engine.setup import load_config
from fsdet.engine.trainer import build_detector
from fsdet.methods.fewx import filtering, folded

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "fewx"
# Base training, and fine-tuning on the release's ten shots.
STAGES = {
    "base": ("coco_base.yaml", ()),
    "finetune": ("coco_novel.yaml", ("FEWSHOT.SETTING", "fsod", "FEWSHOT.SHOT", "10")),
}
# (stem, res2 output, width per group) of the golden model, for files that go without its weights.
WIDTHS = (8, 16, 4)

# Accepted differences of the README: relative to the largest magnitude of the file's array, except boxes and scores.
FEATURES, LOSSES, GRADIENTS = 1e-4, 1e-4, 1e-3
PIXELS, SCORES = 0.02, 1e-4


def network(widths: tuple[int, int, int] = WIDTHS) -> list[str]:
    """Overrides that make a detector as narrow as the golden one, without weights and on the CPU."""
    keys = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP")
    words = [word for key, width in zip(keys, widths, strict=True) for word in (f"MODEL.RESNETS.{key}", str(width))]
    return [*words, "MODEL.RESNETS.DEPTH", "50", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]


def build_small(stage: str, *opts: str, widths: tuple[int, int, int] = WIDTHS) -> tuple[nn.Module, CfgNode]:
    """The narrow detector of a stage as training builds it, and its configuration."""
    file, words = STAGES[stage]
    cfg = load_config(str(CONFIGS / file), [*words, *network(widths), *opts])
    return build_detector(cfg), cfg


class GoldenDetector:
    """Weights of the set, and the detector that has them."""

    def __init__(self, folder: Path) -> None:
        self.weights = read_npz(golden_file(folder, "tiny_weights"))

    def load(self, stage: str, *opts: str) -> tuple[nn.Module, CfgNode]:
        """Detector of a stage with the weights of the set.

        Raises: ValueError when a tensor of either side finds no partner.
        """
        first = "backbone.res2.0"
        stem, out, group = ("backbone.stem.conv1.weight", f"{first}.conv3.weight", f"{first}.conv1.weight")
        widths = tuple(len(self.weights[name]) for name in (stem, out, group))
        model, cfg = build_small(stage, *opts, widths=widths)
        renamed, report = rename(self.weights, TABLES["fewx"], model.state_dict())
        if not report.is_full:
            raise ValueError(f"the released weights do not fit: {report.describe()}")
        model.load_state_dict(renamed)
        return model, cfg


def check_weights(folder: Path) -> Iterator[Comparison]:
    """tiny_weights: every tensor arrives in the model under its released name; pixel statistics are as configured."""
    golden = GoldenDetector(folder)
    model, _ = golden.load("base")
    loaded = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    loaded |= {name: getattr(model, name).numpy() for name in ("pixel_mean", "pixel_std")}
    ledger = Ledger(golden.weights, expected=loaded)
    for name, value in loaded.items():
        yield ledger.compare(name, value, 0.0)
    yield from ledger.rest()


class ScaledLedger(Ledger):
    """Ledger with the tolerances of these files.

    A `label` marks a further comparison, of another way to the same array: reported, never a failure, since rounding
    may decide between neighbours in a ranking there.
    """

    def scaled(self, name: str, got: Any, tolerance: float = FEATURES, label: str = "") -> Comparison:
        """Compare with `tolerance` x the largest magnitude of the file's array; a zero array with `tolerance`."""
        largest = float(np.abs(self.values[name]).max(initial=0.0)) if name in self.values else 0.0
        return self.within(name, got, tolerance * (largest or 1.0), label)

    def within(self, name: str, got: Any, allowed: float, label: str = "") -> Comparison:
        """Compare with an absolute difference, e.g. in pixels."""
        if name not in self.values:
            return failure(name + label, "missing in the file")
        row = close(name + label, self.values[name], got, allowed)
        return replace(row, optional=True) if label else self.custom(row)

    def ranked(self, boxes: tuple[str, Any], logits: tuple[str, Any], label: str = "") -> Iterator[Comparison]:
        """Compare boxes (R, 4), best first, and their logits; rows whose logits nearly tie may change places."""
        (box_name, got_boxes), (logit_name, got_logits) = boxes, logits
        order = matching_order(self.values.get(box_name), np.asarray(got_boxes))
        yield self.within(box_name, np.asarray(got_boxes)[order], PIXELS, label)
        yield self.scaled(logit_name, np.asarray(got_logits)[order], label=label)


def matching_order(expected: np.ndarray | None, got: np.ndarray) -> np.ndarray:
    """Order of the rows of `got` in which they are the boxes of `expected`; as they are where there is none."""
    same = np.arange(len(got))
    if expected is None or expected.shape != got.shape or np.abs(expected - got).max(initial=0.0) <= PIXELS:
        return same
    nearest = np.abs(expected[:, None] - got[None]).max(axis=2).argmin(axis=1)
    return nearest if len(set(nearest.tolist())) == len(got) else same


def close(name: str, expected: Any, got: Any, allowed: float) -> Comparison:
    """Compare two arrays of floats: equal shapes, and no element further apart than `allowed`."""
    left, right = (np.asarray(value, np.float64) for value in (expected, got))
    if left.shape != right.shape:
        return failure(name, f"shape: expected {left.shape}, got {right.shape}")
    difference = float(np.nan_to_num(np.abs(left - right), nan=np.inf).max(initial=0.0))
    largest = float(np.abs(left).max(initial=0.0))
    return Comparison(name, difference, difference / (largest or 1.0), difference <= allowed)


@contextmanager
def identity_permutations() -> Iterator[None]:
    """Let every random permutation be 0, 1, 2, ..., so that sampling takes the first candidates."""
    real = torch.randperm

    def identity(n: int, **keys: Any) -> torch.Tensor:
        keys.pop("generator", None)
        return torch.arange(n, **keys)

    torch.randperm = identity
    try:
        yield
    finally:
        torch.randperm = real


@contextmanager
def fewer_multiplications() -> Iterator[None]:
    """Let the golden detector take the ways that wide ones take at inference on a CPU."""
    modules = (filtering, folded)
    real = [module.MIN_CHANNELS for module in modules]
    try:
        for module in modules:
            module.MIN_CHANNELS = 1
        yield
    finally:
        for module, value in zip(modules, real, strict=True):
            module.MIN_CHANNELS = value


@contextmanager
def order_of_the_release(model: nn.Module) -> Iterator[None]:
    """Let a detector compute in the order of the release, so that rounding moves no activation over a ReLU's kink.

    The RPN head sees one virtual image at a time, and res5 the default memory layout; together with
    MODEL.ROI_HEADS.SKIP_UNREAD_CELLS False.
    """
    head, heads = model.proposal_generator.rpn_head, model.roi_heads
    forward = head.forward

    def one_by_one(features: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        outputs = [forward([image]) for image in features[0].split(1)]
        return tuple([torch.cat([maps[0] for maps in column])] for column in zip(*outputs, strict=True))

    head.__dict__["forward"], heads.__dict__["_stage"] = one_by_one, heads.res5
    try:
        yield
    finally:
        del head.__dict__["forward"], heads.__dict__["_stage"]


@dataclass(frozen=True)
class Call:
    """Arguments and result of one call; a tensor as it was returned, whatever is done to it later."""

    args: tuple[Any, ...]
    result: Any


@contextmanager
def recorded(**watched: tuple[object, str]) -> Iterator[dict[str, list[Call]]]:
    """Note the calls of methods: label=(object, name of the method) -> label -> its calls."""
    calls: dict[str, list[Call]] = {label: [] for label in watched}
    for label, (owner, name) in watched.items():
        owner.__dict__[name] = _noting(getattr(owner, name), calls[label])
    try:
        yield calls
    finally:
        for owner, name in watched.values():
            del owner.__dict__[name]


def _noting(method: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    def call(*args: Any, **keys: Any) -> Any:
        result = method(*args, **keys)
        calls.append(Call(args, result.clone() if isinstance(result, torch.Tensor) else result))
        return result

    return call


# Label and context of each way to compute at inference.
WAYS = (("", nullcontext), (" (fewer multiplications)", fewer_multiplications))
