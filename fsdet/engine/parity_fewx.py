"""Golden files of FewX.

Source: FewX (Fan et al., CVPR 2020), official release.
"""

from __future__ import annotations

from fsdet.engine import (
    parity_fewx_data,
    parity_fewx_detector,
    parity_fewx_eval,
    parity_fewx_heads,
    parity_fewx_recipe,
    parity_fewx_training,
)
from fsdet.engine.parity import Checker

SCHEMA = (
    "a_attention_rpn", "b_relation_heads", "b_full_size_init_stats", "c_detector_loss", "c_train_step", "d_eval",
    "e_support_crop", "f_data_rules", "g_optimizer_groups", "tiny_weights",
)  # fmt: skip

CHECKERS: dict[str, Checker] = {
    "a_attention_rpn": parity_fewx_heads.check_attention,
    "b_full_size_init_stats": parity_fewx_heads.check_initialisation,
    "b_relation_heads": parity_fewx_heads.check_relations,
    "c_detector_loss": parity_fewx_training.check_losses,
    "c_train_step": parity_fewx_training.check_step,
    "d_eval": parity_fewx_eval.check_evaluation,
    "e_support_crop": parity_fewx_data.check_crops,
    "f_data_rules": parity_fewx_data.check_rules,
    "g_optimizer_groups": parity_fewx_recipe.check_groups,
    "tiny_weights": parity_fewx_detector.check_weights,
}
