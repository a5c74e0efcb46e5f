"""Golden checkpoint surgery: remove, random initialisation and combination of predictors, row by row.

Source: TFA (Wang et al., ICML 2020) and DeFRCN (Qiao et al., ICCV 2021), official tools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdet.checkpoint import surgery
from fsdet.data import splits
from fsdet.engine.parity import Comparison, Ledger, compare, failure, golden_file, read_npz

# c_surgery: tensors of every checkpoint but "remove", which lacks the predictor.
KEPT = (
    "backbone.res4.0.conv1.weight", "proposal_generator.rpn_head.conv.weight", "affine_rpn.weight", "affine_rpn.bias",
    "affine_rcnn.weight", "affine_rcnn.bias",
)  # fmt: skip
HEADS = ("cls_score", "bbox_pred")
PREDICTOR = tuple(f"roi_heads.box_predictor.{head}.{kind}" for head in HEADS for kind in ("weight", "bias"))
HEADER = ("top_keys", "iteration")
RESULTS = {"remove": "remove", "randinit": "randinit", "combine_tfa": "combine"}  # golden name -> method
# Random rows are compared with N(0, 0.01^2) over this many draws, at five standard errors.
DRAWS, SIGMAS, NOVEL_STD = 64, 5.0, 0.01


def check_surgery(folder: Path) -> Iterator[Comparison]:
    """c: the three operations on a VOC and a COCO checkpoint, row by row."""
    values = read_npz(golden_file(folder, "c_surgery"))
    ledger = Ledger(values, inputs=_surgery_inputs(), expected=_surgery_outputs())
    for prefix, split in (("voc", splits.voc_split(1)), ("coco", splits.coco_split())):
        base, novel = (_checkpoint(values, f"{prefix}/{part}") for part in ("base", "novel"))
        for name, method in RESULTS.items():
            result = surgery.operate(
                method,
                base,
                novel if method == "combine" else None,
                source_classes=split.base,
                target_classes=split.all,
                novel_classes=split.novel if method == "combine" else None,
            )
            yield from _compare_result(ledger, f"{prefix}/{name}", result, base)
        yield from _compare_draws(ledger, f"{prefix}/randinit", base, split)
    yield from ledger.rest()


def _surgery_inputs() -> list[str]:
    parts = [f"{prefix}/{part}" for prefix in ("voc", "coco") for part in ("base", "novel")]
    return [f"{p}/{n}" for p in parts for n in (*(f"model/{tensor}" for tensor in KEPT + PREDICTOR), *HEADER)]


def _surgery_outputs() -> list[str]:
    names = []
    for prefix in ("voc", "coco"):
        for result in RESULTS:
            tensors = KEPT if result == "remove" else KEPT + PREDICTOR
            names += [f"{prefix}/{result}/{name}" for name in (*(f"model/{tensor}" for tensor in tensors), *HEADER)]
        names += [f"{prefix}/randinit/{head}_row_source" for head in HEADS]
    return names


def _checkpoint(values: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """A training checkpoint with the weights of the file and some state beside them, which surgery has to drop."""
    content: dict[str, Any] = {str(key): {} for key in values[f"{prefix}/top_keys"]}
    content["model"] = {tensor: torch.from_numpy(values[f"{prefix}/model/{tensor}"]) for tensor in KEPT + PREDICTOR}
    content["iteration"] = int(values[f"{prefix}/iteration"])
    return content


def _compare_result(ledger: Ledger, prefix: str, result: Mapping[str, Any], base: Mapping) -> Iterator[Comparison]:
    """Every tensor of one result; of "randinit" the weight rows that were copied, by the rows' sources."""
    yield ledger.compare(f"{prefix}/top_keys", np.array(sorted(result)))
    yield ledger.compare(f"{prefix}/iteration", np.array(result["iteration"]))
    expected = [name for name in ledger.expected if name.startswith(f"{prefix}/model/")]
    for name in sorted(set(result["model"]) - {name.removeprefix(f"{prefix}/model/") for name in expected}):
        yield failure(f"{prefix}/model/{name}", "is in our result and should not be there")
    for name in expected:
        tensor = name.removeprefix(f"{prefix}/model/")
        if tensor not in result["model"]:
            yield ledger.custom(failure(name, "is not in our result"))
        elif prefix.endswith("randinit") and tensor in PREDICTOR[::2]:
            yield _compare_copied(ledger, name, result["model"][tensor].numpy())
        else:
            yield ledger.compare(name, result["model"][tensor].numpy())
    for head in HEADS if prefix.endswith("randinit") else ():
        tensor = f"roi_heads.box_predictor.{head}.weight"
        sources = _row_sources(result["model"][tensor], base["model"][tensor])
        yield ledger.compare(f"{prefix}/{head}_row_source", sources)


def _compare_copied(ledger: Ledger, name: str, got: np.ndarray) -> Comparison:
    """The rows of a widened weight that come from the base model; the others are random."""
    head = "cls_score" if "cls_score" in name else "bbox_pred"
    copied = ledger.values[f"{name.split('/model/')[0]}/{head}_row_source"] >= 0
    expected = ledger.values[name]
    if got.shape != expected.shape or copied.shape != expected.shape[:1]:
        return ledger.custom(failure(name, f"expected shape {expected.shape}, got {got.shape}"))
    return ledger.custom(compare(name, expected[copied], got[copied]))


def _row_sources(got: torch.Tensor, base: torch.Tensor) -> np.ndarray:
    """For each row the base row it equals, or -1."""
    equal = (got[:, None] == base[None]).flatten(2).all(dim=2)  # (R, R_base)
    return torch.where(equal.any(dim=1), equal.int().argmax(dim=1), -1).numpy()


def _compare_draws(
    ledger: Ledger, prefix: str, base: Mapping[str, Any], split: splits.ClassSplit
) -> Iterator[Comparison]:
    """Mean and standard deviation of the random rows over many seeds."""
    models = [surgery.randinit(base["model"], split.base, split.all, seed=seed) for seed in range(DRAWS)]
    for head in HEADS:
        tensor = f"roi_heads.box_predictor.{head}.weight"
        is_random = torch.from_numpy(ledger.values[f"{prefix}/{head}_row_source"] < 0)
        drawn = torch.cat([model[tensor][is_random].flatten() for model in models]).double()
        mean, deviation = abs(drawn.mean().item()), abs(drawn.std().item() - NOVEL_STD)
        error = NOVEL_STD / drawn.numel() ** 0.5
        passed = mean <= SIGMAS * error and deviation <= SIGMAS * error / 2**0.5
        worst = max(mean, deviation)
        note = f"{drawn.numel()} random numbers against N(0, {NOVEL_STD}^2)"
        yield Comparison(f"{prefix}/model/{tensor} (random rows)", worst, worst / NOVEL_STD, passed, note=note)
