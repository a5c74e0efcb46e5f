"""OS2D's class memory: encoding, taking over, refusal; supports that are tiny, many, unreadable, or not there."""

import copy
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_methods_os2d_detector import detector, memory_of, picture, query

from fsdet.data.crops import tight_crop
from fsdet.data.support import Support, SupportSet
from fsdet.methods.os2d.templates import view_pictures
from fsdet.modeling.base import RecallableMemory, condition_on_support
from fsdet.modeling.class_memory import ClassMemory
from fsdet.modeling.digested_shots import draw_shots

NAMES = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supports")
    for number in range(6):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    return folder


def support_of(folder, number, class_id, box=(16.0, 8.0, 70.0, 48.0)):
    return Support(str(folder / f"{number}.png"), number, number, class_id, box)


def shots(folder, image_format="RGB", names=NAMES):
    """Two supports of each class."""
    supports = [support_of(folder, 2 * k + s, k, (16 + 8 * s, 8, 70, 48)) for k in range(len(names)) for s in range(2)]
    return SupportSet(names, supports, image_format=image_format)


@pytest.fixture(scope="module")
def shared():
    return detector()


@pytest.fixture
def model(shared):
    """The same detector for each test, without a memory."""
    shared.eval().keep_class_memory(None)
    return shared


class TestEncoding:
    def test_memory_of_a_support_set(self, model, folder):
        assert isinstance(model, RecallableMemory)
        assert condition_on_support(model, lambda: shots(folder))
        memory = model.class_memory
        assert memory.names == NAMES and memory.kind == "os2d" == model.memory_kind
        assert memory.stack("templates").shape == (3, 2, 225, 64)
        assert [len(memory[name].supports) for name in NAMES] == [2, 2, 2]
        assert not any("memory" in name or "template" in name for name in model.state_dict())
        crop, _ = tight_crop(picture(3), (24, 8, 70, 48), 48)
        torch.testing.assert_close(memory["bee"].tensors["templates"][1], model.encode_picture(crop))

    def test_views_of_a_support_follow_each_other(self, folder):
        model = detector(views="rotation90")
        memory = model.encode_support(shots(folder))
        assert memory.stack("templates").shape == (3, 8, 225, 64)
        crop, _ = tight_crop(picture(1), (24, 8, 70, 48), 48)
        expected = [model.encode_picture(view) for view in view_pictures(crop, "rotation90")]
        torch.testing.assert_close(memory["ant"].tensors["templates"][4:], torch.stack(expected))
        model.keep_class_memory(memory)
        assert next(model.known_templates()).shape == (2, 4, 225, 64)

    def test_channel_order_of_the_set_does_not_matter(self, model, folder):
        first, second = (model.encode_support(shots(folder, image_format)) for image_format in ("BGR", "RGB"))
        assert first.compare(second).same == NAMES

    def test_unchanged_classes_are_taken_over(self, model, folder, tmp_path, monkeypatch):
        condition_on_support(model, lambda: shots(folder))
        first = model.class_memory
        encoded = []
        encode = model.encode_picture
        monkeypatch.setattr(model, "encode_picture", lambda crop: encoded.append(crop.shape) or encode(crop))
        moved = tmp_path / "moved"
        shutil.copytree(folder, moved)
        assert model.encode_support(shots(moved)).compare(first).same == NAMES and not encoded
        changed = shots(folder)
        changed = SupportSet(NAMES, [*changed.shots("ant"), *changed.shots("bee"), support_of(folder, 0, 2)])
        assert model.stale_classes(first, changed) == ["cow"]
        second = model.encode_support(changed)
        assert len(encoded) == 1 and second.compare(first).same == ("ant", "bee")
        first.save(tmp_path / "memory")
        loaded = ClassMemory.load(tmp_path / "memory", encoder=model.memory_encoder, kind=model.memory_kind)
        model.keep_class_memory(loaded)
        assert model.encode_support(shots(folder)).compare(first).same == NAMES and len(encoded) == 1

    @torch.no_grad()
    def test_new_weights_encode_every_class_again(self, model, folder):
        trained = copy.deepcopy(model)
        condition_on_support(trained, lambda: shots(folder))
        first = trained.class_memory
        trained.backbone.layer3[5].bn3.bias.add_(0.1)
        assert condition_on_support(trained, lambda: shots(folder))
        comparison = first.compare(trained.class_memory)
        assert comparison.changed == NAMES and not comparison.same_encoder and not comparison.other_supports
        assert len(trained([query()])) == 1

    def test_more_supports_than_the_limit(self, folder):
        supports = [support_of(folder, number, class_id) for class_id in (0, 1) for number in range(6)]
        support_set = SupportSet(("ant", "bee"), supports)
        model = detector(test_shots=3, seed=2)
        memory = model.encode_support(support_set)
        assert memory.stack("templates").shape == (2, 3, 225, 64)
        files = [support.file_name for support in memory["ant"].supports]
        assert files == [support.file_name for support in draw_shots(support_set, 3, seed=2)["ant"][0]]

    @pytest.mark.parametrize("box", [(20, 20, 21, 21), (20.2, 20.3, 20.8, 20.9), (10, 10, 19, 15), (5, 8, 91, 9)])
    def test_tiny_supports(self, model, folder, box):
        """One pixel, a part of one, smaller than a stride of the backbone, and a line: all are found again."""
        model.keep_class_memory(model.encode_support(SupportSet(("ant",), [support_of(folder, 0, 0, box)])))
        template = model.class_memory["ant"].tensors["templates"]
        assert template.shape == (1, 225, 64) and torch.isfinite(template).all()
        torch.testing.assert_close(template.norm(dim=2), torch.ones(1, 225), rtol=0, atol=1e-2)
        found = model([query()])[0]["instances"]
        assert len(found) and torch.isfinite(found.scores).all()

    @pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 90)])
    def test_pictures_smaller_than_a_stride(self, model, size):
        """A picture that enters the backbone as it is, with a map of a cell or a line of cells."""
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        assert torch.isfinite(model.encode_picture(pixels)).all()

    def test_supports_that_cannot_be_used(self, model, folder, tmp_path):
        with pytest.raises(ValueError, match=r"No support for the classes \['bee'\]"):
            model.encode_support(SupportSet(NAMES, [support_of(folder, 0, 0), support_of(folder, 1, 2)]))
        with pytest.raises(FileNotFoundError, match="99.png"):
            model.encode_support(SupportSet(("ant",), [support_of(folder, 99, 0)]))
        with pytest.raises(ValueError, match="0.png.*leaves nothing"):
            model.encode_support(SupportSet(("ant",), [support_of(folder, 0, 0, (500.0, 500.0, 600.0, 600.0))]))
        (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes()[:500])
        with pytest.raises(ValueError, match="0.png: cannot be decoded"):
            model.encode_support(SupportSet(("ant",), [support_of(tmp_path, 0, 0)]))

    def test_thousand_supports(self, folder, monkeypatch):
        """One at a time through the backbone; then 250 classes of four, with as few templates at once as ever."""
        model = detector(class_image_size=16, test_shots=4, search={"limit": 50})
        names = [f"class {number}" for number in range(250)]
        support_set = SupportSet(
            names,
            [support_of(folder, s, k, (k % 40, 2 * s, k % 40 + 48, 2 * s + 40)) for k in range(250) for s in range(4)],
        )
        sizes = []
        features = model._features
        monkeypatch.setattr(model, "_features", lambda images: sizes.append(len(images)) or features(images))
        condition_on_support(model, lambda: support_set)
        assert len(sizes) == 1000 and set(sizes) == {1}
        rows = []
        detect = model.head.detect
        monkeypatch.setattr(model.head, "detect", lambda scene, t, **k: rows.append(len(t)) or detect(scene, t, **k))
        model.pyramid = type(model.pyramid)((1.0,), 48)
        found = model([query()])[0]["instances"]
        assert sum(rows) == 1000 and max(rows) <= 64 and len(found) == 50
        assert int(found.pred_classes.max()) < 250 and (found.scores.diff() <= 0).all()


class TestRefusal:
    def test_memory_of_other_weights(self, model):
        memory = memory_of(model)
        model.keep_class_memory(memory)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.backbone.bn1.bias.add_(1e-3)
            with pytest.raises(ValueError, match="made by encoder"):
                other.keep_class_memory(memory)
            with pytest.raises(ValueError, match="made by encoder"):  # it was kept before the weights changed
                other([query()])
        assert len(model([query()])) == 1

    def test_settings_count_but_head_and_limits_do_not(self, model):
        digest = model.memory_encoder
        for options in ({"class_image_size": 64}, {"views": "horflip"}, {"input_format": "BGR"}):
            assert detector(**options).memory_encoder != digest
        other = detector("v2", test_shots=3, search={"fusion": "mean", "limit": 5}, seed=4)
        assert other.memory_encoder == digest

    def test_memory_of_another_kind(self, model):
        with pytest.raises(ValueError, match="A memory of fewx; OS2D needs one of os2d"):
            model.keep_class_memory(ClassMemory(kind="fewx", encoder=model.memory_encoder))

    def test_no_memory(self, model):
        with pytest.raises(RuntimeError, match="condition_on_support"):
            model([query()])

    def test_training_makes_a_memory_stale(self, model):
        """Also by an optimizer whose steps PyTorch does not count."""
        trained = copy.deepcopy(model)
        trained.keep_class_memory(memory_of(trained))
        trained([query()])
        trained.train()
        optimizer = torch.optim.SGD(trained.backbone.parameters(), lr=1e-2, fused=True)
        trained._features(torch.ones(1, 3, 32, 32)).sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match="Encode the supports again"):
            trained.eval()([query()])
