"""Hard patch mining: now and then the detector searches its training scenes, and then trains on where it went wrong.

Every INPUT.PATCH.MINING_PERIOD iterations the patches go into mined_patches_ITERATION.json in OUTPUT_DIR, and the
batches that follow are planned anew with them. A resumed run takes up the file of its iteration. So every iteration
stays a function of configuration, seed and iteration.

Source: OS2D (Osokin et al., ECCV 2020), hard patch mining in the form of its release. Departure: the random classes are
drawn once for all scenes, so that memory does not grow with the number of classes.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor

from fsdet.data.loader import training_records
from fsdet.data.patches import MinedPatch, mined_file, save_mined
from fsdet.data.records import Record
from fsdet.data.scenes import SceneDataset, build_scenes, objects_of
from fsdet.data.support import Support, seeded_generator
from fsdet.methods.os2d.decoding import to_frame
from fsdet.methods.os2d.mining import Candidates, crop_for_anchors, hardest_crops, select_patches
from fsdet.methods.os2d.objective import AnchorLosses
from fsdet.methods.os2d.pyramid import resize
from fsdet.methods.os2d.targets import SceneTargets

logger = logging.getLogger(__name__)

TEMPLATES_KEPT = 64  # of classes that scenes show; about 1 MiB each


class Miner(Protocol):
    """What mining asks of a detector."""

    device: torch.device

    def encode_picture(self, picture: np.ndarray) -> Tensor:
        """Template (225, D) of the picture of a support, (h, w, 3) uint8."""
        ...

    def mining_losses(
        self, picture: np.ndarray, templates: Tensor, targets: SceneTargets
    ) -> tuple[AnchorLosses, Tensor]:
        """Losses (C, N) of a scene at one size, (h, w, 3) uint8, and its anchors (N, 4), both in its pixels."""
        ...


class SceneSearch:
    """Searches scenes with one state of the weights.

    Each scene is looked at in a few random scales between the smallest and the largest one of the test, for the classes
    that it shows and for random ones. All draws come from (seed, iteration, image).
    """

    def __init__(self, detector: Miner, scenes: SceneDataset, cfg: CfgNode, iteration: int) -> None:
        """Encode the random classes.

        Args:
            detector: in evaluation mode.
            scenes: the training set.
            cfg: reads INPUT.PATCH and OS2D.PYRAMID.
            iteration: of the weights.
        """
        self.detector, self.scenes, self.iteration = detector, scenes, iteration
        self.patch, self.scales = cfg.INPUT.PATCH, (min(cfg.OS2D.PYRAMID), max(cfg.OS2D.PYRAMID))
        self._kept: OrderedDict[Support, Tensor] = OrderedDict()
        generator = seeded_generator(scenes.seed, iteration, "mining")
        drawn = generator.permutation(scenes.supports.class_ids)[: self.patch.MINING_CLASSES].tolist()
        supports = [scenes.supports.draw(class_id, "", generator) for class_id in sorted(drawn)]
        self._random = {support.class_id: self._encode(support) for support in supports}

    def patches(self, index: int) -> list[MinedPatch]:
        """The patches to keep of one scene. Raises: ImageError naming a file that cannot be used."""
        scene = self.scenes.scenes[index]
        generator = seeded_generator(self.scenes.seed, self.iteration, f"{scene['image_id']}/mining")
        shown = self.scenes.shown_classes(scene)
        supports = [self.scenes.supports.draw(class_id, scene["file_name"], generator) for class_id in shown]
        templates = {**self._random, **{support.class_id: self._template(support) for support in supports}}
        if not templates:
            return []
        factors = generator.uniform(*self.scales, self.patch.MINING_SCALES) * self.scenes.base_scale(scene)
        sizes = [tuple(max(1, int(scene[side] * factor)) for side in ("height", "width")) for factor in factors]
        picture, class_ids = self.scenes.read(scene), sorted(templates)
        stacked = torch.stack([templates[class_id] for class_id in class_ids])
        found = [self._search(scene, resize(picture, size), stacked, class_ids) for size in sizes]
        return select_patches(found, top=self.patch.MINED_PER_IMAGE)

    def _search(
        self, scene: Record, picture: np.ndarray, templates: Tensor, class_ids: Sequence[int]
    ) -> dict[str, Candidates]:
        """Candidates of one scale, in pixels of the stored picture."""
        objects, places = objects_of(scene), {class_id: place for place, class_id in enumerate(class_ids)}
        stored, size, device = (scene["height"], scene["width"]), picture.shape[:2], self.detector.device
        targets = SceneTargets(
            to_frame(torch.from_numpy(objects.boxes).float(), stored, size).to(device),
            torch.tensor([places.get(c, -1) for c in objects.class_ids.tolist()], dtype=torch.int64, device=device),
            torch.from_numpy(objects.difficult).to(device),
        )
        losses, anchors = self.detector.mining_losses(picture, templates, targets)
        crops = to_frame(crop_for_anchors(anchors, size, side=self.patch.SIZE), size, stored)
        return hardest_crops(crops, losses, torch.tensor(class_ids, device=device))

    def _template(self, support: Support) -> Tensor:
        """Template (225, D) of a support; those used last are kept."""
        if support not in self._kept:
            self._kept[support] = self._encode(support)
        self._kept.move_to_end(support)
        while len(self._kept) > TEMPLATES_KEPT:
            self._kept.popitem(last=False)
        return self._kept[support]

    def _encode(self, support: Support) -> Tensor:
        return self.detector.encode_picture(self.scenes.supports.crop(support)).cpu()


@torch.no_grad()
def mine_patches(
    detector: Miner, scenes: SceneDataset, cfg: CfgNode, iteration: int, numbers: Sequence[int]
) -> dict[int, list[MinedPatch]]:
    """Search scenes for hard patches.

    Args:
        detector: in evaluation mode.
        scenes: the training set.
        cfg: a resolved configuration.
        iteration: of the weights; part of the seed.
        numbers: of the scenes to search.
    Returns: number of the scene -> its patches.
    """
    search, found = SceneSearch(detector, scenes, cfg, iteration), {}
    for done, number in enumerate(numbers, 1):
        found[number] = search.patches(number)
        log_every_n_seconds(logging.INFO, f"Mining patches: {done} of {len(numbers)} scenes", n=60)
    return found


class PatchMining(HookBase):
    """Mines patches every few iterations and has the following batches planned with them.

    The trainer must have `start_batches(iteration)`. The processes share the scenes.
    """

    def __init__(self, cfg: CfgNode, model: torch.nn.Module) -> None:
        """Take the settings.

        Args:
            cfg: a resolved configuration with INPUT.PATCH.MINING_PERIOD above 0.
            model: the detector, or one wrapped by DistributedDataParallel.
        Raises: ValueError for a detector that cannot mine.
        """
        self.cfg, self.period = cfg, cfg.INPUT.PATCH.MINING_PERIOD
        self.detector: Any = getattr(model, "module", model)
        if not (cfg.INPUT.PATCH.ENABLED and hasattr(self.detector, "mining_losses")):
            raise ValueError(
                f"INPUT.PATCH.MINING_PERIOD is {self.period}, but {type(self.detector).__name__} is not trained on "
                "patches, or cannot compare them; set it to 0, or INPUT.PATCH.ENABLED and OS2D.ENABLED to True"
            )

    def before_train(self) -> None:
        """Make sure that a resumed run has its patches, and forget those of later iterations.

        Raises: FileNotFoundError when the patches that the run trained on are gone.
        """
        start = self.trainer.start_iter
        path = mined_file(self.cfg.OUTPUT_DIR, start, self.period)
        is_there = path is None or path.is_file() or start >= self.trainer.max_iter
        comm.synchronize()
        if comm.is_main_process():
            self._forget_later(start)
        if not is_there and start % self.period:
            raise FileNotFoundError(
                f"{path} is missing: the run trained on these patches when it stopped before iteration {start}. Put "
                "the file back, or train from the start in another OUTPUT_DIR"
            )
        if not is_there:  # the run ended between its checkpoint and the end of the mining
            self._mine(start)

    def _forget_later(self, start: int) -> None:
        """Remove files of iterations that are still to come: another run may have left them."""
        for path in Path(self.cfg.OUTPUT_DIR).glob("mined_patches_" + "[0-9]" * 7 + ".json"):
            if int(path.stem[-7:]) > start:
                path.unlink()

    def after_step(self) -> None:
        """Mine when the time has come; when that fails, the finished iterations are kept."""
        trainer = self.trainer
        coming = trainer.iter + 1
        if coming % self.period or coming >= trainer.max_iter:
            return
        try:
            self._mine(coming)
        except Exception:
            if comm.is_main_process():
                trainer.checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
            raise

    def _mine(self, iteration: int) -> None:
        started, trainer = time.perf_counter(), self.trainer
        scenes = build_scenes(self.cfg, training_records(self.cfg), seed=trainer.seed)
        mine = range(comm.get_rank(), len(scenes), comm.get_world_size())
        self.detector.eval()
        try:
            gathered = comm.gather(mine_patches(self.detector, scenes, self.cfg, iteration, mine))
        finally:
            self.detector.train()
        if comm.is_main_process():
            found = {number: patches for part in gathered for number, patches in part.items()}
            by_image = {str(scenes.scenes[number]["image_id"]): found[number] for number in range(len(scenes))}
            path = mined_file(self.cfg.OUTPUT_DIR, iteration, self.period)
            save_mined(path, by_image, scenes.supports.classes)
            count, seconds = sum(map(len, by_image.values())), time.perf_counter() - started
            logger.info("%s: %d patches of %d scenes mined in %.0f s", path, count, len(scenes), seconds)
        comm.synchronize()
        trainer.start_batches(iteration)
