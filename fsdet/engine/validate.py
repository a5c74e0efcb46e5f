"""Ranges and combinations of configuration values, checked before anything is built."""

from __future__ import annotations

from detectron2.config import CfgNode

from fsdet.methods import method_faults

_CHOICES = {
    "FEWSHOT.LAYOUT": ("voc", "coco", "custom", "oneshot"),
    "FEWSHOT.STAGE": ("base", "novel"),
    "FEWSHOT.SETTING": ("gfsod", "fsod"),
    "FEWSHOT.RECORDS": ("instance", "image"),
    "FEWSHOT.CHOICE": ("seeded", "official"),
    "FEWSHOT.LEAK": ("background", "drop", "ignore"),
    "FEWSHOT.SURGERY": ("randinit", "remove", "combine", "none"),
    "TEST.STYLE": ("coco", "voc"),
    "SOLVER.AMP.DTYPE": ("auto", "bfloat16", "float16"),
    "INPUT.FS.SAMPLING": ("fresh", "legacy"),
}
# SOLVER keys that must be positive; MAX_ITER may be 0 where nothing is to be trained.
_POSITIVE = ("BASE_LR", "IMS_PER_BATCH", "ACCUMULATION_STEPS", "CHECKPOINT_PERIOD", "CHECKPOINTS_KEPT", "MAX_ITER")


def _value(cfg: CfgNode, key: str) -> object:
    """Value of a dotted key."""
    node: object = cfg
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _draw_faults(fewshot: CfgNode) -> list[str]:
    """Faults of stage, shot, seed and repetition."""
    faults = []
    if fewshot.STAGE == "novel" and fewshot.SHOT < 1:
        faults.append(f"FEWSHOT.SHOT is {fewshot.SHOT}; the novel stage needs K >= 1, e.g. FEWSHOT.SHOT 5")
    if fewshot.STAGE == "base" and fewshot.SHOT:
        faults.append(f"FEWSHOT.SHOT is {fewshot.SHOT}, but FEWSHOT.STAGE base trains on all images; leave it out")
    if fewshot.SEED < 0:
        faults.append(f"FEWSHOT.SEED is {fewshot.SEED}; draws are numbered from 0")
    if fewshot.REPEAT < 0:
        faults.append(f"FEWSHOT.REPEAT is {fewshot.REPEAT}; repetitions are numbered from 0")
    if fewshot.STAGE == "base" and fewshot.REPEAT:
        faults.append(
            f"FEWSHOT.REPEAT is {fewshot.REPEAT}, but it counts runs on K shots; set SEED for another base run"
        )
    return faults


def _own_data_faults(fewshot: CfgNode) -> list[str]:
    """What own data lacks, in one line. A base model may do without novel classes, and be used without a test set."""
    missing = [key for key in ("TRAIN_JSON", "TEST_JSON", "NOVEL_CLASSES") if not fewshot[key]]
    needed = missing if fewshot.STAGE == "novel" else "TRAIN_JSON" in missing
    if fewshot.LAYOUT != "custom" or not needed:
        return []
    return [
        f"FEWSHOT.LAYOUT custom needs FEWSHOT.{', FEWSHOT.'.join(missing)}: COCO-format files below FEWSHOT.ROOT, and "
        "the names of the novel classes; docs/datasets.md (Own data) has an example"
    ]


def _oneshot_faults(fewshot: CfgNode) -> list[str]:
    """Faults of the keys of one-shot sets."""
    faults = []
    if fewshot.LAYOUT == "oneshot" and not (fewshot.TRAIN_JSON or fewshot.TEST_JSON):
        faults.append("FEWSHOT.LAYOUT oneshot needs FEWSHOT.TRAIN_JSON or FEWSHOT.TEST_JSON, its CSV")
    if fewshot.LAYOUT == "oneshot" and fewshot.LEAK != "background":
        faults.append(
            f"FEWSHOT.LEAK is {fewshot.LEAK}, but one-shot sets have no labels of novel objects in training scenes; "
            "set background"
        )
    if fewshot.LAYOUT != "oneshot" and (fewshot.CLASS_IMAGES or fewshot.CLEAR_DIFFICULT):
        faults.append("FEWSHOT.CLASS_IMAGES and CLEAR_DIFFICULT are for FEWSHOT.LAYOUT oneshot; leave them out")
    if len(fewshot.ONESHOT_SETS) != 3:
        faults.append(
            f"FEWSHOT.ONESHOT_SETS is {tuple(fewshot.ONESHOT_SETS)}; expected the names of three sets: training, test "
            "of the base classes, test of the novel ones"
        )
    return faults


def _protocol_faults(cfg: CfgNode) -> list[str]:
    """Faults of the FEWSHOT keys that a user sets."""
    fewshot = cfg.FEWSHOT
    faults = [
        f'{key} is "{_value(cfg, key)}"; expected {" | ".join(allowed)}'
        for key, allowed in _CHOICES.items()
        if _value(cfg, key) not in allowed
    ]
    faults += _draw_faults(fewshot)
    if fewshot.LAYOUT == "voc" and fewshot.SPLIT not in (1, 2, 3):
        faults.append(f"FEWSHOT.SPLIT is {fewshot.SPLIT}; VOC has the class splits 1, 2 and 3")
    faults += _own_data_faults(fewshot) + _oneshot_faults(fewshot)
    if fewshot.LAYOUT != "custom" and fewshot.NOVEL_CLASSES:
        faults.append("FEWSHOT.NOVEL_CLASSES is for FEWSHOT.LAYOUT custom; voc and coco have fixed splits")
    if fewshot.LAYOUT == "voc" and (fewshot.TRAIN_JSON or fewshot.TEST_JSON):
        faults.append("FEWSHOT.TRAIN_JSON and TEST_JSON are for FEWSHOT.LAYOUT coco and custom; voc reads XML files")
    if fewshot.LAYOUT != "voc" and fewshot.SPLIT != 1:
        faults.append(f"FEWSHOT.SPLIT is {fewshot.SPLIT}, but only FEWSHOT.LAYOUT voc has several class splits")
    if fewshot.CHOICE == "official" and fewshot.SURGERY == "none":
        faults.append(
            "FEWSHOT.CHOICE official draws other shots in every process and evaluation, and this detector reads them "
            "at test time; use seeded"
        )
    faults += [
        f'{item}: expected "folder:image set"' for item in (*fewshot.VOC_TRAIN, *fewshot.VOC_TEST) if ":" not in item
    ]
    return faults


def is_untrained(cfg: CfgNode) -> bool:
    """Whether this is a novel stage without training: the base model as it is, which learns from its supports alone."""
    fewshot = cfg.FEWSHOT
    return fewshot.STAGE == "novel" and fewshot.SURGERY == "none" and cfg.SOLVER.MAX_ITER == 0


def _solver_faults(cfg: CfgNode) -> list[str]:
    """Faults of solver and model values."""
    solver, faults = cfg.SOLVER, []
    for key in _POSITIVE[:-1] if is_untrained(cfg) else _POSITIVE:
        if getattr(solver, key) <= 0:
            faults.append(f"SOLVER.{key} is {getattr(solver, key)}; it must be positive")
    if solver.ACCUMULATION_STEPS > 0 and solver.IMS_PER_BATCH % solver.ACCUMULATION_STEPS:
        faults.append(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is no multiple of SOLVER.ACCUMULATION_STEPS "
            f"{solver.ACCUMULATION_STEPS}"
        )
    if solver.WARMUP_ITERS >= solver.MAX_ITER > 1:
        faults.append(
            f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} does not end before SOLVER.MAX_ITER {solver.MAX_ITER}: the "
            "learning rate would never be reached"
        )
    if list(solver.STEPS) != sorted(solver.STEPS):
        faults.append(f"SOLVER.STEPS {tuple(solver.STEPS)} must grow")
    if any(step >= solver.MAX_ITER for step in solver.STEPS):
        faults.append(f"SOLVER.STEPS {tuple(solver.STEPS)} must lie below SOLVER.MAX_ITER {solver.MAX_ITER}")
    if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON:
        faults.append("MODEL.MASK_ON and MODEL.KEYPOINT_ON must be False: this suite detects boxes")
    if cfg.TEST.AUG.ENABLED:
        faults.append("TEST.AUG.ENABLED: there is no test-time augmentation here; set it to False")
    if cfg.DATALOADER.NUM_WORKERS < 0:
        faults.append(f"DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}; 0 loads in the main process")
    return faults


def _speed_faults(cfg: CfgNode) -> list[str]:
    """Faults of what makes fine-tuning faster."""
    keys = (
        "MODEL.ROI_HEADS.BACKGROUND_KEPT",
        "MODEL.RPN.NEGATIVES_KEPT",
        "MODEL.BACKBONE.CACHE_MIB",
        "DATALOADER.VIEWS",
    )
    faults = [f"{key} is {_value(cfg, key)}; it cannot be negative (0: off)" for key in keys if _value(cfg, key) < 0]
    if cfg.MODEL.BACKBONE.CACHE_MIB and not cfg.MODEL.BACKBONE.FREEZE:
        faults.append(
            f"MODEL.BACKBONE.CACHE_MIB is {cfg.MODEL.BACKBONE.CACHE_MIB}, but the backbone trains and its features "
            "change; set MODEL.BACKBONE.FREEZE True, or CACHE_MIB 0"
        )
    return faults


def _episode_faults(cfg: CfgNode) -> list[str]:
    """Faults of what a query image meets."""
    episode = cfg.INPUT.FS
    return [
        f"INPUT.FS.{key} is {episode[key]}; it must be at least {least}"
        for key, least in (("SUPPORT_SHOT", 1), ("CROP_SIZE", 32), ("CACHE_MIB", 0))
        if episode[key] < least
    ]


def _patch_faults(cfg: CfgNode) -> list[str]:
    """Faults of training patches."""
    patch = cfg.INPUT.PATCH
    least = {"SIZE": 16, "SCALE": 0, "OBJECT_SIZE": 0, "EXTRA_NEGATIVES": 0, "MINING_PERIOD": 0, "MINING_CLASSES": 0,
             "MINING_SCALES": 1, "MINED_PER_IMAGE": 1}  # fmt: skip
    faults = [
        f"INPUT.PATCH.{key} is {patch[key]}; it must be at least {low}"
        for key, low in least.items()
        if patch[key] < low
    ]
    faults += [
        f"INPUT.PATCH.{key} is {patch[key]}; expected a number above 0 and up to 1"
        for key in ("SCALE_JITTER", "ASPECT_JITTER", "MIN_COVERAGE")
        if not 0 < patch[key] <= 1
    ]
    if patch.ENABLED and cfg.INPUT.FS.ENABLED:
        faults.append("INPUT.PATCH.ENABLED and INPUT.FS.ENABLED are both True; a training image is one or the other")
    if cfg.SOLVER.CLIP_TOTAL_NORM < 0:
        faults.append(f"SOLVER.CLIP_TOTAL_NORM is {cfg.SOLVER.CLIP_TOTAL_NORM}; it cannot be negative (0: off)")
    return faults


def validate(cfg: CfgNode, *, only_protocol: bool = False) -> None:
    """Check ranges and combinations.

    Raises: ValueError with one line per fault.
    """
    faults = _protocol_faults(cfg)
    if not only_protocol:
        faults += _solver_faults(cfg) + _speed_faults(cfg) + _episode_faults(cfg)
        faults += _patch_faults(cfg) + method_faults(cfg)
    if faults:
        raise ValueError("The configuration cannot run:\n  " + "\n  ".join(faults))
