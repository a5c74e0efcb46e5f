"""Configuration: Detectron2's defaults, fsdet's keys, files, command line, and the values derived from them.

Order: defaults < base files < file < derived < command line. Split, shot, seed and setting are values, not file names;
`derive` turns them into data set names, class counts, a schedule and an output folder, once. A dumped config is marked
`FEWSHOT.RESOLVED` and loads as it stands.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from fsdet.data.catalog import DatasetSources, DatasetSpec, class_split, register
from fsdet.data.splits import ClassSplit
from fsdet.engine.schedule import apply_schedule
from fsdet.engine.validate import validate
from fsdet.methods import add_method_configs, complete_method_configs
from fsdet.modeling import add_modeling_config

logger = logging.getLogger(__name__)

MODEL_FILE = "model_final.pth"  # what a finished training leaves


def add_fewshot_config(cfg: CfgNode) -> None:
    """Declare the keys of data, protocol and schedule (the methods declare their own)."""
    cfg.FEWSHOT = fewshot = CfgNode()
    fewshot.METHOD = "tfa"  # label of the recipe, used for folders and reports
    fewshot.MODEL = ""  # label of the network, used for folders and reports
    fewshot.DATASET = "voc"  # label of the data, used for folders and reports
    # voc (XML, class splits 1-3) | coco (official ids, 60/20) | custom (any COCO-format set) | oneshot (scenes, and a
    # folder with a picture or more of each class)
    fewshot.LAYOUT = "voc"
    fewshot.STAGE = "base"  # base: all images, base classes | novel: K-shot fine-tuning
    fewshot.SETTING = "gfsod"  # novel stage: gfsod (base and novel classes together) | fsod (novel classes alone)
    fewshot.SPLIT = 1  # class split of VOC
    fewshot.SHOT = 0  # K; 0 in the base stage
    fewshot.SEED = 0  # which draw of the K shots
    # Repetition of a run on the same K shots: it trains with SEED + 1000 * REPEAT, in a folder of its own.
    fewshot.REPEAT = 0
    # Where the data is. Relative paths lie below ROOT; "" means $DETECTRON2_DATASETS, else ./datasets.
    fewshot.ROOT = ""
    fewshot.SAMPLES = ""  # folder of the K-shot lists; "" = vocsplit | cocosplit
    fewshot.TRAIN_JSON, fewshot.TRAIN_IMAGES = "", ""  # COCO-format sets; "" = the official places
    fewshot.TEST_JSON, fewshot.TEST_IMAGES = "", ""
    # File of image ids, one a line, relative to the working folder: the test images to evaluate on; "" = all.
    fewshot.TEST_LIST = ""
    fewshot.NOVEL_CLASSES = ()  # names; custom data only
    # One-shot data only. TRAIN_JSON and TEST_JSON name its CSV (or COCO-format files).
    fewshot.CLASS_IMAGES = ""  # folder of the pictures of the classes
    # Values of the CSV's column "split": training, test of the base classes, test of the novel ones; "" = all rows.
    fewshot.ONESHOT_SETS = ("train", "val-old-cl", "val-new-cl")
    fewshot.CLEAR_DIFFICULT = False  # test on difficult objects as on any other
    fewshot.VOC_TRAIN = ("VOC2007:trainval", "VOC2012:trainval")  # folder:image set
    fewshot.VOC_TEST = ("VOC2007:test",)
    # Protocol switches; each one changes results and is written into result.json.
    fewshot.RECORDS = (
        "instance"  # K-shot record: instance (TFA) | image (instances of one image merged; DeFRCN on COCO)
    )
    fewshot.CHOICE = "seeded"  # which K of a longer list: seeded by (split, seed, class) | official (unseeded)
    # Unlabelled novel objects in base images: background | drop (image) | ignore (region). A novel stage only names
    # the policy of its base run.
    fewshot.LEAK = "background"
    fewshot.DIFFICULT = True  # train on VOC's difficult objects, as the official loader does
    fewshot.OUTPUT = "output"  # folder that run folders are derived below
    # Detector that a base stage starts from, with all that the two have in common: the METHOD whose base run on this
    # network, data and split it is, or a file; "" = MODEL.WEIGHTS. A novel stage leaves it alone.
    fewshot.INIT = ""
    # The base run that a novel stage starts from: its folder and the surgered file in it.
    fewshot.BASE_METHOD = ""  # label of the base run's method; "" = METHOD
    fewshot.BASE_RUN = ""  # folder; "" = derived from BASE_METHOD, data set and split
    # randinit | remove | combine: which surgered file MODEL.WEIGHTS defaults to (always remove where the detector has
    # the novel classes alone: fsod) | none: for a detector without weights of its own for each class, which goes on
    # from the base run's model_final.pth as it is.
    fewshot.SURGERY = "randinit"
    fewshot.RESET_PREDICTOR = False  # drop the checkpoint's predictor: start from any plain Detectron2 checkpoint
    # Rows [split, setting, shot, base LR, decay steps, iterations, warm-up]; "*" matches all; the first match wins.
    fewshot.SCHEDULE = []
    fewshot.RESOLVED = False  # set by derive()


def add_engine_config(cfg: CfgNode) -> None:
    """Declare the keys of solver, loader and evaluation that Detectron2 lacks."""
    # Episodes: each query image comes with crops of supports, in training. Official names (FewX): INPUT.FS.SUPPORT_WAY
    # and SUPPORT_SHOT.
    cfg.INPUT.FS = CfgNode()
    cfg.INPUT.FS.ENABLED = False
    cfg.INPUT.FS.SUPPORT_WAY = 2  # classes that a query image meets: its own, and others that it does not show
    cfg.INPUT.FS.SUPPORT_SHOT = 10  # supports of each of them
    cfg.INPUT.FS.CROP_SIZE = 320  # px, side of a crop, at test time as well
    # fresh: drawn from (seed, epoch, image) | legacy: as the release, the same supports for an image in every epoch
    cfg.INPUT.FS.SAMPLING = "fresh"
    cfg.INPUT.FS.CACHE_MIB = 256  # memory of each loader process for crops
    cfg.INPUT.FS.TABLE = ""  # support table of the release as CSV or JSON; "": every training object is a support
    # Patches: a training image is a random part of a scene, and comes with supports of the classes that the scene shows
    # (OS2D).
    cfg.INPUT.PATCH = CfgNode()
    cfg.INPUT.PATCH.ENABLED = False
    cfg.INPUT.PATCH.SIZE = 600  # px, side of a patch as the network sees it
    cfg.INPUT.PATCH.SCALE = 0.0  # of a scene at scale 1; 0 = OS2D.EVAL_SCALE / (OS2D.IMAGE_SIZE or its own long side)
    # px, side that a random object gets, round which the patch is drawn; SCALE is the largest scale then (ours); 0: off
    cfg.INPUT.PATCH.OBJECT_SIZE = 0
    cfg.INPUT.PATCH.SCALE_JITTER = 0.7  # the scale is drawn from [SCALE * jitter, SCALE / jitter]
    cfg.INPUT.PATCH.ASPECT_JITTER = 0.9  # width to height of the part that is cut, likewise
    cfg.INPUT.PATCH.MIN_COVERAGE = 0.7  # share of an object's area that makes it a target; below, it is ignored
    cfg.INPUT.PATCH.FLIP = False
    cfg.INPUT.PATCH.COLOUR = False
    cfg.INPUT.PATCH.EXTRA_NEGATIVES = 0  # further classes that the scene does not show
    cfg.INPUT.PATCH.OWN_OBJECTS = False  # supports are cut from other scenes as well
    # Hard patch mining: every so many iterations, over the whole training set; 0 = never.
    cfg.INPUT.PATCH.MINING_PERIOD = 0
    cfg.INPUT.PATCH.MINING_CLASSES = 200  # random classes that a scene is searched for, beside its own
    cfg.INPUT.PATCH.MINING_SCALES = 2  # random scales of a scene
    cfg.INPUT.PATCH.MINED_PER_IMAGE = 10  # patches kept of each kind
    cfg.SOLVER.CLIP_TOTAL_NORM = 0.0  # largest L2 norm of the whole gradient; 0 = any
    cfg.SOLVER.HEAD_LR_FACTOR = 1.0  # on the learning rate of the box predictor (FewX: 2)
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0  # images per step that LR and schedule are stated for; 0 = no scaling
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # forward/backward passes per step and process
    cfg.SOLVER.CHECKPOINTS_KEPT = 2  # the newest ones, beside model_final
    cfg.SOLVER.AMP.DTYPE = "auto"  # auto: bfloat16 where the device has it, else float16 | bfloat16 | float16
    cfg.SOLVER.FIND_UNUSED_PARAMETERS = False  # several processes: look for parameters without gradient
    cfg.DATALOADER.GROUP_SIZE = 0  # images that share their orientation; 0 = the whole batch
    cfg.TEST.STYLE = "coco"  # coco | voc: which evaluation gives the headline numbers
    cfg.TEST.VOC_11_POINT = True  # VOC style: 11-point rule (2007) or area under the curve (2010 on)
    cfg.TEST.ONESHOT_METRIC = False  # also report OS2D's own metrics
    cfg.TEST.FAST = True  # the faster evaluator, equal to pycocotools
    cfg.SEED = 1  # Detectron2's default -1 (unseeded) stays possible


def default_config() -> CfgNode:
    """Detectron2's defaults on a fresh node with every key of fsdet; nothing global changes."""
    cfg = get_cfg()
    add_modeling_config(cfg)
    add_method_configs(cfg)
    add_fewshot_config(cfg)
    add_engine_config(cfg)
    return cfg


def _known_keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    """All keys, dotted."""
    keys = []
    for key, value in cfg.items():
        keys += _known_keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return keys


def _merge(cfg: CfgNode, source: str, merge: Any) -> None:
    """Merge with one clear error that names the source and the nearest known key."""
    try:
        merge()
    except (KeyError, ValueError, AssertionError) as error:
        text = str(error.args[0] if error.args else error)
        wrong = text.rsplit(":", 1)[-1].strip()
        near = difflib.get_close_matches(wrong, _known_keys(cfg), n=2)
        hint = f"; did you mean {' or '.join(near)}?" if "Non-existent" in text and near else ""
        raise ValueError(f"{source}: {text}{hint}") from error


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    """Merge a YAML file with its bases. Unlike Detectron2's default, a file may not construct Python objects."""
    if not Path(config_file).is_file():
        raise FileNotFoundError(f"{config_file}: no such config file; {_nearest_files(Path(config_file))}")
    _merge(cfg, config_file, lambda: cfg.merge_from_file(config_file, allow_unsafe=False))


def _nearest_files(path: Path) -> str:
    """The config files whose names come closest to a missing one, else all that are in its place."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    missing = path.relative_to(folder)  # with the folders above it that are missing as well
    depth = len(missing.parts)
    if depth > 3 or folder.parent == folder != Path():  # not through a whole disk
        return "the shipped ones are in configs/"
    files = sorted(folder.glob("/".join(["*"] * (depth - 1) + ["*.yaml"])))
    names = {str(file.relative_to(folder).with_suffix("")): str(file) for file in files}
    near = difflib.get_close_matches(str(missing.with_suffix("")), names, n=2)
    if near:
        return f"did you mean {' or '.join(names[name] for name in near)}?"
    return f"{folder} has {', '.join(names)}" if 0 < len(names) < 40 else "the shipped ones are in configs/"


def model_file(config_file: str, model: str) -> str:
    """Path of a network file: a path as it is, a bare name looked up in ../base beside the config's folder."""
    if Path(model).suffix:
        return model
    return str(Path(config_file).parent.parent / "base" / f"{model}.yaml")


def load_config(config_file: str, opts: Sequence[str] = (), *, model: str | None = None) -> CfgNode:
    """The frozen configuration of a run.

    Args:
        config_file: YAML file, or the config.yaml that a run has written.
        opts: KEY VALUE pairs.
        model: another network for the same recipe: a name such as "r50_c4" (configs/base) or a file.
    Raises: FileNotFoundError, ValueError for an unknown key, a wrong type, a value out of range or a contradiction.
    """
    opts = list(opts)
    if len(opts) % 2:
        raise ValueError(f"Overrides come in KEY VALUE pairs; got {len(opts)} words: {' '.join(opts)}")
    cfg = default_config()
    _merge_file(cfg, config_file)
    if model and cfg.FEWSHOT.RESOLVED:
        raise ValueError(f"{config_file} is resolved: its network cannot change. Start from the file in configs/")
    if model:
        weights, stage = cfg.MODEL.WEIGHTS, cfg.FEWSHOT.STAGE
        _merge_file(cfg, model_file(config_file, model))
        cfg.MODEL.WEIGHTS = weights if stage == "novel" else cfg.MODEL.WEIGHTS
    recipe = cfg.SOLVER.clone()
    if cfg.FEWSHOT.RESOLVED:
        resolved = cfg.FEWSHOT.clone()
        if "SOLVER.IMS_PER_BATCH" in opts[::2] and recipe.REFERENCE_IMS_PER_BATCH:
            raise ValueError(
                f"{config_file} is resolved: its learning rate and length belong to {recipe.IMS_PER_BATCH} images per "
                "step. Start from the file in configs/ to scale them, or split the step with SOLVER.ACCUMULATION_STEPS"
            )
        _merge(cfg, "command line", lambda: cfg.merge_from_list(opts))
        complete_method_configs(cfg)
        _refuse_changed_protocol(config_file, resolved, cfg.FEWSHOT)
    else:
        _merge(cfg, "command line", lambda: cfg.merge_from_list(opts))
        complete_method_configs(cfg)
        derive(cfg, opts, recipe)
    validate(cfg)
    cfg.freeze()
    return cfg


# Keys of a resolved file that say where things are, not what the run is.
_MOVABLE = (
    "ROOT", "SAMPLES", "TRAIN_JSON", "TRAIN_IMAGES", "TEST_JSON", "TEST_IMAGES", "CLASS_IMAGES", "TEST_LIST",
    "BASE_RUN",
)  # fmt: skip


def _refuse_changed_protocol(config_file: str, before: CfgNode, after: CfgNode) -> None:
    """A dumped config already holds what follows from its FEWSHOT keys, so they cannot change any more."""
    changed = [key for key in before if key not in _MOVABLE and before[key] != after[key]]
    if changed:
        raise ValueError(
            f"{config_file} is the resolved config of a finished set-up; FEWSHOT.{', FEWSHOT.'.join(changed)} cannot "
            "change any more. Start from the file in configs/ instead; OUTPUT_DIR names another folder for this run."
        )


def dataset_root(cfg: CfgNode) -> Path:
    """Folder that relative data paths lie in."""
    return Path(cfg.FEWSHOT.ROOT or os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def dataset_sources(cfg: CfgNode) -> DatasetSources:
    """Where the files of this configuration's data are."""
    fewshot = cfg.FEWSHOT
    paths = {
        name: Path(getattr(fewshot, name.upper())) if getattr(fewshot, name.upper()) else None
        for name in ("samples", "train_json", "train_images", "test_json", "test_images", "class_images")
    }
    return DatasetSources(
        root=dataset_root(cfg),
        voc_train=tuple(tuple(item.split(":", 1)) for item in fewshot.VOC_TRAIN),
        voc_test=tuple(tuple(item.split(":", 1)) for item in fewshot.VOC_TEST),
        novel_classes=tuple(fewshot.NOVEL_CLASSES),
        oneshot_sets=tuple(fewshot.ONESHOT_SETS),
        test_list=Path(fewshot.TEST_LIST) if fewshot.TEST_LIST else None,
        **paths,
    )


def dataset_specs(cfg: CfgNode) -> tuple[DatasetSpec, DatasetSpec]:
    """The training and the test set of this configuration."""
    fewshot = cfg.FEWSHOT
    subset = stage_subset(cfg)
    shared = {"benchmark": fewshot.LAYOUT, "subset": subset, "split": fewshot.SPLIT}
    shared["clear_difficult"] = fewshot.CLEAR_DIFFICULT
    train = DatasetSpec(
        part="train",
        shot=fewshot.SHOT if fewshot.STAGE == "novel" else 0,
        seed=fewshot.SEED,
        records=fewshot.RECORDS,
        choice=fewshot.CHOICE,
        leak=fewshot.LEAK,
        difficult=fewshot.DIFFICULT,
        **shared,
    )
    return train, DatasetSpec(part="test", **shared)


def stage_subset(cfg: CfgNode) -> str:
    """Which classes the detector of this configuration has: "base", "novel" or "all"."""
    if cfg.FEWSHOT.STAGE == "base":
        return "base"
    return "all" if cfg.FEWSHOT.SETTING == "gfsod" else "novel"


def config_classes(cfg: CfgNode) -> ClassSplit:
    """Base, novel and all class names of this configuration's data."""
    return class_split(dataset_specs(cfg)[0], dataset_sources(cfg))


def run_classes(cfg: CfgNode) -> list[str]:
    """Class names of the detector of this configuration, in predictor order."""
    return list(config_classes(cfg).of(stage_subset(cfg)))


def register_datasets(cfg: CfgNode) -> None:
    """Register the two data sets that the configuration names; reads no annotation."""
    for spec in dataset_specs(cfg):
        register(spec, dataset_sources(cfg))


def data_label(cfg: CfgNode) -> str:
    """Folder name of the data: the data set, with its class split where it has several."""
    split = f"_split{cfg.FEWSHOT.SPLIT}" if cfg.FEWSHOT.LAYOUT == "voc" else ""
    leak = f"_leak-{cfg.FEWSHOT.LEAK}" if cfg.FEWSHOT.LEAK != "background" else ""
    return f"{cfg.FEWSHOT.DATASET}{split}{leak}"


def run_family(cfg: CfgNode, method: str) -> str:
    """Folder of all runs of one method, network and data set."""
    return "/".join(part for part in (method, cfg.FEWSHOT.MODEL, data_label(cfg)) if part)


def derive(cfg: CfgNode, opts: Sequence[str], recipe: CfgNode) -> None:
    """Fill in what follows from stage, setting, split, shot and seed; the command line has the last word.

    Args:
        cfg: files and command line, merged; changed in place.
        opts: the command line, KEY VALUE pairs.
        recipe: SOLVER as the files alone have it.
    """
    fewshot = cfg.FEWSHOT
    validate(cfg, only_protocol=True)
    train, test = dataset_specs(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train.name,), (test.name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(run_classes(cfg))
    fewshot.BASE_METHOD = fewshot.BASE_METHOD or fewshot.METHOD
    fewshot.BASE_RUN = fewshot.BASE_RUN or f"{fewshot.OUTPUT}/{run_family(cfg, fewshot.BASE_METHOD)}/base"
    if stage_subset(cfg) == "novel" and fewshot.SURGERY != "none":
        fewshot.SURGERY = "remove"  # randinit and combine keep the base rows, which this detector does not have
    if fewshot.STAGE == "novel":
        run = f"{fewshot.SETTING}/{fewshot.SHOT}shot_seed{fewshot.SEED}"
        run += f"_repeat{fewshot.REPEAT}" if fewshot.REPEAT else ""
        fewshot.INIT = ""
        cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS or surgered_weights(cfg)
        if "INPUT.FS.SUPPORT_SHOT" not in opts[::2]:  # one of the K shots is the query
            cfg.INPUT.FS.SUPPORT_SHOT = max(1, min(cfg.INPUT.FS.SUPPORT_SHOT, fewshot.SHOT - 1))
    else:
        run = "base"
        fewshot.INIT = "" if "MODEL.WEIGHTS" in opts[::2] else _init_file(cfg)
        cfg.MODEL.WEIGHTS = fewshot.INIT or cfg.MODEL.WEIGHTS
    if cfg.OUTPUT_DIR in ("", "./output"):
        cfg.OUTPUT_DIR = f"{fewshot.OUTPUT}/{run_family(cfg, fewshot.METHOD)}/{run}"
    apply_schedule(cfg, opts, recipe)
    if cfg.SEED >= 0 and "SEED" not in opts[::2]:
        cfg.SEED += 1000 * fewshot.REPEAT
    fewshot.RESOLVED = True


def _init_file(cfg: CfgNode) -> str:
    """The file that FEWSHOT.INIT names: a path, or a method by its label. Raises: ValueError for this run's own."""
    fewshot = cfg.FEWSHOT
    if not fewshot.INIT or "/" in fewshot.INIT or Path(fewshot.INIT).suffix:
        return fewshot.INIT
    if fewshot.INIT == fewshot.METHOD:
        raise ValueError(f"FEWSHOT.INIT is {fewshot.INIT}, this run's own FEWSHOT.METHOD; name another one, or a file")
    return f"{fewshot.OUTPUT}/{run_family(cfg, fewshot.INIT)}/base/{MODEL_FILE}"


def surgered_weights(cfg: CfgNode) -> str:
    """The file that the surgery of the base run writes; one name for the tool, the sweep and the default weights.

    `combine` takes the novel rows from a run on the same K shots, so its file belongs to one draw. Without surgery it
    is the base run's own.
    """
    fewshot = cfg.FEWSHOT
    if fewshot.SURGERY == "none":
        return f"{fewshot.BASE_RUN}/{MODEL_FILE}"
    subset = "" if stage_subset(cfg) == "all" else "_novel"
    draw = f"_{fewshot.SHOT}shot_seed{fewshot.SEED}" if fewshot.SURGERY == "combine" else ""
    return f"{fewshot.BASE_RUN}/model_{fewshot.SURGERY}{subset}{draw}.pth"


def on_this_machine(cfg: CfgNode) -> CfgNode:
    """The same configuration with the device that is really there; a missing GPU costs one log line."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        cfg.freeze()
        logger.warning("No GPU found: running on the CPU")
    return cfg
