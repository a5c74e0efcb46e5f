"""The OS2D detector: recorded detections, training, pictures of any size, and what configurations make of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from fsdet.data.crops import tight_crop
from fsdet.methods.os2d.detector import OS2D
from fsdet.methods.os2d.geometry import anchor_boxes, encode_boxes
from fsdet.methods.os2d.head import OS2DHead
from fsdet.methods.os2d.inference import Search
from fsdet.methods.os2d.objective import Objective
from fsdet.methods.os2d.pyramid import Pyramid, resize
from fsdet.methods.os2d.settings import add_config
from fsdet.methods.os2d.targets import SceneTargets
from fsdet.methods.os2d.templates import view_pictures
from fsdet.methods.os2d.training import Labelling
from fsdet.modeling import strips
from fsdet.modeling.class_memory import ClassEntry, ClassMemory
from fsdet.modeling.torchvision_resnet import TorchvisionC4Backbone

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "os2d"
PIXELS = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}
VERSIONS = {"v1": (4, False), "v2": (6, True)}


def detector(version="v1", *, backbone=None, scales=(1.0,), eval_scale=320, search=None, views="none", **options):
    """A narrow detector with random weights; at its only scale a picture has a long side of 320 px, 20 cells."""
    torch.manual_seed(0)
    backbone = backbone or TorchvisionC4Backbone(50, width=4)
    for name, buffer in backbone.named_buffers():
        if "running_mean" in name:
            buffer.uniform_(-0.5, 0.5)
    head = OS2DHead(*VERSIONS[version])
    nn.init.normal_(head.transform_net.linear.weight, std=0.002)
    return OS2D(
        backbone=backbone,
        head=head,
        objective=options.pop("objective", Objective()),
        labelling=options.pop("labelling", Labelling()),
        pyramid=Pyramid(scales, eval_scale),
        search=Search(
            **{"fusion": "max", "score_threshold": -2.0, "nms": "exact", "nms_threshold": 0.3, **(search or {})}
        ),
        views=views,
        **{**PIXELS, "class_image_size": 48, **options},
    ).eval()


def picture(seed=0, size=(72, 96)):
    """A smooth random picture (H, W, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))


def query(seed=0, size=(72, 96), **entries):
    return {"original_image": torch.tensor(picture(seed, size)), **entries}


def memory_of(model, count=2, shots=1):
    """Templates of cuts of the first pictures."""
    memory = ClassMemory(kind=model.memory_kind, encoder=model.memory_encoder)
    for number in range(count):
        cuts = [picture(number)[8 * s : 8 * s + 40, 16 : 64 - 8 * s] for s in range(shots)]
        views = [view for cut in cuts for view in view_pictures(cut, model.views)]
        memory.add(f"class {number}", ClassEntry({"templates": torch.stack([model.encode_picture(v) for v in views])}))
    return memory


def same(first, second, tolerance=1e-5):
    assert torch.equal(first.pred_classes, second.pred_classes)
    torch.testing.assert_close(first.scores, second.scores, rtol=0, atol=tolerance)
    torch.testing.assert_close(first.pred_boxes.tensor, second.pred_boxes.tensor, rtol=0, atol=1e-2)


@pytest.fixture(scope="module")
def shared_model():
    model = detector()
    model.keep_class_memory(memory_of(model))
    return model


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"reference data not found at {GOLDEN}")
class TestRecorded:
    """The release's modules, two levels; see the README beside the arrays."""

    def build(self, version, views="none"):
        arrays, trunk = np.load(GOLDEN / "model.npz"), np.load(GOLDEN / "transform_net.npz")
        model = detector(version, backbone=TorchvisionC4Backbone(50, width=16), views=views, class_image_size=240)
        model.pyramid = Pyramid((0.8, 1.25), 490, 560)
        names = [name for name in arrays.files if name.startswith("backbone/")]
        state = {name.removeprefix("backbone/"): torch.from_numpy(arrays[name]) for name in names}
        missing, unexpected = model.backbone.load_state_dict(state, strict=False)
        assert not unexpected and all("num_batches" in name for name in missing)
        linear = "linear_simple" if version == "v1" else "linear_affine"
        state = {name: torch.from_numpy(trunk[name]) for name in trunk.files if name.startswith("conv")}
        state |= {f"linear.{part}": torch.from_numpy(arrays[f"{linear}.{part}"]) for part in ("weight", "bias")}
        model.head.transform_net.load_state_dict(state, strict=False)
        return model, arrays

    def remember(self, model, arrays):
        memory = ClassMemory(kind="os2d", encoder=model.memory_encoder)
        for class_id in arrays["class_ids_processing_order"].tolist():
            crop = arrays[f"class_image_{arrays['class_ids'].tolist().index(class_id)}"]
            crop, _ = tight_crop(crop, (0, 0, crop.shape[1], crop.shape[0]))
            templates = [model.encode_picture(view) for view in view_pictures(crop, model.views)]
            memory.add(str(class_id), ClassEntry({"templates": torch.stack(templates)}))
        model.keep_class_memory(memory)

    def test_features(self):
        model, arrays = self.build("v1")
        for number in (0, 1):
            crop = arrays[f"class_image_{number}"]
            resized, _ = tight_crop(crop, (0, 0, crop.shape[1], crop.shape[0]))
            assert np.array_equal(resized, arrays[f"class_image_{number}_resized_uint8"])
            found = model.scene_features(resized)[:32]
            torch.testing.assert_close(
                found, torch.from_numpy(arrays[f"class_feature_map_{number}"]), rtol=0, atol=1e-4
            )
        found = model.scene_features(arrays["level0_image_uint8"])[:32]
        torch.testing.assert_close(found, torch.from_numpy(arrays["level0_feature_map"]), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("version", VERSIONS)
    @torch.no_grad()
    def test_matches_of_both_levels(self, version):
        model, arrays = self.build(version)
        self.remember(model, arrays)
        templates = torch.cat([own[0] for own in model.known_templates()])
        for level, size in enumerate(model.pyramid.sizes(*arrays["image"].shape[:2])):
            scene = resize(arrays["image"], size)
            assert np.array_equal(scene, arrays[f"level{level}_image_uint8"])
            found = model.head(model.scene_features(scene)[None], templates, corners=True)
            expected = {
                key: torch.from_numpy(arrays[f"{version}/level{level}_{key}"])
                for key in ("recognition", "localization", "corners")
            }
            torch.testing.assert_close(found.scores[0], expected["recognition"], rtol=0, atol=2e-5)
            torch.testing.assert_close(found.codes[0].mT, expected["localization"], rtol=0, atol=1e-4)
            torch.testing.assert_close(found.corners[0].flatten(2).mT, expected["corners"], rtol=0, atol=2e-2)

    @pytest.mark.parametrize(
        ("name", "views", "nms"),
        [("v1", "none", "reference"), ("v2", "none", "exact"), ("v2_rotation90", "rotation90", "exact")],
    )
    def test_detections(self, name, views, nms):
        model, arrays = self.build(name[:2], views)
        model.search = Search("max", -2.0, nms, json.loads(str(arrays["config_json"]))["nms_iou"])
        self.remember(model, arrays)
        (output,) = model([{"original_image": arrays["image"]}])
        found = output["instances"]
        order = found.pred_classes.argsort(stable=True)  # class by class, as recorded
        class_ids = torch.from_numpy(arrays["class_ids_processing_order"])[found.pred_classes[order]]
        assert class_ids.tolist() == arrays[f"{name}/det_labels"].tolist()
        scores, boxes = (torch.from_numpy(arrays[f"{name}/det_{key}"]) for key in ("scores", "boxes"))
        torch.testing.assert_close(found.scores[order], scores, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.pred_boxes.tensor[order], boxes, rtol=0, atol=2e-2)

    @pytest.mark.parametrize(("version", "box_weight"), [("v1", 0.2), ("v2", 0.0)])
    def test_training_step(self, version, box_weight):
        """Losses and gradients of two patches; V2 keeps the statistics of the transform's norms."""
        model, arrays = self.build(version)
        step = np.load(GOLDEN / "train_step.npz")
        model.objective = Objective(box_weight=box_weight)
        model.train()
        if version == "v2":
            for module in model.head.transform_net.modules():
                module.eval()
        scene, size = arrays["level1_image_uint8"], int(step["patch_size"])
        pictures = [torch.from_numpy(arrays[f"class_image_{n}_resized_uint8"]).permute(2, 0, 1) for n in (1, 0)]
        items = []
        for number, (x, y) in enumerate(step["patch_xy"].tolist()):
            instances = Instances((size, size))
            instances.gt_boxes = Boxes(torch.from_numpy(step[f"image{number}/gt_boxes"]))
            instances.gt_classes = torch.from_numpy(step[f"image{number}/gt_labels"])
            instances.gt_difficult = torch.from_numpy(step[f"image{number}/gt_difficult"])
            image = torch.from_numpy(scene[y : y + size, x : x + size].copy()).permute(2, 0, 1)
            own = slice(number, None, -1) if number else slice(None)  # the second item brings them the other way round
            items.append(
                {
                    "image": image,
                    "instances": instances,
                    "support_images": pictures[own],
                    "support_classes": [0, 1][own],
                }
            )
        losses = model(items)
        expected = json.loads(str(step[f"{version}/losses_json"]))
        names = {"loss_cls_pos": "cls_pos", "loss_cls_neg": "cls_neg"}
        for ours, name in names.items():
            assert losses[ours].item() == pytest.approx(expected[name], abs=1e-5)
        assert losses["loss_box"].item() == pytest.approx(expected["loc"] * box_weight, abs=1e-5)
        sum(losses.values()).backward()
        norms = torch.stack([parameter.grad.norm() for parameter in model.parameters()])
        assert norms.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-3)
        prefixes = {
            "net_feature_maps.": "backbone.",
            "os2d_head_creator.aligner.parameter_regressor.": "head.transform_net.",
        }
        parameters = dict(model.named_parameters())
        recorded = zip(json.loads(str(step[f"{version}/grad_names_json"])), step[f"{version}/grad_norms"], strict=True)
        for name, norm in recorded:
            for theirs, ours in prefixes.items():
                name = name.replace(theirs, ours)
            if norm > 1e-4:
                assert float(parameters.pop(name).grad.norm()) == pytest.approx(float(norm), rel=1e-3), name


class TestInference:
    def test_detections(self, shared_model):
        (output,) = shared_model([query()])
        found = output["instances"]
        assert found.image_size == (72, 96) and len(found) > 2
        assert set(found.pred_classes.tolist()) == {0, 1} and found.pred_classes.dtype == torch.int64
        assert (found.scores.diff() <= 0).all() and found.scores.abs().max() <= 1
        boxes = found.pred_boxes.tensor
        assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([96.0, 72.0])).all() and not found.has("corners")

    def test_frame(self, shared_model):
        """Twice as high and half as wide; the picture may come as an array or from a file."""
        (plain,) = shared_model([query()])
        (scaled,) = shared_model([query(height=144, width=48)])
        assert scaled["instances"].image_size == (144, 48)
        factors = torch.tensor([0.5, 2, 0.5, 2])
        torch.testing.assert_close(
            scaled["instances"].pred_boxes.tensor, plain["instances"].pred_boxes.tensor * factors
        )

    def test_where_the_picture_comes_from(self, shared_model, tmp_path):
        Image.fromarray(picture()).save(tmp_path / "scene.png")
        inputs = [query(), {"original_image": picture()}, {"file_name": str(tmp_path / "scene.png")}]
        first, *others = (output["instances"] for output in shared_model(inputs))
        for other in others:
            same(first, other)
        with pytest.raises(ValueError, match="original_image"):
            shared_model([{"image": torch.zeros(3, 72, 96)}])

    def test_channel_order(self, shared_model):
        """A detector that reads BGR finds the same in mirrored channels, with weights and statistics turned as well."""
        turned = detector(
            input_format="BGR", pixel_mean=PIXELS["pixel_mean"][::-1], pixel_std=PIXELS["pixel_std"][::-1]
        )
        with torch.no_grad():
            turned.backbone.conv1.weight.copy_(shared_model.backbone.conv1.weight.flip(1))
        templates = {name: shared_model.class_memory[name] for name in shared_model.class_memory}
        turned.keep_class_memory(ClassMemory(kind="os2d", encoder=turned.memory_encoder, entries=templates))
        (expected,), (found,) = shared_model([query()]), turned([{"original_image": picture()[..., ::-1]}])
        same(expected["instances"], found["instances"])

    def test_nothing_above_the_threshold(self):
        model = detector(search={"score_threshold": 1.5})
        model.keep_class_memory(memory_of(model))
        found = model([query()])[0]["instances"]
        assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)
        assert found.scores.shape == found.pred_classes.shape == (0,) and found.pred_classes.dtype == torch.int64

    def test_memory_without_class(self, shared_model):
        model = detector()
        model.keep_class_memory(ClassMemory(kind="os2d", encoder=model.memory_encoder))
        found = model([query()])[0]["instances"]
        assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4) and found.image_size == (72, 96)

    @pytest.mark.parametrize("size", [(1, 1), (8, 400), (500, 9)])
    def test_pictures_of_odd_sizes(self, shared_model, size):
        item = {"original_image": np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)}
        found = shared_model([item])[0]["instances"]
        assert found.image_size == size and len(found) and torch.isfinite(found.pred_boxes.tensor).all()

    def test_huge_scene(self, shared_model, monkeypatch):
        """In strips of four rows of cells, the same detections."""
        model = detector(eval_scale=800)
        model.keep_class_memory(memory_of(model))
        (whole,) = model([query(size=(400, 120))])
        calls = []
        run = strips._run_in_strips
        monkeypatch.setattr(strips, "_run_in_strips", lambda *args: calls.append(args) or run(*args))
        monkeypatch.setattr("fsdet.methods.os2d.detector.MAX_PIXELS", 30_000)
        (parts,) = model([query(size=(400, 120))])
        assert calls
        same(whole["instances"], parts["instances"])

    def test_geometry(self, shared_model):
        """Anchors and corners of the detections: V1 keeps the template's sides parallel to the picture's."""
        model = detector(search={"has_geometry": True})
        model.keep_class_memory(memory_of(model))
        found = model([query()])[0]["instances"]
        (plain,) = shared_model([query()])
        same(found, plain["instances"])
        corners, boxes = found.corners, found.pred_boxes.tensor
        limits = torch.tensor([96.0, 72.0])
        torch.testing.assert_close(corners.amin(1).clamp(min=0), boxes[:, :2], rtol=0, atol=1e-2)
        torch.testing.assert_close(torch.minimum(corners.amax(1), limits), boxes[:, 2:], rtol=0, atol=1e-2)
        anchors = found.anchor_boxes.tensor / 0.3  # 240 px at the scale of 320 px, on the grid of cells
        torch.testing.assert_close(anchors[:, 2:] - anchors[:, :2], torch.full((len(found), 2), 240.0))
        columns = (anchors[:, 0] + 120 - 8) / 16
        torch.testing.assert_close(columns, columns.round(), rtol=0, atol=1e-3)


def patch(seed=0, boxes=((16, 16, 60, 52),), classes=(7,), supports=(7,), size=(64, 80), **entries):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances.gt_difficult = torch.zeros(len(classes), dtype=torch.bool)
    pictures = [
        torch.tensor(picture(class_id, (40, 24 + 8 * (class_id % 3)))).permute(2, 0, 1) for class_id in supports
    ]
    image = torch.tensor(picture(seed, size)).permute(2, 0, 1)
    return {
        "image": image,
        "instances": instances,
        "support_images": pictures,
        "support_classes": list(supports),
        **entries,
    }


# Anchors of 240 px on patches of 64 x 80: everything overlaps little, so positives are what overlaps by 2 %.
LOOSE = Labelling(0.02, 0.01, True, 0.02, 0.01)


def trained(**options):
    return detector(labelling=LOOSE, objective=Objective(positive_margin=1.1, negative_margin=-1.0), **options).train()


class TestTraining:
    def test_losses_and_gradients(self):
        """Scale and shift of the backbone's norms train, their statistics stay; those of the transform move."""
        model = trained()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        losses = model([patch(0), patch(1, classes=(3,), supports=(3, 5))])
        assert set(losses) == {"loss_cls_pos", "loss_cls_neg", "loss_box"}
        assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        assert model.backbone.bn1.weight.grad.abs().max() > 0 and model.backbone.bn1.bias.grad.abs().max() > 0
        changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])}
        assert changed and all(name.startswith("head.transform_net.conv.") for name in changed)

    @pytest.mark.parametrize("kind", ["freeze_transform", "freeze_transform_norm"])
    def test_frozen_transform(self, kind):
        model = trained(**{kind: True})
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        sum(model([patch()]).values()).backward()
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        has_gradient = any(p.grad is not None for p in model.head.transform_net.parameters())
        assert has_gradient == (kind == "freeze_transform_norm")

    def test_negatives_move_the_transform_only_where_they_may(self):
        """The patch shows an object of class 7, so that the part of the negatives, those of class 5, counts."""
        gradients = []
        for transform_on_negatives in (False, True):
            model = trained(transform_on_negatives=transform_on_negatives)
            model([patch(supports=(7, 5))])["loss_cls_neg"].backward()
            gradients.append(float(model.head.transform_net.linear.weight.grad.abs().max()))
            assert model.backbone.conv1.weight.grad.abs().max() > 0
        assert gradients[0] == 0 < gradients[1]

    def test_every_scene_is_searched_for_all_classes(self, monkeypatch):
        model = trained()
        seen = {}
        call = model.head.forward
        monkeypatch.setattr(model.head, "forward", lambda *args: seen.setdefault("matches", call(*args)))
        model([patch(0), patch(1, classes=(3,), supports=(3, 5))])
        assert seen["matches"].scores.shape == (2, 3, 4 * 5)

    @pytest.mark.parametrize("empty", [0, 1])
    def test_patch_without_object(self, empty):
        model = trained()
        without = patch(2, boxes=(), classes=(), supports=())
        items = [patch(0), patch(1)]
        items[empty] = without
        losses = model(items)
        assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_cls_pos"] > 0
        alone = model([patch(2, boxes=(), classes=(), supports=(7,))])
        assert [loss.item() for loss in alone.values()] == [0, 0, 0]

    def test_batch_without_any_support(self):
        """Nothing to compare with: losses of 0 that all parameters are part of."""
        model = trained()
        losses = model([patch(boxes=(), classes=(), supports=())])
        assert set(losses) == {"loss_cls_pos", "loss_cls_neg", "loss_box"}
        sum(losses.values()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())

    def test_detectron2_backbones(self):
        """Its ResNets with batch norm, frozen batch norm and group norm."""
        for norm, width in (("BN", 8), ("FrozenBN", 8), ("GN", 32)):
            model = build_model(config("build_resnet_backbone", norm, width)).train()
            assert all(not m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
            model.labelling = LOOSE
            sum(model([patch()]).values()).backward()
            norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
            assert len(norms) == (0 if norm == "FrozenBN" else 43)
            assert all(m.weight.grad is not None for m in norms)


def config(backbone="TorchvisionC4Backbone", norm="BN", width=8, **os2d):
    cfg = get_cfg()
    add_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "OS2D", "cpu", backbone
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.NORM, resnets.STRIDE_IN_1X1, resnets.OUT_FEATURES = norm, False, ["res4"]
    resnets.STEM_OUT_CHANNELS = resnets.WIDTH_PER_GROUP = width
    resnets.RES2_OUT_CHANNELS = 4 * width
    for key, value in os2d.items():
        cfg.OS2D[key] = value
    return cfg


class TestConfiguration:
    def test_values(self):
        cfg = config(PARAMETERS=6, INVERSE=True, NEGATIVE_RATIO=0, VIEWS="horflip", PYRAMID=(1.0,), ALIGNED_SHARE=0.5)
        cfg.TEST.DETECTIONS_PER_IMAGE, cfg.INPUT.FORMAT = 7, "RGB"
        model = build_model(cfg)
        assert isinstance(model, OS2D) and model.head.inverse and model.head.aligned_share == 0.5
        assert model.head.transform_net.linear.out_channels == 6 and model.objective.negative_ratio is None
        assert model.search == Search("max", -2.0, "exact", 0.3, False, 7) and model.views == "horflip"
        assert model.pyramid == Pyramid((1.0,), 1280, 0) and model.input_format == "RGB"
        assert model.pixel_mean.flatten().tolist() == pytest.approx(cfg.MODEL.PIXEL_MEAN)
        assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "head"}

    def test_weakalign(self, tmp_path):
        net = OS2DHead(6, True).transform_net
        generator = torch.Generator().manual_seed(0)
        state = {
            f"FeatureRegression.{k}": torch.randn(v.shape, generator=generator) for k, v in net.state_dict().items()
        }
        state["FeatureRegression.linear.weight"] = state["FeatureRegression.linear.weight"].flatten(1)
        torch.save(state, tmp_path / "affine.pth")
        model = build_model(config(PARAMETERS=6, INVERSE=True, WEAKALIGN=str(tmp_path / "affine.pth")))
        expected = state["FeatureRegression.linear.weight"].view(6, 64, 5, 5)
        torch.testing.assert_close(model.head.transform_net.linear.weight.data, expected)
        with pytest.raises(FileNotFoundError, match="OS2D.WEAKALIGN: .*none.pth"):
            build_model(config(PARAMETERS=6, WEAKALIGN=str(tmp_path / "none.pth")))
        (tmp_path / "torn.pth").write_bytes(b"torn")
        with pytest.raises(ValueError, match="OS2D.WEAKALIGN: .*torn.pth"):
            build_model(config(PARAMETERS=6, WEAKALIGN=str(tmp_path / "torn.pth")))

    def test_network_without_the_feature_map(self):
        cfg = config("build_resnet_backbone")
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        with pytest.raises(ValueError, match="'res5': 32.*C4 network"):
            build_model(cfg)

    def test_frozen_backbone_norm(self):
        model = build_model(config(norm="FrozenBN"))
        assert any(isinstance(module, FrozenBatchNorm2d) for module in model.backbone.modules())


class TestMining:
    def test_losses_of_a_scene(self, monkeypatch):
        """20 classes, three at once; the second one has an object under the anchor in row 3 and column 4."""
        model = detector(labelling=Labelling(0.5, 0.1, False), objective=Objective(positive_margin=2.0))
        scene = picture(3, (96, 128))
        templates = memory_of(model, 20).stack("templates")[:, 0]
        anchors = anchor_boxes(6, 8)
        target = anchors[3 * 8 + 4][None] + torch.tensor([1.0, 0, 1, 0])
        targets = SceneTargets(target, torch.tensor([1]), torch.tensor([False]))
        sizes = []
        forward = model.head.forward
        monkeypatch.setattr(model.head, "forward", lambda s, t: sizes.append(len(t)) or forward(s, t))
        monkeypatch.setattr("fsdet.methods.os2d.detector._MINED_CELLS", 3 * 48)
        losses, found = model.mining_losses(scene, templates, targets)
        assert sizes == [3] * 6 + [2]
        assert torch.equal(found, anchors) and losses.class_loss.shape == losses.box_loss.shape == (20, 48)
        assert losses.positive[1, 28] and losses.positive.any(dim=1).nonzero().tolist() == [[1]]
        with torch.no_grad():
            matches = model.head(model.scene_features(scene)[None], templates)
        score, code = matches.scores[0, 1, 28], matches.codes[0, 1, 28]
        assert float(losses.class_loss[1, 28]) == pytest.approx((2 - float(score)) / 2, abs=1e-5)
        gap = (code - encode_boxes(target, anchors[28][None])[0]).abs()
        expected = torch.where(gap < 1, gap**2 / 2, gap - 0.5).sum()
        assert float(losses.box_loss[1, 28]) == pytest.approx(float(expected), abs=1e-4)
        hinge = (matches.scores[0, 0] - 0.5).clamp(min=0) / 2
        torch.testing.assert_close(losses.class_loss[0], torch.where(losses.negative[0], hinge, 0.0), rtol=0, atol=1e-5)
