"""The official configuration of DeFRCN, key by key: where each one is declared here and how its values read.

Every key that the official code adds to Detectron2, or that its configuration files set, stands here; a test walks all
26 files through the table. Default, unit and source of a key stand where it is declared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class OfficialKey:
    """One key of the official configuration.

    Attributes:
        ours: our key, dotted; "" where there is none.
        official_value: our value -> the official one that means the same.
        note: why there is none, or what is special about the value.
    """

    ours: str = ""
    official_value: Callable[[Any], Any] = _same
    note: str = ""


def _same_name(*keys: str) -> dict[str, OfficialKey]:
    return {key: OfficialKey(key) for key in keys}


OFFICIAL_KEYS: dict[str, OfficialKey] = {
    # Detectron2's own keys, and those of the official code that kept name and meaning.
    **_same_name(
        "INPUT.MIN_SIZE_TRAIN", "MODEL.RESNETS.DEPTH", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
        "MODEL.BACKBONE.FREEZE", "MODEL.BACKBONE.FREEZE_AT", "MODEL.RPN.ENABLE_DECOUPLE", "MODEL.RPN.BACKWARD_SCALE",
        "MODEL.ROI_HEADS.ENABLE_DECOUPLE", "MODEL.ROI_HEADS.BACKWARD_SCALE", "MODEL.ROI_HEADS.FREEZE_FEAT",
        "MODEL.ROI_HEADS.DROPOUT_RATIO", "MODEL.ROI_HEADS.NUM_CLASSES", "SOLVER.BASE_LR", "SOLVER.STEPS",
        "SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.WEIGHT_DECAY",
    ),
    "MODEL.RPN.FREEZE": OfficialKey("MODEL.PROPOSAL_GENERATOR.FREEZE"),
    # One key of ours for two official ones: which predictor, and whether its class scores have dropout.
    "MODEL.ROI_HEADS.OUTPUT_LAYER": OfficialKey(
        "MODEL.ROI_HEADS.OUTPUT_LAYER", {"linear": "FastRCNNOutputLayers", "dropout": "FastRCNNOutputLayers"}.get
    ),
    "MODEL.ROI_HEADS.CLS_DROPOUT": OfficialKey("MODEL.ROI_HEADS.OUTPUT_LAYER", lambda name: name == "dropout"),
    "TEST.PCB_ENABLE": OfficialKey("TEST.CALIBRATION.ENABLED"),
    "TEST.PCB_ALPHA": OfficialKey("TEST.CALIBRATION.ALPHA"),
    "TEST.PCB_UPPER": OfficialKey("TEST.CALIBRATION.UPPER"),
    "TEST.PCB_LOWER": OfficialKey("TEST.CALIBRATION.LOWER"),
    "TEST.PCB_MODELTYPE": OfficialKey(
        "TEST.CALIBRATION.NETWORK", {"resnet101": "resnet"}.get, "the official code knows one network"
    ),
    "TEST.PCB_MODELPATH": OfficialKey(note="a path of the authors' machine; here TEST.CALIBRATION.WEIGHTS"),
    "DATASETS.TRAIN": OfficialKey(note="a name; here FEWSHOT.LAYOUT, STAGE, SETTING, SPLIT, SHOT and SEED say which"),
    "DATASETS.TEST": OfficialKey(note="a name; here FEWSHOT.LAYOUT, STAGE, SETTING and SPLIT say which"),
    "SOLVER.CHECKPOINT_PERIOD": OfficialKey(
        note="official: longer than the run; here checkpoints serve to resume, and change no result"
    ),
    "MUTE_HEADER": OfficialKey(note="hides the environment in the log; here the log level does that"),
}  # fmt: skip
