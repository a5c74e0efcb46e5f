"""Between base and novel training: refit the box predictor of a checkpoint to other classes, by class names.

- `remove` drops the predictor, so that a novel-only run starts it afresh.
- `randinit` widens it to all classes: base rows are copied, novel rows drawn, background copied to the last row.
- `combine` does the same with novel rows from a second, novel-only checkpoint.

Source: TFA (Wang et al., ICML 2020) section 3 and its released tool; DeFRCN (Qiao et al., ICCV 2021) uses the first
two. The official tools need one flag per data set, since VOC appends novel classes and COCO interleaves them; two
ordered lists of class names make all of them one case. Unlike there, the draws have a seed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fsdet.checkpoint.predictor import first_difference, predictor_classes, predictor_prefixes, recorded_classes
from fsdet.checkpoint.safe_io import METADATA_KEY, load_weights, save_atomic, save_safetensors
from fsdet.data.files import sha256_of

METHODS = ("remove", "randinit", "combine")

# Standard deviation of novel rows, for the classifier and for the boxes (a fresh box head would have 0.001).
NOVEL_STD = 0.01

State = Mapping[str, torch.Tensor]


def remove(state_dict: State) -> OrderedDict[str, torch.Tensor]:
    """Drop weight and bias of classifier and box regressor; everything else is kept.

    Raises: ValueError when there is no box predictor.
    """
    result = _copy(state_dict)
    for prefix in _require_predictor(state_dict):
        for name in _tensors(prefix):
            result.pop(name, None)
    return result


def randinit(
    state_dict: State,
    source_classes: Sequence[str],
    target_classes: Sequence[str],
    *,
    seed: int = 0,
    class_agnostic: bool | None = None,
) -> OrderedDict[str, torch.Tensor]:
    """Refit the predictor to the target classes; rows of new classes are N(0, 0.01^2), their biases 0.

    Args:
        state_dict: weights whose predictor has len(source_classes) + 1 classifier rows, background last.
        source_classes: class names in the order of the predictor's rows.
        target_classes: class names in the order of the new rows; must hold every source class.
        seed: of the generator behind the new rows.
        class_agnostic: whether the box regressor has 4 rows for all classes together; None reads it off the shape
            (and takes 4 rows with a single class as that class's).
    Raises: ValueError for lists that do not fit the file or each other.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        if name.endswith(".bias"):
            return like.new_zeros((count, *like.shape[1:]))
        return torch.normal(0.0, NOVEL_STD, (count, *like.shape[1:]), generator=generator).to(like.dtype)

    _check_source(state_dict, source_classes, "source")
    rows = _rows(source_classes, target_classes, [c for c in target_classes if c not in set(source_classes)])
    return _refit(state_dict, rows, draw, class_agnostic)


def combine(
    state_dict: State,
    novel_state_dict: State,
    source_classes: Sequence[str],
    target_classes: Sequence[str],
    *,
    novel_classes: Sequence[str] | None = None,
    class_agnostic: bool | None = None,
) -> OrderedDict[str, torch.Tensor]:
    """Refit the predictor to the target classes with novel rows from a novel-only checkpoint.

    Base rows, the background row and all other tensors are those of `state_dict`; the novel background is dropped.

    Args:
        novel_state_dict: weights whose predictor has len(novel_classes) + 1 classifier rows.
        novel_classes: class names in the order of its rows; default the target classes that the source has not. Named
            classes win over source rows of the same name (a base model that already has every row, as on LVIS).
    Raises: ValueError as `randinit`, and when the two predictors are of different kinds.
    """
    known = set(source_classes)
    novel = list(novel_classes) if novel_classes is not None else [c for c in target_classes if c not in known]
    _check_source(state_dict, source_classes, "source")
    _check_source(novel_state_dict, novel, "novel")
    shared_boxes = _check_same_kind(state_dict, novel_state_dict)
    order = [novel.index(name) for name in target_classes if name in novel]

    def take(name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        rows = _blocks(name, torch.as_tensor(novel_state_dict[name]), len(novel))
        return rows[order].reshape(count, *like.shape[1:])

    class_agnostic = shared_boxes if class_agnostic is None else class_agnostic
    return _refit(state_dict, _rows(source_classes, target_classes, novel), take, class_agnostic)


def _tensors(prefix: str) -> list[str]:
    return [f"{prefix}{head}.{kind}" for head in ("cls_score", "bbox_pred") for kind in ("weight", "bias")]


def _copy(state_dict: State) -> OrderedDict[str, torch.Tensor]:
    """Shallow copy as tensors, keeping the module versions that a state dict carries along."""
    result = OrderedDict((name, torch.as_tensor(value)) for name, value in state_dict.items())
    result.__dict__.update(getattr(state_dict, "__dict__", {}))
    return result


def _require_predictor(state_dict: State) -> list[str]:
    prefixes = predictor_prefixes(state_dict)
    if not prefixes:
        raise ValueError(
            "The checkpoint has no box predictor (no tensor ...box_predictor.cls_score.weight); surgery needs a "
            "trained detector, not a backbone or a file after `remove`"
        )
    return prefixes


def _check_source(state_dict: State, classes: Sequence[str], role: str) -> None:
    """Refuse a list with repeats or of another length than the predictor of its checkpoint."""
    repeated = sorted({name for name in classes if list(classes).count(name) > 1})
    if repeated:
        raise ValueError(f"The {role} classes repeat {repeated}; every class needs one row")
    _require_predictor(state_dict)
    count = predictor_classes(state_dict)
    if count != len(classes):
        raise ValueError(
            f"The {role} checkpoint has a predictor of {count} classes, but {len(classes)} {role} classes are given; "
            "check --split or the class lists"
        )


def _rows(source: Sequence[str], target: Sequence[str], novel: Sequence[str]) -> list[int]:
    """For every target class its source row, or -1 for a novel one."""
    repeated = sorted({name for name in target if list(target).count(name) > 1})
    if repeated:
        raise ValueError(f"The target classes repeat {repeated}; every class needs one row")
    lost = [name for name in (*source, *novel) if name not in set(target)]
    if lost:
        raise ValueError(f"Unknown classes {lost}: they are not among the target classes {list(target)}")
    nowhere = [name for name in target if name not in set(source) and name not in set(novel)]
    if nowhere:
        raise ValueError(f"Target classes {nowhere} are neither source nor novel classes; no checkpoint has their rows")
    return [-1 if name in set(novel) else list(source).index(name) for name in target]


def _check_same_kind(base: State, novel: State) -> bool | None:
    """Refuse to mix a cosine classifier with a linear one, or different feature widths and box regressors.

    Returns: whether both box regressors are class-agnostic; None when both have a single class, which hides it.
    """
    for name in [name for prefix in _require_predictor(base) for name in _tensors(prefix)]:
        if (name in base) != (name in novel):
            with_it, without = ("base", "novel") if name in base else ("novel", "base")
            raise ValueError(
                f"The {with_it} checkpoint has {name} and the {without} one has not: a linear and a cosine classifier "
                "cannot be combined; train both stages with the same MODEL.ROI_HEADS.OUTPUT_LAYER"
            )
        if name in base and base[name].shape[1:] != novel[name].shape[1:]:
            in_base, in_novel = tuple(base[name].shape[1:]), tuple(novel[name].shape[1:])
            raise ValueError(
                f"{name} has rows of shape {in_base} in the base and {in_novel} in the novel checkpoint; both must "
                "come from the same architecture"
            )
    states = [state for state in (base, novel) if predictor_classes(state) != 1]
    kinds = {_is_agnostic(state, prefix, None) for state in states for prefix in predictor_prefixes(base)}
    if len(kinds) > 1:
        raise ValueError(
            "One checkpoint has a class-agnostic box regressor and the other has one per class; train both with the "
            "same MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
        )
    return kinds.pop() if kinds else None


def _is_agnostic(state_dict: State, prefix: str, given: bool | None) -> bool:
    boxes, classes = state_dict[prefix + "bbox_pred.weight"].shape[0], predictor_classes(state_dict)
    if boxes not in (4, 4 * classes):
        raise ValueError(
            f"{prefix}bbox_pred.weight has {boxes} rows, expected 4 (class-agnostic) or 4 x {classes} classes"
        )
    inferred = boxes == 4 and classes != 1
    if given is not None and given != inferred and classes != 1:
        raise ValueError(f"{prefix}bbox_pred.weight has {boxes} rows, which contradicts class_agnostic={given}")
    return inferred if given is None else given


def _blocks(name: str, tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Rows by class: (count, 4, ...) of a regressor, (count, 1, ...) of a classifier without its background row."""
    if ".cls_score." in name:
        return tensor[:count].unsqueeze(1)
    return tensor.reshape(count, 4, *tensor.shape[1:])


def _refit(
    state_dict: State,
    rows: list[int],
    novel_rows: Callable[[str, int, torch.Tensor], torch.Tensor],
    class_agnostic: bool | None,
) -> OrderedDict[str, torch.Tensor]:
    """Build every predictor tensor anew: block i is block rows[i] of the old one, or the next novel block for -1.

    Args:
        novel_rows: (tensor name, row count, old tensor) -> that many rows, for the -1 blocks in order.
    """
    result = _copy(state_dict)
    is_novel = torch.tensor([row < 0 for row in rows])
    known = torch.tensor([row for row in rows if row >= 0], dtype=torch.long)
    for prefix in _require_predictor(state_dict):
        agnostic = _is_agnostic(state_dict, prefix, class_agnostic)
        for name in _tensors(prefix):
            if name not in result or (agnostic and "bbox_pred" in name):
                continue
            old = result[name]
            blocks = _blocks(name, old, predictor_classes(state_dict))
            new = old.new_empty((len(rows), *blocks.shape[1:]))
            new[~is_novel] = blocks[known]
            count = int(is_novel.sum())
            new[is_novel] = novel_rows(name, count * blocks.shape[1], old).reshape(count, *blocks.shape[1:])
            flat = new.flatten(0, 1)
            result[name] = torch.cat([flat, old[-1:]]) if "cls_score" in name else flat
    return result


def operate(
    method: str,
    checkpoint: Mapping[str, Any],
    novel_checkpoint: Mapping[str, Any] | None = None,
    *,
    source_classes: Sequence[str] | None = None,
    target_classes: Sequence[str] | None = None,
    novel_classes: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Apply one method to a whole checkpoint; only the weights remain, with iteration 0.

    Args:
        method: "remove", "randinit" or "combine".
        checkpoint, novel_checkpoint: as `load_weights` returns them; the second one for "combine".
        source_classes: default the classes that the checkpoint records. Given and recorded lists must be equal.
        target_classes, novel_classes, seed: see `randinit` and `combine`.
    Returns: {"model": state dict, "iteration": 0}; optimizer, scheduler and trainer state are dropped.
    Raises: ValueError for contradictions of any kind.
    """
    if method not in METHODS:
        raise ValueError(f'Unknown method "{method}"; expected one of {", ".join(METHODS)}')
    if (novel_checkpoint is not None) != (method == "combine"):
        raise ValueError(f"A second, novel-only checkpoint belongs to combine and to it alone; the method is {method}")
    source = _agreed(checkpoint, source_classes, "source")
    if method == "remove":
        model = remove(checkpoint["model"])
    elif source is None or target_classes is None:
        raise ValueError(f"{method} needs the source and the target classes; give --split or the two class lists")
    elif method == "randinit":
        model = randinit(checkpoint["model"], source, target_classes, seed=seed)
    else:
        novel = _agreed(novel_checkpoint, novel_classes, "novel")
        model = combine(checkpoint["model"], novel_checkpoint["model"], source, target_classes, novel_classes=novel)
    return {"model": model, "iteration": 0}


def _agreed(checkpoint: Mapping[str, Any], given: Sequence[str] | None, role: str) -> tuple[str, ...] | None:
    recorded = recorded_classes(checkpoint)
    if recorded is None or given is None:
        return recorded if given is None else tuple(given)
    if recorded != tuple(given):
        raise ValueError(
            f"The {role} classes are not those that the {role} checkpoint records: "
            f"{first_difference(recorded, tuple(given))}; its classes are {list(recorded)}"
        )
    return recorded


def surgery_file(
    source: str | Path,
    output: str | Path,
    method: str,
    *,
    novel_source: str | Path | None = None,
    source_classes: Sequence[str] | None = None,
    target_classes: Sequence[str] | None = None,
    novel_classes: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Apply `operate` to files and record classes, method, seed and digests in the output.

    Args:
        source, novel_source: weight files of any format that `load_weights` reads.
        output: .pth or .safetensors to write.
    Returns: the record that was written under "fsdet".
    Raises: ValueError as `operate`, naming the file; FileNotFoundError; CheckpointFileError.
    """
    output = Path(output)
    if output.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{output}: surgery writes .pth or .safetensors")
    files = [Path(source)] + ([Path(novel_source)] if novel_source is not None else [])
    checkpoints = [load_weights(path) for path in files]
    try:
        result = operate(
            method,
            *checkpoints,
            source_classes=source_classes,
            target_classes=target_classes,
            novel_classes=novel_classes,
            seed=seed,
        )
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, files))}: {error}") from error
    record = {
        "classes": list(target_classes) if method != "remove" else [],
        "stage": f"surgery-{method}",
        "seed": seed if method == "randinit" else None,
        "sources": [{"file": path.name, "sha256": sha256_of(path)} for path in files],
    }
    if output.suffix == ".pth":
        save_atomic({**result, METADATA_KEY: record}, output)
    else:
        save_safetensors(result["model"], output, record)
    return record
