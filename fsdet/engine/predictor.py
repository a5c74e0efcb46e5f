"""Detect objects in pictures with a finished run, in three lines of Python.

    from fsdet.engine.predictor import Predictor

    predictor = Predictor.from_run("output/tfa_cos/r101_fpn/voc_split1/gfsod/5shot_seed0")
    detections = predictor("street.jpg")
    predictor.draw("street.jpg", detections).save("drawn.jpg")

A detector that reads examples detects new classes at once, see `Predictor.learn`:

    predictor = Predictor.from_run("output/fewx/r50_c4/coco/base", support="supports")  # one folder of pictures a class
    predictor.learn({"mug": ["mug.jpg", ("desk.jpg", (40, 60, 120, 160))]})

Pictures are prepared as for an evaluation. Only pictures that enter the network at the same size share a batch, so what
is found in one never depends on the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import Image

from fsdet.data.drawing import MIN_SIDE, class_colours
from fsdet.data.pictures import Source, read_pixels
from fsdet.data.support_folder import read_support_folder
from fsdet.engine.calibrated import calibrate, is_calibrated
from fsdet.engine.detection import Detection, detections_of, draw_detections
from fsdet.engine.finished_run import for_inference, load_detector, read_finished_run
from fsdet.engine.memories import recall_or_encode
from fsdet.engine.open_classes import (
    Examples,
    check_memory,
    has_open_classes,
    memory_with,
    require_open_classes,
    support_set_of,
)
from fsdet.engine.setup import run_classes
from fsdet.modeling.class_memory import ClassMemory

logger = logging.getLogger(__name__)


class Predictor:
    """A trained detector that takes pictures and gives detections.

    A run that calibrates its detections (TEST.CALIBRATION) does so here as well.

    Attributes:
        cfg: configuration of the detector.
        class_names: classes in the order of the predictor.
        novel_names: those of them that are novel (empty when unknown).
        threshold: smallest score that is returned; may be changed at any time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        cfg: CfgNode,
        class_names: Sequence[str],
        *,
        novel_names: Sequence[str] = (),
        threshold: float = 0.5,
    ) -> None:
        """Wrap a detector; see `from_run` and `from_config` for the usual ways to one.

        Args:
            model: Detectron2 detector with its weights.
            cfg: its configuration.
            class_names: names in predictor order.
            novel_names: which of them are novel.
            threshold: smallest score, in [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"The threshold is a score between 0 and 1, got {threshold}")
        self.model, self.cfg = model.eval(), cfg
        self.class_names, self.novel_names = tuple(class_names), tuple(novel_names)
        self.threshold = threshold
        self.format = cfg.INPUT.FORMAT
        self.resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self._colours = class_colours(self.class_names)

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        *,
        weights: str | Path = "",
        threshold: float = 0.5,
        device: str = "",
        opts: Sequence[str] = (),
        support: Examples | None = None,
        memory: str | Path = "",
    ) -> Predictor:
        """Predictor of a run folder: its config.yaml, classes.json and model_final.pth.

        Args:
            run: folder that a training has written, or an evaluation without fine-tuning.
            weights: another checkpoint of the run.
            threshold: smallest score that is returned.
            device: "cpu", "cuda", ...; "" = that of the config, or the CPU when there is no GPU.
            opts: KEY VALUE overrides of the run's config, e.g. to switch calibration on.
            support: examples of the classes to detect instead of the run's, for a detector that learns from examples
                alone: a support folder (`fsdet.data.support_folder`) or what else `learn` takes.
            memory: file of `save_memory` with the classes to detect; `support` adds to them.
        Raises: FileNotFoundError naming the missing file; ValueError when file, config and weights do not fit, for a
            class memory of another network or other supports, and for examples where the detector reads none.
        """
        found = read_finished_run(run, weights=weights, opts=opts)
        own = {"class_names": found.class_names, "novel_names": found.novel_names, "run_folder": run}
        given = {"support": support, "memory": memory}
        names = own if support is None and not memory else given
        return cls.from_config(found.cfg, found.weights, threshold=threshold, device=device, **names)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        weights: str | Path,
        class_names: Sequence[str] = (),
        *,
        novel_names: Sequence[str] = (),
        threshold: float = 0.5,
        device: str = "",
        run_folder: str | Path = "",
        support: Examples | None = None,
        memory: str | Path = "",
    ) -> Predictor:
        """Predictor of a configuration (see `fsdet.engine.setup.load_config`) and a weight file.

        Args:
            cfg: resolved configuration; it is not changed.
            weights: .pth, .safetensors or .pkl that fills the whole model.
            class_names: in predictor order; without it they are looked up in the data that the config names.
            novel_names, threshold, device: as above.
            run_folder: has the class memory of an evaluation; "" = OUTPUT_DIR. Without one the K shots are encoded.
            support, memory: as above; they name the classes, `class_names` does not.
        Raises: FileNotFoundError; ValueError when the weights do not fill the model or have other classes, and as
            `from_run`.
        """
        if support is not None or memory:
            return cls._of_examples(cfg, weights, support, memory, threshold=threshold, device=device)
        is_open = has_open_classes(cfg)
        names = list(class_names or run_classes(cfg))
        if not is_open and len(names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise ValueError(
                f"{len(names)} class names for a detector of {cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes "
                f"(MODEL.ROI_HEADS.NUM_CLASSES): {names}"
            )
        cfg = for_inference(cfg, threshold, device)
        novel = [name for name in names if name in set(novel_names)]
        model = calibrate(load_detector(cfg, weights, () if is_open else names), cfg, names, novel)
        recall_or_encode(model, cfg, run_folder or cfg.OUTPUT_DIR)
        predictor = cls(model, cfg, names, novel_names=novel, threshold=threshold)
        if has_open_classes(cfg, model):
            predictor._keep(model.class_memory)  # whose order the class ids follow
        return predictor

    @classmethod
    def _of_examples(
        cls,
        cfg: CfgNode,
        weights: str | Path,
        support: Examples | None,
        memory: str | Path,
        *,
        threshold: float,
        device: str,
    ) -> Predictor:
        """Predictor whose classes are those of examples and of a saved memory."""
        require_open_classes(cfg)
        if is_calibrated(cfg):
            logger.warning("TEST.CALIBRATION is left out: it knows the run's classes, not those of the examples")
        # Both are read before the model is built: a fault in them shows at once.
        saved = ClassMemory.load(memory) if memory else None
        if isinstance(support, str | Path):
            support = read_support_folder(support, image_format=cfg.INPUT.FORMAT)
        cfg = for_inference(cfg, threshold, device)
        predictor = cls(load_detector(cfg, weights), cfg, (), threshold=threshold)
        if saved is not None:
            check_memory(predictor.model, saved, memory)
            predictor._keep(saved)
        if support is not None:
            predictor.learn(support)
        return predictor

    def learn(self, examples: Examples) -> None:
        """Detect further classes from now on, or known ones by other examples; nothing is trained.

        Args:
            examples: class name -> list of pictures (path, PIL image, array) or (picture, box), where the box is XYXY
                in pixels of the picture as it is shown, and the whole picture is the object where there is none. Or a
                support folder, or a `SupportSet`.
        Raises: ValueError for a detector that reads no examples, a class without any, and a box that does not fit its
            picture; ImageError for a broken picture. Nothing changes then.
        """
        require_open_classes(self.cfg, self.model)
        with support_set_of(examples, self.format) as support_set:
            self._keep(memory_with(self.model, support_set))

    def forget(self, class_name: str) -> None:
        """Detect a class no more. Raises: ValueError for an unknown class and for the last one."""
        require_open_classes(self.cfg, self.model)
        if self.class_names == (class_name,):
            raise ValueError(f"{class_name!r} is the only class; a detector needs one. Learn another one first")
        memory: ClassMemory = self.model.class_memory.select(self.class_names)
        memory.remove(class_name)
        self._keep(memory)

    def save_memory(self, path: str | Path) -> None:
        """Write what has been learnt as PATH.safetensors and PATH.json, for `memory` of `from_run`."""
        require_open_classes(self.cfg, self.model)
        self.model.class_memory.save(path)

    def _keep(self, memory: ClassMemory) -> None:
        """Take a class memory, and the names that come with it."""
        self.model.keep_class_memory(memory)
        if self.novel_names:  # a class that has come since the training is novel
            known = set(self.class_names) - set(self.novel_names)
            self.novel_names = tuple(name for name in memory.names if name not in known)
        self.class_names = memory.names
        self._colours = {**self._colours, **class_colours(self.class_names)}  # earlier detections may still be drawn

    def __call__(
        self, images: Source | Sequence[Source], *, batch_size: int = 8
    ) -> list[Detection] | list[list[Detection]]:
        """Detect objects.

        Args:
            images: one picture or a list of them: path, PIL image, or (H, W, 3) uint8 array in BGR order (OpenCV's).
            batch_size: pictures in the network at once, at most.
        Returns: detections of one picture, best first; for a list, one such list for each picture.
        Raises: ImageError naming a picture that cannot be read.
        """
        if isinstance(images, Source):
            return next(self.stream([images]))
        return list(self.stream(images, batch_size=batch_size))

    def stream(self, images: Iterable[Source], *, batch_size: int = 8) -> Iterator[list[Detection]]:
        """Detections picture by picture; no more than one batch is held in memory."""
        waiting: list[np.ndarray] = []
        for image in images:
            waiting.append(self.read(image))
            if len(waiting) >= batch_size:
                yield from self.detect(waiting)
                waiting = []
        yield from self.detect(waiting)

    def read(self, image: Source) -> np.ndarray:
        """Read a picture: (H, W, 3) uint8 in the channel order of the config, EXIF rotation applied.

        Raises: ImageError naming a file that is missing or broken, or an array of another shape or type.
        """
        return read_pixels(image, self.format)

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """Detections of pictures as `read` gives them."""
        inputs: list[dict[str, Any]] = []
        for image in images:
            resized = self.resize.get_transform(image).apply_image(image)
            tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))  # (H, W, 3) -> (3, H, W)
            height, width = image.shape[:2]
            inputs.append({"image": tensor, "height": height, "width": width, "original_image": image})
        groups: dict[torch.Size, list[int]] = {}
        for index, entry in enumerate(inputs):
            groups.setdefault(entry["image"].shape, []).append(index)
        found: list[list[Detection]] = [[] for _ in images]
        for indices in groups.values():
            for index, output in zip(indices, self.model([inputs[i] for i in indices]), strict=True):
                found[index] = detections_of(output["instances"], self.class_names, self.threshold)
        return found

    def draw(self, image: Source, detections: Sequence[Detection], *, min_side: int = MIN_SIDE) -> Image.Image:
        """Picture with boxes, names and scores; base classes have thinner lines where novel ones are known.

        Args:
            image: as above.
            detections: what this predictor found in it.
            min_side: a picture with a shorter side, in pixels, is enlarged (0: never).
        Returns: RGB picture, ready to save.
        """
        return self.draw_pixels(self.read(image), detections, min_side=min_side)

    def draw_pixels(
        self, pixels: np.ndarray, detections: Sequence[Detection], *, min_side: int = MIN_SIDE
    ) -> Image.Image:
        """As `draw`, for a picture as `read` gives it."""
        rgb = pixels[:, :, ::-1] if self.format == "BGR" else pixels
        picture = Image.fromarray(np.ascontiguousarray(rgb))
        return draw_detections(picture, detections, self._colours, self.novel_names, min_side=min_side)
