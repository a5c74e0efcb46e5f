"""The shipped configurations of DeFRCN: they resolve for every value and hold the published recipe, nothing else."""

import json

import pytest
from detectron2.config import CfgNode, get_cfg

from fsdet.engine.parity_detector import CONFIGS
from fsdet.engine.parity_recipe import FILES, OFFICIAL_FILE, load_official, value_of
from fsdet.engine.setup import load_config
from fsdet.methods.defrcn import OFFICIAL_KEYS

NOVEL = {"voc": (1, 2, 3, 5, 10), "coco": (1, 2, 3, 5, 10, 30), "voc_small": (1, 2, 3, 5, 10)}

# Keys of Detectron2 whose value here differs from its default, beside those of the official table.
OURS = {
    "MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.ROI_HEADS.NAME",  # the official code decouples in its detector
    "DATASETS.TRAIN", "DATASETS.TEST", "MODEL.WEIGHTS", "OUTPUT_DIR",  # what things are called and where they are
    "SEED",  # runs are seeded here
    "SOLVER.WEIGHT_DECAY_BIAS",  # as the authors' Detectron2 had it without a key
}  # fmt: skip


@pytest.mark.parametrize("data", NOVEL)
def test_novel_stage_resolves_for_every_value(data):
    folders = set()
    splits = (1,) if data == "coco" else (1, 2, 3)
    for split in splits:
        for setting, count in (("fsod", 20 if data == "coco" else 5), ("gfsod", 80 if data == "coco" else 20)):
            for shot in NOVEL[data]:
                opts = ["FEWSHOT.SPLIT", str(split), "FEWSHOT.SETTING", setting, "FEWSHOT.SHOT", str(shot)]
                cfg = load_config(str(CONFIGS / f"{data}_novel.yaml"), opts)
                assert count == cfg.MODEL.ROI_HEADS.NUM_CLASSES
                assert all(0 < step < cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS)
                assert bool(cfg.SOLVER.STEPS) == (cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR")
                surgered = "remove_novel" if setting == "fsod" else "randinit"
                assert f"{cfg.FEWSHOT.BASE_RUN}/model_{surgered}.pth" == cfg.MODEL.WEIGHTS
                assert cfg.MODEL.ROI_HEADS.FREEZE_FEAT and cfg.TEST.CALIBRATION.ENABLED
                folders.add(cfg.OUTPUT_DIR)
    assert len(folders) == 2 * len(splits) * len(NOVEL[data])


@pytest.mark.parametrize("data", NOVEL)
def test_base_stage_writes_where_the_novel_stage_reads(data):
    base = load_config(str(CONFIGS / f"{data}_base.yaml"))
    novel = load_config(str(CONFIGS / f"{data}_novel.yaml"), ["FEWSHOT.SHOT", "1"])
    assert novel.FEWSHOT.BASE_RUN == base.OUTPUT_DIR
    assert (base.MODEL.ROI_HEADS.BACKWARD_SCALE, base.MODEL.ROI_HEADS.OUTPUT_LAYER) == (0.75, "linear")
    assert not base.MODEL.ROI_HEADS.FREEZE_FEAT and not base.TEST.CALIBRATION.ENABLED


def test_own_data_needs_only_its_place(tmp_path):
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in enumerate("abc")]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    data = ["FEWSHOT.ROOT", str(tmp_path), "FEWSHOT.TRAIN_JSON", "train.json", "FEWSHOT.TEST_JSON", "train.json"]
    data += ["FEWSHOT.NOVEL_CLASSES", "('c',)"]
    counts = {
        load_config(str(CONFIGS / f"custom_{file}.yaml"), [*data, *opts]).MODEL.ROI_HEADS.NUM_CLASSES
        for file, opts in (
            ("base", []),
            ("novel", ["FEWSHOT.SHOT", "7", "FEWSHOT.SETTING", "fsod"]),
            ("novel", ["FEWSHOT.SHOT", "7", "FEWSHOT.SETTING", "gfsod"]),
        )
    }
    assert counts == {2, 1, 3}


def test_published_rows():
    """Numbers of the official files that the two settings, data sets and stages do not share."""
    rows = {
        ("voc", "fsod", 3): ((1280,), 1600), ("voc", "gfsod", 3): ((1600,), 2000),
        ("coco", "fsod", 10): ((2000,), 2500), ("coco", "gfsod", 30): ((9600,), 12000),
    }  # fmt: skip
    for (data, setting, shot), expected in rows.items():
        opts = ["FEWSHOT.SETTING", setting, "FEWSHOT.SHOT", str(shot)]
        cfg = load_config(str(CONFIGS / f"{data}_novel.yaml"), opts)
        assert expected == (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS) == (0.01, 0)
        assert {"voc": 0.001, "coco": 0.01}[data] == cfg.MODEL.ROI_HEADS.BACKWARD_SCALE
        assert {"voc": "instance", "coco": "image"}[data] == cfg.FEWSHOT.RECORDS


def keys_of(cfg, prefix=""):
    for key, value in cfg.items():
        yield from keys_of(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]


@pytest.mark.parametrize("file", [f for f in FILES if "base" in f or "_1shot" in f or "_10shot" in f])
def test_everything_else_is_detectron2s_default(file):
    """The golden file lists what the official files change; here nothing else of Detectron2's may change either."""
    assert OFFICIAL_FILE.fullmatch(file)
    stock, cfg = get_cfg(), load_official(file)
    changed = {key for key in keys_of(stock) if value_of(stock, key) != value_of(cfg, key)}
    assert changed - {row.ours for row in OFFICIAL_KEYS.values()} == OURS


def test_table_names_a_key_or_a_reason():
    known = set(keys_of(load_official(FILES[0])))
    for official, row in OFFICIAL_KEYS.items():
        assert row.ours in known if row.ours else row.note, official
