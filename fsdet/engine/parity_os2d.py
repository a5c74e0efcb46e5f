"""Golden files of OS2D.

Source: OS2D (Osokin et al., ECCV 2020), official release.
"""

from __future__ import annotations

from fsdet.engine import (
    parity_os2d_boxes,
    parity_os2d_detector,
    parity_os2d_eval,
    parity_os2d_head,
    parity_os2d_losses,
    parity_os2d_model,
    parity_os2d_training,
)
from fsdet.engine.parity import Checker

SCHEMA = (
    "box_coder", "evaluation", "head", "model", "objective", "resize", "train_step", "transform_net",
)  # fmt: skip

CHECKERS: dict[str, Checker] = {
    "box_coder": parity_os2d_boxes.check_boxes,
    "evaluation": parity_os2d_eval.check_metrics,
    "head": parity_os2d_head.check_head,
    "model": parity_os2d_model.check_model,
    "objective": parity_os2d_losses.check_losses,
    "resize": parity_os2d_eval.check_sizes,
    "train_step": parity_os2d_training.check_step,
    "transform_net": parity_os2d_detector.check_transform,
}
