"""Golden losses of OS2D: every objective with its gradients, and the losses of single anchors for mining.

Source: OS2D (Osokin et al., ECCV 2020), official release.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fsdet.engine.parity import Comparison, golden_file, read_npz
from fsdet.engine.parity_os2d_detector import GoldenLedger
from fsdet.methods.os2d.objective import Objective

LOSSES, GRADIENTS = 1e-5, 1e-6
KINDS = {"ContrastiveLoss": "contrastive", "RLL": "rll"}
ARRAYS = ("cls_preds", "cls_preds_for_neg", "loc_preds", "loc_targets")
TARGETS = ("cls_targets", "cls_targets_remapped", "cls_targets_no_positives")
SCALARS = ("loss", "loc", "cls", "cls_pos", "cls_neg")
MINING = ("cls_loss", "loc_loss", "pos_mask", "neg_mask", "pos_for_regression", "loss")
ON_CPU = "on a CPU the release loses RLL's negatives; the main arrays have them, as on a GPU"


def check_losses(folder: Path) -> Iterator[Comparison]:
    """objective: all cases of the file's `config_json`."""
    values = read_npz(golden_file(folder, "objective"))
    cases = [_Case(name, settings, values) for name, settings in json.loads(str(values["config_json"])).items()]
    ledger = GoldenLedger(
        values,
        inputs=("config_json", *ARRAYS, *TARGETS),
        expected=[f"{case.name}/{result}" for case in cases for result in case.results],
        unmatched={f"{case.name}/on_cpu/{key}": ON_CPU for case in cases if case.is_rll for key in SCALARS},
    )
    for case in cases:
        for name, value in case.losses().items():
            yield ledger.within(f"{case.name}/{name}", value, LOSSES)
            if case.is_rll and name in SCALARS:
                yield ledger.within(f"{case.name}/on_cpu/{name}", value, LOSSES)
        for name, value in case.gradients().items():
            yield ledger.within(f"{case.name}/{name}", value, GRADIENTS)
        for name, value in case.mining().items() if case.has_positives else ():
            is_mask = value.dtype == torch.bool
            full = f"{case.name}/mining/{name}"
            yield ledger.exact(full, value) if is_mask else ledger.within(full, value, LOSSES)
    yield from ledger.rest()


@dataclass(frozen=True)
class _Case:
    """One objective on the predictions of the file.

    Attributes:
        name: of the case.
        settings: its entry of `config_json`.
        values: arrays of the file.
    """

    name: str
    settings: Mapping[str, Any]
    values: Mapping[str, np.ndarray]

    @property
    def is_rll(self) -> bool:
        """Whether it is the ranked list loss."""
        return KINDS[self.settings["class_objective"]] == "rll"

    @property
    def has_positives(self) -> bool:
        """Without them the file has nothing for mining."""
        targets = self.tensor("cls_targets_remapped") if self._is_remapped else self.tensor(self.settings["targets"])
        return bool((targets == 1).any())

    @property
    def results(self) -> list[str]:
        """Names of its results."""
        names = [*SCALARS, "cls_per_anchor", *(f"grad_{name}" for name in self._predictions)]
        return names + [f"mining/{name}" for name in MINING if self.has_positives]

    @property
    def _is_remapped(self) -> bool:
        return self.settings["remap_classification_targets"] and self.settings["remapped_targets_passed"]

    @property
    def _predictions(self) -> list[str]:
        """Names of the predictions that have a gradient."""
        return ["cls_preds", "loc_preds", *["cls_preds_for_neg"] * self.settings["separate_scores_for_negatives"]]

    @property
    def objective(self) -> Objective:
        """As the settings want it."""
        settings = self.settings
        return Objective(
            kind=KINDS[settings["class_objective"]],
            positive_margin=settings["pos_margin"],
            negative_margin=settings["neg_margin"],
            negative_ratio=settings["neg_to_pos_ratio"],
            rll_ratio=settings["rll_neg_weight_ratio"] or Objective.rll_ratio,
            box_weight=settings["loc_weight"],
            negative_weight=settings["class_neg_weight"],
        )

    def tensor(self, name: str) -> Tensor:
        """A copy of an array."""
        return torch.from_numpy(self.values[name].copy())

    def arguments(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Predictions by their names, and what `Objective` is called with."""
        leaves = {name: self.tensor(name).requires_grad_() for name in self._predictions}
        return leaves, {
            "scores": leaves["cls_preds"],
            "codes": leaves["loc_preds"].mT,
            "labels": self.tensor(self.settings["targets"]),
            "target_codes": self.tensor("loc_targets").mT,
            "remapped": self.tensor("cls_targets_remapped") if self._is_remapped else None,
            "negative_scores": leaves.get("cls_preds_for_neg"),
        }

    @torch.no_grad()
    def losses(self) -> dict[str, Tensor]:
        """The loss, its parts (those of boxes and negatives not weighted), and the class loss of each anchor."""
        _, arguments = self.arguments()
        objective, weighted = self.objective, self.objective(**arguments)
        plain = replace(objective, box_weight=1.0, negative_weight=1.0)(**arguments)
        return {
            "loss": sum(weighted.values()),
            "loc": plain["loss_box"],
            "cls": weighted["loss_cls_pos"] + weighted["loss_cls_neg"],
            "cls_pos": plain["loss_cls_pos"],
            "cls_neg": plain["loss_cls_neg"],
            "cls_per_anchor": objective.weighted(objective.per_anchor(**arguments)),
        }

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the loss."""
        leaves, arguments = self.arguments()
        sum(self.objective(**arguments).values()).backward()
        return {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}

    @torch.no_grad()
    def mining(self) -> dict[str, Tensor]:
        """Losses before any mean, and their total without weights or choice of negatives."""
        _, arguments = self.arguments()
        found = self.objective.per_anchor(**arguments)
        kind = "hinge" if self.is_rll else "contrastive"
        total = replace(self.objective, kind=kind, negative_ratio=None)(**arguments)
        parts = found.class_loss, found.box_loss, found.positive, found.negative, found.box_positive
        return dict(zip(MINING, (*parts, sum(total.values())), strict=True))
