"""Configuration: order, derived values, schedules, validation."""

import json
import re
import shlex
from pathlib import Path

import pytest

from fsdet.engine.record import _LATER as LATER
from fsdet.engine.record import result_digest
from fsdet.engine.schedule import find_row
from fsdet.engine.setup import default_config, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OFFICIAL = sorted(p for p in (CONFIGS / "tfa").glob("*.yaml") if "custom" not in p.name)
NOVEL = [p for p in OFFICIAL if "base" not in p.name]


@pytest.mark.parametrize("path", [p for p in OFFICIAL if p not in NOVEL], ids=lambda p: p.stem)
def test_base_configs_resolve(path):
    cfg = load_config(str(path))
    assert (60 if "coco" in path.name else 15) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert cfg.OUTPUT_DIR.endswith("/base")


@pytest.mark.parametrize("path", NOVEL, ids=lambda p: p.stem)
def test_novel_configs_resolve_for_every_value(path):
    """Every split x setting x shot has a schedule, a class count and folders of its own."""
    coco = path.name.startswith("coco")
    settings = ("fsod",) if "novel_only" in path.name else ("gfsod", "fsod")
    folders = set()
    for split in (1,) if coco else (1, 2, 3):
        for setting in settings:
            for shot in (1, 2, 3, 5, 10) + ((30,) if coco else ()):
                opts = ["FEWSHOT.SPLIT", str(split), "FEWSHOT.SETTING", setting, "FEWSHOT.SHOT", str(shot)]
                cfg = load_config(str(path), opts)
                novel, total = (20, 80) if coco else (5, 20)
                assert (novel if setting == "fsod" else total) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
                assert all(0 < step <= cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS)
                folders.add(cfg.OUTPUT_DIR)
    assert len(folders) == (1 if coco else 3) * len(settings) * (6 if coco else 5)


def test_own_data_from_the_shipped_configs(squares):
    """The configs for own data need only where the data is and which classes are novel."""
    data = ["FEWSHOT.ROOT", str(squares), "FEWSHOT.TRAIN_JSON", "train.json", "FEWSHOT.TEST_JSON", "test.json"]
    data += ["FEWSHOT.NOVEL_CLASSES", "('white',)"]
    expected = {"base": (3, "base"), "cos": (4, "gfsod/2shot_seed0"), "fsod": (1, "fsod/2shot_seed0")}
    for name, (classes, folder) in expected.items():
        shot = [] if name == "base" else ["FEWSHOT.SHOT", "2"]
        cfg = load_config(str(CONFIGS / "tfa" / f"custom_{name}.yaml"), [*data, *shot])
        assert classes == cfg.MODEL.ROI_HEADS.NUM_CLASSES and cfg.OUTPUT_DIR.endswith(folder)
    lacking = r"custom needs FEWSHOT.TRAIN_JSON, FEWSHOT.TEST_JSON, FEWSHOT.NOVEL_CLASSES: .*docs/datasets.md"
    for name, opts in (("base", []), ("fsod", ["FEWSHOT.SHOT", "2"])):
        with pytest.raises(ValueError, match=lacking):
            load_config(str(CONFIGS / "tfa" / f"custom_{name}.yaml"), opts)
    with pytest.raises(ValueError, match="custom needs FEWSHOT.TEST_JSON, FEWSHOT.NOVEL_CLASSES: "):
        load_config(str(CONFIGS / "tfa" / "custom_fsod.yaml"), ["FEWSHOT.SHOT", "2", *data[:4]])
    base = load_config(str(CONFIGS / "tfa" / "custom_base.yaml"), data[:6])  # a base model of all classes
    assert base.MODEL.ROI_HEADS.NUM_CLASSES == 4


def test_short_try_of_own_data_on_a_cpu(squares):
    """The words of README.md: the rate follows the images per step, the warm-up what is left of the schedule."""
    data = ["FEWSHOT.ROOT", str(squares), "FEWSHOT.TRAIN_JSON", "train.json", "FEWSHOT.TEST_JSON", "test.json"]
    data += ["FEWSHOT.NOVEL_CLASSES", "('white',)", "FEWSHOT.SHOT", "2"]
    text = (CONFIGS.parent / "README.md").read_text()
    short = shlex.split(re.search(r"SOLVER.IMS_PER_BATCH 2 .*? INPUT.MIN_SIZE_TEST 480", text, re.S)[0])
    cfg = load_config(str(CONFIGS / "tfa" / "custom_fsod.yaml"), [*data, *short])
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (2, 200, (160,), 1)
    assert pytest.approx(0.00125) == solver.BASE_LR
    assert (tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TEST) == ((480,), 480)
    split = load_config(str(CONFIGS / "tfa" / "custom_fsod.yaml"), [*data, "SOLVER.ACCUMULATION_STEPS", "4"]).SOLVER
    assert (split.IMS_PER_BATCH, split.MAX_ITER, split.BASE_LR) == (16, 2000, 0.01)


def test_novel_classes_alone_never_keep_base_rows():
    """A detector of the novel classes starts from the base model without its predictor, whatever the config says."""
    cos = str(CONFIGS / "tfa" / "voc_cos.yaml")
    both = load_config(cos, ["FEWSHOT.SHOT", "5"])
    assert both.FEWSHOT.SURGERY == "randinit" and both.MODEL.WEIGHTS.endswith("model_randinit.pth")
    alone = load_config(cos, ["FEWSHOT.SHOT", "5", "FEWSHOT.SETTING", "fsod"])
    assert alone.FEWSHOT.SURGERY == "remove" and alone.MODEL.WEIGHTS.endswith("model_remove_novel.pth")
    asked = load_config(cos, ["FEWSHOT.SHOT", "5", "FEWSHOT.SETTING", "fsod", "FEWSHOT.SURGERY", "randinit"])
    assert asked.FEWSHOT.SURGERY == "remove"  # a sweep over both settings asks for one surgery


def test_published_rows():
    """Rows of TFA's released configurations, the split 2 exception among them."""
    cos = str(CONFIGS / "tfa" / "voc_cos.yaml")
    solver = load_config(cos, ["FEWSHOT.SPLIT", "1", "FEWSHOT.SHOT", "5"]).SOLVER
    assert (solver.BASE_LR, solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS) == (0.001, (18000,), 20000, 10)
    solver = load_config(cos, ["FEWSHOT.SPLIT", "2", "FEWSHOT.SHOT", "5"]).SOLVER
    assert (solver.BASE_LR, solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS) == (0.005, (17500,), 20000, 0)


def test_command_line_has_the_last_word_and_steps_follow():
    cos = str(CONFIGS / "tfa" / "voc_cos.yaml")
    solver = load_config(cos, ["FEWSHOT.SHOT", "5", "SOLVER.MAX_ITER", "200"]).SOLVER
    assert (solver.MAX_ITER, solver.STEPS) == (200, (180,))
    solver = load_config(cos, ["FEWSHOT.SHOT", "5", "SOLVER.MAX_ITER", "200", "SOLVER.STEPS", "(7,)"]).SOLVER
    assert solver.STEPS == (7,)
    base = str(CONFIGS / "tfa" / "voc_base.yaml")
    assert load_config(base, ["SOLVER.MAX_ITER", "180"]).SOLVER.STEPS == (120, 160)
    both = load_config(base, ["SOLVER.MAX_ITER", "180", "SOLVER.IMS_PER_BATCH", "4"]).SOLVER
    assert (both.MAX_ITER, both.STEPS) == (180, (120, 160)) and pytest.approx(0.005) == both.BASE_LR


@pytest.mark.parametrize(("length", "steps"), [(3, (2,)), (2, (1,)), (1, ())])
def test_steps_never_move_to_the_end(length, steps):
    """Rounding must not give a milestone that the schedule refuses."""
    for name, shot in (("base", []), ("cos", ["FEWSHOT.SHOT", "5"])):
        cfg = load_config(str(CONFIGS / "tfa" / f"voc_{name}.yaml"), [*shot, "SOLVER.MAX_ITER", str(length)])
        assert steps == cfg.SOLVER.STEPS


def test_schedule_follows_the_batch_size():
    base = str(CONFIGS / "tfa" / "voc_base.yaml")
    solver = load_config(base, ["SOLVER.IMS_PER_BATCH", "4"]).SOLVER
    assert pytest.approx(0.005) == solver.BASE_LR
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (72000, (48000, 64000), 400)
    fixed = load_config(base, ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.02"]).SOLVER
    assert fixed.BASE_LR == 0.02


def test_dumped_config_is_the_same_run(tmp_path):
    cos = str(CONFIGS / "tfa" / "voc_cos.yaml")
    cfg = load_config(cos, ["FEWSHOT.SHOT", "3", "FEWSHOT.SEED", "2", "SOLVER.MAX_ITER", "50"], model="r50_c4")
    assert "r50_c4" in cfg.OUTPUT_DIR and cfg.MODEL.ROI_HEADS.NAME == "FewShotRes5ROIHeads"
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    assert json.dumps(load_config(str(path))) == json.dumps(cfg)
    with pytest.raises(ValueError, match="belong to 16 images per step"):
        load_config(str(path), ["SOLVER.IMS_PER_BATCH", "4"])
    with pytest.raises(ValueError, match="FEWSHOT.SHOT cannot change"):
        load_config(str(path), ["FEWSHOT.SHOT", "5"])
    with pytest.raises(ValueError, match="OUTPUT_DIR"):  # it would change nothing: the run's folder is resolved
        load_config(str(path), ["FEWSHOT.OUTPUT", "elsewhere"])


def test_loading_changes_no_global_default():
    from detectron2.config import get_cfg

    before = get_cfg().dump()
    default_config()
    assert get_cfg().dump() == before and "FEWSHOT" not in get_cfg()


def test_repetitions_train_with_their_own_seed():
    """On the same K shots, in a folder of their own; the digest of the recipe stays."""
    cfgs = [
        load_config(str(CONFIGS / "tfa" / "voc_cos.yaml"), ["FEWSHOT.SHOT", "1", "FEWSHOT.REPEAT", str(repeat)])
        for repeat in (0, 1, 2)
    ]
    assert [cfg.SEED for cfg in cfgs] == [1, 1001, 2001]
    assert [cfg.OUTPUT_DIR.rsplit("/", 1)[1] for cfg in cfgs] == [
        "1shot_seed0",
        "1shot_seed0_repeat1",
        "1shot_seed0_repeat2",
    ]
    assert len({result_digest(cfg) for cfg in cfgs}) == 1 and len({cfg.DATASETS.TRAIN for cfg in cfgs}) == 1


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["FEWSHOT.SHOTS", "5"], "FEWSHOT.SHOTS; did you mean FEWSHOT.SHOT"),
        (["FEWSHOT.SHOT"], "KEY VALUE pairs"),
        ([], "novel stage needs K >= 1"),
        (["FEWSHOT.SHOT", "5", "FEWSHOT.REPEAT", "-1"], "repetitions are numbered from 0"),
        (["FEWSHOT.SHOT", "7"], "no row for split 1, gfsod, 7 shots, only for 1, 2, 3, 5, 10 shots. Choose one"),
        (["FEWSHOT.SHOT", "5", "FEWSHOT.SPLIT", "4"], "splits 1, 2 and 3"),
        (["FEWSHOT.SHOT", "5", "FEWSHOT.LEAK", "hide"], "expected background | drop | ignore"),
        (["FEWSHOT.SHOT", "5", "FEWSHOT.TRAIN_JSON", "a.json"], "voc reads XML files"),
        (["FEWSHOT.SHOT", "5", "TEST.AUG.ENABLED", "True"], "no test-time augmentation"),
        (["FEWSHOT.SHOT", "5", "FEWSHOT.CHOICE", "lucky"], "expected seeded | official"),
        (["FEWSHOT.SHOT", "5", "SOLVER.ACCUMULATION_STEPS", "3"], "no multiple of SOLVER.ACCUMULATION_STEPS"),
        (["FEWSHOT.SHOT", "5", "SOLVER.STEPS", "(20000,)"], "must lie below SOLVER.MAX_ITER 20000"),
        (["FEWSHOT.SHOT", "5", "FEWSHOT.NOVEL_CLASSES", "('cat',)"], "fixed splits"),
    ],
)
def test_faults_have_one_clear_message(opts, message):
    with pytest.raises(ValueError) as error:
        load_config(str(CONFIGS / "tfa" / "voc_cos.yaml"), opts)
    assert message in str(error.value)


def test_missing_file_and_unsafe_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config("nowhere.yaml")
    cos, base = str(CONFIGS / "tfa" / "voc_cos.yaml"), CONFIGS / "base"
    with pytest.raises(FileNotFoundError) as error:
        load_config(cos, ["FEWSHOT.SHOT", "1"], model="r50")
    assert f"did you mean {base / 'r50_c4.yaml'} or {base / 'r50_fpn.yaml'}?" in str(error.value)
    for wrong in ("tfa/voc_coss.yaml", "tfaa/voc_cos.yaml", "tfa/voc_cos"):
        with pytest.raises(FileNotFoundError, match=f"did you mean {cos}"):
            load_config(str(CONFIGS / wrong))
    with pytest.raises(FileNotFoundError, match=r"demo has base, base_c4, cos, ft_full"):
        load_config(str(CONFIGS / "demo" / "zzzzzz.yaml"))
    target = tmp_path / "executed"
    path = tmp_path / "payload.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{target}']\n")
    with pytest.raises(Exception, match="python/object"):
        load_config(str(path))
    assert not target.exists()


def test_find_row_wildcards():
    rows = [[2, "*", 1, 0.5, [], 10, 0], ["*", "fsod", 1, 0.1, [], 20, 0]]
    assert find_row(rows, split=2, setting="gfsod", shot=1)[3] == 0.5
    assert find_row(rows, split=1, setting="fsod", shot=1)[3] == 0.1
    with pytest.raises(
        ValueError, match=r"no row for split 1, gfsod, 1 shots, only for split \*, fsod and split 2, \*"
    ):
        find_row(rows, split=1, setting="gfsod", shot=1)
    with pytest.raises(ValueError, match="7 columns"):
        find_row([[1, 2]], split=1, setting="gfsod", shot=1)


def test_switches_that_are_off_are_no_part_of_a_digest(monkeypatch):
    """Results from before they existed stay valid; switched on they make another recipe."""
    file, words = str(CONFIGS / "tfa" / "voc_cos.yaml"), ["FEWSHOT.SHOT", "1"]
    plain = load_config(file, words)
    older = plain.clone()
    older.defrost()
    del older["FEWX"], older.INPUT["FS"], older.SOLVER["HEAD_LR_FACTOR"], older.DATALOADER["VIEWS"]
    del older["OS2D"], older.INPUT["PATCH"], older.SOLVER["CLIP_TOTAL_NORM"], older.TEST["ONESHOT_METRIC"]
    for key in ("CLASS_IMAGES", "ONESHOT_SETS", "CLEAR_DIFFICULT", "INIT"):
        del older.FEWSHOT[key]
    monkeypatch.setattr("fsdet.engine.record._switched_off", lambda cfg: ["TEST.CALIBRATION", *LATER])
    before = result_digest(older)
    monkeypatch.undo()
    assert result_digest(plain) == before
    for key, value in (
        ("SOLVER.HEAD_LR_FACTOR", "2.0"),
        ("DATALOADER.VIEWS", "4"),
        ("SOLVER.FUSED", "True"),
        ("SOLVER.CLIP_TOTAL_NORM", "100.0"),
        ("FEWSHOT.TEST_LIST", "a.txt"),
    ):
        assert result_digest(load_config(file, [*words, key, value])) != before
