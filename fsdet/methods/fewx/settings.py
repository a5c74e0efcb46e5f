"""Ranges of FewX's settings, for the configuration as a whole and for a detector that is built without one."""

from __future__ import annotations

from detectron2.config import CfgNode

from fsdet.methods.fewx.relation import RELATIONS
from fsdet.modeling.drawn_memory import unread_shots

CORRELATIONS = ("sum", "mean")


def range_faults(cfg: CfgNode) -> list[str]:
    """One line for each number of FEWX.* and INPUT.FS.SUPPORT_WAY that cannot be."""
    faults = [
        f"FEWX.{key} is {cfg.FEWX[key]}; expected {least} or more"
        for key, least in (("TEST_SHOTS", 1), ("ROWS_AT_ONCE", 1), ("SHARED_PROPOSALS", 0))
        if cfg.FEWX[key] < least
    ]
    if cfg.FEWX.CORRELATION not in CORRELATIONS:
        faults.append(f'FEWX.CORRELATION is "{cfg.FEWX.CORRELATION}"; expected one of {CORRELATIONS}')
    if cfg.INPUT.FS.SUPPORT_WAY != 2:
        faults.append(
            f"INPUT.FS.SUPPORT_WAY is {cfg.INPUT.FS.SUPPORT_WAY}; two-way contrastive training takes the query's class "
            "and one other: 2"
        )
    return faults


def setting_faults(cfg: CfgNode) -> list[str]:
    """`range_faults`, and a line for relation heads that do not exist and for shots that no test would read."""
    faults, relations = range_faults(cfg), cfg.FEWX.RELATIONS
    if not relations or set(relations) - set(RELATIONS):
        faults.append(f"FEWX.RELATIONS is {tuple(relations)}; expected some of {RELATIONS}")
    return faults + unread_shots(cfg, "FEWX") if cfg.FEWX.ENABLED else faults
