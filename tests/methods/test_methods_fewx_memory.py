"""FewX's class memory and inference: encoding, taking over, refusal; any number of classes, proposals and images."""

import copy
import shutil

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from test_methods_fewx_model import close, episode, golden_model, losses_of, query

from fsdet.data.support import Support, SupportSet, fewx_support_crop
from fsdet.methods.fewx import inference
from fsdet.modeling.base import RecallableMemory, condition_on_support
from fsdet.modeling.class_memory import ClassEntry, ClassMemory

NAMES = ("ant", "bee", "cow")
CROP = ("INPUT.FS.CROP_SIZE", 96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures."""
    folder = tmp_path_factory.mktemp("supports")
    generator = np.random.default_rng(0)
    for number in range(6):
        picture = cv2.resize(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8), (160, 120))
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    return folder


def support_of(folder, number, class_id, box=(20.0, 30.0, 90.0, 80.0)):
    return Support(str(folder / f"{number}.png"), number, number, class_id, box)


def shots(folder, names=NAMES, image_format="BGR"):
    """Two supports of each class."""
    supports = [support_of(folder, 2 * k + s, k, (20 + 5 * s, 30, 90, 80)) for k in range(len(names)) for s in range(2)]
    return SupportSet(names, supports, image_format=image_format)


@pytest.fixture(scope="module")
def shared():
    return golden_model(*CROP)


@pytest.fixture
def model(shared):
    """The same detector for each test, without a memory."""
    shared.eval().keep_class_memory(None)
    return shared


def random_memory(model, count, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    memory = ClassMemory(kind=model.memory_kind, encoder=model.memory_encoder)
    for number in range(count):
        kernel = torch.rand(64, generator=generator) * 2
        feature = torch.rand(128, 7, 7, generator=generator) * scale
        memory.add(f"class {number}", ClassEntry({"kernel": kernel, "feature": feature}))
    return memory


def same(first, second):
    assert torch.equal(first.pred_classes, second.pred_classes)
    torch.testing.assert_close(first.scores, second.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(first.pred_boxes.tensor, second.pred_boxes.tensor, rtol=0, atol=1e-2)


class TestEncoding:
    def test_memory_of_a_support_set(self, model, folder):
        assert isinstance(model, RecallableMemory)
        assert condition_on_support(model, lambda: shots(folder))
        memory = model.class_memory
        assert memory.names == NAMES and memory.kind == "fewx" == model.memory_kind
        assert memory.stack("kernel").shape == (3, 64) and memory.stack("feature").shape == (3, 128, 7, 7)
        assert [len(memory[name].supports) for name in NAMES] == [2, 2, 2]
        assert not any("memory" in name or "kernel" in name for name in model.state_dict())
        # By hand: the mean over two crops, each pooled with its box.
        crops = [
            fewx_support_crop(cv2.imread(str(folder / f"{number}.png")), (20 + 5 * number, 30, 90, 80), size=96)
            for number in range(2)
        ]
        kernels, features = [], []
        with torch.no_grad():
            for crop, box in crops:
                image = model.preprocess_image([{"image": torch.from_numpy(crop).permute(2, 0, 1)}])
                res4 = model.backbone(image.tensor)["res4"]
                pooled = model.roi_heads.support_pooler([res4], [Boxes(torch.from_numpy(box)[None])])
                kernels.append(pooled.mean((2, 3))[0])
                features.append(model.roi_heads.region_features(res4, [Boxes(torch.from_numpy(box)[None])])[0])
        close(memory["ant"].tensors["kernel"], sum(kernels) / 2)
        close(memory["ant"].tensors["feature"], sum(features) / 2)

    def test_channel_order_of_the_set_does_not_matter(self, model, folder):
        blue_first, red_first = (model.encode_support(shots(folder, image_format=f)) for f in ("BGR", "RGB"))
        assert blue_first.compare(red_first).same == NAMES

    def test_unchanged_classes_are_taken_over(self, model, folder, tmp_path, monkeypatch):
        condition_on_support(model, lambda: shots(folder))
        first = model.class_memory
        encoded = []
        encode = model.encode_crops
        monkeypatch.setattr(model, "encode_crops", lambda *args: encoded.append(args[2]) or encode(*args))
        moved = tmp_path / "moved"
        shutil.copytree(folder, moved)
        assert model.encode_support(shots(moved)).compare(first).same == NAMES and not encoded
        changed = shots(folder)
        changed = SupportSet(NAMES, [*changed.shots("ant"), *changed.shots("bee"), support_of(folder, 0, 2)])
        assert model.stale_classes(first, changed) == ["cow"]
        second = model.encode_support(changed)
        assert encoded == [1] and second.compare(first).same == ("ant", "bee")
        loaded = ClassMemory.load(self.saved(first, tmp_path), encoder=model.memory_encoder, kind=model.memory_kind)
        model.keep_class_memory(loaded)
        assert model.encode_support(shots(folder)).compare(first).same == NAMES and encoded == [1]

    @torch.no_grad()
    def test_new_weights_encode_every_class_again(self, model, folder):
        trained = copy.deepcopy(model)
        condition_on_support(trained, lambda: shots(folder))
        first = trained.class_memory
        trained.backbone.res4[5].conv3.weight.mul_(1.5)
        assert condition_on_support(trained, lambda: shots(folder))
        comparison = first.compare(trained.class_memory)
        assert comparison.changed == NAMES and not comparison.same_encoder and not comparison.other_supports
        assert len(trained([query()])) == 1

    def saved(self, memory, folder):
        memory.save(folder / "memory")
        return folder / "memory"

    def test_class_without_supports(self, model, folder):
        support_set = SupportSet(NAMES, [support_of(folder, 0, 0), support_of(folder, 1, 2)])
        with pytest.raises(ValueError, match=r"No support for the classes \['bee'\]"):
            model.encode_support(support_set)

    def test_missing_picture(self, model, folder):
        support_set = SupportSet(("ant",), [support_of(folder, 99, 0)])
        with pytest.raises(FileNotFoundError, match="99.png"):
            model.encode_support(support_set)

    def test_box_outside_its_picture(self, model, folder):
        support_set = SupportSet(("ant",), [support_of(folder, 0, 0, (500.0, 500.0, 600.0, 600.0))])
        with pytest.raises(ValueError, match="0.png"):
            model.encode_support(support_set)

    def test_box_without_width_on_the_crop(self, model, folder):
        """A line of the picture: its crop ends with a box without width, which still gives a kernel."""
        box = (30.2, 10.0, 30.9, 110.0)
        assert np.diff(fewx_support_crop(np.zeros((120, 160, 3), np.uint8), box, size=96)[1][[0, 2]]) == 0
        memory = model.encode_support(SupportSet(("ant",), [support_of(folder, 0, 0, box)]))
        assert memory["ant"].tensors["kernel"].abs().max() > 0


class TestRefusal:
    def test_memory_of_other_weights(self, model):
        memory = random_memory(model, 2)
        model.keep_class_memory(memory)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.roi_heads.res5[0].conv1.weight.add_(1e-3)
            with pytest.raises(ValueError, match="made by encoder"):
                other.keep_class_memory(memory)
            with pytest.raises(ValueError, match="made by encoder"):  # it was kept before the weights changed
                other([query()])
            other.roi_heads.box_predictor.fc_1.weight.add_(1e-3)
        assert len(model([query()])) == 1

    def test_settings_count_but_heads_and_limits_do_not(self, model):
        digest = model.memory_encoder
        assert golden_model("INPUT.FS.CROP_SIZE", 128).memory_encoder != digest
        same_encoder = golden_model(*CROP, "FEWX.TEST_SHOTS", 3, "FEWX.ROWS_AT_ONCE", 7, "FEWX.RELATIONS", RELATIONS)
        with torch.no_grad():
            same_encoder.roi_heads.box_predictor.fc_1.weight.add_(1)
        assert same_encoder.memory_encoder == digest

    def test_memory_of_another_kind(self, model):
        memory = ClassMemory(kind="prototypes", encoder=model.memory_encoder)
        with pytest.raises(ValueError, match="A memory of prototypes; FewX needs one of fewx"):
            model.keep_class_memory(memory)

    def test_no_memory(self, model):
        with pytest.raises(RuntimeError, match="condition_on_support"):
            model([query()])

    def test_training_makes_a_memory_stale(self, model):
        """Also by an optimizer whose steps PyTorch does not count."""
        trained = copy.deepcopy(model)
        trained.keep_class_memory(random_memory(trained, 1))
        trained([query()])
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1e-4, fused=True)
        losses_of(trained, [episode()])
        optimizer.step()
        with pytest.raises(ValueError, match="Encode the supports again"):
            trained.eval()([query()])

    def test_boxes_to_classify_are_refused(self, model):
        with pytest.raises(ValueError, match="class memory"):
            model.inference([query()], detected_instances=[Instances((64, 96))])


RELATIONS = ("local", "global", "patch")


class TestInference:
    @pytest.fixture(autouse=True)
    def _no_grad(self):
        with torch.no_grad():
            yield

    def test_batch_equals_images_one_by_one(self, model):
        """Images of one size and of different sizes."""
        model.keep_class_memory(random_memory(model, 3))
        items = [query(0), query(1), query(2, size=(80, 64)), query(3)]
        together = model(items)
        for item, found in zip(items, together, strict=True):
            (alone,) = model([item])
            assert len(alone["instances"]) > 0
            same(found["instances"], alone["instances"])

    def test_many_classes_in_pieces(self, model, monkeypatch):
        """250 classes: bounded pieces, one piece, and each class alone give the same detections."""
        rpn = model.proposal_generator
        monkeypatch.setitem(rpn.post_nms_topk, False, 4)
        monkeypatch.setattr(model.roi_heads, "detections_per_image", 1000)
        memory = random_memory(model, 250)
        model.keep_class_memory(memory)
        rows = []
        features = model.roi_heads.region_features
        monkeypatch.setattr(
            model.roi_heads, "region_features", lambda f, b: rows.append(sum(map(len, b))) or features(f, b)
        )
        monkeypatch.setattr(inference, "_CPU_ROWS", 10_000)
        monkeypatch.setattr(model, "rows_at_once", 50)
        (pieces,) = model([query()])
        assert max(rows) <= 50 and len(rows) == 21  # 12 classes at once
        monkeypatch.setattr(model, "rows_at_once", 1000)
        rows.clear()
        (whole,) = model([query()])
        assert len(rows) == 1
        same(pieces["instances"], whole["instances"])
        found = pieces["instances"].pred_classes
        assert found.dtype == torch.int64 and int(found.max()) > 200
        for number in (7, 249):
            model.keep_class_memory(memory.select([f"class {number}"]))
            (alone,) = model([query()])
            assert (alone["instances"].pred_classes == 0).all()
            expected = pieces["instances"].scores[found == number]
            torch.testing.assert_close(alone["instances"].scores, expected, rtol=0, atol=1e-5)

    def test_a_cpu_takes_fewer_rows(self, model, monkeypatch):
        model.keep_class_memory(random_memory(model, 3))
        scorer = inference.PairScorer(model.proposal_generator, model.roi_heads, 500)
        classes = inference.prepare_classes(model.roi_heads.box_predictor, model.class_memory, model.device)
        pieces = [len(pairs) for pairs, _ in scorer.propose(torch.rand(2, 64, 4, 6), [(64, 96)] * 2, classes)]
        assert pieces == [1] * 6

    @pytest.mark.parametrize("empty", [(0,), (0, 1, 2)])
    @pytest.mark.parametrize("shared_proposals", [0, 100])
    def test_classes_and_images_without_proposals(self, model, monkeypatch, empty, shared_proposals):
        model.keep_class_memory(random_memory(model, 3))
        propose = model.proposal_generator.propose

        def some(features, sizes, kernels, pairs):
            found = propose(features, sizes, kernels, pairs)
            return [own[:0] if number in empty else own for own, (_, number) in zip(found, pairs, strict=True)]

        monkeypatch.setattr(model.proposal_generator, "propose", some)
        monkeypatch.setattr(model, "shared_proposals", shared_proposals)
        monkeypatch.setattr(model, "rows_at_once", 300)
        monkeypatch.setattr(inference, "_CPU_ROWS", 300)
        results = model([query(0), query(1)])
        for result in results:
            found = result["instances"]
            assert bool(len(found)) == (len(empty) < 3) and found.has("scores")
            if not shared_proposals:
                assert not set(found.pred_classes.tolist()) & set(empty)

    def test_top_detections_over_all_classes(self, model, monkeypatch):
        model.keep_class_memory(random_memory(model, 3))
        (every,) = model([query()])
        monkeypatch.setattr(model.roi_heads, "detections_per_image", 4)
        (best,) = model([query()])
        found = best["instances"]
        assert len(found) == 4 and (found.scores.diff() <= 0).all()
        torch.testing.assert_close(found.scores, every["instances"].scores[:4])

    def test_shared_proposals(self, model, monkeypatch):
        """Every class is compared with the same boxes, at most n; with one class it is the exact way."""
        memory = random_memory(model, 3)
        monkeypatch.setattr(model.roi_heads, "score_thresh", -1.0)
        monkeypatch.setattr(model.roi_heads, "nms_thresh", 1.0)
        monkeypatch.setattr(model.roi_heads, "detections_per_image", 1000)
        model.keep_class_memory(memory)
        monkeypatch.setattr(model, "shared_proposals", 10)
        seen = []
        features = model.roi_heads.region_features
        monkeypatch.setattr(model.roi_heads, "region_features", lambda f, b: seen.append(b) or features(f, b))
        (found,) = model([query()])
        assert [len(boxes) for (boxes,) in seen] == [10]
        assert found["instances"].pred_classes.bincount().tolist() == [10, 10, 10]
        model.keep_class_memory(memory.select(["class 1"]))
        monkeypatch.setattr(model, "shared_proposals", 100)
        (approximate,) = model([query()])
        monkeypatch.setattr(model, "shared_proposals", 0)
        (exact,) = model([query()])
        same(approximate["instances"], exact["instances"])

    def test_head_weights_count_at_once(self, model):
        """The supports' share of the heads follows the weights, and the memory stays valid."""
        changing = copy.deepcopy(model)
        changing.keep_class_memory(random_memory(changing, 2))
        changing([query()])
        changing.roi_heads.box_predictor.conv_1.weight.mul_(0.9)
        (found,) = changing([query()])
        fresh = copy.deepcopy(changing)
        (expected,) = fresh([query()])
        assert torch.equal(found["instances"].scores, expected["instances"].scores)

    def test_mixed_precision(self, model):
        model.keep_class_memory(random_memory(model, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (found,) = model([query()])
        scores = found["instances"].scores
        assert len(scores) and torch.isfinite(scores).all() and scores.dtype == torch.float32

    def test_rescaled(self, model):
        model.keep_class_memory(random_memory(model, 2))
        (network,) = model.inference([query()], do_postprocess=False)
        (found,) = model([{**query(), "height": 128, "width": 288}])
        scale = torch.tensor([3.0, 2, 3, 2])
        torch.testing.assert_close(found["instances"].pred_boxes.tensor, network.pred_boxes.tensor * scale)
