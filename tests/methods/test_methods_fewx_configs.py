"""The shipped FewX configurations: all of them load, and hold the release's recipe where they say so."""

import json
from pathlib import Path

import pytest

from fsdet.engine.setup import load_config
from fsdet.engine.sweep_plan import Sweep, make_plan

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "fewx"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NOVEL = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.endswith("_base"))


@pytest.fixture
def load(tmp_path):
    """Load a shipped file; the demo's finds its class names in a data set without images."""
    for name in ("train", "test"):
        categories = [{"id": i + 1, "name": digit} for i, digit in enumerate(DIGITS)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))

    def read(name, *opts):
        root = ["FEWSHOT.ROOT", str(tmp_path)] if name.startswith("demo") else []
        return load_config(str(FOLDER / f"{name}.yaml"), [*opts, *root])

    return read


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*_base.yaml")))
def test_base_stages(name, load):
    cfg = load(name)
    assert cfg.FEWSHOT.STAGE == "base" and cfg.MODEL.META_ARCHITECTURE == "FewXRCNN" and cfg.SOLVER.MAX_ITER > 0
    assert (cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_HEADS.NAME) == ("AttentionRPN", "RelationRes5ROIHeads")
    assert cfg.INPUT.FS.ENABLED and cfg.FEWSHOT.SURGERY == "none" and cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION == 14


@pytest.mark.parametrize("name", NOVEL)
@pytest.mark.parametrize("shot", [1, 10])
def test_novel_stages_go_on_from_their_base_run(name, shot, load):
    cfg, base = load(name, "FEWSHOT.SHOT", str(shot)), load(f"{name.rsplit('_', 1)[0]}_base")
    assert f"{base.OUTPUT_DIR}/model_final.pth" == cfg.MODEL.WEIGHTS
    assert (cfg.SOLVER.MAX_ITER == 0) == name.endswith("_direct")
    assert (1 if shot == 1 else min(9, base.INPUT.FS.SUPPORT_SHOT)) == cfg.INPUT.FS.SUPPORT_SHOT
    assert cfg.FEWSHOT.INIT == ""


def test_quickstart_goes_on_from_its_detector(load, tmp_path):
    """The detector is trained where FEWSHOT.INIT looks for it, and samples its regions as FewX does."""
    path = FOLDER.parent / "demo" / "base_c4.yaml"
    detector, fewx = load_config(str(path), ["FEWSHOT.ROOT", str(tmp_path)]), load("demo_base")
    assert f"{detector.OUTPUT_DIR}/model_final.pth" == fewx.FEWSHOT.INIT
    for key in ("POOLER_RESOLUTION", "POOLER_SAMPLING_RATIO", "POOLER_TYPE"):
        assert detector.MODEL.ROI_BOX_HEAD[key] == fewx.MODEL.ROI_BOX_HEAD[key]
    assert detector.MODEL.RESNETS == fewx.MODEL.RESNETS and detector.MODEL.TIMM == fewx.MODEL.TIMM
    assert detector.INPUT.MIN_SIZE_TEST == fewx.INPUT.MIN_SIZE_TEST


@pytest.mark.parametrize("recipe", ["fewx/voc_small_base", "os2d/voc_small_v1_base", "os2d/voc_small_v2_base"])
def test_voc_small_goes_on_from_the_base_model_of_defrcn(recipe, tmp_path):
    """Also on another split and below another folder, where a sweep trains the one after the other."""
    files = [str(FOLDER.parent / f"{name}.yaml") for name in ("defrcn/voc_small_base", recipe)]
    opts = ["FEWSHOT.SPLIT", "2", "FEWSHOT.OUTPUT", str(tmp_path / "out")]
    detector, cfg = (load_config(file, opts) for file in files)
    assert f"{detector.OUTPUT_DIR}/model_final.pth" == cfg.FEWSHOT.INIT == cfg.MODEL.WEIGHTS
    assert detector.INPUT.FORMAT == cfg.INPUT.FORMAT and detector.MODEL.PIXEL_STD == cfg.MODEL.PIXEL_STD
    assert detector.MODEL.RESNETS.STRIDE_IN_1X1 == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    direct = recipe.replace("_base", "_direct")
    plan = make_plan(Sweep(tuple(files), (str(FOLDER.parent / f"{direct}.yaml"),), (1,), (0,), opts=tuple(opts)))
    assert [run.after for run in plan] == [(), (plan[0].folder,), (plan[1].folder,)]


def test_init_is_a_file_or_another_method():
    path = str(FOLDER / "voc_small_base.yaml")
    assert load_config(path, ["FEWSHOT.INIT", "some/model.pth"]).MODEL.WEIGHTS == "some/model.pth"
    assert load_config(path, ["FEWSHOT.INIT", "model.pth"]).MODEL.WEIGHTS == "model.pth"
    with pytest.raises(ValueError, match=r"this run's own FEWSHOT\.METHOD"):
        load_config(path, ["FEWSHOT.INIT", "fewx"])


def test_recipe_of_the_release():
    base = load_config(str(FOLDER / "coco_release_base.yaml"))
    assert (base.SOLVER.BASE_LR, base.SOLVER.IMS_PER_BATCH, base.SOLVER.MAX_ITER) == (0.004, 8, 120_000)
    assert (base.SOLVER.STEPS, base.SOLVER.WARMUP_ITERS, base.MODEL.BACKBONE.FREEZE_AT) == ((112_000,), 1000, 3)
    assert (base.INPUT.FS.SUPPORT_SHOT, base.MODEL.RPN.POST_NMS_TOPK_TEST, base.INPUT.MIN_SIZE_TEST) == (10, 100, 600)
    novel = load_config(str(FOLDER / "coco_release_novel.yaml"), ["FEWSHOT.SHOT", "10"])
    assert (novel.SOLVER.BASE_LR, novel.SOLVER.IMS_PER_BATCH, novel.SOLVER.MAX_ITER) == (0.001, 4, 3000)
    assert (novel.SOLVER.STEPS, novel.SOLVER.WARMUP_ITERS, novel.MODEL.BACKBONE.FREEZE_AT) == ((2000,), 200, 5)
    assert novel.INPUT.FS.SUPPORT_SHOT == 9 and novel.FEWSHOT.SETTING == "fsod"


@pytest.mark.parametrize("model", ["r101_c4", "r50_c4"])
def test_other_networks_keep_the_heads(model):
    cfg = load_config(str(FOLDER / "voc_base.yaml"), model=model)
    assert cfg.MODEL.META_ARCHITECTURE == "FewXRCNN" and cfg.MODEL.ROI_HEADS.NAME == "RelationRes5ROIHeads"
    assert cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 100
    with pytest.raises(ValueError, match="POOLER_RESOLUTION is 7"):
        load_config(str(FOLDER / "voc_base.yaml"), model="r50_c4_pool7")
    with pytest.raises(ValueError, match="a C4 network"):
        load_config(str(FOLDER / "voc_base.yaml"), model="r50_fpn")
