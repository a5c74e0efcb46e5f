"""Freezing parts of a detector for fine-tuning.

Source: TFA section 3.1 (phase 2 trains only the box predictor) and DeFRCN's released configs (res5 frozen, res4 and RPN
trained). The official code clears `requires_grad`; here a frozen part also stays in evaluation mode, since live batch
norm would otherwise let its running statistics drift on a few dozen images. Nothing that is frozen records a graph:
no parameter and no input of it requires a gradient, so backbone and RPN cost a forward pass only.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

from detectron2.config import CfgNode
from torch import nn

# What each switch freezes: attributes of the component, as far as it has them. Never the RPN or the ROI heads as a
# whole: their `training` flag selects losses and proposal counts, and layers that a method adds beside them
# (DeFRCN's affine layers) train in every stage. box_head: FPN heads; res5: C4 heads.
RPN_PARTS = ("rpn_head",)
ROI_FEATURE_PARTS = ("box_head", "res5")


def _train_nothing(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)


def freeze_module(module: nn.Module) -> None:
    """Stop training a module for good: no gradients, and evaluation mode even after `train()` on its parents."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.train = MethodType(_train_nothing, module)
    module.train(False)


def apply_freeze(model: nn.Module, cfg: CfgNode) -> list[str]:
    """Freeze what MODEL.BACKBONE.FREEZE, PROPOSAL_GENERATOR.FREEZE and ROI_HEADS.FREEZE_FEAT ask for.

    Call it after `build_model` and before the optimizer and DistributedDataParallel are made. MODEL.BACKBONE.FREEZE_AT
    is the backbone's own matter and has been obeyed by then.

    Returns:
        The prefixes of all trainable parameters, sorted.

    Raises:
        ValueError: if a switch finds nothing to freeze, or if nothing is left to train.

    Source: TFA spec of phase 2; DeFRCN's FREEZE flags.
    """
    if cfg.MODEL.BACKBONE.FREEZE:
        _freeze_parts(model, "backbone", (), "MODEL.BACKBONE.FREEZE")
    if cfg.MODEL.PROPOSAL_GENERATOR.FREEZE:
        _freeze_parts(model, "proposal_generator", RPN_PARTS, "MODEL.PROPOSAL_GENERATOR.FREEZE")
    if cfg.MODEL.ROI_HEADS.FREEZE_FEAT:
        _freeze_parts(model, "roi_heads", ROI_FEATURE_PARTS, "MODEL.ROI_HEADS.FREEZE_FEAT")
    trainable = trainable_prefixes(model)
    if not trainable:
        raise ValueError(f"nothing is left to train in {type(model).__name__}: every parameter is frozen")
    return trainable


def _freeze_parts(model: nn.Module, component: str, parts: tuple[str, ...], key: str) -> None:
    root = getattr(model, component, None)
    found = [root] if root is not None and not parts else [getattr(root, part, None) for part in parts]
    found = [module for module in found if isinstance(module, nn.Module)]
    if not found:
        wanted = f"{component}.{{{','.join(parts)}}}" if parts else component
        raise ValueError(f"{key} is True, but {type(model).__name__} has no {wanted}; set {key} to False")
    for module in found:
        freeze_module(module)


def trainable_prefixes(model: nn.Module) -> list[str]:
    """Name what trains: two name components where all parameters under them train, more where only some do.

    For instance ["backbone.res4", "roi_heads.box_predictor"].
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return sorted(_prefixes(flags, depth=2))


def _prefixes(flags: dict[str, bool], depth: int) -> Iterator[str]:
    groups: dict[str, dict[str, bool]] = {}
    for name, trains in flags.items():
        groups.setdefault(".".join(name.split(".")[:depth]), {})[name] = trains
    for prefix, members in groups.items():
        if all(members.values()):
            yield prefix
        elif any(members.values()):
            yield from _prefixes(members, depth + 1)
