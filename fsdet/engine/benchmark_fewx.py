"""Paired timings of FewX: the cost of a further class, shared proposals, many classes in memory, choice of supports.

`ReleasedWay` detects what the detector detects and spends its time as the release does; it is written from the
description of the method.

Source: FewX (Fan et al., CVPR 2020) and its release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from fsdet.data.episode_draws import FreshEpisodes
from fsdet.data.queries import Query
from fsdet.data.support import Support, SupportSet
from fsdet.engine.benchmark_parts import (
    Pair,
    cpu_seconds,
    fixed_batch,
    measure_pair,
    memory_pair,
    one_thread,
    peak_of_process_mib,
    seeded_model,
)
from fsdet.engine.setup import load_config, on_this_machine
from fsdet.engine.trainer import build_detector
from fsdet.modeling.class_memory import ClassEntry, ClassMemory

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "fewx"
# Further overrides of the detector, e.g. a narrower network; processes of their own get them too.
OPTS: tuple[str, ...] = ()
_STOCK = ("FEWX.ENABLED", "False", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
HEAD = "roi_heads.box_predictor."
SPREAD, REGIONS = 0.5, 50  # standard deviation of the logits of random regions
SHARED = 300  # proposals of all classes together in the approximate mode
MANY, FEW = 80, 5  # classes whose peak memory is compared
# Supports, images and classes of the release's COCO pool; draws of it that make one measurement.
POOL, DRAWS, SCANS = (141_000, 59_758, 60), 100, 2
SHOTS = 10


def _config(size: int, *opts: str) -> CfgNode:
    sizes = ["INPUT.MIN_SIZE_TEST", str(size), "MODEL.WEIGHTS", ""]
    return on_this_machine(load_config(str(CONFIGS / "coco_base.yaml"), [*sizes, *OPTS, *opts]))


class ReleasedWay:
    """The same detections as the release computes them.

    The attention map is a grouped convolution, every class has its RPN call with NMS over all pre-NMS boxes, res5 reads
    whole pooled regions in the default memory layout, and the heads see the support beside every region.
    """

    def __init__(self, cfg: CfgNode, detector: nn.Module) -> None:
        """Stock Detectron2 modules with the weights of `detector`."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.merge_from_list(list(_STOCK) + ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
        self.cfg, self.model = cfg, build_model(cfg).eval()
        state = detector.state_dict()
        missing = self.model.load_state_dict({n: v for n, v in state.items() if not n.startswith(HEAD)}, strict=False)
        if wrong := [n for n in (*missing.missing_keys, *missing.unexpected_keys) if not n.startswith(HEAD)]:
            raise RuntimeError(f"the released way and the detector have different weights: {wrong}")
        # Default memory layout, whatever the detector's is.
        self.head = {n.removeprefix(HEAD): v.contiguous() for n, v in state.items() if n.startswith(HEAD)}
        self.decoder = Box2BoxTransform(weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)

    @torch.no_grad()
    def __call__(self, entry: Mapping[str, Any], kernels: Tensor, features: Tensor) -> Instances:
        """Detections of one picture.

        Args:
            entry: input dict of a detector.
            kernels: (K, C4), one row per class.
            features: (K, C5, 7, 7).
        """
        images = self.model.preprocess_image([entry])
        res4 = self.model.backbone(images.tensor)["res4"]
        proposals = []
        for kernel in kernels:
            attention = F.conv2d(res4, kernel.view(-1, 1, 1, 1), groups=len(kernel))
            found, _ = self.model.proposal_generator(images, {"res4": attention})
            proposals.append(found[0].proposal_boxes)
        heads = self.model.roi_heads
        regions = heads.res5(heads.pooler([res4], [Boxes.cat(proposals)]))  # (R of all classes, C5, 7, 7)
        rows = regions.split([len(boxes) for boxes in proposals])
        related = [self._relate(part, support) for part, support in zip(rows, features, strict=True)]
        boxes = [self.decoder.apply_deltas(d, b.tensor) for (_, d), b in zip(related, proposals, strict=True)]
        scores = torch.cat([logits.softmax(1)[:, 0] for logits, _ in related])
        classes = torch.cat([torch.full((len(part),), i) for i, part in enumerate(rows)]).to(scores.device)
        return self._select(torch.cat(boxes), scores, classes, images.image_sizes[0], entry)

    def _relate(self, regions: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, 2) and deltas (R, 4) of regions (R, C, 7, 7) and one support (C, 7, 7)."""
        support = support[None]
        means = torch.cat([regions.mean((2, 3)), support.mean((2, 3)).expand(len(regions), -1)], 1)
        hidden = self._linear("fc_2", self._linear("fc_1", means).relu()).relu()
        kernel = self._conv("conv_cor", support).transpose(0, 1)
        alike = F.conv2d(self._conv("conv_cor", regions), kernel, groups=len(kernel)).relu().flatten(1)
        x = self._conv("conv_1", torch.cat([regions, support.expand_as(regions)], 1)).relu()
        x = self._conv("conv_2", F.avg_pool2d(x, 3, 1)).relu()
        x = F.avg_pool2d(self._conv("conv_3", x).relu(), 3, 1).flatten(1)
        parts = (("cls_score_fc", hidden), ("cls_score_cor", alike), ("cls_score_pr", x))
        return sum(self._linear(name, value) for name, value in parts), self._linear("bbox_pred_pr", x)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.head[f"{name}.weight"], self.head[f"{name}.bias"])

    def _conv(self, name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, self.head[f"{name}.weight"])

    def _select(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int], entry: Mapping[str, Any]
    ) -> Instances:
        """NMS within each class and the best of all, at the size of the picture."""
        clipped = Boxes(boxes)
        clipped.clip(size)
        heads = self.cfg.MODEL.ROI_HEADS
        good = scores > heads.SCORE_THRESH_TEST
        boxes, scores, classes = clipped.tensor[good], scores[good], classes[good]
        kept = batched_nms(boxes, scores, classes, heads.NMS_THRESH_TEST)[: self.cfg.TEST.DETECTIONS_PER_IMAGE]
        found = Instances(size, pred_boxes=Boxes(boxes[kept]), scores=scores[kept], pred_classes=classes[kept])
        return detector_postprocess(found, entry["height"], entry["width"])


class Case:
    """A detector with random weights, a noise picture of `size` x 4/3 `size`, and classes with random supports."""

    def __init__(self, size: int, classes: int, *opts: str) -> None:
        """Build them; the same for the same arguments."""
        self.cfg = _config(size, *opts)
        self.detector = seeded_model(build_detector, self.cfg).eval()
        (entry,) = fixed_batch(size, images=1)
        self.entry = {key: entry[key] for key in ("image", "height", "width")}
        head = self.detector.roi_heads.box_predictor
        channels = self.detector.backbone.output_shape()["res4"].channels, head.conv_cor.weight.shape[1]
        generator = torch.Generator().manual_seed(0)
        self.kernels = torch.rand(classes, channels[0], generator=generator)
        self.features = torch.rand(classes, channels[1], 7, 7, generator=generator)
        self._spread_scores(generator)

    @torch.no_grad()
    def _spread_scores(self, generator: torch.Generator) -> None:
        """Scale and shift the last layers, so that scores fill 0 to 1 and lie further apart than rounding."""
        heads = self.detector.roi_heads
        images = self.detector.preprocess_image([self.entry])
        corners = torch.rand(REGIONS, 2, generator=generator) * 0.5
        boxes = torch.cat([corners, corners + 0.1 + 0.4 * torch.rand(REGIONS, 2, generator=generator)], dim=1)
        height, width = images.image_sizes[0]
        boxes = (boxes * boxes.new_tensor([width, height] * 2)).to(images.tensor.device)
        regions = heads.region_features(self.detector.backbone(images.tensor)["res4"], [Boxes(boxes)])
        support = heads.box_predictor.encode(self.features[:1].to(regions.device))
        logits, _ = heads.box_predictor(regions, support, torch.zeros(REGIONS, dtype=torch.long, device=boxes.device))
        margin = logits[:, 0] - logits[:, 1]
        factor = SPREAD / margin.std()
        for name, parameter in heads.box_predictor.named_parameters():
            if name.startswith("cls_score"):
                parameter.mul_(factor)
        heads.box_predictor.cls_score_pr.bias[0] -= factor * margin.mean()

    def keep(self, classes: int) -> None:
        """Let the detector know the first so many classes."""
        rows = {
            f"class{i}": ClassEntry({"kernel": self.kernels[i], "feature": self.features[i]}) for i in range(classes)
        }
        memory = ClassMemory(kind="fewx", encoder=self.detector.memory_encoder, entries=rows)
        self.detector.keep_class_memory(memory)

    @torch.no_grad()
    def detect(self) -> Instances:
        """Detections of the classes that the detector knows."""
        return self.detector([self.entry])[0]["instances"]


def class_costs(size: int, rounds: int, classes: Sequence[int]) -> Iterator[Pair]:
    """Cost of a further class in forward passes of stock Detectron2's backbone on the same picture, by CPU time.

    Between 1 class and each number of `classes` (default 5); one thread.

    Raises: RuntimeError when the two ways detect different things.
    """
    with one_thread() as measure:
        case = Case(size, max(classes, default=5))
        released = ReleasedWay(case.cfg, case.detector)
        for many in classes or (5,):
            yield _class_cost(case, released, many, rounds, measure)


def _class_cost(
    case: Case, released: ReleasedWay, many: int, rounds: int, measure: Callable[[Callable[[], Any]], float]
) -> Pair:
    device = next(case.detector.parameters()).device
    kernels, features = case.kernels.to(device), case.features.to(device)
    image = released.model.preprocess_image([case.entry]).tensor

    @torch.no_grad()
    def backbone() -> None:
        released.model.backbone(image)

    costs: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        unit = measure(backbone)
        times = {}
        for count in (1, many):
            case.keep(count)
            if not number:
                case.detect()  # prepares the classes
                check_same(case.detect(), released(case.entry, kernels[:count], features[:count]))
            times["ours", count] = measure(case.detect)
            times["released", count] = measure(lambda c=count: released(case.entry, kernels[:c], features[:c]))
        if number:
            for side, name in zip(costs, ("ours", "released"), strict=True):
                side.append((times[name, many] - times[name, 1]) / (many - 1) / unit)
    names = f"fsdet, {many} classes", "the released way"
    return Pair("fewx-class", *names, tuple(costs[0]), tuple(costs[1]), "backbones")


def check_same(ours: Instances, released: Instances) -> None:
    """Same number, classes and order; boxes within 0.02 pixels and scores within 1e-4.

    Raises: RuntimeError with the difference.
    """
    found = f"{len(ours)} and {len(released)} detections"
    same = len(ours) == len(released) > 0 and torch.equal(ours.pred_classes, released.pred_classes)
    if same:
        boxes = (ours.pred_boxes.tensor - released.pred_boxes.tensor).abs().max().item()
        scores = (ours.scores - released.scores).abs().max().item()
        found += f", boxes {boxes:.1e} pixels and scores {scores:.1e} apart"
        same = boxes <= 0.02 and scores <= 1e-4
    if not same:
        raise RuntimeError(f"fsdet and the released way detect different things with the same weights: {found}")


def shared_costs(size: int, rounds: int, classes: Sequence[int]) -> Iterator[Pair]:
    """Detection with proposals shared by all classes against exact detection (default 20 classes); one thread."""
    with one_thread() as measure:
        for count in classes or (20,):
            cases = Case(size, count, "FEWX.SHARED_PROPOSALS", str(SHARED)), Case(size, count)
            for case in cases:
                case.keep(count)
            works = (f"{SHARED} shared, {count} cl.", cases[0].detect), ("exact", cases[1].detect)
            yield measure_pair("fewx-shared", *works, rounds, measure)


def memory_costs(size: int, rounds: int, classes: Sequence[int]) -> Iterator[Pair]:
    """Peak memory of a process that detects few classes and of one that detects many (default 80)."""
    for many in classes or (MANY,):
        yield memory_pair("fewx-memory", peak_of, size, FEW, many, rounds, OPTS)


def peak_of(size: int, classes: int, opts: Sequence[str]) -> float:
    """Peak memory in MiB of this process while it detects `classes` classes; on a GPU the device's."""
    with one_thread():
        case = Case(size, classes, *opts)
        case.keep(classes)
        return peak_of_process_mib(lambda: [case.detect() for _ in range(2)])


def support_costs(size: int, rounds: int, classes: Sequence[int]) -> Iterator[Pair]:
    """Choice of the 20 supports of a sample: index lists against table scans. `size` and `classes` play no part."""
    del size, classes
    rng = np.random.default_rng(0)
    count, images, kinds = POOL
    image_ids, class_ids = rng.integers(0, images, count), rng.integers(0, kinds, count)
    rows = zip(image_ids.tolist(), class_ids.tolist(), strict=True)
    supports = [Support(f"{image}.jpg", image, i, kind, (0.0, 0.0, 9.0, 9.0)) for i, (image, kind) in enumerate(rows)]
    episodes = FreshEpisodes(SupportSet([f"class{i}" for i in range(kinds)], supports), n_way=2, n_shot=SHOTS, seed=0)
    shown: dict[int, set[int]] = {}
    for support in supports:
        shown.setdefault(support.image_id, set()).add(support.class_id)
    chosen = [supports[i] for i in rng.permutation(count)[:DRAWS].tolist()]
    queries = [Query(s.image_id, s.class_id, tuple(sorted(shown[s.image_id])), s.annotation_id) for s in chosen]
    epochs = iter(range(10**9))

    def draw() -> None:
        epoch = next(epochs)
        for query in queries:
            episodes.draw(query, epoch)

    def scan() -> None:
        for query in queries[:SCANS]:
            _scan(image_ids, class_ids, query)

    draw()  # builds the index, once in a training
    pairs = [(cpu_seconds(draw) / DRAWS * 1e3, cpu_seconds(scan) / SCANS * 1e3) for _ in range(rounds)]
    yield Pair("fewx-supports", "index lists", "table scans", *zip(*pairs, strict=True), "ms")


def _scan(image_ids: np.ndarray, class_ids: np.ndarray, query: Query) -> list[int]:
    """Rows of the supports of a query, each found by a look through the whole table."""
    rng = np.random.RandomState(query.annotation_id)
    used, rows = [query.image_id], []
    absent = np.setdiff1d(class_ids, class_ids[image_ids == query.image_id])
    for class_id in (query.class_id, rng.permutation(absent)[0]):
        for _ in range(SHOTS):
            free = np.flatnonzero(
                (class_ids == class_id) & ~np.isin(image_ids, used) & ~np.isin(np.arange(len(image_ids)), rows)
            )
            rows.append(int(rng.permutation(free)[0]))
            used.append(int(image_ids[rows[-1]]))
    return rows


MEASURED: dict[str, Callable[[int, int, Sequence[int]], Iterator[Pair]]] = {
    "fewx-class": class_costs,
    "fewx-shared": shared_costs,
    "fewx-memory": memory_costs,
    "fewx-supports": support_costs,
}
