"""Prototypical calibration: the scores of any detector, corrected by what an ImageNet classifier sees in the boxes.

A class's prototype is the mean of its support boxes' vectors; a detection's score becomes
alpha * score + (1 - alpha) * cosine(vector of its box, prototype of its class).

Source: DeFRCN (Qiao et al., ICCV 2021), section 3.4. Departures from the official code: support boxes are exact, which
moves them by less than a pixel (`LegacyBoxes` is the official way); and, changing no number, only calibrated classes
have prototypes, a support picture passes the network once, a query picture without anything to calibrate not at all,
the cosines are one matrix product, the score alone decides which detections are touched (not the place in a sorted
list), and classes come from the configuration, not from a data set's name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn.functional import normalize

from fsdet.data.support import Support, SupportSet, read_picture, read_support
from fsdet.modeling.base import RecallableMemory, SupportConditioned
from fsdet.modeling.class_memory import ClassEntry, ClassMemory
from fsdet.modeling.digested_shots import DigestedShots, digest_shots, stale_classes
from fsdet.modeling.imagenet import NETWORKS, ImageEncoder
from fsdet.modeling.support_boxes import LegacyBoxes, exact_boxes

logger = logging.getLogger(__name__)

KIND = "prototypes"
_KEY = "prototype"  # the tensor of each class
_CHOICES = ("novel", "all")


class CalibratedDetector(RecallableMemory, nn.Module):
    """A detector whose detections are calibrated; in training mode it is the detector alone.

    The classifier is no sub-module: it enters neither the state dict nor an optimizer, and it follows the detector from
    device to device.

    Attributes:
        detector: the detector inside.
        encoder: the classifier.
        calibrated: classes whose detections are calibrated.
    """

    memory_kind = KIND

    def __init__(
        self,
        detector: nn.Module,
        encoder: ImageEncoder,
        class_names: Sequence[str],
        *,
        calibrated: Sequence[str],
        alpha: float = 0.5,
        lower: float = 0.05,
        upper: float = 1.0,
        image_format: str = "BGR",
        legacy_boxes: LegacyBoxes | None = None,
    ) -> None:
        """Wrap a detector.

        Args:
            detector: Detectron2 model: list of input dicts -> list of {"instances": Instances}.
            encoder: the classifier.
            class_names: K names in predictor order.
            calibrated: those of them whose detections are calibrated; each needs a support.
            alpha: weight of the detector's score, in [0, 1].
            lower, upper: detections with lower < score <= upper are calibrated.
            image_format: channel order of "original_image" in the inputs, "BGR" or "RGB".
            legacy_boxes: rounding of support boxes; None pools the exact ones.
        Raises: ValueError for a calibrated class that the detector does not have.
        """
        super().__init__()
        if unknown := [name for name in calibrated if name not in class_names]:
            raise ValueError(f"Classes {unknown} are to be calibrated, but the detector has {list(class_names)}")
        self.detector = detector
        object.__setattr__(self, "encoder", encoder)  # around nn.Module, which would register it
        self.calibrated = tuple(calibrated)
        self.alpha, self.lower, self.upper = alpha, lower, upper
        self.image_format, self.legacy_boxes = image_format, legacy_boxes
        self._rows = torch.tensor([self.calibrated.index(n) if n in self.calibrated else -1 for n in class_names])
        self._prototypes: Tensor | None = None  # (len(calibrated), D), normalised
        self.training = detector.training

    @property
    def memory_encoder(self) -> str:
        """Digest of all that prototypes depend on beside the supports."""
        if self.legacy_boxes is None:
            return self.encoder.digest
        return hashlib.sha256(f"{self.encoder.digest} legacy {self.legacy_boxes.sizes}".encode()).hexdigest()

    def encode_support(self, support_set: SupportSet) -> ClassMemory:
        """Prototypes of the calibrated classes; a detector that reads supports itself gets its own memory beside.

        Classes whose supports have not changed since the last call keep their prototypes.

        Returns: memory with a "prototype" (D,) for each calibrated class.
        Raises: ValueError for a class without support, or a support without area inside its picture; FileNotFoundError
            for a missing picture.
        """
        if isinstance(self.detector, SupportConditioned):
            self.detector.keep_class_memory(self.detector.encode_support(support_set))
        shots = self._digested_shots(support_set)
        former = self._class_memory
        stale = stale_classes(former, shots)
        kept = {name: former[name] for name in shots if name not in stale}
        wanted = [support for name, (supports, _) in shots.items() if name not in kept for support in supports]
        _, features = self.support_features(wanted)
        vectors = dict(zip(wanted, features, strict=True))
        memory = ClassMemory(kind=KIND, encoder=self.memory_encoder)
        for name, (supports, digests) in shots.items():
            if name in kept:
                memory.add(name, kept[name])
            else:
                mean = torch.stack([vectors[support] for support in supports]).mean(0)
                memory.add(name, ClassEntry({_KEY: mean}, digests))
        return memory

    def _digested_shots(self, support_set: SupportSet) -> DigestedShots:
        """Supports of the calibrated classes, and their digests. Raises: ValueError for a class without any."""
        known = dict(support_set)
        if empty := [name for name in self.calibrated if not known.get(name)]:
            raise ValueError(
                f"No support box for the calibrated classes {empty}; the support set has "
                f"{ {name: len(supports) for name, supports in known.items()} }. Check the K-shot lists: crowd boxes "
                "do not count"
            )
        return digest_shots({name: known[name] for name in self.calibrated})

    @torch.no_grad()
    def support_features(self, supports: Sequence[Support]) -> tuple[Tensor, Tensor]:
        """Encode supports; each picture is read and passes the network once, one at a time.

        Returns: boxes as they are pooled, (M, 4) XYXY in pixels of their picture, and vectors (M, D), both on the CPU.
        Raises: ValueError for a support without area inside its picture; FileNotFoundError for a missing picture.
        """
        by_file: dict[str, list[int]] = {}
        for index, support in enumerate(supports):
            by_file.setdefault(support.file_name, []).append(index)
        encoder = self._encoder()
        boxes = torch.empty(len(supports), 4)
        features = torch.empty(len(supports), encoder.classifier.out_features)
        for indices in by_file.values():
            picture = read_support(supports[indices[0]], self.image_format)
            pooled = (self.legacy_boxes or exact_boxes)(picture, [supports[i].box for i in indices])
            for index, box in zip(indices, pooled, strict=True):
                if not (box[2:] > box[:2]).all():
                    raise ValueError(
                        f"{supports[index].file_name}: the support box {supports[index].box} has no area inside its "
                        f"picture of {picture.shape[1]} x {picture.shape[0]} pixels (width x height); correct it"
                    )
            boxes[indices], features[indices] = pooled, encoder(picture, pooled, self.image_format).cpu()
        if supports:
            logger.info("Encoded %d support boxes from %d pictures", len(supports), len(by_file))
        return boxes, features

    def stale_classes(self, memory: ClassMemory, support_set: SupportSet) -> list[str]:
        """Calibrated classes whose entry in `memory` was made of other pictures or boxes than these."""
        return stale_classes(memory, self._digested_shots(support_set))

    def keep_class_memory(self, memory: ClassMemory | None) -> None:
        """Take prototypes for the evaluations to come (None forgets them).

        Raises: ValueError for a memory of another kind or encoder, and for a calibrated class without prototype.
        """
        if memory is not None:
            if memory.kind != KIND:
                raise ValueError(f"A memory of {memory.kind}; calibration needs {KIND}")
            if memory.encoder != self.memory_encoder:
                raise ValueError(
                    f"The prototypes were made by encoder {memory.encoder}, this calibration has "
                    f"{self.memory_encoder}: its weights, network or box rounding differ. Encode the supports again"
                )
            if missing := [name for name in self.calibrated if name not in memory]:
                raise ValueError(
                    f"No prototype for the calibrated classes {missing}; the memory has {list(memory.names)}. Add "
                    "their supports, or take them out of the calibrated classes"
                )
        super().keep_class_memory(memory)
        self._prototypes = None if memory is None else normalize(memory.stack(_KEY, self.calibrated).float(), dim=1)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Detect and calibrate.

        Args:
            batched_inputs: the detector's, any number. The picture that is calibrated on is "original_image" (H, W, 3)
                uint8, or else read from "file_name".
        Returns: as the detector's; the order of the detections is unchanged, so scores need not be sorted, and a score
            can be negative. In training mode the detector's losses.
        Raises: RuntimeError before supports were encoded.
        """
        outputs = self.detector(batched_inputs)
        if self.training:
            return outputs
        return [
            {**output, "instances": self.calibrate(output["instances"], entry)}
            for entry, output in zip(batched_inputs, outputs, strict=True)
        ]

    def in_range(self, scores: Tensor) -> Tensor:
        """(M,) bool: scores that are calibrated if their class is."""
        return (scores > self.lower) & ~(scores > self.upper)

    @torch.no_grad()
    def calibrate(self, instances: Instances, entry: dict[str, Any]) -> Instances:
        """Calibrate detections of one picture.

        Args:
            instances: with pred_boxes, scores, pred_classes, in the frame of `instances.image_size`.
            entry: the input dict, see `forward`.
        Returns: new instances with other scores, float32; the given ones when there is nothing to calibrate.
        """
        _ = self.class_memory  # raises when nothing was encoded, whether or not this picture needs it
        rows = self._on(instances.scores.device, "_rows")[instances.pred_classes]  # (M,), -1: not calibrated
        touched = torch.nonzero(self.in_range(instances.scores) & (rows >= 0))[:, 0]
        if not len(touched):
            return instances
        picture = self._picture(entry)
        frame = instances.image_size
        boxes = instances.pred_boxes.tensor[touched].float()
        scale = boxes.new_tensor([picture.shape[1] / frame[1], picture.shape[0] / frame[0]] * 2)  # 1 as a rule
        features = self._encoder()(picture, boxes * scale, self.image_format)
        with torch.autocast(features.device.type, enabled=False):
            cosines = normalize(features, dim=1) @ self._on(features.device, "_prototypes").T  # (len(touched), K)
        cosines = cosines.to(rows.device).gather(1, rows[touched, None])[:, 0]
        scores = instances.scores.float()
        scores = scores.index_copy(0, touched, self.alpha * scores[touched] + (1 - self.alpha) * cosines)
        return Instances(frame, **{**instances.get_fields(), "scores": scores})

    def _picture(self, entry: dict[str, Any]) -> Any:
        if "original_image" in entry:
            return entry["original_image"]
        if "file_name" not in entry:
            raise ValueError(
                f'An input with the keys {sorted(entry)} cannot be calibrated: give the picture as "original_image" '
                f'(H, W, 3) uint8 in {self.image_format} order, or its "file_name"'
            )
        return read_picture(entry["file_name"], self.image_format)

    def _encoder(self) -> ImageEncoder:
        """The classifier on the detector's device."""
        parameter = next(self.detector.parameters(), None)
        if parameter is not None and parameter.device != self.encoder.device:
            self.encoder.to(parameter.device)
        return self.encoder

    def _on(self, device: torch.device, name: str) -> Tensor:
        """A constant tensor on a device, moved there once."""
        value = getattr(self, name)
        if value.device != device:
            value = value.to(device)
            setattr(self, name, value)
        return value


def check_settings(cfg: CfgNode) -> None:
    """Check the ranges of TEST.CALIBRATION. Raises: ValueError with one line per fault."""
    node = cfg.TEST.CALIBRATION
    faults = []
    if not 0 <= node.ALPHA <= 1:
        faults.append(f"ALPHA is {node.ALPHA}; it is the weight of the detector's score, between 0 and 1")
    if not 0 <= node.LOWER < node.UPPER:
        faults.append(f"LOWER is {node.LOWER} and UPPER {node.UPPER}; expected 0 <= LOWER < UPPER")
    if node.CLASSES not in _CHOICES:
        faults.append(f'CLASSES is "{node.CLASSES}"; expected {" | ".join(_CHOICES)}')
    if node.NETWORK not in NETWORKS:
        faults.append(f'NETWORK is "{node.NETWORK}"; expected {" | ".join(NETWORKS)}')
    if faults:
        raise ValueError("TEST.CALIBRATION cannot be used:\n  " + "\n  ".join(faults))


def calibrated_names(cfg: CfgNode, class_names: Sequence[str], novel_names: Sequence[str]) -> tuple[str, ...]:
    """Classes of a detector whose detections TEST.CALIBRATION.CLASSES calibrates, in predictor order."""
    return tuple(name for name in class_names if cfg.TEST.CALIBRATION.CLASSES == "all" or name in novel_names)


def with_calibration(
    model: nn.Module,
    cfg: CfgNode,
    *,
    encoder: ImageEncoder,
    class_names: Sequence[str],
    novel_names: Sequence[str],
) -> nn.Module:
    """The detector with the calibration that a configuration asks for.

    Args:
        model: any Detectron2 detector.
        cfg: reads TEST.CALIBRATION, INPUT.FORMAT and, for LEGACY_BOXES, INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST.
        encoder: the network of the configuration, from `fsdet.modeling.imagenet.build_encoder`.
        class_names: names in predictor order.
        novel_names: which of them are novel.
    Returns: `model` itself when TEST.CALIBRATION.ENABLED is False or no class is to be calibrated.
    Raises: ValueError for settings out of range.
    """
    node = cfg.TEST.CALIBRATION
    names = calibrated_names(cfg, class_names, novel_names)
    if not node.ENABLED or not names:
        return model
    check_settings(cfg)
    return CalibratedDetector(
        model,
        encoder,
        class_names,
        calibrated=names,
        alpha=node.ALPHA,
        lower=node.LOWER,
        upper=node.UPPER,
        image_format=cfg.INPUT.FORMAT,
        legacy_boxes=LegacyBoxes(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) if node.LEGACY_BOXES else None,
    )
