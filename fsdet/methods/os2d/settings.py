"""OS2D's keys, their ranges, and what they make of a network file."""

from __future__ import annotations

from detectron2.config import CfgNode

from fsdet.methods.os2d.fusion import FUSIONS
from fsdet.methods.os2d.objective import KINDS
from fsdet.modeling.drawn_memory import unread_shots

NO_THRESHOLD = -2.0  # below every cosine
_CHOICES = {
    "VIEWS": ("none", "rotation90", "horflip", "horflip_rotation90"),
    "FUSION": FUSIONS,
    "NMS": ("exact", "reference"),
    "OBJECTIVE": KINDS,
    "PARAMETERS": (4, 6),
}
# Smallest and largest value of a number.
_RANGES = {
    "CLASS_IMAGE_SIZE": (1, 4096),
    "EVAL_SCALE": (1, 100_000),
    "IMAGE_SIZE": (0, 100_000),
    "NMS_THRESH_TEST": (0.0, 1.0),
    "TEST_SHOTS": (1, 100_000),
    "ALIGNED_SHARE": (0.0, 1.0),
    "MAX_CLASSES": (1, 100_000),
    "POSITIVE_MARGIN": (-1.0, 2.0),
    "NEGATIVE_MARGIN": (-1.0, 2.0),
    "NEGATIVE_RATIO": (0, 100_000),
    "BOX_WEIGHT": (0.0, 1000.0),
    "NEGATIVE_WEIGHT": (0.0, 1000.0),
    "POSITIVE_IOU": (0.0, 1.0),
    "NEGATIVE_IOU": (0.0, 1.0),
    "REMAP_POSITIVE_IOU": (0.0, 1.0),
    "REMAP_NEGATIVE_IOU": (0.0, 1.0),
}


def add_config(cfg: CfgNode) -> None:
    """Declare OS2D's keys; INPUT.PATCH.* are the engine's. Defaults: V1, as published."""
    cfg.OS2D = node = CfgNode()
    node.ENABLED = False  # puts OS2D in place of the detector that a C4 network file names, see `complete_config`
    # Alignment: V1 has 4 parameters (scale and shift a direction), V2 6 whose map is inverted.
    node.PARAMETERS = 4
    node.INVERSE = False
    node.WEAKALIGN = ""  # file of weakalign's affine weights that the transform starts from; "" = identity
    node.CLASS_IMAGE_SIZE = 240  # px, a support is resized to the area of a square of this side
    node.VIEWS = "none"  # none | rotation90 | horflip | horflip_rotation90: further views of each support in a test
    # Several supports of a class: max (their boxes joined) | mean (one mean template) | agree (ours: the score of a box
    # grows with the other supports that see it too).
    node.FUSION = "max"
    node.TEST_SHOTS = 30  # supports of a class at test time, at most; drawn with (SEED, class) where there are more
    # Scales of the test: level s has the size of the stored picture times s * EVAL_SCALE / IMAGE_SIZE.
    node.PYRAMID = (0.5, 0.625, 0.8, 1.0, 1.2, 1.4, 1.6)
    node.EVAL_SCALE = 1280  # px, wanted long side at level 1.0, where an object should be about 240 px
    node.IMAGE_SIZE = 0  # px, nominal long side of the stored pictures; 0: each picture's own
    node.SCORE_THRESH_TEST = NO_THRESHOLD  # detections must lie above it; scores are cosines
    node.NMS_THRESH_TEST = 0.3
    node.NMS = "exact"  # exact | reference: in chunks of 10,000 boxes, as the release
    node.NMS_ACROSS_CLASSES = False  # a second NMS over all classes together
    # 1: exact. Less: only this share of the places, those with the best score before alignment, gets aligned;
    # faster and approximate.
    node.ALIGNED_SHARE = 1.0
    node.FREEZE_TRANSFORM = False
    node.FREEZE_TRANSFORM_NORM = False  # batch norm of the transform keeps its statistics (V2)
    node.TRANSFORM_ON_NEGATIVES = False  # negatives move the transform, too
    node.MAX_CLASSES = 15  # classes of a training batch, at most
    # Objective (margins on the cosine): rll (ranked list loss) | contrastive (squared hinge, hardest negatives) | hinge
    node.OBJECTIVE = "rll"
    node.POSITIVE_MARGIN = 0.6
    node.NEGATIVE_MARGIN = 0.5
    node.NEGATIVE_RATIO = 3  # negatives kept for each positive, contrastive and hinge; 0: all
    node.RLL_RATIO = 0.001  # weight of the easiest violating negative relative to the hardest
    node.BOX_WEIGHT = 0.2  # V2: 0
    node.NEGATIVE_WEIGHT = 1.0
    node.POSITIVE_IOU, node.NEGATIVE_IOU = 0.5, 0.1  # of an anchor
    node.REMAP = True  # classification targets from the overlap of the predicted box instead
    node.REMAP_POSITIVE_IOU, node.REMAP_NEGATIVE_IOU = 0.8, 0.4


def complete_config(cfg: CfgNode) -> None:
    """Put OS2D in place of the detector that a C4 network file names, wherever OS2D.ENABLED asks for it.

    Raises: ValueError for a network whose feature map is not res4 at stride 16.
    """
    if not cfg.OS2D.ENABLED:
        return
    model = cfg.MODEL
    if tuple(model.RESNETS.OUT_FEATURES) != ("res4",) or "FPN" in model.BACKBONE.NAME.upper():
        raise ValueError(
            f"OS2D.ENABLED is True, but the network is {model.BACKBONE.NAME} with {list(model.RESNETS.OUT_FEATURES)}: "
            "OS2D matches the res4 map alone. Take a C4 network, e.g. --model r50_c4"
        )
    model.META_ARCHITECTURE = "OS2D"


def setting_faults(cfg: CfgNode) -> list[str]:
    """One line for each value of OS2D.* that cannot be."""
    node = cfg.OS2D
    faults = [
        f"OS2D.{key} is {node[key]!r}; expected {' | '.join(map(str, allowed))}"
        for key, allowed in _CHOICES.items()
        if node[key] not in allowed
    ]
    faults += [
        f"OS2D.{key} is {node[key]}; expected {low} to {high}"
        for key, (low, high) in _RANGES.items()
        if not low <= node[key] <= high
    ]
    if not node.ALIGNED_SHARE > 0:
        faults.append("OS2D.ALIGNED_SHARE is 0, which aligns nothing; 1 is exact")
    if not 0 < node.RLL_RATIO < 1:
        faults.append(f"OS2D.RLL_RATIO is {node.RLL_RATIO}; expected a number between 0 and 1")
    if not node.PYRAMID or min(node.PYRAMID) <= 0:
        faults.append(f"OS2D.PYRAMID is {tuple(node.PYRAMID)}; expected one positive scale or more")
    for low, high in (("NEGATIVE_IOU", "POSITIVE_IOU"), ("REMAP_NEGATIVE_IOU", "REMAP_POSITIVE_IOU")):
        if node[low] > node[high]:
            faults.append(f"OS2D.{low} {node[low]} lies above OS2D.{high} {node[high]}")
    if node.ENABLED:
        faults += _faults_beside(cfg)
    elif cfg.INPUT.PATCH.ENABLED:
        faults.append("INPUT.PATCH.ENABLED is True, but only OS2D trains on patches; set OS2D.ENABLED True or it False")
    if node.WEAKALIGN and node.PARAMETERS != 6:
        faults.append("OS2D.WEAKALIGN has weights of six parameters; set OS2D.PARAMETERS 6 and OS2D.INVERSE True")
    return faults


def _faults_beside(cfg: CfgNode) -> list[str]:
    """Keys of other methods and of regions that OS2D has no use for, and shots that it would not read."""
    expected = {
        "FEWX.ENABLED": (cfg.FEWX.ENABLED, False),
        "MODEL.ROI_HEADS.BACKGROUND_KEPT": (cfg.MODEL.ROI_HEADS.BACKGROUND_KEPT, 0),
        "MODEL.RPN.NEGATIVES_KEPT": (cfg.MODEL.RPN.NEGATIVES_KEPT, 0),
        "MODEL.BACKBONE.CACHE_MIB": (cfg.MODEL.BACKBONE.CACHE_MIB, 0),
        "SOLVER.HEAD_LR_FACTOR": (cfg.SOLVER.HEAD_LR_FACTOR, 1.0),
    }
    faults = [
        f"{key} is {found}, which OS2D cannot obey: it has no proposals and one learning rate; set {wanted}"
        for key, (found, wanted) in expected.items()
        if found != wanted
    ]
    if cfg.SOLVER.MAX_ITER and not cfg.INPUT.PATCH.ENABLED:
        faults.append("INPUT.PATCH.ENABLED is False, but OS2D trains on patches; set it True, or SOLVER.MAX_ITER 0")
    return faults + unread_shots(cfg, "OS2D")


def idle_keys(cfg: CfgNode) -> list[str]:
    """Keys that change no result: all of them where OS2D is off."""
    return [] if cfg.OS2D.ENABLED else ["OS2D"]
