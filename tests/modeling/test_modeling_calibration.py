"""Calibration with a detector and an encoder whose numbers are known, then around real ones."""

import weakref

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from fsdet.data.support import Support, SupportSet
from fsdet.modeling import calibration
from fsdet.modeling.base import SupportConditioned, condition_on_support
from fsdet.modeling.calibration import CalibratedDetector, check_settings, with_calibration
from fsdet.modeling.class_memory import ClassEntry, ClassMemory
from fsdet.modeling.imagenet import ImageEncoder
from fsdet.modeling.support_boxes import LegacyBoxes, exact_boxes

NAMES = ("cat", "dog", "bird", "fish")  # bird and fish are novel


class CornerEncoder(nn.Module):
    """A box's vector is (x0, y0, 1); counts the pictures that it sees."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(1, 3)
        self.digest, self.pictures = "corners", []

    @property
    def device(self):
        return self.classifier.weight.device

    def forward(self, picture, boxes, image_format):
        self.pictures.append(np.asarray(picture))
        return torch.cat([boxes[:, :2], torch.ones(len(boxes), 1)], dim=1)


class Fixed(nn.Module):
    """A detector that finds the same on every picture."""

    def __init__(self, boxes=(), scores=(), classes=(), size=(40, 60)):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.found = boxes, scores, classes, size

    def forward(self, batched_inputs):
        if self.training:
            return {"loss": self.weight.sum()}
        boxes, scores, classes, size = self.found
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return [
            {
                "instances": Instances(
                    size,
                    pred_boxes=Boxes(boxes),
                    scores=torch.tensor(scores, dtype=torch.float32),
                    pred_classes=torch.tensor(classes, dtype=torch.int64),
                    rows=torch.arange(len(boxes)),
                )
            }
            for _ in batched_inputs
        ]


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of 40 x 60 pixels."""
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.png"))
        cv2.imwrite(files[-1], np.full((40, 60, 3), 10 * number, np.uint8))
    return files


@pytest.fixture
def support_set(pictures):
    rows = [
        (0, 0, (1, 2, 9, 9)),
        (0, 2, (3, 4, 20, 20)),  # the same picture shows a cat, a bird and a fish
        (1, 2, (5, 0, 15, 10)),
        (0, 3, (0, 8, 30, 30)),
        (2, 1, (4, 4, 9, 9)),
    ]
    supports = [Support(pictures[p], p, i, class_id, box) for i, (p, class_id, box) in enumerate(rows)]
    return SupportSet(NAMES, supports)


def wrap(detector=None, encoder=None, calibrated=("bird", "fish"), **settings):
    model = CalibratedDetector(
        detector or Fixed(), encoder or CornerEncoder(), NAMES, calibrated=calibrated, **settings
    )
    return model.eval()


def entry(value=0, size=(40, 60)):
    return {"original_image": torch.full((*size, 3), value, dtype=torch.uint8)}


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


BIRD, FISH = np.array([4.0, 2, 1]), np.array([0.0, 8, 1])  # means of the supports' vectors


def test_prototypes_are_means_with_one_pass_per_picture(support_set, pictures):
    model = wrap()
    assert condition_on_support(model, lambda: support_set)
    memory = model.class_memory
    assert memory.names == ("bird", "fish") and memory.kind == "prototypes" and memory.encoder == "corners"
    np.testing.assert_allclose(memory["bird"].tensors["prototype"], BIRD)
    np.testing.assert_allclose(memory["fish"].tensors["prototype"], FISH)
    assert [support.file_name for support in memory["bird"].supports] == [pictures[0], pictures[1]]
    # Picture 0 holds a bird and a fish, picture 2 only a dog, which is not calibrated.
    assert sorted(int(p[0, 0, 0]) for p in model.encoder.pictures) == [0, 10]
    condition_on_support(model, lambda: support_set)
    assert len(model.encoder.pictures) == 2, "the same supports were encoded again"


def test_changed_supports_are_encoded_again(support_set, pictures):
    model = wrap()
    condition_on_support(model, lambda: support_set)
    cv2.imwrite(pictures[1], np.full((40, 60, 3), 99, np.uint8))  # a bird
    assert model.stale_classes(model.class_memory, support_set) == ["bird"]
    condition_on_support(model, lambda: support_set)
    assert [int(p[0, 0, 0]) for p in model.encoder.pictures] == [0, 10, 0, 99]
    assert model.stale_classes(model.class_memory, support_set) == []


def test_scores_by_hand(support_set):
    boxes = [[3, 4, 9, 9], [4, 2, 9, 9], [1, 1, 9, 9], [0, 0, 9, 9], [7, 7, 9, 9]]
    detector = Fixed(boxes, [0.9, 0.6, 0.5, 0.3, 0.04], [2, 3, 0, 2, 3])
    model = wrap(detector, alpha=0.3)
    condition_on_support(model, lambda: support_set)
    model.encoder.pictures.clear()
    (output,) = model([entry(7)])
    found = output["instances"]
    expected = [
        0.3 * 0.9 + 0.7 * cosine((3, 4, 1), BIRD),
        0.3 * 0.6 + 0.7 * cosine((4, 2, 1), FISH),
        0.5,  # a base class
        0.3 * 0.3 + 0.7 * cosine((0, 0, 1), BIRD),
        0.04,  # not above 0.05
    ]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6)
    assert found.rows.tolist() == [0, 1, 2, 3, 4] and found.pred_classes.tolist() == [2, 3, 0, 2, 3]
    assert detector([0])[0]["instances"].scores.tolist() == pytest.approx([0.9, 0.6, 0.5, 0.3, 0.04])
    assert [int(p[0, 0, 0]) for p in model.encoder.pictures] == [7]


def test_limits_are_open_below_and_closed_above(support_set):
    scores = [0.8, 0.3, 0.7, 0.29, 0.70001]  # not sorted: the score decides
    detector = Fixed([[4, 2, 9, 9]] * 5, scores, [2] * 5)
    model = wrap(detector, lower=0.29, upper=0.7, alpha=0.0)
    condition_on_support(model, lambda: support_set)
    found = model([entry()])[0]["instances"].scores
    np.testing.assert_allclose(found, [0.8, 1.0, 1.0, 0.29, 0.70001], rtol=1e-6)


def test_opposite_vectors_give_negative_scores():
    model = wrap(Fixed([[-4, -2, 9, 9]], [0.2], [2]))
    vectors = {"bird": [4.0, 2, 0], "fish": [1.0, 0, 0]}
    entries = {name: ClassEntry({"prototype": torch.tensor(vector)}) for name, vector in vectors.items()}
    model.keep_class_memory(ClassMemory(kind="prototypes", encoder="corners", entries=entries))
    score = model([entry()])[0]["instances"].scores.item()
    assert score == pytest.approx(0.5 * 0.2 - 0.5 * np.sqrt(20 / 21), abs=1e-6) and score < 0


@pytest.mark.parametrize(
    ("scores", "classes"), [((), ()), ((0.9, 0.8), (0, 1)), ((0.05, 0.01), (2, 3))], ids=["none", "base", "low"]
)
def test_nothing_to_calibrate_costs_nothing(support_set, scores, classes):
    model = wrap(Fixed([[1, 1, 9, 9]] * len(scores), scores, classes))
    condition_on_support(model, lambda: support_set)
    model.encoder.pictures.clear()
    (output,) = model([{}])  # no picture is asked for
    assert output["instances"].scores.tolist() == pytest.approx(scores) and not model.encoder.pictures


def test_a_batch_equals_its_pictures(support_set, pictures):
    model = wrap(Fixed([[4, 2, 9, 9], [1, 9, 20, 20]], [0.9, 0.8], [2, 3]))
    condition_on_support(model, lambda: support_set)
    batch = [{"file_name": pictures[2]}, entry(3), {"file_name": pictures[0], **entry(5)}]
    model.encoder.pictures.clear()
    together = model(batch)
    # What the input carries goes before the file.
    assert [int(p[0, 0, 0]) for p in model.encoder.pictures] == [20, 3, 5]
    for single, output in zip(batch, together, strict=True):
        assert torch.equal(model([single])[0]["instances"].scores, output["instances"].scores)
    with pytest.raises(ValueError, match=r"keys \['image_id'\] cannot be calibrated.*original_image.*file_name"):
        model([{"image_id": 3}])


def test_boxes_of_another_output_size_are_scaled_to_the_picture(support_set):
    model = wrap(Fixed([[4, 2, 9, 9]], [0.5], [2], size=(20, 30)))
    condition_on_support(model, lambda: support_set)
    score = model([entry(size=(40, 60))])[0]["instances"].scores.item()
    assert score == pytest.approx(0.25 + 0.5 * cosine((8, 4, 1), BIRD))


def test_the_network_is_no_part_of_the_model(support_set):
    model = wrap()
    condition_on_support(model, lambda: support_set)
    assert list(model.state_dict()) == ["detector.weight"] and len(list(model.parameters())) == 1
    assert model.train()([entry()]).keys() == {"loss"}
    assert not model.class_memory["bird"].tensors["prototype"].requires_grad


def test_a_detector_with_supports_of_its_own_gets_them(support_set):
    class Own(SupportConditioned, Fixed):
        def encode_support(self, support_set):
            return {name: len(shots) for name, shots in support_set}

    model = wrap(Own())
    condition_on_support(model, lambda: support_set)
    assert model.detector.class_memory == {"cat": 1, "dog": 1, "bird": 2, "fish": 1}
    assert model.class_memory.names == ("bird", "fish")


def test_before_any_support_every_call_fails():
    with pytest.raises(RuntimeError, match="has no class memory"):
        wrap(Fixed([[1, 1, 9, 9]], [0.9], [0]))([entry()])


def test_a_class_without_support_is_named(support_set, pictures):
    fewer = SupportSet(NAMES, [s for _, shots in support_set for s in shots if s.class_id != 3])
    with pytest.raises(ValueError, match=r"No support box for the calibrated classes \['fish'\].*'bird': 2.*'fish': 0"):
        condition_on_support(wrap(), lambda: fewer)
    with pytest.raises(ValueError, match=r"calibrated classes \['fish'\]"):
        condition_on_support(wrap(), lambda: SupportSet(NAMES[:3], [support_set.shots("bird")[0]]))
    outside = Support(pictures[0], 0, 9, 3, (70, 3, 80, 9))
    with pytest.raises(ValueError, match=r"0\.png: the support box \(70, 3, 80, 9\) has no area inside"):
        wrap().support_features([outside])
    with pytest.raises(FileNotFoundError, match="gone.png"):
        wrap(calibrated=["bird"]).encode_support(SupportSet(NAMES, [Support("gone.png", 0, 0, 2, (1, 1, 2, 2))]))


def test_a_class_without_prototype_is_refused_before_the_first_picture(support_set):
    bird = wrap(calibrated=["bird"])
    condition_on_support(bird, lambda: support_set)
    model = wrap()
    with pytest.raises(ValueError, match=r"No prototype for the calibrated classes \['fish'\].*\['bird'\]"):
        model.keep_class_memory(bird.class_memory)
    with pytest.raises(RuntimeError, match="has no class memory"):
        _ = model.class_memory


def test_a_memory_of_other_weights_is_refused(support_set):
    model, other = wrap(), wrap(legacy_boxes=LegacyBoxes(80, 133))
    condition_on_support(model, lambda: support_set)
    with pytest.raises(ValueError, match="made by encoder corners, .* Encode the supports again"):
        other.keep_class_memory(model.class_memory)
    with pytest.raises(ValueError, match="A memory of words; calibration needs prototypes"):
        model.keep_class_memory(ClassMemory(kind="words", encoder="corners"))


def test_unknown_classes_are_refused():
    with pytest.raises(ValueError, match=r"\['cow'\] are to be calibrated, but the detector has"):
        wrap(calibrated=["cow"])


def test_legacy_boxes_by_hand():
    # 60 x 41 pixels, shorter side to 80: 117.07 -> 117 wide; x is scaled by 117/60 and divided by 80/41.
    picture = np.zeros((41, 60, 3), np.uint8)
    legacy = LegacyBoxes(80, 133)
    assert legacy.resized(picture) == (80, 117)
    expected = [[30 * 117 / 60 * 41 / 80, 10, 117 * 41 / 80, 41]]
    np.testing.assert_allclose(legacy(picture, [(30, 10, 70, 50)]), expected, rtol=1e-6)
    np.testing.assert_allclose(exact_boxes(picture, [(30, 10, 70, 50)]), [[30, 10, 60, 41]])


def stub_encoder():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 6, 7, stride=8, padding=3), nn.ReLU())
    return ImageEncoder(
        trunk, nn.Linear(6, 5), stride=8, pixel_mean=(100, 100, 100), pixel_std=(50, 50, 50), channel_order="RGB"
    )


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.parametrize("mixed", [False, True])
def test_any_detector_can_be_calibrated(tiny_cfg, make_inputs, support_set, kind, mixed):
    torch.manual_seed(0)
    cfg = tiny_cfg(kind)
    cfg.TEST.CALIBRATION.ENABLED = True
    names = [*NAMES, "frog"]
    detector = build_model(cfg).eval()
    model = with_calibration(detector, cfg, encoder=stub_encoder(), class_names=names, novel_names=["bird", "fish"])
    condition_on_support(model, lambda: SupportSet(names, [s for _, shots in support_set for s in shots]))
    inputs = [{k: v for k, v in i.items() if k != "instances"} for i in make_inputs()]
    inputs = [{**i, "original_image": i["image"].permute(1, 2, 0)} for i in inputs]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        plain, calibrated = detector(inputs), model(inputs)
    for entry_, before, after in zip(inputs, plain, calibrated, strict=True):
        before, after = before["instances"], after["instances"]
        novel = (before.pred_classes == 2) | (before.pred_classes == 3)
        assert novel.any() and not novel.all()
        assert torch.equal(after.pred_boxes.tensor, before.pred_boxes.tensor) and after.scores.dtype == torch.float32
        assert torch.equal(after.scores[~novel], before.scores[~novel].float())
        vectors = model.encoder(entry_["original_image"], before.pred_boxes.tensor.float())
        for row in torch.nonzero(novel)[:, 0].tolist():
            prototype = model.class_memory[names[before.pred_classes[row]]].tensors["prototype"]
            likeness = torch.cosine_similarity(vectors[row], prototype, dim=0)
            assert after.scores[row].item() == pytest.approx(
                0.5 * before.scores[row].item() + 0.5 * likeness.item(), abs=1e-6
            )


def test_settings(tiny_cfg):
    cfg = tiny_cfg()
    common = {"encoder": CornerEncoder(), "class_names": NAMES, "novel_names": ["bird", "fish"]}
    detector = Fixed()
    assert with_calibration(detector, cfg, **common) is detector
    cfg.TEST.CALIBRATION.ENABLED = True
    cfg.TEST.CALIBRATION.ALPHA = 0.7
    model = with_calibration(detector, cfg, **common)
    assert (model.calibrated, model.alpha, model.lower, model.upper) == (("bird", "fish"), 0.7, 0.05, 1.0)
    assert model.legacy_boxes is None and model.image_format == "BGR"
    assert with_calibration(detector, cfg, **{**common, "novel_names": []}) is detector
    cfg.TEST.CALIBRATION.CLASSES = "all"
    assert with_calibration(detector, cfg, **common).calibrated == NAMES
    node = cfg.TEST.CALIBRATION
    node.ALPHA, node.LOWER, node.UPPER, node.CLASSES, node.NETWORK = 1.5, 0.5, 0.4, "base", "vgg"
    with pytest.raises(ValueError, match=r"(?s)ALPHA is 1\.5.*LOWER is 0\.5.*CLASSES is \"base\".*NETWORK is \"vgg\""):
        check_settings(cfg)


def test_prototypes_take_the_memory_of_one_pass(support_set):
    """No graph is recorded and no feature map outlives its picture, whatever the caller's mode."""
    maps, encoder = [], stub_encoder()

    def hook(_module, _inputs, out):
        assert not out.requires_grad and all(former() is None for former in maps)
        maps.append(weakref.ref(out))

    encoder.trunk.register_forward_hook(hook)
    encoder.requires_grad_(True)
    model = wrap(encoder=encoder)
    with torch.enable_grad():
        memory = model.encode_support(support_set)
    assert len(maps) == 2
    assert memory["bird"].tensors["prototype"].shape == (5,)


def test_each_support_file_is_decoded_once(support_set, monkeypatch):
    read = []
    original = calibration.read_support
    monkeypatch.setattr(calibration, "read_support", lambda s, *args: read.append(s.file_name) or original(s, *args))
    wrap(calibrated=NAMES).encode_support(support_set)
    assert len(read) == len(set(read)) == 3


@pytest.mark.gpu
def test_the_network_follows_the_detector_to_a_gpu(tiny_cfg, make_inputs, support_set):
    scores = {}
    for device in ("cpu", "cuda"):
        detector = Fixed([[4, 2, 30, 35], [1, 9, 20, 20]], [0.9, 0.8], [2, 3]).to(device)
        model = wrap(detector, stub_encoder())
        condition_on_support(model, lambda: support_set)
        on_device = detector([0])[0]["instances"].to(device)
        found = model.calibrate(on_device, entry(9))
        assert found.scores.device.type == device and model.encoder.device.type == device
        scores[device] = found.scores.cpu()
    torch.testing.assert_close(scores["cuda"], scores["cpu"], rtol=1e-3, atol=1e-3)
