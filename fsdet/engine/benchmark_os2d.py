"""Paired timings of OS2D's head: against the release's way, in chunks of classes, approximate, and its memory.

The scene of published costs has 1280 x 960 pixels, a shorter side of 960; supports have 240 x 240.

Source: OS2D (Osokin et al., ECCV 2020) and its release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from fsdet.engine.benchmark_os2d_release import LIMIT, Matches, ReleasedWay, check_same
from fsdet.engine.benchmark_parts import (
    Measure,
    Pair,
    measure_pair,
    memory_pair,
    one_thread,
    peak_of_process_mib,
    seeded_model,
)
from fsdet.engine.setup import load_config, on_this_machine
from fsdet.engine.trainer import build_detector
from fsdet.layers.correlation import normalize_cells
from fsdet.methods.os2d.geometry import anchor_boxes, decode_boxes
from fsdet.methods.os2d.memory import KIND, TEMPLATES
from fsdet.methods.os2d.pyramid import resize
from fsdet.modeling.class_memory import ClassEntry, ClassMemory

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "os2d" / "v2.yaml"
NETWORK = "r50_c4_torchvision"
# Further overrides of the detector, e.g. a narrower network; processes of their own get them too.
OPTS: tuple[str, ...] = ()
CLASSES = (1, 10, 50)
ALIGNED = 0.2  # share of the places that the approximate mode aligns
FEW, MANY = 5, 50  # classes whose peak memory is compared
SUPPORT = 240  # pixels a side
PATCHES = 40  # of one colour, along the shorter side of the scene
TURNED = 0.2  # largest difference between a parameter of the random alignments and that of the identity


class Case:
    """V2 with random weights and alignments, a scene of `size` x 4/3 `size` pixels, and supports cut out of it.

    Attributes:
        detector: in evaluation mode; the scene is searched at one scale.
        picture: (size, 4/3 size, 3) uint8.
        image: (1, 3, size, 4/3 size), as it enters the backbone.
        features: (D, H, W) that the backbone makes of it.
        templates: (C, 225, D).
    """

    def __init__(self, size: int, classes: int, *opts: str) -> None:
        """Build them; the same for the same arguments. The first classes do not depend on how many there are."""
        self.detector = seeded_model(build_detector, _config(size, *opts)).eval()
        rng = np.random.default_rng(0)
        shape = size, size * 4 // 3
        patches = rng.integers(0, 256, (PATCHES, PATCHES * 4 // 3, 3), dtype=np.uint8)
        self.picture = resize(patches, shape)
        pixels = torch.from_numpy(self.picture.transpose(2, 0, 1).copy())[None].to(self.detector.device)
        self.image = (pixels - self.detector.pixel_mean) / self.detector.pixel_std
        self._spread_features()
        self.features = self.detector.scene_features(self.picture)
        side = min(size, SUPPORT)
        corners = [rng.integers(0, (shape[0] - side + 1, shape[1] - side + 1)).tolist() for _ in range(classes)]
        cuts = [self.picture[top : top + side, left : left + side] for top, left in corners]
        self.templates = torch.stack([self.detector.encode_picture(resize(cut, (SUPPORT, SUPPORT))) for cut in cuts])
        self._turn_templates()

    @torch.no_grad()
    def _spread_features(self) -> None:
        """Take from every channel its mean before the last ReLU: random features of all places are much alike."""
        mean = self.detector.scene_features(self.picture).mean(dim=(1, 2))
        self.detector.backbone.layer3[-1].bn3.bias.sub_(mean)

    @torch.no_grad()
    def _turn_templates(self) -> None:
        """Give the alignment a random last layer: untrained, it is the identity."""
        linear = self.detector.head.transform_net.linear
        identity = linear.bias.clone()
        nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
        correlation = torch.einsum("kd,dhw->khw", self.templates[0], normalize_cells(self.features))[None]
        moved = self.detector.head.transform_net(correlation) - identity.view(1, -1, 1, 1)
        linear.weight.mul_(TURNED / moved.abs().max())
        self.detector.head.eval()  # forgets what was derived from the weights

    def match(self, classes: int) -> Matches:
        """Scores and boxes of the first so many classes by the head, with what it prepares of the scene."""
        head = self.detector.head
        scores, boxes, _ = head.detect(head.prepare(self.features), self.templates[:classes])
        return scores, boxes

    def match_one_by_one(self, classes: int) -> None:
        """The same in one call for each class."""
        head = self.detector.head
        scene = head.prepare(self.features)
        for template in self.templates[:classes].split(1):
            head.detect(scene, template)

    @torch.no_grad()
    def run_backbone(self) -> None:
        """The forward pass that is the unit of costs."""
        self.detector.backbone(self.image)


def _config(size: int, *opts: str) -> CfgNode:
    """V2 on one level that has the size of the picture, without weights or data."""
    scale = ["OS2D.PYRAMID", "(1.0,)", "OS2D.EVAL_SCALE", str(size * 4 // 3), "OS2D.IMAGE_SIZE", "0"]
    words = ["MODEL.WEIGHTS", "", "INPUT.PATCH.MINING_PERIOD", "0", "TEST.DETECTIONS_PER_IMAGE", str(LIMIT)]
    return on_this_machine(load_config(str(CONFIG), [*words, *scale, *OPTS, *opts], model=NETWORK))


def class_costs(size: int, rounds: int, classes: Sequence[int]) -> Iterator[Pair]:
    """Cost of the head for each class in forward passes of the backbone over the same scene, by CPU time; one thread.

    At each number of `classes` (default 1, 10, 50). Templates are made beforehand.

    Raises: RuntimeError when the two ways find different things.
    """
    with one_thread() as measure:
        case = Case(size, max(classes or CLASSES))
        head = case.detector.head
        released = ReleasedWay(head.transform_net, inverse=head.inverse)
        for count in classes or CLASSES:
            yield _class_cost(case, released, count, rounds, measure)


def _class_cost(case: Case, released: ReleasedWay, count: int, rounds: int, measure: Measure) -> Pair:
    templates = case.templates[:count]

    def release() -> Matches:
        return released(case.features, templates)

    def ours() -> Matches:
        return case.match(count)

    size, (scores, codes) = case.picture.shape[:2], release()  # the round that is not counted
    anchors = anchor_boxes(*case.features.shape[1:], device=codes.device)
    check_same(ours(), (scores, decode_boxes(codes, anchors)), size)
    case.run_backbone()
    costs: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        unit = measure(case.run_backbone)
        for side, work in zip(costs, (ours, release), strict=True):
            side.append(measure(work) / count / unit)
    names = f"fsdet, {count} cl.", "the released way"
    return Pair("os2d-class", *names, tuple(costs[0]), tuple(costs[1]), "backbones")


def chunk_costs(size: int, rounds: int, classes: Sequence[int]) -> Iterator[Pair]:
    """The head with as many classes at a time as it takes against one class a call (default 10, 50); one thread."""
    yield from _pairs("os2d-chunk", size, rounds, classes or CLASSES[1:], _chunk_works)


def _chunk_works(size: int, count: int) -> tuple[tuple[str, Callable], tuple[str, Callable]]:
    case = Case(size, count)
    one_by_one = "one class a call", lambda: case.match_one_by_one(count)
    return (f"in chunks, {count} cl.", lambda: case.match(count)), one_by_one


def aligned_costs(size: int, rounds: int, classes: Sequence[int]) -> Iterator[Pair]:
    """The head that aligns a fifth of the places against the exact one (default 10, 50 classes); one thread."""
    yield from _pairs("os2d-aligned", size, rounds, classes or CLASSES[1:], _aligned_works)


def _aligned_works(size: int, count: int) -> tuple[tuple[str, Callable], tuple[str, Callable]]:
    part, whole = Case(size, count, "OS2D.ALIGNED_SHARE", str(ALIGNED)), Case(size, count)
    return (f"{ALIGNED:g} aligned, {count} cl.", lambda: part.match(count)), ("exact", lambda: whole.match(count))


def _pairs(
    name: str, size: int, rounds: int, classes: Sequence[int], works: Callable[[int, int], tuple]
) -> Iterator[Pair]:
    """One pair for each number of classes."""
    with one_thread() as measure:
        for count in classes:
            yield measure_pair(name, *works(size, count), rounds, measure)


def memory_costs(size: int, rounds: int, classes: Sequence[int]) -> Iterator[Pair]:
    """Peak memory of a process that detects few classes and of one that detects many (default 50)."""
    for many in classes or (MANY,):
        yield memory_pair("os2d-memory", peak_of, size, FEW, many, rounds, OPTS)


def peak_of(size: int, classes: int, opts: Sequence[str]) -> float:
    """Peak memory in MiB of this process while it detects `classes` classes; on a GPU the device's."""
    with one_thread():
        case = Case(size, classes, *opts)
        encoder = case.detector.memory_encoder
        entries = {f"class{i}": ClassEntry({TEMPLATES: own[None].cpu()}) for i, own in enumerate(case.templates)}
        case.detector.keep_class_memory(ClassMemory(kind=KIND, encoder=encoder, entries=entries))
        return peak_of_process_mib(lambda: [case.detector([{"original_image": case.picture}]) for _ in range(2)])


MEASURED: dict[str, Callable[[int, int, Sequence[int]], Iterator[Pair]]] = {
    "os2d-class": class_costs,
    "os2d-chunk": chunk_costs,
    "os2d-aligned": aligned_costs,
    "os2d-memory": memory_costs,
}
