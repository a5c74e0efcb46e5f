"""Episodes: every query image comes with crops of its own class and of classes that it does not show.

A query is one image with the boxes of one class (`queries.py`). Its supports are drawn from the training records
themselves, or from a legacy support table (`episode_draws.py`), and cut on the fly.

Source: FewX (Fan et al., CVPR 2020) and its release, training data, which cuts all crops beforehand.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from torch.utils.data import Dataset

from fsdet.data.crops import CropCache, fewx_support_crop
from fsdet.data.episode_draws import Episodes, FreshEpisodes, LegacyEpisodes
from fsdet.data.mapper import ImageError
from fsdet.data.queries import QUERY, mark_empty_boxes, query_records
from fsdet.data.records import Record
from fsdet.data.support import Support, SupportSet
from fsdet.data.support_table import read_support_table

logger = logging.getLogger(__name__)


def build_support_pool(cfg: Any, records: Sequence[Record]) -> SupportSet:
    """The supports of a configuration, with the policy that gives its crops.

    They are the objects of the records, cut with context to squares of INPUT.FS.CROP_SIZE; or with INPUT.FS.TABLE the
    rows of a support table, whose crops are files.

    Args:
        cfg: a resolved configuration; reads DATASETS.TRAIN, INPUT.FORMAT and INPUT.FS.
        records: the training records.
    Raises: FileNotFoundError or ValueError for a table that cannot be used, or whose crops have another size.
    """
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    fs, image_format = cfg.INPUT.FS, cfg.INPUT.FORMAT
    if not fs.TABLE:
        policy = partial(fewx_support_crop, size=fs.CROP_SIZE)
        usable = mark_empty_boxes(records, metadata.name)
        return SupportSet.from_records(usable, metadata.thing_classes, policy, image_format=image_format, min_shots=0)
    class_ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if class_ids is None:
        raise ValueError(
            f"INPUT.FS.TABLE is {fs.TABLE}, but {metadata.name} has no category ids; support tables are for data sets "
            "in COCO format. Leave it empty."
        )
    sources = metadata.get("sources")
    path = (sources.root if sources else Path()) / Path(fs.TABLE).expanduser()
    supports = read_support_table(path, class_ids, crop_size=fs.CROP_SIZE)
    logger.info("%s: %d supports", path, len(supports))
    return SupportSet(metadata.thing_classes, supports, image_format=image_format)


def build_episodes(cfg: Any, records: Sequence[Record], *, seed: int) -> tuple[list[Record], Episodes]:
    """Query records of the training records, and what draws their supports; faults are found here.

    Args:
        cfg: a resolved configuration; reads DATASETS.TRAIN, INPUT.FORMAT and INPUT.FS.
        records: dataset dicts of the training set.
        seed: of the draws.
    Raises: ValueError for values that cannot be, classes without supports and, for legacy draws, too few images; as
        `build_support_pool`.
    """
    fs = cfg.INPUT.FS
    if fs.SAMPLING not in ("fresh", "legacy") or fs.SUPPORT_WAY < 2 or fs.SUPPORT_SHOT < 1 or fs.CROP_SIZE < 1:
        raise ValueError(
            f'INPUT.FS.SAMPLING is "{fs.SAMPLING}", SUPPORT_WAY {fs.SUPPORT_WAY}, SUPPORT_SHOT {fs.SUPPORT_SHOT}, '
            f"CROP_SIZE {fs.CROP_SIZE}; expected fresh | legacy, at least 2, 1 and 1"
        )
    if fs.SAMPLING == "legacy" and fs.SUPPORT_WAY != 2:
        raise ValueError(f"INPUT.FS.SUPPORT_WAY is {fs.SUPPORT_WAY}; INPUT.FS.SAMPLING legacy knows 2 only")
    records = mark_empty_boxes(records, ", ".join(cfg.DATASETS.TRAIN))
    pool = build_support_pool(cfg, records)
    episodes: Episodes
    if fs.SAMPLING == "legacy":
        episodes = LegacyEpisodes(pool, n_shot=fs.SUPPORT_SHOT)
    else:
        episodes = FreshEpisodes(pool, n_way=fs.SUPPORT_WAY, n_shot=fs.SUPPORT_SHOT, seed=seed)
    queries = episodes.check(query_records(records))
    logger.info(
        "%d queries from %d records, %d supports of %d classes",
        len(queries),
        len(records),
        len(pool),
        len(pool.appearance),
    )
    return queries, episodes


class EpisodicDataset(Dataset[dict[str, Any]]):
    """Queries with their supports, addressed by (epoch, index).

    An item is the mapper's output with "support_images" (W·S, 3, C, C) uint8, the S supports of the query's class
    first, "support_boxes" (W·S, 4) float32, XYXY in pixels of the crops, and "support_classes", W names.
    """

    def __init__(self, queries: Dataset[dict[str, Any]], episodes: Episodes, *, crop_size: int, cache_mib: int) -> None:
        """Join queries and episodes.

        Args:
            queries: mapped query records by (epoch, index), which hand on "query".
            episodes: draws the supports; the policy of its pool must give squares of `crop_size`.
            crop_size: side C of a crop in pixels.
            cache_mib: memory for crops, in each process.
        """
        self.queries, self.episodes, self.crop_size = queries, episodes, crop_size
        self.cache = CropCache(cache_mib << 20)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        item = self.queries[key]
        episode = self.episodes.draw(item.pop(QUERY), key[0])
        crops = [self._crop(*pair) for pair in zip(episode.supports, episode.flips, strict=True)]
        images = np.stack([image for image, _ in crops]).transpose(0, 3, 1, 2)  # (W·S, 3, C, C)
        item["support_images"] = torch.from_numpy(np.ascontiguousarray(images))
        item["support_boxes"] = torch.from_numpy(np.stack([box for _, box in crops]))
        item["support_classes"] = episode.classes
        return item

    def _crop(self, support: Support, mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
        """Crop (C, C, 3) and box (4,) of a support. Raises: ImageError naming the file when it cannot be used."""
        key = (support.file_name, support.box, self.crop_size)
        image, box = self.cache.get(key, lambda: self._cut(support))
        if not mirrored:
            return image, box
        x0, y0, x1, y1 = box
        return image[:, ::-1], np.array([self.crop_size - x1, y0, self.crop_size - x0, y1], np.float32)

    def _cut(self, support: Support) -> tuple[np.ndarray, np.ndarray]:
        try:
            crop = self.episodes.pool.crop(support)
        except (OSError, ValueError) as error:
            raise ImageError(f"{support.file_name}: this support picture cannot be used ({error})") from error
        if crop.image.shape != (self.crop_size, self.crop_size, 3):
            raise ImageError(
                f"{support.file_name}: this support is {crop.image.shape[1]} x {crop.image.shape[0]} pixels, not "
                f"{self.crop_size} x {self.crop_size}; set INPUT.FS.CROP_SIZE to the size of the stored crops"
            )
        return crop.image, crop.box
