"""Official names in: nothing may be lost on either side."""

import pytest
import torch

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.checkpoint.rename import OFFICIAL_TFA, TABLES, convert_file, rename
from fsdet.checkpoint.safe_io import load_weights, save_atomic


def official_names() -> list[str]:
    """Parameter and buffer names of the official R-50 FPN checkpoints, written down from their layout."""
    norm = [f"norm.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")]
    body = "backbone.bottom_up"
    names = [f"{body}.stem.conv1.{leaf}" for leaf in ["weight", *norm]]
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            layers = ["conv1", "conv2", "conv3"] + (["shortcut"] if block == 0 else [])
            names += [f"{body}.res{stage}.{block}.{layer}.{leaf}" for layer in layers for leaf in ["weight", *norm]]
    modules = [f"backbone.fpn_{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)]
    modules += [f"proposal_generator.rpn_head.{layer}" for layer in ("conv", "objectness_logits", "anchor_deltas")]
    modules += [f"roi_heads.box_head.fc{i}" for i in (1, 2)]
    modules += [f"roi_heads.box_predictor.{layer}" for layer in ("cls_score", "bbox_pred")]
    return names + [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]


@pytest.fixture(scope="module")
def official(tiny_detector):
    """(official checkpoint, model): shapes from the model, values of their own, old buffers and training state."""
    model = tiny_detector("fpn")
    own = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(own[name].shape, generator=generator) for name in official_names()}
    state |= {f"proposal_generator.anchor_generator.cell_anchors.{i}": torch.rand(3, 4) for i in range(5)}
    state |= {"pixel_mean": torch.rand(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    return {"model": state, "optimizer": {"state": {}}, "iteration": 79999}, model


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_official_checkpoint_loads_with_nothing_unmatched(tmp_path, official, wrapped):
    checkpoint, model = official
    save_atomic({**checkpoint, "model": {wrapped + k: v for k, v in checkpoint["model"].items()}}, tmp_path / "tfa.pth")
    own = model.state_dict()
    report = convert_file(
        tmp_path / "tfa.pth", tmp_path / "o.safetensors", OFFICIAL_TFA, model_state=own, record={"classes": ["a"]}
    )
    assert report.is_full and set(report.renamed.values()) == set(own) and len(report.dropped) == 7
    assert load_weights(tmp_path / "o.safetensors")["fsdet"]["classes"] == ["a"]
    checkpointer = FewShotCheckpointer(model, require_full=True)
    checkpointer.load(tmp_path / "o.safetensors")
    assert all(torch.equal(value, checkpoint["model"][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("backbone.fpn_lateral2.weight", "backbone.fpn_side2.weight", "not in the model: backbone.fpn_side2.weight"),
        ("roi_heads.box_head.fc1.bias", "box_head.fc1.bias", "no row of the table takes box_head.fc1.bias"),
        ("proposal_generator.rpn_head.conv.weight", "rpn.conv.weight", "no row of the table takes rpn.conv.weight"),
    ],
)
def test_renamed_key_is_reported_and_fails(tmp_path, official, old, new, said):
    checkpoint, model = official
    state = {new if name == old else name: value for name, value in checkpoint["model"].items()}
    save_atomic({"model": state}, tmp_path / "tfa.pth")
    arguments = (tmp_path / "tfa.pth", tmp_path / "o.pth", OFFICIAL_TFA)
    with pytest.raises(ValueError, match="tfa.pth does not fit") as error:
        convert_file(*arguments, model_state=model.state_dict())
    assert said in str(error.value) and f"not in the file: {old}" in str(error.value)
    assert not (tmp_path / "o.pth").exists()
    report = convert_file(*arguments, model_state=model.state_dict(), allow_unmatched=True)
    assert report.missing == (old,) and (tmp_path / "o.pth").exists()


def test_other_class_count_is_reported(official, tiny_detector):
    checkpoint, _ = official
    _, report = rename(checkpoint["model"], OFFICIAL_TFA, tiny_detector("fpn", classes=20).state_dict())
    assert ("roi_heads.box_predictor.cls_score.weight", (16, 8), (21, 8)) in report.mismatched
    assert not report.is_full and "other shape" in report.describe()


def test_learnable_cosine_scale_belongs_to_the_classifier():
    state, report = rename({"roi_heads.box_predictor.scale": torch.ones(1)}, OFFICIAL_TFA)
    assert list(state) == ["roi_heads.box_predictor.cls_score.scale"] and report.is_full


def test_rows_apply_in_order_and_at_the_start():
    table = ((r"head\.old\.", None), (r"head\.(\d+)\.", r"heads.\1."), (r"head\.", "heads.x."))
    state = {"head.old.w": 0, "head.3.w": 1, "head.head.w": 2, "body.head.w": 3}
    result, report = rename({name: torch.tensor(value) for name, value in state.items()}, table)
    assert list(result) == ["heads.3.w", "heads.x.head.w"]
    assert report.dropped == ("head.old.w",) and report.unmatched == ("body.head.w",) and not report.is_full


def test_two_keys_with_one_name_are_refused():
    with pytest.raises(ValueError, match=r"renamed to x\.w"):
        rename({"a.w": torch.ones(1), "b.w": torch.zeros(1)}, ((r"[ab]\.", "x."),))


def test_second_copy_of_a_shared_part_is_left_out():
    state = {
        "net_feature_maps.conv1.weight": torch.ones(2),
        "net_label_features.net_class_features.conv1.weight": torch.ones(2),
    }
    renamed, report = rename(state, TABLES["os2d"], {"backbone.conv1.weight": torch.zeros(2)})
    assert list(renamed) == ["backbone.conv1.weight"]
    assert report.is_full
    assert report.dropped == ("net_label_features.net_class_features.conv1.weight",)
    state["net_label_features.net_class_features.conv1.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="two sets of weights"):
        rename(state, TABLES["os2d"])


def test_output_format(tmp_path):
    with pytest.raises(ValueError, match=r"o\.pkl: converted weights"):
        convert_file(tmp_path / "a.pth", tmp_path / "o.pkl", OFFICIAL_TFA)
