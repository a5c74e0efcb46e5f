"""FewX against numbers of the official modules (tests/golden/fewx); tolerances are those of the golden files."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from test_methods_fewx_model import GOLDEN, close, golden_model, golden_state, read, tensors

from fsdet.methods.fewx.contrastive import image_losses, select_rows
from fsdet.methods.fewx.detector import KIND
from fsdet.methods.fewx.inference import Classes, PairScorer
from fsdet.methods.fewx.relation import MultiRelationHead
from fsdet.methods.fewx.rpn import attention_kernels
from fsdet.modeling.class_memory import ClassEntry, ClassMemory

PIXELS = 0.02


@pytest.fixture(scope="module")
def model():
    return golden_model("TEST.DETECTIONS_PER_IMAGE", 50)


def flat(x, width):
    """(N, A * width, H, W) -> (N, H * W * A, width), anchors in order."""
    return x.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3)


class TestAttentionRPN:
    """File a."""

    @pytest.fixture(scope="class")
    def values(self):
        return tensors("a_attention_rpn")

    @pytest.fixture(scope="class")
    def kernels(self, model, values):
        with torch.no_grad():
            pooled, _ = model.roi_heads.support_features(values["support_res4"], values["support_boxes"])
        close(pooled, values["support_roi14"])
        return attention_kernels(pooled, int(values["num_shot"]))

    @torch.no_grad()
    def test_kernels_attention_and_head(self, model, values, kernels):
        for row, name in enumerate(("pos", "neg")):
            close(kernels[row], values[f"kernel_{name}"].flatten())
            attention = values["query_res4"] * kernels[row].view(1, -1, 1, 1)
            close(attention, values[f"attention_{name}"])
            (logits,), (deltas,) = model.proposal_generator.rpn_head([attention])
            close(logits, values[f"objectness_map_{name}"])
            close(deltas, values[f"delta_map_{name}"])
            close(flat(logits, 1)[..., 0], values[f"objectness_flat_{name}"])
            close(flat(deltas, 4), values[f"deltas_flat_{name}"])
        (anchors,) = model.proposal_generator.anchor_generator([values["query_res4"]])
        assert torch.equal(anchors.tensor, values["anchors"])

    @torch.no_grad()
    def test_proposals(self, model, values, kernels):
        rpn = model.proposal_generator
        size = tuple(values["image_size_hw"].tolist())
        found = rpn.eval().propose(values["query_res4"], [size], kernels, [(0, 0), (0, 1)])
        self.compare(found, values, "test")
        targets = Instances(size, gt_boxes=Boxes(values["gt_boxes"]), gt_classes=torch.zeros(3, dtype=torch.int64))
        images = type("Images", (), {"tensor": None, "image_sizes": [size]})
        with EventStorage():
            found, _ = rpn.train()(images, {"res4": values["query_res4"]}, [targets], kernels[None])
        rpn.eval()
        self.compare(found, values, "train")

    def compare(self, found, values, rule):
        for instances, name in zip(found, ("pos", "neg"), strict=True):
            expected = values[f"{rule}_proposals_{name}"]
            assert len(instances) == len(expected)
            assert float((instances.proposal_boxes.tensor - expected).abs().max()) < PIXELS
            close(instances.objectness_logits, values[f"{rule}_proposal_logits_{name}"])


class TestRelationHead:
    """File b."""

    @torch.no_grad()
    def test_every_stage(self, model):
        values = tensors("b_relation_heads")
        head = model.roi_heads.box_predictor.eval()
        regions, support = values["query_roi_res5"], head.encode(values["support_res5"])
        index = torch.zeros(len(regions), dtype=torch.int64)
        close(support.embedded, values["local_support_embedded"])
        vectors = head.vectors(head.embed(regions), support, index)
        for name in ("global", "local", "patch"):
            close(vectors[name], values[f"{name}_vector"])
        for name, scores in head.scores_by_head(regions, support, index).items():
            close(scores, values[f"logits_{name}"])
        logits, deltas = head(regions, support, index)
        close(logits, values["logits_sum"])
        close(deltas, values["box_deltas"])
        close(logits.softmax(dim=1), values["probabilities"])

    def test_initial_weights(self):
        """Full size: shapes, and mean and deviation within what chance allows."""
        torch.manual_seed(0)
        head = MultiRelationHead(2048, 7)
        expected = json.loads((GOLDEN / "b_full_size_init_stats.json").read_text())
        parameters = dict(head.named_parameters())
        assert set(parameters) == set(expected)
        for name, value in parameters.items():
            row = expected[name]
            assert list(value.shape) == row["shape"], name
            if name.endswith("bias"):
                assert not value.any()
                continue
            wanted = 0.001 if name == "bbox_pred_pr.weight" else 0.01
            error = wanted / value.numel() ** 0.5
            assert abs(float(value.detach().mean())) < 5 * error and abs(row["mean"]) < 5 * error
            assert abs(float(value.detach().std()) - wanted) < 5 * error and abs(row["std"] - wanted) < 5 * error


class TestLosses:
    """File c, losses."""

    values = read("c_detector_loss")
    CASES = tuple(str(name) for name in values["case_names"])

    def case(self, name, legacy):
        part = {
            key.split(".", 1)[1]: torch.from_numpy(np.asarray(value))
            for key, value in self.values.items()
            if key.startswith(f"{name}.")
        }
        logits, deltas = (part[key].clone().requires_grad_() for key in ("logits", "deltas"))
        losses, kept = image_losses(
            logits,
            deltas,
            part["gt_classes"],
            part["proposals"],
            part["gt_boxes"],
            positives=int(part["num_pos_branch"]),
            transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            legacy_boundary=legacy,
        )
        return part, losses, kept, (logits, deltas)

    @pytest.mark.parametrize("name", CASES)
    def test_as_the_release(self, name):
        part, losses, kept, (logits, deltas) = self.case(name, legacy=True)
        assert torch.equal(kept, part["selected_rows"])
        for key, loss in losses.items():
            torch.testing.assert_close(loss.detach(), part[key], rtol=1e-4, atol=1e-7)
        sum(losses.values()).backward()
        close(logits.grad, part["grad_logits"], 1e-3)
        close(deltas.grad, part["grad_deltas"], 1e-3)

    @pytest.mark.parametrize("name", CASES)
    def test_true_boundary_differs_only_where_the_passes_do(self, name):
        part, _, kept, _ = self.case(name, legacy=False)
        assert torch.equal(kept, part["selected_rows"]) != name.startswith("short_")
        first = int(part["num_pos_branch"])
        matches = int((part["gt_classes"] == 0).sum())
        if name.startswith("short_"):  # the counts of the rule hold on the right sides
            background = max(1, min(2 * matches, len(part["gt_classes"]) // 4))
            assert int((kept < first).sum()) == matches + background
            assert int((kept >= first).sum()) == max(1, min(matches, background))


class TestTrainStep:
    """File c, a whole training step."""

    @pytest.fixture(scope="class")
    def step(self):
        values = tensors("c_train_step")
        model = golden_model().train()
        batch = []
        for number in range(2):
            name = "image0_hwc_uint8" if number == 0 else "image1_hwc_uint8"
            image, boxes = values[name].permute(2, 0, 1), values[f"image{number}_gt_boxes"]
            instances = Instances(image.shape[1:], gt_boxes=Boxes(boxes), gt_classes=torch.tensor([5, 5, 5]))
            crops = values["support_images_hwc_uint8"][number].permute(0, 3, 1, 2)
            batch.append({
                "image": image, "instances": instances, "support_images": crops,
                "support_boxes": values["support_boxes"][number],
            })  # fmt: skip
        seen = {}
        rpn, heads = model.proposal_generator, model.roi_heads
        rpn_losses, sample, losses = rpn.losses, heads.label_and_sample_proposals, heads._losses

        def note_rpn(anchors, logits, labels, deltas, boxes):
            seen["rpn"] = (anchors, logits[0], torch.stack(labels), deltas[0], torch.stack(boxes))
            return rpn_losses(anchors, logits, labels, deltas, boxes)

        def note_sample(proposals, targets):
            seen["counts"] = [len(found) for found in proposals]
            return sample(proposals, targets)

        def note_losses(logits, deltas, sampled):
            seen["heads"] = (logits, deltas, sampled)
            return losses(logits, deltas, sampled)

        rpn.losses, heads.label_and_sample_proposals, heads._losses = note_rpn, note_sample, note_losses
        with pytest.MonkeyPatch.context() as patch, EventStorage():
            patch.setattr(torch, "randperm", lambda count, **kwargs: torch.arange(count, device=kwargs.get("device")))
            result = model(batch)
            sum(result.values()).backward()
        return values, model, result, seen

    def test_rpn(self, step):
        values, _, _, seen = step
        (anchors,), logits, labels, deltas, boxes = seen["rpn"]
        for number in range(2):
            rows = slice(2 * number, 2 * number + 2)
            assert torch.equal(anchors.tensor, values[f"image{number}_anchors"])
            close(logits[rows], values[f"image{number}_rpn_logits"])
            close(deltas[rows], values[f"image{number}_rpn_deltas"])
            assert torch.equal(labels[rows], values[f"image{number}_anchor_labels_in_loss"].to(labels))
            sampled = values[f"image{number}_anchor_labels_sampled"]
            matched = sampled == 1
            assert matched[1].any() and not (labels[rows][1] == 1).any()
            close(boxes[rows][matched], values[f"image{number}_anchor_matched_gt"][matched])

    def test_regions(self, step):
        values, _, _, seen = step
        logits, deltas, sampled = seen["heads"]
        for number in range(2):
            for offset, name in enumerate(("pos", "neg")):
                regions = sampled[2 * number + offset].proposal_boxes.tensor
                expected = values[f"image{number}_{name}_sampled_boxes"]
                assert regions.shape == expected.shape and float((regions - expected).abs().max()) < PIXELS
                assert seen["counts"][2 * number + offset] == int(values[f"image{number}_{name}_num_rpn_proposals"])
            rows = slice(256 * number, 256 * number + 256)
            close(logits[rows], values[f"image{number}_det_logits"])
            close(deltas[rows], values[f"image{number}_det_deltas"])
            classes = torch.cat([part.gt_classes for part in sampled[2 * number : 2 * number + 2]])
            assert torch.equal(classes, values[f"image{number}_det_gt_classes_in_loss"])
            matched = torch.cat([part.gt_boxes.tensor for part in sampled[2 * number : 2 * number + 2]])[classes == 0]
            close(matched, values[f"image{number}_det_gt_boxes"][classes == 0])

    def test_losses(self, step):
        values, _, result, _ = step
        for name, loss in result.items():
            torch.testing.assert_close(loss.detach(), values[name], rtol=1e-4, atol=1e-7)

    def test_gradients(self, step):
        values, model, _, _ = step
        names = [str(name) for name in read("c_train_step")["grad_names"]]
        parameters = dict(model.named_parameters())
        assert set(names) == set(parameters)
        norms = values["grad_norms"]
        for name, norm in zip(names, norms.tolist(), strict=True):
            grad = parameters[name].grad
            if norm < 0:
                assert grad is None, name
                continue
            assert abs(float(grad.norm()) - norm) <= 1e-3 * max(norm, 1e-3 * float(norms.max())), name
        for key in (key for key in values if key.startswith("grad.")):
            close(parameters[key.removeprefix("grad.")].grad, values[key], 1e-3)


class TestEvaluation:
    """File d."""

    @pytest.fixture(scope="class")
    def values(self):
        return tensors("d_eval")

    @pytest.fixture(scope="class")
    def classes(self, model, values):
        """Kernels and features of the classes, in the order in which they are processed."""
        result = []
        for name in values["class_order"].tolist():
            rows = values["support_class"] == name
            crops = values["support_images_hwc_uint8"][rows].permute(0, 3, 1, 2)
            with torch.no_grad():
                result.append(model.eval().encode_crops(crops, values["support_boxes"][rows], int(rows.sum())))
        return torch.cat([kernel for kernel, _ in result]), torch.cat([feature for _, feature in result])

    @pytest.fixture(scope="class")
    def features(self, model, values):
        with torch.no_grad():
            images = model.preprocess_image([{"image": values["image_chw_uint8"]}])
            close(images.tensor[0, :, ::16, ::16], values["normalised_image"])
            return model.backbone(images.tensor)["res4"]

    def test_class_memory(self, values, classes):
        close(classes[0], values["support_res4_avg"].flatten(1))
        close(classes[1], values["support_res5_avg"])

    @torch.no_grad()
    def test_stages(self, model, values, classes, features):
        heads = model.roi_heads
        close(features, values["query_res4"])
        close(features * classes[0][..., None, None], values["attention_map"])
        pairs = [(0, number) for number in range(3)]
        found = model.proposal_generator.propose(features, [(256, 352)], classes[0], pairs)
        assert [len(proposals) for proposals in found] == [100] * 3
        boxes = torch.stack([proposals.proposal_boxes.tensor for proposals in found])
        assert float((boxes - values["proposal_boxes"]).abs().max()) < PIXELS
        close(torch.stack([proposals.objectness_logits for proposals in found]), values["proposal_objectness"])
        regions = heads.region_features(features, [Boxes(boxes.flatten(0, 1))])
        close(regions.unflatten(0, (3, 100))[:, :4], values["query_roi_res5_first4"])
        index = torch.arange(3).repeat_interleave(100)
        logits, deltas = heads.box_predictor(regions, heads.box_predictor.encode(classes[1]), index)
        close(logits.view(3, 100, 2), values["class_logits"])
        close(deltas.view(3, 100, 4), values["box_deltas"])

    @torch.no_grad()
    def test_detections(self, model, values, classes):
        memory = ClassMemory(kind=KIND, encoder=model.memory_encoder)
        for number, name in enumerate(values["class_order"].tolist()):
            entry = {"kernel": classes[0][number], "feature": classes[1][number]}
            memory.add(str(name), ClassEntry(entry))
        model.keep_class_memory(memory)
        item = {
            "image": values["image_chw_uint8"], "height": int(values["output_height"]),
            "width": int(values["output_width"]),
        }  # fmt: skip
        (found,) = model.inference([item])
        found = found["instances"]
        assert len(found) == len(values["final_scores"]) == 50
        ids = values["class_order"][found.pred_classes]
        assert torch.equal(ids, values["final_classes"]) and found.pred_classes.dtype == torch.int64
        assert float((found.scores - values["final_scores"]).abs().max()) < 1e-4
        assert float((found.pred_boxes.tensor - values["final_boxes"]).abs().max()) < PIXELS
        # `final_boxes_network` of the file holds the rescaled boxes too: Detectron2 rescales in place.
        (network,) = model.inference([item], do_postprocess=False)
        assert network.image_size == (256, 352)
        assert float((2 * network.pred_boxes.tensor - values["final_boxes_network"]).abs().max()) < 2 * PIXELS

    @torch.no_grad()
    def test_pieces_of_any_size_give_the_same(self, model, values, classes, features):
        """Chunks of one class and of all classes."""
        parts = Classes(classes[0], model.roi_heads.box_predictor.encode(classes[1]))
        scorers = [PairScorer(model.proposal_generator, model.roi_heads, rows) for rows in (1, 200, 10_000)]
        found = [scorer.detect(features, [(256, 352)], parts)[0] for scorer in scorers]
        for other in found[1:]:
            assert torch.equal(other.pred_classes, found[0].pred_classes)
            torch.testing.assert_close(other.scores, found[0].scores, rtol=0, atol=1e-5)
            torch.testing.assert_close(other.pred_boxes.tensor, found[0].pred_boxes.tensor, rtol=0, atol=1e-3)


def test_selection_counts():
    """Ratio 1:2:1 up to 32 matches of 256 rows, then fewer of the others; 0:1:1 without any."""
    for matches, wanted in (
        (10, (10, 20, 10)),
        (32, (32, 64, 32)),
        (40, (40, 64, 40)),
        (64, (64, 64, 64)),
        (0, (0, 1, 1)),
    ):
        classes = torch.ones(256, dtype=torch.int64)
        classes[:matches] = 0
        kept = select_rows(torch.randn(256, 2), classes, 128)
        groups = ((kept < matches), (kept >= matches) & (kept < 128), kept >= 128)
        assert tuple(int(group.sum()) for group in groups) == wanted


def test_golden_weights_are_those_of_the_narrow_model():
    assert len(golden_state()) == 289
