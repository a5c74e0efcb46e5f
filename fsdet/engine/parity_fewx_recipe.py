"""Golden optimizer groups of FewX: what trains in base training and fine-tuning, at which learning rate and decay.

Source: FewX (Fan et al., CVPR 2020), official configurations and optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdet.engine.parity import Comparison, Ledger, golden_file, read_json
from fsdet.engine.parity_fewx_detector import STAGES, build_small
from fsdet.engine.trainer import make_optimizer

FIELDS = ("trainable", "frozen", "momentum", "nesterov")
RATE_TOLERANCE = 1e-9  # learning rates and decays are small numbers


def check_groups(folder: Path) -> Iterator[Comparison]:
    """g: solver values of every tensor in both stages, from the shipped configurations."""
    golden = read_json(golden_file(folder, "g_optimizer_groups"))
    values = {name: value for name, value in golden.items() if name not in STAGES}
    values |= {f"{stage}/{name}": value for stage in STAGES for name, value in golden.get(stage, {}).items()}
    ledger = Ledger(values, expected=[f"{stage}/{name}" for stage in STAGES for name in FIELDS])
    for stage in STAGES:
        for name, value in solver_values(stage).items():
            if name == "frozen":  # their order is the file's
                in_file = values.get(f"{stage}/frozen", [])
                value = [n for n in in_file if n in value] + sorted(value - set(in_file))
            yield ledger.compare(f"{stage}/{name}", value, RATE_TOLERANCE)
    yield from ledger.rest()


def solver_values(stage: str) -> dict[str, Any]:
    """What the file has of a stage; `frozen` as a set.

    Raises: ValueError when momentum or Nesterov's rule are not the same for all groups.
    """
    model, cfg = build_small(stage)
    optimizer = make_optimizer(cfg, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates: dict[str, list[float]] = {}
    shared = set()
    for group in optimizer.param_groups:
        rates |= {names[id(parameter)]: [group["lr"], group["weight_decay"]] for parameter in group["params"]}
        shared.add((group["momentum"], group["nesterov"]))
    if len(shared) != 1:
        raise ValueError(f"momentum and Nesterov's rule differ between the groups: {sorted(shared)}")
    momentum, nesterov = shared.pop()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {"trainable": rates, "frozen": frozen, "momentum": momentum, "nesterov": nesterov}
