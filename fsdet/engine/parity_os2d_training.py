"""Golden training step of OS2D: targets, losses, gradients of all parameters, and one step of the optimizer.

The training loop takes the step, on patches of a level of the golden model's picture. Compared is a step on pixels from
0 to 1, as the release has them: in another order of operations, rounding moves some activations over a ReLU's kink. The
step on pixels as training has them is compared as well, labelled.

Source: OS2D (Osokin et al., ECCV 2020), official release.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from fsdet.engine.parity import Comparison, golden_file, read_npz
from fsdet.engine.parity_os2d_detector import VERSIONS, GoldenDetector, GoldenLedger, unfolded
from fsdet.engine.parity_os2d_losses import KINDS
from fsdet.engine.trainer import Trainer
from fsdet.methods.os2d.objective import Objective

LOSSES, NORMS, SMALL_NORM, BIAS, WEIGHT, STATISTICS = 1e-5, 1e-3, 1e-4, 1e-3, 1e-2, 2e-5
OBJECTS = ("gt_boxes", "gt_labels", "gt_difficult")
SCENE = "level1_image_uint8"  # of the golden model
PARTS = ("loss", "mean_cls_loss_per_anchor", "loc", "cls", "cls_pos", "cls_neg", "grad_norm")
# The tensors that the file has in full: end of its names -> our name, and accepted length of the difference, relative.
TENSORS = {
    "linear_bias": ("head.transform_net.linear.bias", BIAS),
    "conv1_weight": ("backbone.conv1.weight", WEIGHT),
}
RUNNING_MEAN = "conv1_running_mean_after"  # of the transform network, where its norms train
AS_TRAINED = " (as trained)"
TEXTS = [f"{version}/{name}" for version in VERSIONS for name in ("losses_json", "grad_names_json")]


def check_step(folder: Path) -> Iterator[Comparison]:
    """train_step: one step of both versions as training takes it, with the settings of the file."""
    golden, arrays = GoldenDetector(folder), read_npz(golden_file(folder, "train_step"))
    values = unfolded(arrays, "config_json", *TEXTS)
    settings = {name.split("/", 1)[1]: value for name, value in values.items() if name.startswith("config_json/")}
    ledger = GoldenLedger(values, inputs=_inputs(values), expected=_expected(settings))
    for version in VERSIONS:
        step = take_step(golden, version, settings, arrays, white=1.0)
        for name, value in step.targets().items():
            yield ledger.exact(f"{version}/{name}", value)
        yield from _compare_losses(ledger, version, step)
        yield from _compare_gradients(ledger, version, step)
        yield from _compare_change(ledger, version, step)
        if not _keeps_statistics(settings, version):
            mean = step.model.head.transform_net.conv[1].running_mean
            yield ledger.within(f"{version}/{RUNNING_MEAN}", mean, STATISTICS)
        as_trained = take_step(golden, version, settings, arrays, white=255.0)
        yield from _compare_losses(ledger, version, as_trained, AS_TRAINED)
        yield _compare_norms(ledger, version, as_trained, AS_TRAINED)
    yield from ledger.rest()


def _inputs(values: Mapping[str, Any]) -> list[str]:
    """Patches with their objects, and the settings."""
    objects = [f"image{number}/{name}" for number in range(len(values["patch_xy"])) for name in OBJECTS]
    return ["patch_xy", "patch_size", *objects, *(name for name in values if name.startswith("config_json/"))]


def _expected(settings: Mapping[str, Any]) -> list[str]:
    """Names of the results."""
    tensors = [f"{kind}_{name}" for kind in ("grad", "step") for name in TENSORS]
    own = ["cls_targets", "cls_targets_remapped", "grad_names_json", "grad_norms", *tensors]
    own += [f"losses_json/{part}" for part in PARTS]
    means = [f"{version}/{RUNNING_MEAN}" for version in VERSIONS if not _keeps_statistics(settings, version)]
    return [*(f"{version}/{name}" for version in VERSIONS for name in own), *means]


def _keeps_statistics(settings: Mapping[str, Any], version: str) -> bool:
    """Whether the norms of the transform network are in evaluation mode."""
    return settings["transform_bn"][version].startswith("eval statistics")


class _Watched:
    """An objective that remembers what it was called with."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __call__(self, *args: Any, **keys: Any) -> dict[str, Tensor]:
        self.arguments = args, keys
        return self.objective(*args, **keys)


class _OneStep(Trainer):
    """The training loop on a batch that is given, without any file."""

    def __init__(self, cfg: CfgNode, batch: list[dict[str, Any]]) -> None:
        super().__init__(cfg)
        self._given = batch

    def start_batches(self, iteration: int) -> None:
        """See `Trainer.start_batches`."""
        self._batches = iter([self._given])

    def build_hooks(self) -> list[Any]:
        """See `Trainer.build_hooks`."""
        return []


@dataclass(frozen=True)
class Step:
    """What a step has left behind.

    Attributes:
        model: with its gradients.
        before: its parameters before the step, copies.
        watched: the objective.
        names: released name -> name of the parameter.
    """

    model: nn.Module
    before: Mapping[str, Tensor]
    watched: _Watched
    names: Mapping[str, str]

    def targets(self) -> dict[str, Tensor]:
        """Labels that the losses were computed with."""
        _, keys = self.watched.arguments
        return {"cls_targets": keys["labels"], "cls_targets_remapped": keys["remapped"]}

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Entries of "losses_json"; the losses of boxes and negatives are not weighted."""
        (args, keys), objective = self.watched.arguments, self.watched.objective
        weighted = objective(*args, **keys)
        plain = replace(objective, box_weight=1.0, negative_weight=1.0)(*args, **keys)
        by_anchor = objective.weighted(objective.per_anchor(*args, **keys))
        classes = weighted["loss_cls_pos"] + weighted["loss_cls_neg"]
        norm = np.linalg.norm(list(self.norms().values()))
        values = (
            sum(weighted.values()), by_anchor.mean(), plain["loss_box"], classes, plain["loss_cls_pos"],
            plain["loss_cls_neg"], norm,
        )  # fmt: skip
        return {name: float(value) for name, value in zip(PARTS, values, strict=True)}

    def norms(self) -> dict[str, float]:
        """Norm of the gradient of every parameter that has one."""
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return {name: float(grad.double().norm()) for name, grad in gradients.items() if grad is not None}


def take_step(
    golden: GoldenDetector,
    version: str,
    settings: Mapping[str, Any],
    values: Mapping[str, np.ndarray],
    *,
    white: float,
) -> Step:
    """One step of the training loop.

    Args:
        golden: the set.
        version: "v1" or "v2".
        settings: of the file.
        values: arrays of the file.
        white: largest value of a pixel.
    """
    cfg = golden.config(version, *golden.pixels(white), *_overrides(settings, version))
    with torch.random.fork_rng():  # the training loop seeds the generator
        trainer = _OneStep(cfg, _batch(golden, settings, values, white))
        model = trainer.model
        names = golden.fill(model, version)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model.objective = watched = _Watched(model.objective)
        trainer.train()
    return Step(model, before, watched, names)


def _overrides(settings: Mapping[str, Any], version: str) -> list[str]:
    """Settings of the file as those of a configuration."""
    opts = {
        "SOLVER.BASE_LR": settings["lr"],
        "SOLVER.MOMENTUM": settings["momentum"],
        "SOLVER.WEIGHT_DECAY": settings["weight_decay"],
        "SOLVER.WEIGHT_DECAY_NORM": settings["weight_decay"],
        "SOLVER.CLIP_TOTAL_NORM": settings["max_grad_norm"],
        "SOLVER.MAX_ITER": 1,
        "SOLVER.STEPS": (),
        "OS2D.OBJECTIVE": KINDS[settings["class_objective"]],
        "OS2D.POSITIVE_MARGIN": settings["pos_margin"],
        "OS2D.NEGATIVE_MARGIN": settings["neg_margin"],
        "OS2D.RLL_RATIO": settings["rll_neg_weight_ratio"],
        "OS2D.BOX_WEIGHT": settings["loc_weight"][version],
        "OS2D.POSITIVE_IOU": settings["iou_pos"],
        "OS2D.NEGATIVE_IOU": settings["iou_neg"],
        "OS2D.REMAP_POSITIVE_IOU": settings["remap_pos"],
        "OS2D.REMAP_NEGATIVE_IOU": settings["remap_neg"],
        "OS2D.FREEZE_TRANSFORM_NORM": _keeps_statistics(settings, version),
    }
    return [str(word) for pair in opts.items() for word in pair]


def _batch(
    golden: GoldenDetector, settings: Mapping[str, Any], values: Mapping[str, np.ndarray], white: float
) -> list[dict[str, Any]]:
    """Training inputs; the class ids are the labels of the file, and every patch brings all supports."""
    numbers = {int(label): re.match(r"class_image_\d+", name)[0] for label, name in settings["class_labels"].items()}
    supports = {label: golden.values[f"{name}_resized_uint8"] for label, name in sorted(numbers.items())}
    size = int(values["patch_size"])
    batch = []
    for number, (x, y) in enumerate(values["patch_xy"].tolist()):
        boxes, labels, difficult = (torch.from_numpy(values[f"image{number}/{name}"]) for name in OBJECTS)
        objects = {"gt_boxes": Boxes(boxes), "gt_classes": labels, "gt_difficult": difficult}
        batch.append(
            {
                "image": _to_tensor(golden.values[SCENE][y : y + size, x : x + size], white),
                "instances": Instances((size, size), **objects),
                "support_images": [_to_tensor(picture, white) for picture in supports.values()],
                "support_classes": list(supports),
            }
        )
    return batch


def _to_tensor(picture: np.ndarray, white: float) -> Tensor:
    """A picture (h, w, 3) uint8 as (3, h, w) float up to `white`."""
    return torch.from_numpy(picture.transpose(2, 0, 1).copy()).float() / (255.0 / white)


def _compare_losses(ledger: GoldenLedger, version: str, step: Step, label: str = "") -> Iterator[Comparison]:
    """The losses, and the norm of the whole gradient."""
    for name, value in step.losses().items():
        full = f"{version}/losses_json/{name}"
        allowed = NORMS * ledger.values.get(full, 0.0) if name == "grad_norm" else LOSSES
        row = ledger.within(full, value, allowed, label)
        yield replace(row, optional=True) if label else row


def _compare_gradients(ledger: GoldenLedger, version: str, step: Step) -> Iterator[Comparison]:
    """Which parameters have a gradient, the norms of all, and the two that the file has in full."""
    names, norms = f"{version}/grad_names_json", step.norms()
    in_file = ledger.values.get(names, [])
    known = [name for name in in_file if step.names.get(name) in norms]
    ours = {step.names[name] for name in known}
    yield ledger.compare(names, known + sorted(norms.keys() - ours))
    yield _compare_norms(ledger, version, step)
    for name, (own, allowed) in TENSORS.items():
        yield ledger.direction(f"{version}/grad_{name}", step.model.get_parameter(own).grad, allowed)


def _compare_norms(ledger: GoldenLedger, version: str, step: Step, label: str = "") -> Comparison:
    """Relative differences where a norm counts; where it is rounding alone, it has to be that here, too."""
    norms, name = step.norms(), f"{version}/grad_norms"
    in_file = ledger.values.get(f"{version}/grad_names_json", [])
    found = np.array([norms.get(step.names.get(released, ""), np.nan) for released in in_file])
    row = ledger.within(name, found, math.inf, label)
    if math.isfinite(row.max_abs):
        expected = ledger.values[name]
        counts = expected > SMALL_NORM
        worst = float((np.abs(found - expected)[counts] / expected[counts]).max(initial=0.0))
        row = replace(row, max_rel=worst, passed=bool(worst <= NORMS and (found[~counts] <= SMALL_NORM).all()))
    return replace(row, optional=bool(label))


def _compare_change(ledger: GoldenLedger, version: str, step: Step) -> Iterator[Comparison]:
    """What the step changed: a difference of parameters, which carries their rounding."""
    for name, (own, allowed) in TENSORS.items():
        before = step.before[own]
        change = step.model.get_parameter(own).detach() - before
        rounding = float(np.spacing(before.abs().max().numpy()))
        largest = float(np.abs(ledger.values.get(f"{version}/step_{name}", change)).max())
        yield ledger.within(f"{version}/step_{name}", change, rounding + allowed * largest)
