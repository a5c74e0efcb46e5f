"""FewX through the engine: base stage, no fine-tuning, K-shot fine-tuning, sweeps, resuming, class memories, faults."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from fsdet.checkpoint.safe_io import load_weights
from fsdet.data.seeds import write_coco_shots
from fsdet.engine.predictor import Predictor
from fsdet.engine.record import result_digest, resume_digest
from fsdet.engine.run import run
from fsdet.engine.setup import load_config, on_this_machine
from fsdet.engine.sweep import Sweep, make_plan, run_sweep
from fsdet.engine.trainer import build_detector, make_optimizer
from fsdet.evaluation.result import read_result
from fsdet.modeling.class_memory import ClassMemory

CLASSES = ("red", "green", "blue", "grey", "white")  # white is novel
COLOURS = ((0, 0, 255), (0, 255, 0), (255, 0, 0), (128, 128, 128), (255, 255, 255))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Own data set: every picture shows squares of two of the five classes; 1-shot and 2-shot lists of seed 0."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for name, count in (("train", 10), ("test", 5)):
        data = _draw(folder / name, count, rng)
        (folder / f"{name}.json").write_text(json.dumps(data))
        for shot in (1, 2) if name == "train" else ():
            for class_id, class_name in enumerate(CLASSES):
                shots = [a for a in data["annotations"] if a["category_id"] == class_id + 1][:shot]
                images = [i for i in data["images"] if i["id"] in {a["image_id"] for a in shots}]
                path = folder / "samples" / "seed0" / f"full_box_{shot}shot_{class_name}_trainval.json"
                write_coco_shots(path, {**data, "images": images, "annotations": shots})
    return folder


def _draw(folder, count, rng):
    folder.mkdir()
    images, annotations = [], []
    for i in range(count):
        picture = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
        for half, class_id in enumerate((i % 5, (i + 1 + i // 5) % 5)):
            x, y = half * 48 + int(rng.integers(2, 18)), int(rng.integers(2, 34))
            picture[y : y + 28, x : x + 28] = COLOURS[class_id]
            row = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": class_id + 1, "iscrowd": 0}
            annotations.append({**row, "bbox": [x, y, 28, 28], "area": 784})
        cv2.imwrite(str(folder / f"{i + 1}.png"), picture)
        images.append({"id": i + 1, "file_name": f"{i + 1}.png", "height": 64, "width": 96})
    categories = [{"id": i + 1, "name": n} for i, n in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def config(pairs, write_config, calm_weights, tmp_path):
    """Write a narrow FewX config; keyword arguments update whole sections."""

    def write(name, **sections):
        model = {
            "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},
            "RESNETS": {"OUT_FEATURES": ["res4"], "NORM": "FrozenBN"},
            "ANCHOR_GENERATOR": {"SIZES": [[16, 32]], "ASPECT_RATIOS": [[1.0]]},
            "RPN": {"IN_FEATURES": ["res4"], "POST_NMS_TOPK_TEST": 20},
            "ROI_HEADS": {"NAME": "FewShotRes5ROIHeads", "IN_FEATURES": ["res4"]},
            "ROI_BOX_HEAD": {"NAME": "", "NUM_FC": 0, "POOLER_RESOLUTION": 14},
        }
        fewshot = {"METHOD": "fewx", "SURGERY": "none", "ROOT": str(pairs), "OUTPUT": str(tmp_path / "output")}
        fewshot["SAMPLES"] = "samples"
        parts = {
            "OUTPUT_DIR": "./output",
            "FEWSHOT": fewshot,
            "FEWX": {"ENABLED": True, "TEST_SHOTS": 2},
            "MODEL": model,
            "INPUT": {"FS": {"ENABLED": True, "SUPPORT_SHOT": 2, "CROP_SIZE": 64}},
            "SOLVER": {
                "IMS_PER_BATCH": 2,
                "MAX_ITER": 4,
                "BASE_LR": 1e-6,
                "STEPS": [],
                "CHECKPOINT_PERIOD": 2,
                "HEAD_LR_FACTOR": 2.0,
            },
        }
        for section, values in sections.items():
            parts[section] = {**parts.get(section, {}), **values}
        calm = tmp_path / "calm.pth"
        if not calm.is_file() and parts["FEWX"]["ENABLED"]:
            calm_weights(write_config(name, **parts))
        starts = calm.is_file() and "STAGE" not in parts["FEWSHOT"]
        parts["MODEL"] = {**parts["MODEL"], "WEIGHTS": str(calm) if starts else ""}
        return write_config(name, **parts)

    return write


@pytest.fixture
def stages(config):
    """Configs of base stage, no fine-tuning, and fine-tuning."""
    novel = {"BASE_METHOD": "fewx", "STAGE": "novel"}
    direct = {**novel, "METHOD": "fewx_direct", "SCHEDULE": [["*", "*", "*", 1e-7, [], 0, 0]]}
    tuned = {**novel, "METHOD": "fewx_ft", "SCHEDULE": [["*", "*", "*", 1e-7, [], 2, 1]]}
    return (
        config("base.yaml"),
        config("direct.yaml", FEWSHOT=_fewshot(config, direct)),
        config("tuned.yaml", FEWSHOT=_fewshot(config, tuned), MODEL=_model(config, {"BACKBONE": {"FREEZE_AT": 5}})),
    )


def _section(config, name):
    return yaml.safe_load(Path(config("section.yaml")).read_text(encoding="utf-8"))[name]


def _fewshot(config, values):
    return {**_section(config, "FEWSHOT"), **values}


def _model(config, values):
    model = _section(config, "MODEL")
    for key, part in values.items():
        model[key] = {**model[key], **part}
    return model


def test_sweep_base_direct_and_fine_tuned(stages, tmp_path):
    base, direct, tuned = stages
    results = [read_result(path) for path in run_sweep(Sweep(base, (direct, tuned), (1, 2), (0,)), quiet=True)]
    methods = [(r.protocol.method, r.protocol.shot, r.iterations) for r in results]
    assert methods == [
        ("fewx", 0, 4),
        ("fewx_direct", 1, 0),
        ("fewx_direct", 2, 0),
        ("fewx_ft", 1, 2),
        ("fewx_ft", 2, 2),
    ]
    for result in results[1:]:
        assert result.protocol.base_model == results[1].protocol.base_model != ""
        assert {"AP50", "bAP50", "nAP50"} <= result.metrics.keys() and set(result.per_class) == set(CLASSES)
    assert set(results[0].per_class) == set(CLASSES) - {"white"}
    assert results[1].seconds["train"] == 0
    folders = {
        p.parent.relative_to(tmp_path / "output").as_posix().split("/")[0] for p in tmp_path.rglob("result.json")
    }
    assert folders == {"fewx", "fewx_direct", "fewx_ft"}
    memories = list((tmp_path / "output").rglob("class_memory_fewx.json"))
    assert len(memories) == 5
    # Nothing is done again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "output").rglob("result.json")}
    run_sweep(Sweep(base, (direct, tuned), (1, 2), (0,)), quiet=True)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sweep_on_a_gpu(stages):
    """Training in mixed precision, class memories and detections in chunks, on the device."""
    base, direct, tuned = stages
    opts = ("SOLVER.AMP.ENABLED", "True", "FEWX.ROWS_AT_ONCE", "40")
    results = [read_result(path) for path in run_sweep(Sweep(base, (direct, tuned), (1,), (0,), opts=opts), quiet=True)]
    assert [r.iterations for r in results] == [4, 0, 2] and all(0 <= r.metrics["AP50"] <= 100 for r in results)


def test_backbone_is_frozen_in_fine_tuning_and_heads_train(stages, tmp_path):
    base, _, tuned = stages
    run(base, quiet=True)
    run(tuned, ["FEWSHOT.SHOT", "2"], quiet=True)
    before, after = (
        load_weights(next((tmp_path / "output").glob(f"{name}/**/model_final.pth")))["model"]
        for name in ("fewx", "fewx_ft")
    )
    changed = {
        name.split(".")[0] + "." + name.split(".")[1] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"proposal_generator.rpn_head", "roi_heads.res5", "roi_heads.box_predictor"}


def test_killed_and_resumed_equals_uninterrupted(config, tmp_path):
    path = config("base.yaml")
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    run(path, ["OUTPUT_DIR", whole], quiet=True)
    run(path, ["OUTPUT_DIR", parts, "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1"], quiet=True)
    _forget(path)
    run(path, ["OUTPUT_DIR", parts], resume=True, quiet=True)
    one, other = (load_weights(f"{folder}/model_final.pth")["model"] for folder in (whole, parts))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def _forget(path):
    for name in [n for n in DatasetCatalog if "pairs" in n or "squares" in n]:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def test_memory_is_kept_and_taken_up_without_pictures(stages, pairs, tmp_path):
    base, direct, _ = stages
    run(base, quiet=True)
    first = run(direct, ["FEWSHOT.SHOT", "1"], quiet=True)
    folder = next((tmp_path / "output" / "fewx_direct").glob("**/result.json")).parent
    kept = (folder / "class_memory_fewx.json").read_bytes()
    lost = tmp_path / "lost"
    shutil.copytree(pairs, lost)
    shutil.rmtree(lost / "samples")
    _forget(direct)
    again = run(
        direct, ["FEWSHOT.SHOT", "1", "FEWSHOT.ROOT", str(lost), "OUTPUT_DIR", str(folder)], eval_only=True, quiet=True
    )
    assert str(again) == str(first)  # nan where there is no object of a size
    assert (folder / "class_memory_fewx.json").read_bytes() == kept


def test_memory_of_other_weights_is_not_taken(stages, tmp_path):
    base, direct, _ = stages
    run(base, quiet=True)
    run(direct, ["FEWSHOT.SHOT", "1"], quiet=True)
    folder = next((tmp_path / "output" / "fewx_direct").glob("**/result.json")).parent
    kept = json.loads((folder / "class_memory_fewx.json").read_text())
    weights = next((tmp_path / "output" / "fewx").glob("**/model_final.pth"))
    state = torch.load(weights, weights_only=True)
    state["model"]["roi_heads.res5.0.conv1.weight"] *= 1.5
    torch.save(state, weights)
    _forget(direct)
    run(direct, ["FEWSHOT.SHOT", "1"], eval_only=True, quiet=True)
    assert json.loads((folder / "class_memory_fewx.json").read_text())["encoder"] != kept["encoder"]


def test_heads_learn_at_their_own_rate(config):
    cfg = on_this_machine(load_config(config("base.yaml")))
    model = build_detector(cfg)
    rates = {id(p): group["lr"] for group in make_optimizer(cfg, model).param_groups for p in group["params"]}
    trained = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained) == sum(p.requires_grad for p in model.parameters())
    assert {lr for name, lr in trained.items() if "box_predictor" in name} == {2e-6}
    assert {lr for name, lr in trained.items() if "box_predictor" not in name} == {1e-6}


def test_starts_from_another_detector(config, tmp_path):
    """FEWSHOT.INIT: a plain C4 detector gives everything but the relation heads."""
    plain = config(
        "plain.yaml",
        FEWX={"ENABLED": False},
        INPUT={"FS": {"ENABLED": False}},
        SOLVER={"MAX_ITER": 1, "HEAD_LR_FACTOR": 1.0, "CHECKPOINT_PERIOD": 1},
    )
    run(plain, ["FEWSHOT.METHOD", "plain"], quiet=True)
    init = next((tmp_path / "output" / "plain").glob("**/model_final.pth"))
    _forget(plain)
    cfg_path = config("base.yaml")
    run(cfg_path, ["FEWSHOT.INIT", str(init), "SOLVER.BASE_LR", "1e-30", "SOLVER.MAX_ITER", "1"], quiet=True)
    before = load_weights(init)["model"]
    result = next((tmp_path / "output" / "fewx").glob("**/result.json"))
    after = load_weights(result.parent / "model_final.pth")["model"]
    shared = [name for name in after if name in before and name.startswith(("proposal_generator", "roi_heads.res5"))]
    assert len(shared) > 20 and [n for n in shared if not torch.allclose(before[n], after[n], atol=1e-5)] == []
    assert read_result(result).protocol.pretraining.startswith("detector base:")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["INPUT.FS.SUPPORT_WAY", "3"], "SUPPORT_WAY is 3"),
        (["INPUT.FS.SUPPORT_SHOT", "0"], "SUPPORT_SHOT is 0"),
        (["FEWX.RELATIONS", "('global', 'remote')"], "RELATIONS is"),
        (["FEWX.CORRELATION", "largest"], 'CORRELATION is "largest"'),
        (["INPUT.FS.SAMPLING", "often"], 'SAMPLING is "often"'),
        (["MODEL.ROI_HEADS.NAME", "FewShotROIHeads"], "a C4 network"),
        (["SOLVER.MAX_ITER", "0"], "MAX_ITER is 0"),
        (["FEWSHOT.STAGE", "novel", "FEWSHOT.SHOT", "3"], "SHOT is 3, but FEWX.TEST_SHOTS 2"),
    ],
)
def test_contradictions_are_found_at_once(config, opts, message):
    with pytest.raises(ValueError, match=message):
        load_config(config("base.yaml"), opts)


def test_novel_stage_without_base_model_says_so(stages):
    _, direct, _ = stages
    with pytest.raises(FileNotFoundError, match="train the base stage first"):
        run(direct, ["FEWSHOT.SHOT", "1"], quiet=True)


def test_detector_without_relation_heads_is_refused(stages, config, tmp_path):
    """A plain C4 checkpoint fills all but the relation heads, which nothing would train."""
    _, direct, _ = stages
    plain = config(
        "plain.yaml",
        FEWX={"ENABLED": False},
        INPUT={"FS": {"ENABLED": False}},
        SOLVER={"MAX_ITER": 1, "HEAD_LR_FACTOR": 1.0, "CHECKPOINT_PERIOD": 1},
    )
    run(plain, ["FEWSHOT.METHOD", "plain"], quiet=True)
    weights = next((tmp_path / "output" / "plain").glob("**/model_final.pth"))
    _forget(plain)
    with pytest.raises(ValueError, match="fills the model only in part"):
        run(direct, ["FEWSHOT.SHOT", "1", "MODEL.WEIGHTS", str(weights)], quiet=True)
    heads_alone = ["FEWSHOT.RESET_PREDICTOR", "True", "FEWSHOT.METHOD", "untrained"]
    assert run(direct, ["FEWSHOT.SHOT", "1", "MODEL.WEIGHTS", str(weights), *heads_alone], quiet=True)["AP50"] >= 0


def test_start_weights_that_have_seen_the_novel_classes_are_refused(stages, pairs, tmp_path):
    """The base run of another class split: its detector has no predictor of classes that could tell."""
    base, direct, _ = stages
    run(base, quiet=True)
    _forget(base)
    with pytest.raises(ValueError, match=r"trained with labels of \['red'\], which are novel classes here"):
        run(direct, ["FEWSHOT.SHOT", "1", "FEWSHOT.NOVEL_CLASSES", "('red',)"], quiet=True)


def test_a_base_stage_never_starts_from_novel_labels(config, tmp_path):
    """Whichever key names the file."""
    torch.save({"model": {"w": torch.ones(1)}, "fsdet": {"classes": ["red", "white"]}}, tmp_path / "seen.pth")
    for key in ("MODEL.WEIGHTS", "FEWSHOT.INIT"):
        with pytest.raises(ValueError, match=r"trained with labels of \['white'\]"):
            run(config("base.yaml"), [key, str(tmp_path / "seen.pth")], quiet=True)


def test_a_base_class_without_objects_is_found_at_once(config, pairs, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    data = json.loads((folder / "train.json").read_text())
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] != 2]
    (folder / "train.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"train.json: no object of the classes \['green'\].*fewx knows a class by"):
        run(config("base.yaml"), ["FEWSHOT.ROOT", str(folder)], quiet=True)


def test_features_of_a_deeper_network_are_refused(config, tmp_path):
    """The blocks that R-50 has would fit by name."""
    path = config("base.yaml")
    deeper = build_detector(load_config(path, ["MODEL.RESNETS.DEPTH", "101", "MODEL.DEVICE", "cpu"]))
    torch.save({"model": deeper.state_dict()}, tmp_path / "deeper.pth")
    with pytest.raises(ValueError, match=r"deeper network than this one \(R-50\): it has res4\.6, res4\.7"):
        run(path, ["FEWSHOT.INIT", str(tmp_path / "deeper.pth")], quiet=True)


def test_a_resumed_run_keeps_what_it_started_from(config, tmp_path):
    path = config("base.yaml")
    start = Path(load_config(path).MODEL.WEIGHTS)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        shutil.copy(start, tmp_path / name / "model_final.pth")
    first, second = (["FEWSHOT.INIT", str(tmp_path / name / "model_final.pth")] for name in ("first", "second"))
    run(path, [*first, "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1"], quiet=True)
    for opts in (second, ["FEWSHOT.INIT", str(tmp_path / "gone.pth")]):
        _forget(path)
        run(path, [*opts, "SOLVER.MAX_ITER", "3", "SOLVER.WARMUP_ITERS", "1"], resume=True, quiet=True)
        result = read_result(next((tmp_path / "output").rglob("result.json")))
        assert result.protocol.pretraining.startswith("detector first:") and result.iterations == 3


def test_half_a_memory_is_made_anew(stages, tmp_path):
    base, direct, _ = stages
    run(base, quiet=True)
    first = run(direct, ["FEWSHOT.SHOT", "1"], quiet=True)
    folder = next((tmp_path / "output" / "fewx_direct").rglob("result.json")).parent
    (folder / "class_memory_fewx.safetensors").unlink()
    _forget(direct)
    again = run(direct, ["FEWSHOT.SHOT", "1"], eval_only=True, quiet=True)
    np.testing.assert_equal([again[name] for name in first], [*first.values()])


def test_an_edited_memory_is_taken_as_it_is(stages, pairs, tmp_path):
    """On the disk of a run, whose K shots are at hand; and in a detector that has predicted with it."""
    base, direct, _ = stages
    run(base, quiet=True)
    run(direct, ["FEWSHOT.SHOT", "1", "FEWX.TEST_SHOTS", "1"], quiet=True)
    folder = next((tmp_path / "output" / "fewx_direct").rglob("result.json")).parent
    memory = ClassMemory.load(folder / "class_memory_fewx")
    memory.remove("red")
    memory.rename("blue", "navy")
    memory.save(folder / "class_memory_fewx")
    predictor = Predictor.from_run(folder, threshold=0.0)
    assert set(predictor.class_names) == {"green", "grey", "white", "navy"}
    picture = torch.from_numpy(cv2.imread(str(pairs / "test" / "1.png"))).permute(2, 0, 1)
    query = [{"image": picture, "height": 64, "width": 96}]
    before = {int(number) for number in predictor.model(query)[0]["instances"].pred_classes}
    predictor.model.class_memory.remove(predictor.class_names[0])
    after = {int(number) for number in predictor.model(query)[0]["instances"].pred_classes}
    assert max(before) == 3 and max(after) == 2


def test_base_stage_is_not_evaluated_with_random_heads(config, calm_weights):
    path = config("base.yaml")
    weights = calm_weights(path)[1]
    state = torch.load(weights, weights_only=True)["model"]
    torch.save({"model": {k: v for k, v in state.items() if "box_predictor" not in k}}, weights)
    with pytest.raises(ValueError, match="fills the model only in part"):
        run(path, ["MODEL.WEIGHTS", weights], eval_only=True, quiet=True)


def test_calibration_of_the_untrained_takes_the_base_weights(stages):
    base, direct, tuned = stages
    plan = make_plan(Sweep(base, (direct, tuned), (1,), (0,), calibration="both"))
    weights = {
        p.folder.split("/")[-5]: p.opts[p.opts.index("MODEL.WEIGHTS") + 1] for p in plan if p.kind == "evaluation"
    }
    assert weights["fewx_direct"].endswith("fewx/squares/base/model_final.pth")
    assert weights["fewx_ft"].endswith("fewx_ft/squares/gfsod/1shot_seed0/model_final.pth")


def test_memory_bounds_and_places_are_no_part_of_the_recipe(config):
    path = config("base.yaml")
    plain = load_config(path)
    for opts in (["FEWX.ROWS_AT_ONCE", "7"], ["INPUT.FS.CACHE_MIB", "1"]):
        other = load_config(path, opts)
        assert result_digest(other) == result_digest(plain) and resume_digest(other) == resume_digest(plain)
    assert result_digest(load_config(path, ["FEWX.SHARED_PROPOSALS", "9"])) != result_digest(plain)
    given = load_config(config("init.yaml", FEWSHOT={"INIT": "a.pth"}), ["MODEL.WEIGHTS", "b.pth"])
    assert (given.MODEL.WEIGHTS, given.FEWSHOT.INIT) == ("b.pth", "")
