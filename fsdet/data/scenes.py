"""Scenes: every training image is a patch of a scene and comes with one support of each class that the scene shows.

The classes are those of the full picture, whatever the patch shows of it; the model joins the supports of a batch. A
class that a picture shows as crowd alone, and that has no support anywhere, is not searched. Regions to ignore
("ignore_regions") stay negatives: an unlabelled object is none of the classes that are searched.

Everything that is random follows from (seed, epoch, image), but for flips: the images of a batch and their supports are
flipped alike, so these follow from (seed, iteration).

Source: OS2D (Osokin et al., ECCV 2020) and its release, training data.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data.common import DatasetFromList
from detectron2.data.detection_utils import SizeMismatchError, check_image_size
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fsdet.data.crops import has_area_inside
from fsdet.data.mapper import ImageError
from fsdet.data.patches import (
    FILTERS,
    MinedPatch,
    MinedPatches,
    PatchRule,
    cut_patch,
    flip_boxes,
    jitter_colour,
    mined_file,
    read_mined,
)
from fsdet.data.records import Record, join_pictures, xyxy
from fsdet.data.scene_supports import SceneSupports, build_scene_supports, is_difficult
from fsdet.data.support import Support, read_picture, seeded_generator

logger = logging.getLogger(__name__)


class SceneKey(NamedTuple):
    """Address of an item: epoch, place in the data set, iteration, and place in the batch of that iteration."""

    epoch: int
    index: int
    iteration: int = 0
    place: int = 0


class Objects(NamedTuple):
    """Ground truth of a picture: boxes (G, 4) XYXY in its pixels, class ids (G,), difficult (G,) bool."""

    boxes: np.ndarray
    class_ids: np.ndarray
    difficult: np.ndarray


def objects_of(record: Record) -> Objects:
    """Ground truth of a record, in the order of its annotations."""
    annotations = record["annotations"]
    return Objects(
        np.array([xyxy(a) for a in annotations], np.float64).reshape(-1, 4),
        np.array([a["category_id"] for a in annotations], np.int64),
        np.array([is_difficult(a) for a in annotations], bool),
    )


def scene_records(records: Sequence[Record]) -> list[Record]:
    """One record for each picture, with all its objects that have area inside it; what is left out is logged.

    Args:
        records: dataset dicts; K-shot sets have one for each object.
    """
    scenes, dropped = join_pictures(records), 0
    for scene in scenes:
        labelled = scene["annotations"]
        scene["annotations"] = [a for a in labelled if has_area_inside(xyxy(a), scene["height"], scene["width"])]
        dropped += len(labelled) - len(scene["annotations"])
    if dropped:
        logger.warning("%d object(s) without area inside their picture left out", dropped)
    return scenes


class SceneDataset(Dataset[dict[str, Any]]):
    """Patches of scenes with supports, addressed by `SceneKey`.

    An item is the record of its scene without annotations, with

    * "image": the patch, (3, S, S) uint8;
    * "instances": `gt_boxes` in pixels of the patch, not clipped, `gt_classes` and `gt_difficult` (bool); objects that
      the part cuts away are not among them;
    * "support_images": one crop (3, h, w) uint8 of each class that the full picture shows, in the order of the ids, of
      the mined class, and of further classes; a scene that shows none gets one further class at least;
    * "support_classes": their class ids;
    * "mined_class": id of the class that a mined patch is hard for; other patches lack it.
    """

    def __init__(
        self,
        scenes: Sequence[Record],
        supports: SceneSupports,
        rule: PatchRule,
        *,
        seed: int,
        wanted: float,
        scale: float = 0,
        nominal: float = 0,
        image_format: str,
        fill: Sequence[int] = (0, 0, 0),
        flip: bool = False,
        colour: bool = False,
        extra_classes: int = 0,
        views: int = 0,
        mined: MinedPatches | None = None,
    ) -> None:
        """Join scenes and supports.

        Args:
            scenes: one record for each picture.
            supports: draws and cuts.
            rule: of the parts.
            seed: of all draws.
            wanted: long side of a scene at scale 1 in pixels.
            scale: pixels of a scene at scale 1 for each pixel of its picture; 0 = as `wanted` has it.
            nominal: long side of a picture that `wanted` is meant for; 0 = each picture's own.
            image_format: channel order, "BGR" or "RGB".
            fill: colour beyond the border, in that order.
            flip: mirror batches, along each axis in every second one.
            colour: jitter the colours of patches.
            extra_classes: further classes that the scene does not show.
            views: parts of a scene that return in turn; 0 = always new ones.
            mined: hard patches; scenes that have some show nothing else.
        """
        self.scenes = DatasetFromList(list(scenes), copy=False)  # serialised once, shared by the workers
        self.supports, self.rule, self.seed = supports, rule, seed
        self.wanted, self.scale, self.nominal = wanted, scale, nominal
        self.image_format, self.fill, self.flip, self.colour = image_format, tuple(fill), flip, colour
        self.extra_classes, self.views, self.mined = extra_classes, views, mined or {}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, key: SceneKey | tuple[int, ...]) -> dict[str, Any]:
        key = SceneKey(*key)
        scene = self.scenes[key.index]
        mined = self._draw_mined(scene, key)
        flips = self._draw_flips(key.iteration)
        patch, instances = self._patch(scene, mined, key.epoch % self.views if self.views else key.epoch, flips)
        class_ids, crops = self._supports(scene, mined, key.epoch)
        item = {name: value for name, value in scene.items() if name not in ("annotations", "ignore_regions")}
        item["image"], item["instances"] = patch, instances
        item["support_images"] = [_flipped(crop, *flips) for crop in crops]
        item["support_classes"] = class_ids
        if mined is not None:
            item["mined_class"] = mined.class_id
        return item

    def read(self, scene: Record) -> np.ndarray:
        """The picture of a scene, (H, W, 3) uint8. Raises: ImageError naming the file when it cannot be used."""
        try:
            image = read_picture(scene["file_name"], self.image_format)
            check_image_size(dict(scene), image)
        except (OSError, ValueError, SizeMismatchError) as error:
            raise ImageError(
                f"{scene['file_name']}: this image cannot be used ({error}). Replace the file, or remove image "
                f"{scene['image_id']} from the annotations."
            ) from error
        return image

    def base_scale(self, scene: Record) -> float:
        """Pixels of a scene at scale 1 for each pixel of its picture."""
        return self.scale or self.wanted / (self.nominal or max(scene["height"], scene["width"]))

    def shown_classes(self, scene: Record) -> list[int]:
        """Ids of the classes that the full picture shows, rising, but for those that have no support."""
        return sorted({a["category_id"] for a in scene["annotations"]} & set(self.supports.class_ids))

    def _generator(self, scene: Record, epoch: int, of: str) -> np.random.Generator:
        """A stream of draws for each purpose, so that a switch does not change the draws of another one."""
        return seeded_generator(self.seed, epoch, f"{scene['image_id']}/{of}")

    def _draw_mined(self, scene: Record, key: SceneKey) -> MinedPatch | None:
        """A mined patch of a scene: a negative at every second place of the batch, a positive at the others.

        The release gives the negatives to the first half of the batch; here each piece of a batch that several
        processes or passes share has some of both.
        """
        patches = self.mined.get(str(scene["image_id"]), ())
        wanted = ("neg",) if key.place % 2 else ("pos", "pos_loc")
        fit = [patch for patch in patches if patch.kind in wanted] or patches
        return fit[self._generator(scene, key.epoch, "mined").integers(len(fit))] if fit else None

    def _draw_flips(self, iteration: int) -> tuple[bool, bool]:
        """Whether a batch is mirrored from left to right, and from top to bottom."""
        if not self.flip:
            return False, False
        horizontal, vertical = seeded_generator(self.seed, iteration, "flips").random(2) < 0.5
        return bool(horizontal), bool(vertical)

    def _patch(
        self, scene: Record, mined: MinedPatch | None, view: int, flips: tuple[bool, bool]
    ) -> tuple[Tensor, Instances]:
        """Image (3, S, S) and ground truth of a patch."""
        size, found, generator = self.rule.size, objects_of(scene), self._generator(scene, view, "patch")
        frame, base = (scene["height"], scene["width"]), self.base_scale(scene)
        resample = FILTERS[generator.integers(len(FILTERS))]
        window = mined.window if mined else self.rule.draw(found.boxes, *frame, base=base, generator=generator)
        patch = _as_tensor(cut_patch(self.read(scene), window, size, resample, fill=self.fill))
        if self.colour:
            order = [2, 1, 0] if self.image_format == "BGR" else [0, 1, 2]
            patch = jitter_colour(patch[order], self._generator(scene, view, "colour"))[order]
        boxes, is_left, is_cut = self.rule.place_boxes(found.boxes, window)
        boxes = flip_boxes(boxes, size, horizontal=flips[0], vertical=flips[1])
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes[is_left]).float())
        instances.gt_classes = torch.from_numpy(found.class_ids[is_left])
        instances.gt_difficult = torch.from_numpy((found.difficult | is_cut)[is_left])
        return _flipped(patch, *flips), instances

    def _supports(self, scene: Record, mined: MinedPatch | None, epoch: int) -> tuple[list[int], list[Tensor]]:
        """Class ids and crops of the classes that a patch is searched for."""
        generator = self._generator(scene, epoch, "supports")
        class_ids = self.shown_classes(scene)
        drawn = [self._draw_support(scene, class_id, generator) for class_id in class_ids]
        others = [class_id for class_id in self.supports.class_ids if class_id not in class_ids]
        if mined is not None and mined.class_id in others:
            others.remove(mined.class_id)
            class_ids.append(mined.class_id)
        further = generator.permutation(len(others))[: self.extra_classes or int(not class_ids)]
        class_ids += [others[place] for place in further]
        drawn += [self._draw_support(scene, class_id, generator) for class_id in class_ids[len(drawn) :]]
        return class_ids, [_as_tensor(self.supports.crop(*pair)) for pair in drawn]

    def _draw_support(
        self, scene: Record, class_id: int, generator: np.random.Generator
    ) -> tuple[Support, Image.Resampling]:
        support = self.supports.draw(class_id, scene["file_name"], generator)
        return support, FILTERS[generator.integers(len(FILTERS))]


def _as_tensor(image: np.ndarray) -> Tensor:
    """A copy of a picture (H, W, 3) as (3, H, W)."""
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def _flipped(image: Tensor, horizontal: bool, vertical: bool) -> Tensor:
    """An image (3, H, W) after flips."""
    return image.flip([axis for axis, does in ((2, horizontal), (1, vertical)) if does])


def build_scenes(cfg: Any, records: Sequence[Record], *, seed: int, start: int = 0) -> SceneDataset:
    """The scenes of a configuration; what lies in OUTPUT_DIR for iteration `start`, mined patches, is taken up.

    Args:
        cfg: a resolved configuration; reads DATASETS.TRAIN, INPUT.FORMAT, INPUT.PATCH, INPUT.FS.CACHE_MIB, OS2D,
            MODEL.PIXEL_MEAN, DATALOADER.VIEWS and OUTPUT_DIR.
        records: dataset dicts of the training set.
        seed: of all draws.
        start: first iteration.
    Raises: ValueError for classes without support, and for a faulty file of mined patches.
    """
    patch, os2d = cfg.INPUT.PATCH, cfg.OS2D
    scenes = scene_records(records)
    pool = build_scene_supports(cfg, scenes)
    path = mined_file(cfg.OUTPUT_DIR, start, patch.MINING_PERIOD)
    mined = read_mined(path, pool.classes) if path is not None and path.is_file() else {}
    logger.info(
        "%d scenes, %d supports of %d classes%s",
        len(scenes),
        len(pool),
        len(pool.appearance),
        f", {path}" * bool(mined),
    )
    return SceneDataset(
        scenes,
        SceneSupports(pool, target=os2d.CLASS_IMAGE_SIZE, cache_mib=cfg.INPUT.FS.CACHE_MIB),
        PatchRule(patch.SIZE, patch.SCALE_JITTER, patch.ASPECT_JITTER, patch.MIN_COVERAGE, patch.OBJECT_SIZE),
        seed=seed,
        wanted=os2d.EVAL_SCALE,
        scale=patch.SCALE,
        nominal=os2d.IMAGE_SIZE,
        image_format=cfg.INPUT.FORMAT,
        fill=[round(value) for value in cfg.MODEL.PIXEL_MEAN],
        flip=patch.FLIP,
        colour=patch.COLOUR,
        extra_classes=patch.EXTRA_NEGATIVES,
        views=cfg.DATALOADER.VIEWS,
        mined=mined,
    )
