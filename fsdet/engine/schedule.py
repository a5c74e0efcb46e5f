"""Schedules as rows of a table, and their scaling to another number of images per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

# Positions in a row of FEWSHOT.SCHEDULE.
_COLUMNS = ("split", "setting", "shot", "base LR", "steps", "iterations", "warm-up")


def find_row(rows: Sequence[Sequence[Any]], *, split: int, setting: str, shot: int) -> Sequence[Any] | None:
    """First row whose split, setting and shot match; "*" matches everything.

    Raises: ValueError when there are rows but none fits, naming what has one.
    """
    for row in rows:
        if len(row) != len(_COLUMNS):
            raise ValueError(f"FEWSHOT.SCHEDULE: a row has {len(_COLUMNS)} columns ({', '.join(_COLUMNS)}), got {row}")
        if all(want in ("*", have) for want, have in zip(row[:3], (split, setting, shot), strict=True)):
            return row
    if rows:
        shots = {str(row[2]) for row in rows if row[0] in ("*", split) and row[1] in ("*", setting)}
        others = ", ".join(sorted(shots, key=lambda text: (len(text), text)))  # as numbers: 2 before 10
        there = f"{others} shots" if shots else " and ".join(sorted({f"split {row[0]}, {row[1]}" for row in rows}))
        raise ValueError(
            f"FEWSHOT.SCHEDULE has no row for split {split}, {setting}, {shot} shots, only for {there}. Choose one of "
            f"these, or add a row ({', '.join(_COLUMNS)}) to the config file."
        )
    return None


def apply_schedule(cfg: CfgNode, opts: Sequence[str], recipe: CfgNode) -> None:
    """Set BASE_LR, MAX_ITER, STEPS and WARMUP_ITERS from the table and the batch size, then from the command line.

    The table states a recipe for `SOLVER.REFERENCE_IMS_PER_BATCH` images per step. With another IMS_PER_BATCH the
    learning rate scales in proportion and every count of iterations inversely, so that the images seen stay the same
    (Goyal et al. 2017, section 2.1). STEPS come last: they keep their fraction of whatever MAX_ITER ends up as, and so
    does the warm-up of a shortened run.

    Args:
        cfg: files and command line, merged; changed in place.
        opts: the command line, KEY VALUE pairs.
        recipe: SOLVER as the files alone have it, which the fractions refer to.
    """
    solver = cfg.SOLVER
    steps, length = recipe.STEPS, recipe.MAX_ITER
    if cfg.FEWSHOT.STAGE == "novel":
        row = find_row(
            cfg.FEWSHOT.SCHEDULE, split=cfg.FEWSHOT.SPLIT, setting=cfg.FEWSHOT.SETTING, shot=cfg.FEWSHOT.SHOT
        )
        if row is not None:
            solver.BASE_LR, solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS = (
                float(row[3]),
                tuple(row[4]),
                int(row[5]),
                int(row[6]),
            )
            steps, length = solver.STEPS, solver.MAX_ITER
    scale = solver.IMS_PER_BATCH / (solver.REFERENCE_IMS_PER_BATCH or solver.IMS_PER_BATCH)
    planned = max(1, round(length / scale))
    solver.BASE_LR *= scale
    solver.MAX_ITER = max(1, round(solver.MAX_ITER / scale)) if solver.MAX_ITER else 0  # 0: no training
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / scale)
    solver.CHECKPOINT_PERIOD = max(1, round(solver.CHECKPOINT_PERIOD / scale))
    cfg.TEST.EVAL_PERIOD = round(cfg.TEST.EVAL_PERIOD / scale)
    given = dict(zip(opts[::2], opts[1::2], strict=True))
    # FEWSHOT keys are merged and completed already; once more, they would undo what was derived from them.
    cfg.merge_from_list([word for pair in given.items() if not pair[0].startswith("FEWSHOT.") for word in pair])
    if "SOLVER.MAX_ITER" in given and "SOLVER.WARMUP_ITERS" not in given:
        solver.WARMUP_ITERS = round(solver.WARMUP_ITERS * min(1.0, solver.MAX_ITER / planned))
    if "SOLVER.STEPS" not in given:
        solver.STEPS = _stretched(steps, length, solver.MAX_ITER)


def _stretched(steps: Sequence[int], length: int, new_length: int) -> tuple[int, ...]:
    """Decay steps of a schedule of `length` iterations, moved to the same fractions of `new_length`.

    Rounding never moves one to the end, where it would change nothing.
    """
    if not new_length:
        return ()
    moved = {(min(round(s / length * new_length), new_length - 1) if s < length else new_length) for s in steps}
    return tuple(sorted(moved - {0}))
