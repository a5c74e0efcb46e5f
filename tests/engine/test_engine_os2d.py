"""OS2D through the engine: base stage with mining, new classes from their pictures, resuming, class memory, faults."""

import csv
import shutil

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from fsdet.checkpoint.safe_io import load_weights
from fsdet.engine.predictor import Predictor
from fsdet.engine.record import result_digest
from fsdet.engine.run import run
from fsdet.engine.setup import default_config, load_config
from fsdet.engine.sweep import Sweep, run_sweep
from fsdet.engine.trainer import build_detector
from fsdet.evaluation.result import read_result

SIDE, CLASSES = 24, 5  # the classes 4 and 5 are novel


@pytest.fixture(scope="module")
def pictures():
    """A coarse pattern of each class, (24, 24, 3)."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (CLASSES, 6, 6, 3), dtype=np.uint8)
    return [cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST) for one in small]


@pytest.fixture(scope="module")
def cards(tmp_path_factory, pictures):
    """One-shot set: scenes of 64 x 96 pixels with two patterns each, two pictures of every class."""
    folder = tmp_path_factory.mktemp("cards")
    (folder / "src").mkdir()
    (folder / "classes" / "images").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number, picture in enumerate(pictures, 1):
        cv2.imwrite(str(folder / "classes" / "images" / f"{number}.png"), picture)
        cv2.imwrite(str(folder / "classes" / "images" / f"{number}_b.png"), cv2.GaussianBlur(picture, (3, 3), 0))
    rows = []
    for scene in range(1, 11):
        image = rng.integers(100, 140, (64, 96, 3), dtype=np.uint8)
        for half in range(2):
            number = (scene + half * 2) % 3 + 1 if scene <= 6 else (4 + half if scene <= 8 else 1 + half)
            x, y = half * 48 + int(rng.integers(0, 48 - SIDE)), int(rng.integers(0, 64 - SIDE))
            image[y : y + SIDE, x : x + SIDE] = pictures[number - 1]
            split = "train" if scene <= 6 else ("val-new-cl" if scene <= 8 else "val-old-cl")
            rows.append(_row(scene, number, len(rows), x, y, split))
        cv2.imwrite(str(folder / "src" / f"{scene}.png"), image)
    with (folder / "classes" / "cards.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def _row(scene, number, box, x, y, split):
    return {
        "imageid": scene,
        "imagefilename": f"{scene}.png",
        "classid": number,
        "classfilename": f"{number}.png",
        "gtbboxid": box,
        "difficult": 0,
        "lx": x / 96,
        "ty": y / 64,
        "rx": (x + SIDE) / 96,
        "by": (y + SIDE) / 64,
        "split": split,
    }


@pytest.fixture
def config(write_config, cards, tmp_path):
    """Write a narrow OS2D config; keyword arguments update whole sections."""

    def write(name, **sections):
        fewshot = {
            "METHOD": "os2d",
            "SURGERY": "none",
            "DATASET": "cards",
            "LAYOUT": "oneshot",
            "ROOT": str(cards),
            "TRAIN_JSON": "classes/cards.csv",
            "TRAIN_IMAGES": "src",
            "TEST_JSON": "",
            "TEST_IMAGES": "",
            "CLASS_IMAGES": "classes/images",
            "NOVEL_CLASSES": [],
            "OUTPUT": str(tmp_path / "output"),
        }
        parts = {
            "OUTPUT_DIR": "./output",
            "FEWSHOT": fewshot,
            "OS2D": {"ENABLED": True, "CLASS_IMAGE_SIZE": 96, "EVAL_SCALE": 960, "PYRAMID": [0.5, 1.0]},
            "MODEL": {
                "BACKBONE": {"NAME": "TorchvisionC4Backbone", "FREEZE_AT": 0},
                "RESNETS": {"OUT_FEATURES": ["res4"], "STRIDE_IN_1X1": False, "STEM_OUT_CHANNELS": 4},
            },
            "INPUT": {"FORMAT": "RGB", "PATCH": {"ENABLED": True, "SIZE": 256}},
            "SOLVER": {
                "IMS_PER_BATCH": 2, "MAX_ITER": 4, "BASE_LR": 1e-4, "STEPS": [], "CHECKPOINT_PERIOD": 2,
                "CLIP_TOTAL_NORM": 100.0,
            },
        }  # fmt: skip
        for section, values in sections.items():
            parts[section] = {**parts.get(section, {}), **values} if isinstance(values, dict) else values
        return write_config(name, **parts)

    return write


@pytest.fixture
def stages(config):
    """Configs of the base stage, and of new classes from their pictures."""
    base = config("base.yaml")
    fewshot = load_config(base).FEWSHOT
    novel = {key: fewshot[key] for key in fewshot if key not in ("RESOLVED", "BASE_RUN", "BASE_METHOD", "SCHEDULE")}
    novel |= {"METHOD": "os2d_direct", "BASE_METHOD": "os2d", "STAGE": "novel", "SETTING": "fsod"}
    novel["SCHEDULE"] = [["*", "*", "*", 1e-4, [], 0, 0]]
    novel = {key: list(value) if isinstance(value, tuple) else value for key, value in novel.items()}
    return base, config("direct.yaml", FEWSHOT=novel, INPUT={"FORMAT": "RGB"})


def test_sweep_of_base_and_new_classes(stages, tmp_path):
    base, direct = stages
    results = [read_result(path) for path in run_sweep(Sweep(base, (direct,), (1, 2), (0,), ("fsod",)), quiet=True)]
    assert [(r.protocol.method, r.protocol.shot, r.iterations) for r in results] == [
        ("os2d", 0, 4),
        ("os2d_direct", 1, 0),
        ("os2d_direct", 2, 0),
    ]
    assert {"bAP50", "mAP50", "mAPw50", "recall50"} <= results[0].metrics.keys()
    assert {"nAP50", "mAP50", "nmAP50"} <= results[1].metrics.keys()
    assert results[1].protocol.base_model == results[2].protocol.base_model != ""
    assert [r.protocol.proposals for r in results] == [0, 0, 0]
    assert len(results[0].classes["base"]) == 3 and len(results[1].classes["novel"]) == 2
    assert len(list((tmp_path / "output").rglob("class_memory_os2d.json"))) == 3


def test_nothing_found_is_not_blamed_on_a_predictor_that_is_not_there(stages, tmp_path, monkeypatch):
    base, direct = stages
    run(base, ["SOLVER.MAX_ITER", "1"], quiet=True)
    monkeypatch.setattr("fsdet.engine.run.is_novel_zero", lambda metrics: True)
    run(direct, ["FEWSHOT.SHOT", "1"], quiet=True)
    result = read_result(next((tmp_path / "output" / "os2d_direct").rglob("result.json")))
    assert "box predictor must train" not in result.notes["novel AP is 0"]


def test_backbone_alone_is_evaluated_only_as_untrained(stages, tmp_path):
    base, direct = stages
    run(base, ["SOLVER.MAX_ITER", "1"], quiet=True)
    weights = next((tmp_path / "output").rglob("model_final.pth"))
    backbone = {k: v for k, v in load_weights(weights)["model"].items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    words = ["FEWSHOT.SHOT", "1", "MODEL.WEIGHTS", str(tmp_path / "backbone.pth")]
    with pytest.raises(ValueError, match=r"only in part.*head\.transform_net"):
        run(direct, words, quiet=True)
    metrics = run(direct, [*words, "FEWSHOT.RESET_PREDICTOR", "True", "FEWSHOT.METHOD", "untrained"], quiet=True)
    assert 0 < metrics["mAP50"] <= 100


def test_killed_and_resumed_equals_uninterrupted_with_mining(config, tmp_path):
    path = config("mined.yaml", INPUT={"FORMAT": "RGB", "PATCH": {"ENABLED": True, "SIZE": 256, "MINING_PERIOD": 2}})
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run(path, ["OUTPUT_DIR", whole], quiet=True)
    run(path, ["OUTPUT_DIR", parts, "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1"], quiet=True)
    _forget()
    run(path, ["OUTPUT_DIR", parts], resume=True, quiet=True)
    assert (tmp_path / "whole" / "mined_patches_0000002.json").is_file()
    one, other = (load_weights(f"{folder}/model_final.pth")["model"] for folder in (whole, parts))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def _forget():
    for name in [name for name in DatasetCatalog if "oneshot" in name]:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def test_memory_without_pictures_and_one_picture_finds_the_rest(stages, cards, pictures, tmp_path):
    base, direct = stages
    run(base, quiet=True)
    first = run(direct, ["FEWSHOT.SHOT", "1"], quiet=True)
    folder = next((tmp_path / "output" / "os2d_direct").rglob("result.json")).parent
    hidden = cards / "hidden"
    shutil.move(cards / "classes" / "images", hidden)
    try:
        predictor = Predictor.from_run(folder, threshold=0.0)
        assert len(predictor.class_names) == 2
    finally:
        shutil.move(hidden, cards / "classes" / "images")
    _forget()
    again = run(direct, ["FEWSHOT.SHOT", "1"], quiet=True)
    np.testing.assert_equal([again[name] for name in first], [*first.values()])
    taught = Predictor.from_run(folder, threshold=0.0, support={"card": [pictures[3]]})
    scene = cv2.imread(str(cards / "src" / "7.png"))
    assert taught.class_names == ("card",)
    assert {found.class_name for found in taught(scene)} == {"card"}


def test_objects_of_other_scenes_are_supports_in_any_layout(write_config, tmp_path):
    path = write_config(
        "squares.yaml",
        FEWSHOT={"METHOD": "os2d", "SURGERY": "none", "OUTPUT": str(tmp_path / "output")},
        MODEL={"BACKBONE": {"NAME": "build_resnet_backbone"}, "RESNETS": {"OUT_FEATURES": ["res4"]}},
        OS2D={"ENABLED": True, "CLASS_IMAGE_SIZE": 48, "EVAL_SCALE": 240, "PYRAMID": [1.0], "TEST_SHOTS": 2},
        INPUT={"FORMAT": "RGB", "PATCH": {"ENABLED": True, "SIZE": 128, "FLIP": True, "COLOUR": True}},
        SOLVER={"IMS_PER_BATCH": 2, "MAX_ITER": 2, "BASE_LR": 1e-4, "STEPS": [], "WARMUP_ITERS": 0},
    )
    metrics = run(path, quiet=True)
    assert "bAP50" in metrics and "mAP50" not in metrics


def test_starts_from_the_features_of_another_detector(config, tmp_path):
    """FEWSHOT.INIT: a region-based C4 detector gives its stages up to res4."""
    network = {
        "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 0},
        "RESNETS": {"OUT_FEATURES": ["res4"], "NORM": "BN"},
    }
    heads = {
        "ANCHOR_GENERATOR": {"SIZES": [[32]]},
        "RPN": {"IN_FEATURES": ["res4"]},
        "ROI_HEADS": {"NAME": "Res5ROIHeads", "IN_FEATURES": ["res4"]},
        "ROI_BOX_HEAD": {"NAME": "", "NUM_FC": 0, "POOLER_RESOLUTION": 14},
    }
    os2d = {"OS2D": {"ENABLED": False}, "INPUT": {"PATCH": {"ENABLED": False}}, "SOLVER": {"CLIP_TOTAL_NORM": 0.0}}
    plain = build_detector(load_config(config("plain.yaml", MODEL=network | heads, **os2d), ["MODEL.DEVICE", "cpu"]))
    (tmp_path / "trained").mkdir()
    init = tmp_path / "trained" / "model_final.pth"
    torch.save({"model": plain.state_dict()}, init)
    path = config("base.yaml", MODEL=network, FEWSHOT={"INIT": str(init)})
    run(path, ["SOLVER.BASE_LR", "1e-30", "SOLVER.MAX_ITER", "1"], quiet=True)
    result = next((tmp_path / "output").rglob("result.json"))
    before, after = plain.state_dict(), load_weights(result.parent / "model_final.pth")["model"]
    shared = [name for name in before if name.startswith("backbone.res4") and name.endswith("weight")]
    assert len(shared) > 20 and [n for n in shared if not torch.allclose(before[n], after[n], atol=1e-5)] == []
    assert read_result(result).protocol.pretraining.startswith("detector trained:")


def test_more_shots_than_pictures_or_than_are_read(stages):
    _, direct = stages
    with pytest.raises(ValueError, match="OS2D.TEST_SHOTS"):
        load_config(direct, ["FEWSHOT.SHOT", "2", "OS2D.TEST_SHOTS", "1"])
    with pytest.raises(ValueError, match=r"3"):
        run(direct, ["FEWSHOT.SHOT", "3"], quiet=True)


def test_pyramid_network_is_refused(config):
    with pytest.raises(ValueError, match=r"--model r50_c4"):
        load_config(
            config(
                "fpn.yaml",
                MODEL={"RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"]}},
            )
        )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("OS2D.FUSION", "median", r"max \| mean \| agree"),
        ("OS2D.PARAMETERS", "5", r"4 \| 6"),
        ("OS2D.PYRAMID", "()", "one positive scale"),
        ("OS2D.ALIGNED_SHARE", "0.0", "aligns nothing"),
        ("OS2D.NEGATIVE_IOU", "0.9", "lies above"),
        ("OS2D.WEAKALIGN", "weakalign.pth", "six parameters"),
        ("INPUT.PATCH.SCALE_JITTER", "0.0", "above 0"),
        ("INPUT.FS.ENABLED", "True", "both True"),
        ("SOLVER.CLIP_TOTAL_NORM", "-1.0", "cannot be negative"),
        ("FEWSHOT.ONESHOT_SETS", "('train',)", "names of three sets"),
        ("FEWSHOT.LEAK", "drop", "no labels of novel objects"),
        ("INPUT.PATCH.ENABLED", "False", "trains on patches"),
        ("SOLVER.HEAD_LR_FACTOR", "2.0", "cannot obey"),
        ("MODEL.RPN.NEGATIVES_KEPT", "4", "no proposals"),
        ("OS2D.ENABLED", "False", "only OS2D trains on patches"),
    ],
)
def test_values_that_cannot_be(config, key, value, said):
    path = config("base.yaml")
    with pytest.raises(ValueError, match=said):
        load_config(path, [key, value])


def test_keys_of_os2d_leave_other_digests_alone(write_config):
    cfg = load_config(write_config())
    older = default_config()
    assert older.OS2D.ENABLED is False
    changed = load_config(write_config(), ["OS2D.EVAL_SCALE", "77", "INPUT.PATCH.SIZE", "77"])
    assert result_digest(cfg) == result_digest(changed)


def test_a_test_set_alone_runs(config, cards, tmp_path):
    """As Dairy and Paste: no training file, all classes are new."""
    folder = {"ROOT": str(cards), "TRAIN_JSON": "", "TRAIN_IMAGES": "", "TEST_JSON": "classes/cards.csv"}
    words = {**folder, "TEST_IMAGES": "src", "CLASS_IMAGES": "classes/images", "NOVEL_CLASSES": [], "SURGERY": "none"}
    words |= {"LAYOUT": "oneshot", "DATASET": "cards", "OUTPUT": str(tmp_path / "output"), "ONESHOT_SETS": ["", "", ""]}
    words |= {"METHOD": "untrained", "STAGE": "novel", "SETTING": "fsod", "SHOT": 1, "RESET_PREDICTOR": True}
    words["SCHEDULE"] = [["*", "*", "*", 1e-4, [], 0, 0]]
    torch.save({"model": _backbone(config("base.yaml"))}, tmp_path / "backbone.pth")
    path = config("alone.yaml", FEWSHOT=words, INPUT={"FORMAT": "RGB"}, OS2D={"ENABLED": True, "PYRAMID": [1.0]})
    metrics = run(path, ["MODEL.WEIGHTS", str(tmp_path / "backbone.pth"), "OS2D.EVAL_SCALE", "320"], quiet=True)
    assert "nmAP50" in metrics and len([name for name in metrics if name.startswith("AP50-")]) == CLASSES


def _backbone(path):
    detector = build_detector(load_config(path, ["MODEL.DEVICE", "cpu"]))
    return {f"backbone.{name}": value for name, value in detector.backbone.state_dict().items()}
