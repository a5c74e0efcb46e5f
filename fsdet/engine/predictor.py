"""Detect objects in pictures with a finished run: three lines of Python, or `predict_files` for images and folders.

    from fsdet.engine.predictor import Predictor

    predictor = Predictor.from_run("output/tfa_cos/r101_fpn/voc_split1/gfsod/5shot_seed0")
    detections = predictor("street.jpg")
    predictor.draw("street.jpg", detections).save("drawn.jpg")

Pictures are prepared as for an evaluation. Only pictures that enter the network at the same size share a batch, so what
is found in one never depends on the others.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy, read_image
from detectron2.structures import Instances
from PIL import Image, ImageOps
from torch import Tensor

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.checkpoint.safe_io import save_text_atomic
from fsdet.data.drawing import MIN_SIDE, Mark, class_colours, draw_marks
from fsdet.data.mapper import ImageError
from fsdet.engine.calibrated import calibrate, recall_or_encode
from fsdet.engine.setup import load_config, on_this_machine, run_classes
from fsdet.engine.trainer import build_detector

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# What Pillow raises on broken, torn and oversized files.
_READ_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)

Source = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Detection:
    """One object found.

    Attributes:
        class_name: name of its class.
        score: confidence in [0, 1]; a calibrated one (an average with a cosine) can be below 0.
        box: (x0, y0, x1, y1) in pixels of the picture as it is shown (after its EXIF rotation).
        class_id: position of the class in `Predictor.class_names`.
    """

    class_name: str
    score: float
    box: tuple[float, float, float, float]
    class_id: int


class Predictor:
    """A trained detector that takes pictures and gives detections.

    A run that calibrates its detections (TEST.CALIBRATION) does so here as well.

    Attributes:
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
            cfg: its configuration; reads INPUT.FORMAT, INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST.
            class_names: names in predictor order.
            novel_names: which of them are novel.
            threshold: smallest score, in [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"The threshold is a score between 0 and 1, got {threshold}")
        self.model = model.eval()
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
    ) -> Predictor:
        """Predictor of a run folder: its config.yaml, classes.json and model_final.pth.

        Args:
            run: folder that a training has written.
            weights: another checkpoint of the run.
            threshold: smallest score that is returned.
            device: "cpu", "cuda", ...; "" = that of the config, or the CPU when there is no GPU.
            opts: KEY VALUE overrides of the run's config, e.g. to switch calibration on.
        Raises: FileNotFoundError naming the missing file; ValueError when file, config and weights do not fit, and for
            a class memory of another network or other supports.
        """
        run = Path(run)
        weights = Path(weights) if weights else run / "model_final.pth"
        for path in (run / "config.yaml", run / "classes.json", weights):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} not found. Name the folder of a finished training (tools/train_net.py writes config.yaml, "
                    "classes.json and model_final.pth into its OUTPUT_DIR)"
                )
        classes = _read_classes(run / "classes.json")
        return cls.from_config(
            load_config(str(run / "config.yaml"), opts),
            weights,
            classes["detector"],
            novel_names=classes["novel"],
            threshold=threshold,
            device=device,
            memory=run,
        )

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
        memory: str | Path = "",
    ) -> Predictor:
        """Predictor of a configuration (see `fsdet.engine.setup.load_config`) and a weight file.

        Args:
            cfg: resolved configuration; it is not changed.
            weights: .pth, .safetensors or .pkl that fills the whole model.
            class_names: in predictor order; without it they are looked up in the data that the config names.
            novel_names, threshold, device: as above.
            memory: folder with the class memory of a calibrated evaluation; "" = OUTPUT_DIR. Without one the supports
                are encoded.
        Raises: FileNotFoundError; ValueError when the weights do not fill the model or have other classes.
        """
        names = list(class_names or run_classes(cfg))
        if len(names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
            raise ValueError(
                f"{len(names)} class names for a detector of {cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes "
                f"(MODEL.ROI_HEADS.NUM_CLASSES): {names}"
            )
        cfg = _for_inference(cfg, threshold, device)
        model = build_detector(cfg)
        FewShotCheckpointer(model, require_full=True, metadata={"classes": names}).load(weights, checkpointables=[])
        novel = tuple(name for name in names if name in set(novel_names))
        model = calibrate(model, cfg, names, novel)
        recall_or_encode(model, cfg, memory or cfg.OUTPUT_DIR)
        return cls(model, cfg, names, novel_names=novel, threshold=threshold)

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
        if isinstance(images, str | Path | Image.Image | np.ndarray):
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
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
                raise ImageError(
                    f"This array of shape {image.shape} and type {image.dtype} is no picture; expected (H, W, 3) uint8 "
                    "in BGR order, as cv2.imread gives"
                )
            return image if self.format == "BGR" else np.ascontiguousarray(image[:, :, ::-1])
        try:
            if isinstance(image, Image.Image):
                return convert_PIL_to_numpy(ImageOps.exif_transpose(image), self.format)
            return read_image(str(image), format=self.format)
        except _READ_ERRORS as error:
            name = getattr(image, "filename", "") or "This picture" if isinstance(image, Image.Image) else image
            raise ImageError(f"{name}: this image cannot be read ({error}). Replace or remove the file.") from error

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
                found[index] = self._detections(output["instances"].to("cpu"))
        return found

    def _detections(self, instances: Instances) -> list[Detection]:
        boxes: Tensor = instances.pred_boxes.tensor.float()
        rows = zip(boxes.tolist(), instances.scores.tolist(), instances.pred_classes.tolist(), strict=True)
        found = [
            Detection(self.class_names[class_id], score, tuple(box), class_id)
            for box, score, class_id in rows
            if score >= self.threshold
        ]
        return sorted(found, key=lambda detection: -detection.score)

    def draw(self, image: Source, detections: Sequence[Detection], *, min_side: int = MIN_SIDE) -> Image.Image:
        """Picture with boxes, names and scores; base classes have thinner lines where novel ones are known.

        Args:
            image: as above.
            detections: what this predictor found in it.
            min_side: a picture with a shorter side, in pixels, is enlarged (0: never).
        Returns: RGB picture, ready to save.
        """
        return self._draw(self.read(image), detections, min_side)

    def _draw(self, pixels: np.ndarray, detections: Sequence[Detection], min_side: int = MIN_SIDE) -> Image.Image:
        if self.format == "BGR":
            pixels = pixels[:, :, ::-1]
        marks = [
            Mark(
                detection.box,
                f"{detection.class_name} {detection.score:.0%}",
                self._colours[detection.class_name],
                is_thin=bool(self.novel_names) and detection.class_name not in self.novel_names,
            )
            for detection in reversed(detections)
        ]
        return draw_marks(Image.fromarray(np.ascontiguousarray(pixels)), marks, min_side=min_side)


def _for_inference(cfg: CfgNode, threshold: float, device: str) -> CfgNode:
    """Copy of a config without what only training needs: initial weights, a higher score threshold."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(f'"{cfg.MODEL.DEVICE}" is no device; expected cpu, cuda, cuda:1, ...') from error
    cfg.MODEL.TIMM.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    # Never raised: a method may rescore what passes it.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = min(cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, threshold)
    cfg.freeze()
    return on_this_machine(cfg)


def _read_classes(path: Path) -> dict[str, list[str]]:
    """Class lists of a run. Raises: ValueError naming the file."""
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
        return {key: [str(name) for name in classes[key]] for key in ("detector", "novel")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} must hold the lists "detector" and "novel" of class names ({error!r}). Run an evaluation with '
            "tools/train_net.py --eval-only, which writes it anew."
        ) from error


def find_images(inputs: Sequence[str | Path]) -> list[tuple[Path, Path]]:
    """Image files named by `inputs` or lying below folders among them, as (file, name for its result).

    Raises: FileNotFoundError for an input that does not exist and when no image is found.
    """
    found: list[tuple[Path, Path]] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            files = sorted(path for path in entry.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            found += [(path, path.relative_to(entry)) for path in files if path.is_file()]
        elif entry.is_file():
            found.append((entry, Path(entry.name)))
        else:
            raise FileNotFoundError(f"{entry}: no such image or folder")
    if not found:
        raise FileNotFoundError(
            f"No image in {', '.join(map(str, inputs))}; looked for {', '.join(IMAGE_SUFFIXES)} in all sub-folders"
        )
    taken: set[Path] = set()
    unique = []
    for path, name in found:
        wanted, number = name, 2
        while name in taken:
            name, number = wanted.with_name(f"{wanted.stem}_{number}{wanted.suffix}"), number + 1
        taken.add(name)
        unique.append((path, name))
    return unique


def predict_files(
    predictor: Predictor, inputs: Sequence[str | Path], output: str | Path, *, batch_size: int = 8
) -> dict[str, Any]:
    """Detect objects in images and folders; write drawn pictures and one JSON file.

    `output` receives the pictures below "pictures", in the folder structure of the inputs, and "detections.json":
    `images` (id, file_name, height, width), `detections` as COCO results (image_id, category_id, bbox [x, y, width,
    height] in pixels, score) with `category_name`, `categories` (id, name; the ids count the detector's classes from
    0), and `failed` (file_name, error): a broken image is listed and the rest goes on.

    Args:
        predictor: detector to use.
        inputs: image files and folders (searched with their sub-folders).
        output: folder to write.
        batch_size: images in the network at once, at most.
    Returns: the content of detections.json.
    Raises: FileNotFoundError for a missing input; ImageError when not one image can be read.
    """
    if batch_size < 1:
        raise ValueError(f"The batch size is a number of images from 1 up, got {batch_size}")
    files, output = find_images(inputs), Path(output)
    content: dict[str, Any] = {
        "threshold": predictor.threshold,
        "categories": [{"id": number, "name": name} for number, name in enumerate(predictor.class_names)],
        "images": [],
        "detections": [],
        "failed": [],
    }
    for first in range(0, len(files), batch_size):
        readable = []
        for path, name in files[first : first + batch_size]:
            try:
                readable.append((path, name, predictor.read(path)))
            except ImageError as error:
                logger.warning("%s", error)
                content["failed"].append({"file_name": str(path), "error": str(error)})
        for (path, name, pixels), found in zip(readable, predictor.detect([r[2] for r in readable]), strict=True):
            _append(content, path, pixels.shape[:2], found)
            target = (
                output / "pictures" / (name if name.suffix.lower() == ".jpg" else name.with_name(f"{name.name}.jpg"))
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            predictor._draw(pixels, found).save(target, quality=92)
    if not content["images"]:
        raise ImageError(f"None of the {len(files)} image(s) can be read; the first: {content['failed'][0]['error']}")
    output.mkdir(parents=True, exist_ok=True)
    save_text_atomic(json.dumps(content, indent=1, ensure_ascii=False) + "\n", output / "detections.json")
    return content


def _append(content: dict[str, Any], path: Path, size: tuple[int, int], found: Sequence[Detection]) -> None:
    """Add one picture and its detections."""
    number = len(content["images"]) + 1
    content["images"].append({"id": number, "file_name": str(path), "height": size[0], "width": size[1]})
    for detection in found:
        x0, y0, x1, y1 = detection.box
        content["detections"].append(
            {
                "image_id": number,
                "category_id": detection.class_id,
                "category_name": detection.class_name,
                "bbox": [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(detection.score, 5),
            }
        )
