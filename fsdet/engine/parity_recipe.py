"""Golden configurations, optimizer groups and learning rates of DeFRCN.

Each official configuration file corresponds to one of configs/defrcn with values for split, setting and shot; the table
of the method says how the keys read.

Source: DeFRCN (Qiao et al., ICCV 2021), official configurations and optimizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.solver import build_lr_scheduler, build_optimizer

from fsdet.engine.parity import Comparison, Ledger, failure, golden_file, read_json
from fsdet.engine.parity_detector import CONFIGS, STAGES, build_small, official_name
from fsdet.engine.parity_protocol import official_set
from fsdet.engine.setup import dataset_specs, default_config, load_config
from fsdet.methods.defrcn import OFFICIAL_KEYS

OFFICIAL_FILE = re.compile(
    r"(?P<data>voc|coco)/defrcn_(?P<setting>det|fsod|gfsod)_r101_(base(?P<split>[123]?)|novelx?_(?P<shot>\d+)shot_seedx)"
    r"\.yaml"
)
FILES = (
    "coco/defrcn_det_r101_base.yaml",
    *(f"voc/defrcn_det_r101_base{split}.yaml" for split in (1, 2, 3)),
    *(f"coco/defrcn_{s}_r101_novel_{k}shot_seedx.yaml" for s in ("fsod", "gfsod") for k in (1, 2, 3, 5, 10, 30)),
    *(f"voc/defrcn_{s}_r101_novelx_{k}shot_seedx.yaml" for s in ("fsod", "gfsod") for k in (1, 2, 3, 5, 10)),
)
# Keys that a file leaves at Detectron2's value, or at the official default, in some stages.
SOMETIMES = ("MODEL.ROI_HEADS.NUM_CLASSES", "SOLVER.WARMUP_ITERS", "TEST.PCB_MODELPATH")
DATASETS = ("DATASETS.TRAIN", "DATASETS.TEST")
ABSENT = "(absent)"
RATE = re.compile(r"lr_(?P<file>.+)_(?P<data>voc|coco)")
RATES = (
    "lr_defrcn_det_r101_base1_voc", "lr_defrcn_det_r101_base_coco", "lr_defrcn_fsod_r101_novelx_1shot_seedx_voc",
    "lr_defrcn_fsod_r101_novelx_5shot_seedx_voc",
)  # fmt: skip
RECIPE_TOLERANCE = 1e-9  # decays and learning rates are small numbers


def load_official(name: str) -> CfgNode:
    """Our resolved configuration for an official file, e.g. "voc/defrcn_fsod_r101_novelx_1shot_seedx.yaml".

    Raises: ValueError for a name that no configuration corresponds to.
    """
    found = OFFICIAL_FILE.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is no official configuration of DeFRCN")
    stage = "novel" if found["shot"] else "base"
    opts = ["FEWSHOT.SPLIT", found["split"] or "1"]
    if stage == "novel":
        opts += ["FEWSHOT.SETTING", found["setting"], "FEWSHOT.SHOT", found["shot"]]
    return load_config(str(CONFIGS / f"{found['data']}_{stage}.yaml"), opts)


def value_of(cfg: CfgNode, key: str) -> Any:
    """Value of a dotted key; lists for tuples."""
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


def check_configs(folder: Path) -> Iterator[Comparison]:
    """configs: effective values of every official file, and the defaults that the official code adds."""
    golden = read_json(golden_file(folder, "configs_effective"))
    stages, defaults = golden["stages"], golden["added_or_changed_defaults"]
    values = {f"{file}/{key}": value for file, content in stages.items() for key, value in content.items()}
    values |= {f"defaults/{key}": value for key, value in defaults.items()}
    values |= {key: value for key, value in golden.items() if key not in ("stages", "added_or_changed_defaults")}
    always = [key for key in OFFICIAL_KEYS if key not in SOMETIMES]
    unread = [key for key in always if not OFFICIAL_KEYS[key].ours and key not in DATASETS]
    added = [f"defaults/{key}" for key in OFFICIAL_KEYS if key in defaults]
    unread_defaults = [name for name in added if not OFFICIAL_KEYS[name.removeprefix("defaults/")].ours]
    ledger = Ledger(
        values,
        inputs=[*(f"{file}/{key}" for file in FILES for key in unread), *unread_defaults],
        expected=[
            *(f"{file}/{key}" for file in FILES for key in always if key not in unread),
            *(name for name in added if name not in unread_defaults),
        ],
        optional=[f"{file}/{key}" for file in FILES for key in SOMETIMES],
    )
    yield from _compare_defaults(ledger, defaults)
    for file in FILES:
        if file in stages:
            yield from _compare_file(ledger, file, stages[file], defaults)
    yield from ledger.rest()


def _compare_defaults(ledger: Ledger, defaults: Mapping[str, Mapping[str, Any]]) -> Iterator[Comparison]:
    """Keys that the official code adds have its defaults; where it changes Detectron2's, only the files do so here."""
    cfg = default_config()
    for key, row in defaults.items():
        found = OFFICIAL_KEYS.get(key)
        if found is None or not found.ours:
            continue
        ours = found.official_value(value_of(cfg, found.ours))
        side = "defrcn" if row["detectron2"] == ABSENT else "detectron2"
        yield ledger.compare(f"defaults/{key}", {**row, side: ours}, RECIPE_TOLERANCE)


def _compare_file(
    ledger: Ledger, file: str, content: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]
) -> Iterator[Comparison]:
    """All keys of one file; one that it leaves out has the official default."""
    cfg, stock = load_official(file), get_cfg()
    for key, found in OFFICIAL_KEYS.items():
        name = f"{file}/{key}"
        if key in DATASETS and key in content:
            yield ledger.custom(_same_data(name, content[key], cfg, is_test=key.endswith("TEST")))
        if not found.ours:
            continue
        ours = found.official_value(value_of(cfg, found.ours))
        if key in content:
            yield _required(ledger.compare(name, ours, RECIPE_TOLERANCE))
        elif key in SOMETIMES:
            default = defaults[key]["defrcn"] if key in defaults else value_of(stock, key)
            if ours != default:
                yield failure(name, f"not in the file, so {default}; ours is {ours}")


def _required(row: Comparison) -> Comparison:
    """A key that a file may leave out must still agree when it is there."""
    return replace(row, optional=False)


def _same_data(name: str, official: Sequence[str], cfg: CfgNode, *, is_test: bool) -> Comparison:
    """Whether the official data set names stand for our data set; their placeholders take our split and seed."""
    fewshot = cfg.FEWSHOT
    filled = [re.sub(r"seedx$", f"seed{fewshot.SEED}", text) for text in official]
    filled = [re.sub(r"(novel|all)x(?=_|$)", rf"\g<1>{fewshot.SPLIT}", text) for text in filled]
    found = [official_set(text, Path()) for text in filled]
    if None in found:
        return failure(name, f"unknown data set in {official}")
    ours = dataset_specs(cfg)[is_test].name
    theirs = {replace(spec, choice=fewshot.CHOICE).name for spec, _ in found}
    parts = [part for _, sources in found for part in (sources.voc_test if is_test else sources.voc_train)]
    wanted = fewshot.VOC_TEST if is_test else fewshot.VOC_TRAIN
    has_parts = fewshot.LAYOUT != "voc" or bool(fewshot.SHOT and not is_test)
    same = theirs == {ours} and (has_parts or [":".join(part) for part in parts] == list(wanted))
    difference = 0.0 if same else math.inf
    return Comparison(name, difference, difference, same, note="" if same else f"{official} is not our {ours}")


def check_solver(folder: Path) -> Iterator[Comparison]:
    """d_solver: optimizer groups, learning rates, and what trains under each combination of switches."""
    golden = read_json(golden_file(folder, "d_solver"))
    values = {f"{stage}/{name}": v for stage in STAGES for name, v in golden.get(stage, {}).items()}
    values |= {name: value for name, value in golden.items() if name not in STAGES and name != "trainable_prefixes"}
    values |= {f"trainable_prefixes/{name}": value for name, value in golden.get("trainable_prefixes", {}).items()}
    switches = [_switches(numbers) for numbers in range(16)]
    expected = [*(f"{stage}/param_groups" for stage in STAGES), *RATES]
    ledger = Ledger(values, expected=[*expected, *(f"trainable_prefixes/{name}" for name in switches)])
    for stage in STAGES:
        yield ledger.compare(f"{stage}/param_groups", _groups(stage), RECIPE_TOLERANCE)
    for name in RATES:
        if name in values:
            yield ledger.compare(name, _rates(name, values[name]), RECIPE_TOLERANCE)
    for name in switches:
        yield ledger.compare(f"trainable_prefixes/{name}", _trainable(name))
    yield from ledger.rest()


def _groups(stage: str) -> dict[str, dict[str, Any]]:
    """Solver values of every trainable parameter, by official name."""
    model, cfg = build_small(stage)
    names = {id(p): official_name(name) for name, p in model.named_parameters()}
    keys = ("lr", "weight_decay", "momentum", "nesterov")
    groups = build_optimizer(cfg, model).param_groups
    return {names[id(p)]: {key: group[key] for key in keys} for group in groups for p in group["params"]}


def _rates(name: str, official: Mapping[str, float]) -> dict[str, float]:
    """Learning rate of our schedule at the iterations of the file."""
    found = RATE.fullmatch(name)
    cfg = load_official(f"{found['data']}/{found['file']}.yaml")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = {}
    for iteration in official:
        scheduler.last_epoch = int(iteration)
        rates[iteration] = scheduler.get_lr()[0]
    return rates


def _switches(number: int) -> str:
    """One of the 16 combinations, as the file names it."""
    backbone, rpn, feature, last = (bool(number >> bit & 1) for bit in (3, 2, 1, 0))
    flags = f"BACKBONE.FREEZE={backbone},RPN.FREEZE={rpn},ROI_HEADS.FREEZE_FEAT={feature}"
    return f"{flags},BACKBONE.FREEZE_AT={3 if last else 2}"


def _trainable(switches: str) -> list[str]:
    """First two components of the official names of everything that trains."""
    words = [pair.split("=") for pair in switches.split(",")]
    opts = [word for key, value in words for word in (OFFICIAL_KEYS[f"MODEL.{key}"].ours, value)]
    names = (official_name(n) for n, p in build_small("base", *opts)[0].named_parameters() if p.requires_grad)
    return sorted({".".join(name.split(".")[:2]) for name in names})
