"""Golden files of DeFRCN, and of what TFA shares with it.

Source: DeFRCN (Qiao et al., ICCV 2021), official implementation.
"""

from __future__ import annotations

from fsdet.engine import (
    parity_calibration,
    parity_detector,
    parity_heads,
    parity_model,
    parity_protocol,
    parity_recipe,
    parity_surgery,
)
from fsdet.engine.parity import Checker

SCHEMA = (
    "a_gdl_affine", "b_fast_rcnn", "c_surgery", "d_model_r50w16", "d_pcb", "d_solver", "d_train3", "e_fake_datasets",
    "e_fewshot_sampling", "e_loader_records", "f_evaluators", "g_aggregate", "configs_effective",
)  # fmt: skip

CHECKERS: dict[str, Checker] = {
    "a_gdl_affine": parity_heads.check_gradient,
    "b_fast_rcnn": parity_heads.check_predictor,
    "c_surgery": parity_surgery.check_surgery,
    "configs_effective": parity_recipe.check_configs,
    "d_model_r50w16": parity_model.check_detector,
    "d_pcb": parity_calibration.check_pcb,
    "d_solver": parity_recipe.check_solver,
    "d_train3": parity_detector.check_steps,
    "e_fake_datasets": parity_protocol.check_fake_datasets,
    "e_fewshot_sampling": parity_protocol.check_sampling,
    "e_loader_records": parity_protocol.check_records,
    "f_evaluators": parity_protocol.check_evaluators,
    "g_aggregate": parity_protocol.check_aggregate,
}
