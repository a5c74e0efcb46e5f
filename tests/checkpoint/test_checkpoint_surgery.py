"""Every row lands at its class: the official tools' results, then hand-made cases and faults."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.checkpoint.class_lists import named_split, read_class_names
from fsdet.checkpoint.predictor import predictor_classes
from fsdet.checkpoint.safe_io import load_weights, save_atomic, save_safetensors
from fsdet.checkpoint.surgery import combine, operate, randinit, remove, surgery_file
from fsdet.data.files import sha256_of
from fsdet.data.splits import coco_split, voc_split

GOLDEN = Path(__file__).resolve().parents[1] / "golden/defrcn/c_surgery.npz"
SPLITS = {"voc": voc_split(1), "coco": coco_split()}
HEAD = "roi_heads.box_predictor."
CLS, BOX = HEAD + "cls_score.weight", HEAD + "bbox_pred.weight"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {key: file[key] for key in file.files}


def golden_model(golden, prefix):
    start = f"{prefix}/model/"
    return {k.removeprefix(start): torch.from_numpy(v) for k, v in golden.items() if k.startswith(start)}


def golden_checkpoint(golden, prefix):
    rest = {"optimizer": {"state": {}}, "scheduler": {"last_epoch": 1}, "iteration": int(golden[f"{prefix}/iteration"])}
    assert sorted([*rest, "model"]) == golden[f"{prefix}/top_keys"].tolist()
    return {"model": golden_model(golden, prefix), **rest}


@pytest.mark.parametrize("method", ["remove", "randinit", "combine_tfa"])
@pytest.mark.parametrize("benchmark", ["voc", "coco"])
def test_official_results(golden, benchmark, method):
    split = SPLITS[benchmark]
    checkpoints = [golden_checkpoint(golden, f"{benchmark}/base")]
    if method == "combine_tfa":
        checkpoints.append(golden_checkpoint(golden, f"{benchmark}/novel"))
    result = operate(
        method.removesuffix("_tfa"), *checkpoints, source_classes=split.base, target_classes=split.all, seed=3
    )
    expected = golden_model(golden, f"{benchmark}/{method}")
    assert sorted(result) == golden[f"{benchmark}/{method}/top_keys"].tolist()
    assert result["iteration"] == golden[f"{benchmark}/{method}/iteration"]
    assert set(result["model"]) == set(expected)
    for name, value in result["model"].items():
        exact = torch.ones(len(value), dtype=torch.bool)
        if method == "randinit" and name in (CLS, BOX):
            head = "cls_score" if name == CLS else "bbox_pred"
            exact = torch.from_numpy(golden[f"{benchmark}/randinit/{head}_row_source"]) >= 0
            drawn = value[~exact]
            # Four standard errors: VOC draws 30 numbers for the classifier.
            assert abs(drawn.mean()) < 4 * 0.01 / drawn.numel() ** 0.5
            assert abs(drawn.std() - 0.01) < 4 * 0.01 / (2 * drawn.numel()) ** 0.5
        assert value.shape == expected[name].shape and torch.equal(value[exact], expected[name][exact]), name


def predictor(classes, width=4, *, bias=True, agnostic=False, prefix=HEAD, offset=0.0):
    """A predictor whose row r is filled with r (boxes: class + coordinate / 10), plus one other tensor."""
    rows = torch.arange(classes + 1.0)[:, None].expand(-1, width) + offset
    boxes = (torch.arange(classes)[:, None] + torch.arange(4) / 10).flatten()[:, None].expand(-1, width) + offset
    state = {"backbone.w": torch.tensor([1.0 + offset]), prefix + "cls_score.weight": rows.clone()}
    state[prefix + "bbox_pred.weight"] = (boxes[:4] if agnostic else boxes).clone()
    state[prefix + "bbox_pred.bias"] = state[prefix + "bbox_pred.weight"][:, 0].clone()
    if bias:
        state[prefix + "cls_score.bias"] = rows[:, 0].clone()
    return state


@pytest.mark.parametrize("benchmark", ["voc", "coco"])
def test_randinit_statistics_and_rows(benchmark):
    split = SPLITS[benchmark]
    state = predictor(len(split.base), width=1024)
    untouched = {name: value.clone() for name, value in state.items()}
    result = randinit(state, split.base, split.all, seed=0)
    novel = [name in split.novel for name in split.all]
    for row, name in enumerate(split.all):
        if name in split.base:
            source = split.base.index(name)
            assert torch.all(result[CLS][row] == source) and result[HEAD + "cls_score.bias"][row] == source
            assert torch.allclose(result[BOX][4 * row : 4 * row + 4, 0], source + torch.arange(4) / 10)
        else:
            assert result[HEAD + "cls_score.bias"][row] == 0
    assert torch.all(result[CLS][-1] == len(split.base))  # background
    drawn = torch.cat([result[CLS][:-1][novel], result[BOX].reshape(-1, 4, 1024)[novel].flatten(0, 1)])
    assert abs(drawn.std() - 0.01) < 0.001 and abs(drawn.mean()) < 0.0005
    assert all(torch.equal(state[name], untouched[name]) for name in state)


def test_randinit_seed():
    state = predictor(2)
    first, again, other = (randinit(state, ["a", "b"], ["a", "x", "b"], seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first[CLS], again[CLS]) and torch.equal(first[BOX], again[BOX])
    assert not torch.equal(first[CLS][1], other[CLS][1])
    before = torch.random.get_rng_state()
    randinit(state, ["a", "b"], ["a", "x", "b"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_combine_takes_novel_rows_and_base_background():
    base, novel = predictor(3), predictor(2, offset=100.0)
    result = combine(base, novel, ["a", "b", "c"], ["a", "x", "b", "y", "c"])
    assert result[CLS][:, 0].tolist() == [0, 100, 1, 101, 2, 3]
    assert result[HEAD + "cls_score.bias"].tolist() == [0, 100, 1, 101, 2, 3]
    assert torch.allclose(result[BOX][4:8, 0], 100 + torch.arange(4) / 10)
    assert result["backbone.w"] == 1.0
    # The novel model may list its classes in an order of its own.
    result = combine(base, novel, ["a", "b", "c"], ["a", "x", "b", "y", "c"], novel_classes=["y", "x"])
    assert result[CLS][:, 0].tolist() == [0, 101, 1, 100, 2, 3]


def test_combine_where_the_base_has_every_row():
    result = combine(predictor(3), predictor(1, offset=100.0), list("abc"), list("abc"), novel_classes=["b"])
    assert result[CLS][:, 0].tolist() == [0, 100, 2, 3]


def test_remove_keeps_everything_else():
    state = predictor(3) | {HEAD + "cls_score.scale": torch.ones(1)}
    assert list(remove(state)) == ["backbone.w", HEAD + "cls_score.scale"]


@pytest.mark.parametrize("method", ["randinit", "combine"])
def test_cosine_heads_have_no_classifier_bias(method):
    base, novel = predictor(3, bias=False), predictor(1, bias=False, offset=100.0)
    if method == "randinit":
        result = randinit(base, list("abc"), list("abxc"))
    else:
        result = combine(base, novel, list("abc"), list("abxc"))
    assert HEAD + "cls_score.bias" not in result and HEAD + "bbox_pred.bias" in result
    assert result[CLS].shape == (5, 4) and result[CLS][3, 0] == 2


def test_combine_of_cosine_and_linear_is_refused():
    for base_bias in (True, False):
        with pytest.raises(ValueError, match=r"a linear and a cosine classifier.*OUTPUT_LAYER"):
            combine(predictor(2, bias=base_bias), predictor(1, bias=not base_bias), ["a", "b"], ["a", "b", "x"])


def test_class_agnostic_boxes_are_kept():
    state = predictor(3, agnostic=True)
    result = randinit(state, list("abc"), list("abxc"))
    assert torch.equal(result[BOX], state[BOX]) and result[CLS].shape == (5, 4)
    result = combine(state, predictor(2, agnostic=True, offset=100.0), list("abc"), list("abcxy"))
    assert torch.equal(result[BOX], state[BOX]) and result[CLS][:, 0].tolist() == [0, 1, 2, 100, 101, 3]
    with pytest.raises(ValueError, match=r"class-agnostic box regressor.*CLS_AGNOSTIC_BBOX_REG"):
        combine(state, predictor(2), list("abc"), list("abcxy"))


def test_one_class_reads_as_class_specific_unless_told():
    state = predictor(1)
    assert randinit(state, ["a"], ["a", "x"])[BOX].shape == (8, 4)
    assert randinit(state, ["a"], ["a", "x"], class_agnostic=True)[BOX].shape == (4, 4)
    # The other checkpoint settles it.
    result = combine(state, predictor(2, agnostic=True), ["a"], ["a", "x", "y"])
    assert result[BOX].shape == (4, 4) and result[CLS].shape == (4, 4)
    with pytest.raises(ValueError, match="contradicts class_agnostic=True"):
        randinit(predictor(2), ["a", "b"], ["a", "b", "x"], class_agnostic=True)


def test_cascade_predictors_are_all_refitted():
    state = predictor(2, prefix=HEAD + "0.") | predictor(2, prefix=HEAD + "1.", offset=10.0)
    assert predictor_classes(state) == 2
    result = randinit(state, ["a", "b"], ["x", "b", "a"])
    assert result[HEAD + "0.cls_score.weight"][1:, 0].tolist() == [1, 0, 2]
    assert result[HEAD + "1.cls_score.weight"][1:, 0].tolist() == [11, 10, 12]
    assert len(remove(state)) == 1


def test_half_precision_is_kept():
    state = {name: value.half() for name, value in predictor(2).items()}
    assert {value.dtype for value in randinit(state, ["a", "b"], ["a", "b", "x"]).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (["a", "a"], ["a", "b"], r"source classes repeat \['a'\]"),
        (["a", "b"], ["a", "b", "b"], r"target classes repeat \['b'\]"),
        (["a", "z"], ["a", "b"], r"Unknown classes \['z'\].*target"),
        (["a", "b", "c"], ["a", "b", "c", "x"], r"predictor of 2 classes, but 3 source classes.*--split"),
    ],
)
def test_wrong_class_lists(source, target, message):
    with pytest.raises(ValueError, match=message):
        randinit(predictor(2), source, target)


def test_wrong_novel_lists():
    base, novel = predictor(2), predictor(1)
    with pytest.raises(ValueError, match=r"predictor of 1 classes, but 2 novel classes"):
        combine(base, novel, ["a", "b"], ["a", "b", "x", "y"])
    with pytest.raises(ValueError, match=r"Unknown classes \['z'\]"):
        combine(base, novel, ["a", "b"], ["a", "b", "x"], novel_classes=["z"])
    with pytest.raises(ValueError, match=r"\['y'\] are neither source nor novel"):
        combine(base, novel, ["a", "b"], ["a", "b", "x", "y"], novel_classes=["x"])
    with pytest.raises(ValueError, match=r"rows of shape \(4,\) in the base and \(8,\)"):
        combine(base, predictor(1, width=8), ["a", "b"], ["a", "b", "x"])


def test_no_predictor():
    assert predictor_classes({"stem.conv1.weight": torch.ones(1)}) is None
    for method in ("remove", "randinit"):
        with pytest.raises(ValueError, match="no box predictor"):
            operate(method, {"model": {"w": torch.ones(1)}}, source_classes=["a"], target_classes=["a", "b"])


def test_contradictory_arguments():
    checkpoint = {"model": predictor(2)}
    with pytest.raises(ValueError, match="Unknown method"):
        operate("append", checkpoint)
    with pytest.raises(ValueError, match="belongs to combine"):
        operate("randinit", checkpoint, checkpoint, source_classes=["a", "b"], target_classes=["a", "b", "c"])
    with pytest.raises(ValueError, match="belongs to combine"):
        operate("combine", checkpoint, source_classes=["a", "b"], target_classes=["a", "b", "c"])
    with pytest.raises(ValueError, match="needs the source and the target classes"):
        operate("randinit", checkpoint, target_classes=["a", "b", "c"])


def test_recorded_classes_are_used_and_compared():
    checkpoint = {"model": predictor(2), "fsdet": {"classes": ["a", "b"]}, "trainer": {}}
    assert set(operate("randinit", checkpoint, target_classes=["x", "b", "a"])) == {"model", "iteration"}
    with pytest.raises(ValueError, match=r'source checkpoint records: row 0 is "a" in the file and "b"'):
        operate("randinit", checkpoint, source_classes=["b", "a"], target_classes=["a", "b", "x"])
    novel = {"model": predictor(1), "fsdet": {"classes": ["x"]}}
    with pytest.raises(ValueError, match=r"novel checkpoint records"):
        operate("combine", checkpoint, novel, target_classes=["a", "b", "y"], novel_classes=["y"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(tmp_path, toy, suffix):
    base, target = ["a", "b"], ["a", "x", "b"]
    FewShotCheckpointer(toy(2), tmp_path, metadata={"classes": base}).save("model_final", iteration=9)
    output = tmp_path / f"surgery{suffix}"
    record = surgery_file(tmp_path / "model_final.pth", output, "randinit", target_classes=target, seed=4)
    assert record["classes"] == target and record["seed"] == 4
    assert record["sources"] == [{"file": "model_final.pth", "sha256": sha256_of(tmp_path / "model_final.pth")}]
    loaded = load_weights(output)
    assert loaded["fsdet"] == record and loaded.get("iteration", 0) == 0
    model = toy(3)
    FewShotCheckpointer(model, require_full=True, metadata={"classes": target}).load(output)
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, loaded["model"][CLS])
    with pytest.raises(ValueError, match=r'row 1 is "x" in the file and "b"'):
        FewShotCheckpointer(model, metadata={"classes": ["a", "b", "x"]}).load(output)


def test_combine_of_files(tmp_path):
    save_atomic({"model": predictor(2)}, tmp_path / "base.pth")
    save_safetensors(predictor(1, offset=100.0), tmp_path / "novel.safetensors")
    surgery_file(
        tmp_path / "base.pth",
        tmp_path / "out.pth",
        "combine",
        novel_source=tmp_path / "novel.safetensors",
        source_classes=["a", "b"],
        target_classes=["a", "x", "b"],
    )
    assert load_weights(tmp_path / "out.pth")["model"][CLS][:, 0].tolist() == [0, 100, 1, 2]


def test_errors_name_the_file(tmp_path):
    save_atomic({"model": predictor(2)}, tmp_path / "base.pth")
    with pytest.raises(ValueError, match=r"base.pth: .*predictor of 2 classes, but 15"):
        surgery_file(
            tmp_path / "base.pth",
            tmp_path / "o.pth",
            "randinit",
            source_classes=voc_split(1).base,
            target_classes=voc_split(1).all,
        )
    with pytest.raises(ValueError, match=r"o.txt: surgery writes .pth or .safetensors"):
        surgery_file(tmp_path / "base.pth", tmp_path / "o.txt", "remove")
    assert not (tmp_path / "o.pth").exists()


def test_class_lists(tmp_path):
    assert named_split("voc2") == voc_split(2) and named_split("coco") == coco_split()
    with pytest.raises(ValueError, match=r'Unknown split "voc4"'):
        named_split("voc4")
    (tmp_path / "names.txt").write_text("traffic light\n\nbench\n")
    (tmp_path / "names.json").write_text('["traffic light", "a, b"]')
    assert read_class_names(str(tmp_path / "names.txt")) == ("traffic light", "bench")
    assert read_class_names(str(tmp_path / "names.json")) == ("traffic light", "a, b")
    assert read_class_names("traffic light, bench") == ("traffic light", "bench")
    with pytest.raises(ValueError, match="gone.txt not found"):
        read_class_names("gone.txt")
    with pytest.raises(ValueError, match="names no class"):
        read_class_names(" , ")
