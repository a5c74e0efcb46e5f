"""Official checkpoints in: apply a rename table and account for every key on either side.

A table is an ordered list of rows (pattern, replacement): the first pattern that matches the start of a key wins, and
the matched part is replaced; None drops the key on purpose. A key that no row takes, or that the model does not know,
is reported, as is every model tensor that stays empty.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdet.checkpoint.safe_io import METADATA_KEY, load_weights, save_atomic, save_safetensors
from fsdet.data.files import sha256_of

Table = Sequence[tuple[str, str | None]]

# Buffers of anchors and pixel statistics, which older versions of Detectron2 saved and the configuration sets now.
_GONE: Table = (
    (r"(module\.)?proposal_generator\.anchor_generator\.cell_anchors\.\d+$", None),
    (r"(module\.)?pixel_(mean|std)$", None),
)
# Modules of the official codes that have Detectron2's names to this day.
_SAME: Table = (
    (r"(module\.)?backbone\.", "backbone."),
    (r"(module\.)?proposal_generator\.rpn_head\.", "proposal_generator.rpn_head."),
    (r"(module\.)?roi_heads\.", "roi_heads."),
)

# TFA (ucbdrive/few-shot-object-detection). The learnable scale of the cosine classifier belongs to the classifier here.
OFFICIAL_TFA: Table = (
    *_GONE,
    (r"(module\.)?roi_heads\.box_predictor\.scale$", "roi_heads.box_predictor.cls_score.scale"),
    *_SAME,
)

# DeFRCN (er-muyue/DeFRCN). The affine layers belong to the branches that read through them here.
OFFICIAL_DEFRCN: Table = (
    *_GONE,
    (r"(module\.)?affine_rpn\.", "proposal_generator.decouple.res4."),
    (r"(module\.)?affine_rcnn\.", "roi_heads.decouple.res4."),
    *_SAME,
)

# FewX (fanq15/FewX). All names are the same here.
OFFICIAL_FEWX: Table = (*_GONE, *_SAME)

# OS2D (aosokin/os2d). A backbone that scenes and class images share stands in its files twice.
OFFICIAL_OS2D: Table = (
    (r"(module\.)?net_feature_maps\.", "backbone."),
    (r"(module\.)?net_label_features\.net_class_features\.", "backbone."),
    (r"(module\.)?os2d_head_creator\.aligner\.parameter_regressor\.", "head.transform_net."),
)

TABLES: dict[str, Table] = {
    "defrcn": OFFICIAL_DEFRCN,
    "fewx": OFFICIAL_FEWX,
    "os2d": OFFICIAL_OS2D,
    "tfa": OFFICIAL_TFA,
}


@dataclass(frozen=True)
class RenameReport:
    """Account of one conversion.

    Attributes:
        renamed: old key -> new key.
        dropped: keys that a row of the table drops on purpose, and second copies of the same tensor.
        unmatched: keys that no row of the table takes.
        unexpected: new keys that the model does not have.
        missing: model keys that nothing fills.
        mismatched: (new key, shape in the file, shape in the model).
    """

    renamed: dict[str, str]
    dropped: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def is_full(self) -> bool:
        """True when every key of the file was taken or dropped on purpose and every model tensor is filled."""
        return not (self.unmatched or self.unexpected or self.missing or self.mismatched)

    def describe(self) -> str:
        """Counts, then every key at fault, one per line."""
        lines = [f"{len(self.renamed)} keys renamed, {len(self.dropped)} dropped on purpose"]
        lines += [f"  no row of the table takes {key}" for key in self.unmatched]
        lines += [f"  not in the model: {key}" for key in self.unexpected]
        lines += [f"  not in the file: {key}" for key in self.missing]
        lines += [f"  other shape: {key}, {a} in the file, {b} in the model" for key, a, b in self.mismatched]
        return "\n".join(lines)


def rename(
    state_dict: Mapping[str, Any], table: Table, model_state: Mapping[str, torch.Tensor] | None = None
) -> tuple[OrderedDict[str, torch.Tensor], RenameReport]:
    """Rename the keys of a state dict and compare the result with a model.

    Args:
        state_dict: official key -> tensor or array.
        table: rows (pattern matched at the start of the key, replacement or None).
        model_state: state dict of the model that will load it; None leaves the model's side unchecked.
    Returns: the renamed state dict, of all keys that a row takes, and the report.
    Raises: ValueError when two keys with different values get the same name.
    """
    rows = [(re.compile(pattern), replacement) for pattern, replacement in table]
    result: OrderedDict[str, torch.Tensor] = OrderedDict()
    renamed, dropped, unmatched = {}, [], []
    for key, value in state_dict.items():
        pattern, replacement = next(((p, r) for p, r in rows if p.match(key)), (None, None))
        if pattern is None:
            unmatched.append(key)
        elif replacement is None:
            dropped.append(key)
        else:
            new = pattern.sub(replacement, key, count=1)
            if new not in result:
                renamed[key], result[new] = new, torch.as_tensor(value)
            elif torch.equal(result[new], torch.as_tensor(value)):
                dropped.append(key)
            else:
                raise ValueError(
                    f"Two keys of the checkpoint with different values are renamed to {new}, one of them {key}: a part "
                    "that is shared here has two sets of weights there, or the table is another method's"
                )
    known = result if model_state is None else model_state
    report = RenameReport(
        renamed=renamed,
        dropped=tuple(dropped),
        unmatched=tuple(unmatched),
        unexpected=tuple(key for key in result if key not in known),
        missing=tuple(key for key in known if key not in result),
        mismatched=tuple(
            (key, tuple(value.shape), tuple(known[key].shape))
            for key, value in result.items()
            if key in known and value.shape != known[key].shape
        ),
    )
    return result, report


def convert_file(
    source: str | Path,
    output: str | Path,
    table: Table,
    *,
    model_state: Mapping[str, torch.Tensor] | None = None,
    allow_unmatched: bool = False,
    record: Mapping[str, Any] | None = None,
) -> RenameReport:
    """Write the weights of an official checkpoint under this project's names.

    Args:
        source: weight file of any format that `load_weights` reads; optimizer and scheduler state are left behind.
        output: .pth or .safetensors to write.
        table: rename table, for instance TABLES["tfa"].
        model_state: see `rename`.
        allow_unmatched: write what fits even when keys remain on either side.
        record: plain values added to the "fsdet" entry of the output, for instance "classes".
    Returns: the report.
    Raises: ValueError that names the file and lists the keys that remain.
    """
    output = Path(output)
    if output.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{output}: converted weights are written as .pth or .safetensors")
    state, report = rename(load_weights(source)["model"], table, model_state)
    if not (report.is_full or allow_unmatched):
        raise ValueError(
            f"{source} does not fit the rename table or the model: {report.describe()}\n"
            "Add rows to the table, check the configuration, or allow unmatched keys to convert the rest."
        )
    entry = {"stage": "converted", "sources": [{"file": Path(source).name, "sha256": sha256_of(source)}]}
    entry |= dict(record or {})
    if output.suffix == ".pth":
        save_atomic({"model": state, "iteration": 0, METADATA_KEY: entry}, output)
    else:
        save_safetensors(state, output, entry)
    return report
