"""The encoders against torchvision's and Detectron2's own networks, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling import build_resnet_backbone
from torch import nn

from fsdet.modeling.imagenet import NETWORKS, build_encoder, check_weights

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PICTURE = np.random.default_rng(0).integers(0, 256, (70, 96, 3), dtype=np.uint8)  # BGR
BOXES = torch.tensor([[3.0, 5, 60, 64], [20, 0, 96, 33.5], [40, 40, 44, 47]])


def _liven(module):
    """Statistics that a wrongly folded norm would show, and outputs of order 1."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if hasattr(layer, "running_var"):
            layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=generator) * 0.1)
            layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator) + 0.5)
            layer.weight.data.mul_(0.5)
            layer.bias.data.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.1)


@pytest.fixture(scope="module")
def torchvision_r50():
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    _liven(network)
    return network.eval()


@pytest.fixture(scope="module")
def encoder(torchvision_r50):
    return build_encoder("resnet50", torchvision_r50.state_dict(), "r50.pth")


def _expected(layer4, fc, image):
    pool = ROIAlign((1, 1), 1 / 32, 0, aligned=True)
    rois = torch.cat([torch.zeros(len(BOXES), 1), BOXES], dim=1)
    return fc(pool(layer4(image), rois).flatten(1))


@torch.no_grad()
def test_torchvision_boxes_equal_the_plain_network(torchvision_r50, encoder):
    kept = {}
    torchvision_r50.layer4.register_forward_hook(lambda _, __, out: kept.update(out=out))
    image = PICTURE[:, :, ::-1].astype(np.float32) / 255
    image = (image - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    image = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]

    def layer4(x):
        torchvision_r50(x)
        return kept["out"]

    expected = _expected(layer4, torchvision_r50.fc, image)
    assert encoder.feature_map(PICTURE).shape == (1, 2048, 3, 3)
    got = encoder(PICTURE, BOXES)
    assert got.shape == (3, 1000) and expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_detectron2_boxes_equal_the_plain_network():
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    _liven(backbone)
    fc = nn.Linear(2048, 1000)
    weights = {**backbone.state_dict(), "linear.weight": fc.weight.data, "linear.bias": fc.bias.data}
    encoder = build_encoder("resnet50_msra", weights, "msra.safetensors")
    image = PICTURE.astype(np.float32) - np.float32(cfg.MODEL.PIXEL_MEAN)
    image = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    expected = _expected(lambda x: backbone(x)["res5"], fc, image)
    got = encoder(PICTURE, BOXES)
    assert (got - expected).abs().max() < 2e-5 * expected.abs().max()


def test_channel_order_of_the_picture_does_not_matter(encoder):
    turned = np.ascontiguousarray(PICTURE[:, :, ::-1])
    torch.testing.assert_close(encoder(turned, BOXES, "RGB"), encoder(PICTURE, BOXES, "BGR"))
    assert (encoder(turned, BOXES, "BGR") - encoder(PICTURE, BOXES)).abs().max() > 1e-3
    torch.testing.assert_close(encoder(torch.tensor(PICTURE), BOXES), encoder(PICTURE, BOXES))


def test_float32_and_no_gradient_under_mixed_precision(encoder):
    plain = encoder(PICTURE, BOXES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = encoder(PICTURE, BOXES)
    assert mixed.dtype == torch.float32 and not mixed.requires_grad
    torch.testing.assert_close(mixed, plain, rtol=1e-5, atol=1e-6)


def test_half_weights_and_absent_counters_are_taken(torchvision_r50, encoder):
    weights = {name: value for name, value in torchvision_r50.state_dict().items() if "num_batches" not in name}
    assert build_encoder("resnet50", weights, "r50.pth").digest == encoder.digest
    half = {name: value.half().numpy() for name, value in weights.items()}
    other = build_encoder("resnet50", half, "half.pth")
    assert other.digest != encoder.digest
    assert (other(PICTURE, BOXES) - encoder(PICTURE, BOXES)).abs().max() < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_computes_with_all_bits(torchvision_r50):
    """TF32 would leave differences of a thousandth of the largest output."""
    on_cpu = build_encoder("resnet50", torchvision_r50.state_dict(), "test")(PICTURE, BOXES)
    on_gpu = build_encoder("resnet50", torchvision_r50.state_dict(), "test").to("cuda")(PICTURE, BOXES).cpu()
    assert (on_cpu - on_gpu).abs().max() < 1e-4 * on_cpu.abs().max()
    assert torch.backends.cudnn.allow_tf32, "the setting of the process is put back"


def test_building_draws_no_random_number(torchvision_r50):
    state = torch.get_rng_state()
    build_encoder("resnet50", torchvision_r50.state_dict(), "r50.pth")
    assert torch.equal(torch.get_rng_state(), state)


def _shapes_of(name):
    with torch.device("meta"):
        return NETWORKS[name].build().state_dict()


def test_the_official_file_has_626_entries_and_fits():
    weights = _shapes_of("resnet101")
    assert len(weights) == 626
    check_weights("resnet101", weights, "resnet101-5d3b4d8f.pth")
    assert "res4.22.conv3.norm.running_var" in _shapes_of("resnet101_msra")


def test_another_known_network_is_named():
    # The deeper network has every tensor of the shallower one, with the same shape.
    with pytest.raises(ValueError, match=r'r101\.pth holds the network "resnet101", but .* is "resnet50".*resnet101'):
        build_encoder("resnet50", _shapes_of("resnet101"), "r101.pth")
    with pytest.raises(ValueError, match=r'holds the network "resnet50_msra", but .* is "resnet101"'):
        check_weights("resnet101", _shapes_of("resnet50_msra"), "msra.safetensors")
    with pytest.raises(ValueError, match=r'NETWORK is "vgg"; expected one of resnet101, resnet50, '):
        check_weights("vgg", {}, "vgg.pth")


def test_a_file_that_does_not_fit_says_what_is_wrong():
    weights = _shapes_of("resnet50_msra")
    backbone = {name: value for name, value in weights.items() if not name.startswith("linear")}
    with pytest.raises(
        ValueError, match=r"b\.pth is not .*2 tensors missing \(linear\.bias, linear\.weight\).*backbone"
    ):
        check_weights("resnet50_msra", backbone, "b.pth")
    detector = {f"backbone.{name}": value for name, value in backbone.items()}
    with pytest.raises(ValueError, match=r"267 tensors missing .*; 265 tensors unknown \(backbone\.res2"):
        check_weights("resnet50_msra", detector, "d.pth")
    ten = {**weights, "linear.weight": torch.empty(10, 2048, device="meta")}
    with pytest.raises(ValueError, match=r"1 tensors of another shape \(linear\.weight\)"):
        check_weights("resnet50_msra", ten, "ten.pth")


def test_real_weights_name_what_a_box_shows():
    """ImageNet's class of an aeroplane's and a cat's box, which a wrong mean, channel order or stride would miss."""
    file = SHARED / "weights" / "r50_msra_d2_fp16.safetensors"
    if not file.is_file():
        pytest.skip("needs the real ResNet-50 weights and photographs of the development data")
    safetensors = pytest.importorskip("safetensors.torch")
    encoder = build_encoder("resnet50_msra", safetensors.load_file(file), str(file))
    top = _top_classes(encoder, ("aeroplane", "cat"))
    assert 404 in top["aeroplane"]  # airliner
    assert set(range(281, 286)) & set(top["cat"])  # the five domestic cats


def _top_classes(encoder, names, count=2):
    """Best class of the first `count` large boxes of each name in the photographs."""
    import json

    data = json.loads((SHARED / "voc_small" / "coco_trainval.json").read_text())
    ids = {category["name"]: category["id"] for category in data["categories"]}
    images = {image["id"]: image for image in data["images"]}
    found = {}
    for name in names:
        large = (a for a in data["annotations"] if a["category_id"] == ids[name] and a["area"] > 30000)
        found[name] = []
        for annotation in [next(large) for _ in range(count)]:
            x, y, w, h = annotation["bbox"]
            (path,) = (SHARED / "voc_small").rglob(Path(images[annotation["image_id"]]["file_name"]).name)
            logits = encoder(read_image(str(path), "BGR"), torch.tensor([[x, y, x + w, y + h]]))
            found[name].append(int(logits.argmax()))
    return found
