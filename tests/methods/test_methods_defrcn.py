"""DeFRCN's modules in the narrow detector that training builds from configs/defrcn."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fsdet.checkpoint.rename import TABLES, convert_file, rename
from fsdet.checkpoint.safe_io import save_atomic
from fsdet.engine.parity_detector import CONFIGS, NETWORK, build_small
from fsdet.engine.setup import load_config
from fsdet.methods import METHODS, add_method_configs, complete_method_configs, defrcn
from fsdet.methods.defrcn.decoupled import DecoupledROIHeads, DecoupledRPN, Decoupling, DropoutOutputLayers
from fsdet.modeling import add_modeling_config
from fsdet.modeling.roi_heads import build_box_predictor

RPN_SCALE, ROI_SCALE = "MODEL.RPN.BACKWARD_SCALE", "MODEL.ROI_HEADS.BACKWARD_SCALE"
FEW = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "64")


def make_inputs(classes=(0, 3)):
    generator = torch.Generator().manual_seed(0)
    boxes = Boxes(torch.tensor([[4.0, 4, 60, 60], [50, 20, 90, 62]]))
    instances = Instances((64, 96), gt_boxes=boxes, gt_classes=torch.tensor(classes))
    image = torch.randint(0, 256, (3, 64, 96), generator=generator).to(torch.uint8)
    return [{"image": image, "height": 64, "width": 96, "instances": instances}]


def prepared(model):
    """Random weights that stay finite behind frozen norms, and affine layers that are not the identity."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            value.fill_(0.3)
        elif ".decouple." in name:
            value.add_(0.1 * torch.rand(value.shape, generator=generator))
    return model


def small(stage="base", *opts):
    torch.manual_seed(0)
    return prepared(build_small(stage, *FEW, *opts)[0])


def train(model):
    """Losses and gradients of one pass; the same draws each time."""
    torch.manual_seed(1)
    with EventStorage():
        losses = model.train()(make_inputs())
    model.zero_grad()
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_keys_are_declared_on_a_copy():
    before = get_cfg().dump()
    cfg = get_cfg()
    add_modeling_config(cfg)
    add_method_configs(cfg)
    assert defrcn in METHODS
    for branch in (cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS):
        assert (branch.ENABLE_DECOUPLE, branch.BACKWARD_SCALE) == (False, 1.0)
    assert cfg.MODEL.ROI_HEADS.DROPOUT_RATIO == 0.8
    assert get_cfg().dump() == before


class TestDecoupling:
    """What the branches send back into the backbone."""

    def test_backbone_gets_the_scaled_sum_of_both_branches(self):
        runs = {
            scales: train(small("base", RPN_SCALE, str(scales[0]), ROI_SCALE, str(scales[1])))
            for scales in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.25), (0.0, 0.0))
        }
        grads = {scales: run[1] for scales, run in runs.items()}
        backbone = [name for name in grads[1.0, 0.0] if name.startswith("backbone.res4")]
        assert len(backbone) == 19
        for name in backbone:
            rpn, roi = grads[1.0, 0.0][name], grads[0.0, 1.0][name]
            assert rpn.any() and roi.any()
            torch.testing.assert_close(grads[0.5, 0.25][name], 0.5 * rpn + 0.25 * roi, atol=1e-6, rtol=1e-3)
            assert not grads[0.0, 0.0][name].any()  # zeros, not nothing: weight decay and momentum go on
        for name in set(grads[1.0, 0.0]) - set(backbone):  # heads and affine layers get the whole gradient
            for scales in grads:
                torch.testing.assert_close(grads[scales][name], grads[1.0, 0.0][name], atol=1e-6, rtol=1e-4)
        losses = [run[0] for run in runs.values()]
        assert all(torch.equal(a[name], losses[0][name]) for a in losses for name in a)

    def test_switched_off_it_is_the_plain_detector(self):
        off = ("MODEL.RPN.ENABLE_DECOUPLE", "False", "MODEL.ROI_HEADS.ENABLE_DECOUPLE", "False")
        model = small("base", *off)
        losses, grads = train(model)
        plain_names = (
            "MODEL.PROPOSAL_GENERATOR.NAME", "FewShotRPN", "MODEL.ROI_HEADS.NAME", "FewShotRes5ROIHeads",
        )  # fmt: skip
        plain = small("base", *off, *plain_names)
        assert not any("decouple" in name for name in plain.state_dict())
        plain.load_state_dict(model.state_dict(), strict=False)
        wanted_losses, wanted = train(plain)
        assert all(torch.equal(loss, wanted_losses[name]) for name, loss in losses.items())
        assert set(grads) == set(wanted)
        affine = {name: p for name, p in model.named_parameters() if "decouple" in name}
        assert len(affine) == 4 and all(not p.requires_grad and p.grad is None for p in affine.values())

    def test_no_switch_freezes_the_affine_layers(self):
        freeze = ("MODEL.BACKBONE.FREEZE", "True", "MODEL.PROPOSAL_GENERATOR.FREEZE", "True")
        model = small("novel", *freeze)
        trained = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
        predictor = "roi_heads.box_predictor"
        assert trained == {
            "proposal_generator.decouple.res4", "roi_heads.decouple.res4", f"{predictor}.cls_score",
            f"{predictor}.bbox_pred",
        }  # fmt: skip
        assert not model.roi_heads.res5.training and model.roi_heads.training
        _, grads = train(model.train())
        assert all(grads[f"{part}.decouple.res4.weight"].any() for part in ("proposal_generator", "roi_heads"))

    def test_mixed_precision(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, grads = train(small("base", RPN_SCALE, "0.5"))
        _, wanted = train(small("base", RPN_SCALE, "0.5"))
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert set(grads) == set(wanted)
        assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads.values())
        affine = "roi_heads.decouple.res4.bias"
        assert torch.linalg.norm(grads[affine] - wanted[affine]) < 0.2 * torch.linalg.norm(wanted[affine])

    def test_only_the_levels_of_the_branch_change(self):
        decouple = Decoupling({"res4": 2}, scale=0.5, enabled=True)
        torch.nn.init.constant_(decouple["res4"].bias, 1.0)
        features = {"res3": torch.zeros(1, 2, 1, 1), "res4": torch.zeros(1, 2, 1, 1)}
        read = decouple(features)
        assert read["res3"] is features["res3"] and read["res4"].flatten().tolist() == [1.0, 1.0]
        assert not features["res4"].any()

    @pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
    def test_scale_is_checked(self, scale):
        with pytest.raises(ValueError, match="BACKWARD_SCALE: got"):
            Decoupling({"res4": 2}, scale=scale, enabled=True)


class TestOtherNetworks:
    """A recipe on the network of another file."""

    def load(self, model, *opts):
        cfg = load_config(str(CONFIGS / "voc_base.yaml"), ["MODEL.DEVICE", "cpu", *opts], model=model).clone()
        cfg.defrost()
        complete_method_configs(cfg)
        return cfg

    @pytest.mark.parametrize(
        ("model", "heads"), [("r50_fpn", "DecoupledROIHeads"), ("r50_c4_small", "DecoupledRes5ROIHeads")]
    )
    def test_network_file_keeps_the_decoupling(self, model, heads):
        cfg = self.load(model)
        assert cfg.MODEL.PROPOSAL_GENERATOR.NAME == "DecoupledRPN" and heads == cfg.MODEL.ROI_HEADS.NAME
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 3 and cfg.MODEL.ROI_HEADS.BACKWARD_SCALE == 0.75
        before = cfg.dump()
        complete_method_configs(cfg)
        assert cfg.dump() == before

    def test_a_resolved_file_is_completed_as_well(self, tmp_path):
        """Else the switch would be on and nothing decoupled, without a word."""
        on = ["MODEL.RPN.ENABLE_DECOUPLE", "True", "MODEL.ROI_HEADS.ENABLE_DECOUPLE", "True"]
        plain = load_config(str(CONFIGS.parent / "tfa" / "voc_base.yaml"), model="r50_c4")
        (tmp_path / "config.yaml").write_text(plain.dump())
        for opts, names in (
            (on, ("DecoupledRPN", "DecoupledRes5ROIHeads")),
            ([], ("FewShotRPN", "FewShotRes5ROIHeads")),
        ):
            cfg = load_config(str(tmp_path / "config.yaml"), opts)
            assert names == (cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_HEADS.NAME)

    def test_other_methods_are_left_alone(self):
        for file in ("tfa/voc_cos.yaml", "tfa/voc_small_ft_full.yaml"):
            cfg = load_config(str(CONFIGS.parent / file), ["FEWSHOT.SHOT", "1"], model="r50_c4_small").clone()
            before = cfg.dump()
            complete_method_configs(cfg)
            assert cfg.dump() == before and cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION == 7

    def test_class_without_decoupling_is_refused(self):
        cfg = load_config(str(CONFIGS / "voc_base.yaml")).clone()
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        with pytest.raises(ValueError, match="ROI_HEADS.ENABLE_DECOUPLE is True, but StandardROIHeads cannot"):
            complete_method_configs(cfg)

    def test_pyramid_has_one_affine_per_level(self):
        """Ours: every level a branch reads has its own affine layer, all with the branch's scale."""
        narrow = [*NETWORK[2:10], "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"]
        cfg = self.load("r50_fpn", *narrow, *FEW, "MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32],[48],[64],[96]]")
        torch.manual_seed(0)
        model = prepared(build_model(cfg))
        rpn, heads = model.proposal_generator, model.roi_heads
        assert type(rpn) is DecoupledRPN and type(heads) is DecoupledROIHeads
        assert list(rpn.decouple) == ["p2", "p3", "p4", "p5", "p6"] and list(heads.decouple) == ["p2", "p3", "p4", "p5"]
        assert [layer.weight.shape[1] for layer in rpn.decouple.values()] == [8] * 5
        _, grads = train(model)
        rpn.decouple.scale = heads.decouple.scale = 0.0
        _, without = train(model)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        assert all(f"proposal_generator.decouple.{level}.weight" in grads for level in rpn.decouple)
        assert grads["backbone.fpn_output2.weight"].any() and not without["backbone.fpn_output2.weight"].any()
        with torch.no_grad():
            (found,) = model.eval()(make_inputs())
        assert torch.isfinite(found["instances"].scores).all()


class TestDropout:
    """The novel stage's predictor."""

    def build(self, ratio=0.8):
        cfg = get_cfg()
        add_modeling_config(cfg)
        add_method_configs(cfg)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        cfg.MODEL.ROI_HEADS.OUTPUT_LAYER = "dropout"
        cfg.MODEL.ROI_HEADS.DROPOUT_RATIO = ratio
        torch.manual_seed(0)
        return build_box_predictor(cfg, ShapeSpec(channels=1000))

    def test_only_class_scores_lose_components(self):
        """Of 1000 ones about 200 remain, five times as large; the box deltas see them all."""
        predictor = self.build().train()
        assert type(predictor) is DropoutOutputLayers
        for layer in (predictor.cls_score, predictor.bbox_pred):
            torch.nn.init.ones_(layer.weight)
        scores, deltas = predictor(torch.ones(4, 1000))
        kept = scores[:, 0] / 5
        torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
        assert bool(((kept > 140) & (kept < 260)).all())
        assert deltas.shape == (4, 12) and bool((deltas == 1000).all())
        scores, deltas = predictor.eval()(torch.ones(4, 1000))
        assert bool((scores == 1000).all()) and bool((deltas == 1000).all())

    def test_maps_of_one_cell_are_accepted(self):
        assert self.build().eval()(torch.ones(2, 1000, 1, 1))[0].shape == (2, 4)

    def test_weights_of_the_base_stage_fit(self):
        linear, dropped = small("base").roi_heads.box_predictor, small("novel").roi_heads.box_predictor
        assert list(linear.state_dict()) == list(dropped.state_dict())
        assert type(linear) is not DropoutOutputLayers and type(dropped) is DropoutOutputLayers

    @pytest.mark.parametrize("ratio", [-0.1, 1.0])
    def test_ratio_is_checked(self, ratio):
        with pytest.raises(ValueError, match="DROPOUT_RATIO: got"):
            self.build(ratio)


def official_names() -> list[str]:
    """Parameter and buffer names of an official R-50 checkpoint, written down from its layout."""
    norm = [f"norm.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")]
    names = [f"backbone.stem.conv1.{leaf}" for leaf in ["weight", *norm]]
    stages = [("backbone.res2", 3), ("backbone.res3", 4), ("backbone.res4", 6), ("roi_heads.res5", 3)]
    for stage, blocks in stages:
        for block in range(blocks):
            layers = ["conv1", "conv2", "conv3"] + (["shortcut"] if block == 0 else [])
            names += [f"{stage}.{block}.{layer}.{leaf}" for layer in layers for leaf in ["weight", *norm]]
    modules = [f"proposal_generator.rpn_head.{layer}" for layer in ("conv", "objectness_logits", "anchor_deltas")]
    modules += [f"roi_heads.box_predictor.{layer}" for layer in ("cls_score", "bbox_pred")]
    modules += ["affine_rpn", "affine_rcnn"]
    return names + [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]


@pytest.fixture(scope="module")
def official():
    """(official state dict with values of its own, the model that shall load it)."""
    model = build_small("base")[0]
    own = model.state_dict()
    renames = [(ours, theirs) for theirs, ours in defrcn.RENAMES]
    shapes = {}
    for name, value in own.items():
        ours, theirs = next((row for row in renames if name.startswith(row[0])), ("", ""))
        shapes[theirs + name.removeprefix(ours)] = value.shape
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shapes[name], generator=generator) for name in official_names()}, model


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_official_checkpoint_loads_with_nothing_unmatched(tmp_path, official, wrapped):
    state, model = official
    save_atomic({"model": {wrapped + k: v for k, v in state.items()}, "iteration": 14999}, tmp_path / "base.pth")
    own = model.state_dict()
    report = convert_file(tmp_path / "base.pth", tmp_path / "o.pth", TABLES["defrcn"], model_state=own)
    assert report.is_full and set(report.renamed.values()) == set(own) and not report.dropped
    converted, _ = rename(state, TABLES["defrcn"])
    model.load_state_dict(converted)
    for theirs, part in (("affine_rpn", "proposal_generator"), ("affine_rcnn", "roi_heads")):
        assert torch.equal(model.state_dict()[f"{part}.decouple.res4.weight"], state[f"{theirs}.weight"])


def test_one_table_of_names():
    """The method's list and the conversion tool's table say the same."""
    for theirs, ours in defrcn.RENAMES:
        state, _ = rename({f"{theirs}.weight": torch.ones(1)}, TABLES["defrcn"])
        assert list(state) == [f"{ours}.weight"]


@pytest.mark.parametrize("old", ["affine_rpn.weight", "roi_heads.res5.0.conv1.weight"])
def test_renamed_key_is_reported_and_fails(tmp_path, official, old):
    state, model = official
    save_atomic({"model": {("lost." + k if k == old else k): v for k, v in state.items()}}, tmp_path / "base.pth")
    with pytest.raises(ValueError, match="base.pth does not fit") as error:
        convert_file(tmp_path / "base.pth", tmp_path / "o.pth", TABLES["defrcn"], model_state=model.state_dict())
    assert f"no row of the table takes lost.{old}" in str(error.value) and "not in the file" in str(error.value)


def test_what_the_novel_stage_trains():
    model, _ = build_small("novel")
    trained = {".".join(name.split(".")[:2]) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "backbone.res4", "proposal_generator.rpn_head", "proposal_generator.decouple", "roi_heads.decouple",
        "roi_heads.box_predictor",
    }  # fmt: skip
