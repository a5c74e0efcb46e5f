"""FewX: attention RPN and multi-relation head; novel classes from their supports, without fine-tuning or with it.

Paper: "Few-Shot Object Detection with Attention-RPN and Multi-Relation Detector", Fan, Zhuo, Tang, Tai, CVPR 2020,
arXiv 1908.01998. Official code: https://github.com/fanq15/FewX (MIT).

Parts: `detector.py` (training, class memory), `inference.py`, `rpn.py`, `roi_heads.py`, `relation.py` (the three
relation heads), `contrastive.py` (pairs in the ratio 1:2:1, losses), `supports.py` (supports at test time). Exact
savings at inference on a CPU: `filtering.py`, `folded.py`. Parameters have the release's names.

Departures from the release: positive and negative pass are separated where they meet, not at half of all rows
(LEGACY_BOUNDARY); an image without object is all background; the box of a very thin support is widened to a pixel; more
supports than TEST_SHOTS are not encoded; proposals and classes may be of any number, and their ids are int64.
Changing no number: both passes of all images are one batch; the class memory is filled before an evaluation, kept with
the digest of its weights, and never read again per image; the supports' halves of the relation heads are computed once
per class; NMS sees the best candidates first; pooled cells that res5 does not read are left out; at inference on a CPU
frozen norms are folded and 3x3 convolutions need fewer multiplications.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from fsdet.methods.fewx import detector, roi_heads, rpn  # noqa: F401 (they register themselves)
from fsdet.methods.fewx.relation import MIN_CELLS
from fsdet.methods.fewx.settings import setting_faults

__all__ = ["RENAMES", "add_config", "complete_config", "idle_keys", "setting_faults"]

# (official prefix, name here) of parameters whose names differ: none. Old files also hold the cells of the anchors and
# the pixel statistics, which the conversion drops.
RENAMES = ()

MIN_RESOLUTION = 2 * MIN_CELLS - 1  # pooled cells a side, of which res5 reads every second one


def add_config(cfg: CfgNode) -> None:
    """Declare FewX's keys; INPUT.FS.* and SOLVER.HEAD_LR_FACTOR are the engine's."""
    cfg.FEWX = fewx = CfgNode()
    fewx.ENABLED = False  # puts FewX's classes in place of those that a C4 network file names, see `complete_config`
    # Relation heads whose scores are summed. Whatever is left out, the patch head keeps its box regression: there is no
    # other one.
    fewx.RELATIONS = ("global", "local", "patch")
    # What the local head makes of the cells: "sum" as in the release; "mean" (ours) learns with larger rates, and much
    # sooner.
    fewx.CORRELATION = "sum"
    # Separate positive and negative pass at half of all rows, as the release does (wrong when the two passes have
    # different numbers of regions).
    fewx.LEGACY_BOUNDARY = False
    fewx.TEST_SHOTS = 30  # supports of a class at test time, at most; drawn with (SEED, class) where there are more
    # Regions that pass through res5 at once at test time; classes go in chunks that fit, which bounds the memory.
    fewx.ROWS_AT_ONCE = 500
    # 0: proposals of each class apart, exact. n: the n best proposals of all classes together, whose features are
    # computed once; faster and approximate.
    fewx.SHARED_PROPOSALS = 0


def complete_config(cfg: CfgNode) -> None:
    """Put FewX's classes in place of those that a C4 network file names, wherever FEWX.ENABLED asks for them.

    So a FewX recipe goes with every C4 network of the suite.

    Raises:
        ValueError: for a network without res5 per region.
    """
    if not cfg.FEWX.ENABLED:
        return
    model = cfg.MODEL
    if model.ROI_HEADS.NAME not in ("FewShotRes5ROIHeads", "RelationRes5ROIHeads"):
        raise ValueError(
            f"FEWX.ENABLED is True, but MODEL.ROI_HEADS.NAME is {model.ROI_HEADS.NAME}: FewX runs res5 per region. "
            "Take a C4 network, e.g. --model r50_c4"
        )
    resolution = model.ROI_BOX_HEAD.POOLER_RESOLUTION
    if resolution < MIN_RESOLUTION:
        raise ValueError(
            f"FEWX.ENABLED is True, but MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION is {resolution}: the patch "
            f"relation head needs {MIN_RESOLUTION} or more (the release: 14)"
        )
    model.META_ARCHITECTURE = "FewXRCNN"
    model.PROPOSAL_GENERATOR.NAME = "AttentionRPN"
    model.ROI_HEADS.NAME = "RelationRes5ROIHeads"


def idle_keys(cfg: CfgNode) -> list[str]:
    """Keys that change no result: all of them where FewX is off, else a memory bound."""
    return ["FEWX.ROWS_AT_ONCE"] if cfg.FEWX.ENABLED else ["FEWX"]
