"""Training batches as a pure function of (seed, iteration), and Detectron2's test loader.

Detectron2's own loader restarts its sampler on resume and groups images inside each process, so that the images of
an iteration depend on how often a run was interrupted and on the number of GPUs. Here a plan lists the images of every
iteration; processes and gradient accumulation only cut each batch into pieces.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.common import DatasetFromList
from torch.utils.data import DataLoader, Dataset, Sampler

from fsdet.data.episodes import EpisodicDataset, build_episodes
from fsdet.data.mapper import FewShotMapper
from fsdet.data.records import Record
from fsdet.data.scenes import SceneKey, build_scenes


class BatchPlan(Sampler[list[tuple[int, int]]]):
    """Endless list of batches of (epoch, record) pairs, equal for every number of processes.

    Every epoch is one permutation drawn from (seed, epoch). With `wide` given, a batch is built from groups of
    `group_size` images that are all wide or all tall (less padding); images that do not fill a group wait for the next
    epoch's. Small groups matter for K-shot sets: a single tall image would otherwise fill a whole batch by itself.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        wide: Sequence[bool] | None = None,
        group_size: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Describe the plan.

        Args:
            size: number of records, at least 1.
            batch_size: images of one iteration over all processes, a multiple of `world_size`.
            seed: of the permutations.
            start: first iteration to deliver (the earlier ones are skipped, not read).
            wide: per record whether the image is wider than high; None switches grouping off.
            group_size: images that share their orientation, a divisor of `batch_size`; 0 means the whole batch.
            rank, world_size: this process receives the `rank`-th of `world_size` equal pieces of each batch.
        """
        if size < 1:
            raise ValueError("There is no training record: the data set is empty or no image has an annotation")
        if batch_size % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} processes cannot share; use a multiple"
            )
        self.group_size = 1 if wide is None else group_size or batch_size
        if batch_size % self.group_size:
            raise ValueError(
                f"DATALOADER.GROUP_SIZE is {self.group_size}, which does not divide SOLVER.IMS_PER_BATCH {batch_size}"
            )
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.groups = [0] * size if wide is None else [int(w) for w in wide]
        piece = batch_size // world_size
        self.piece = slice(rank * piece, (rank + 1) * piece)

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Whole batches from iteration 0 on."""
        waiting: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
        batch: list[tuple[int, int]] = []
        epoch = 0
        while True:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            for index in torch.randperm(self.size, generator=generator).tolist():
                bucket = waiting[self.groups[index]]
                bucket.append((epoch, index))
                if len(bucket) == self.group_size:
                    batch += bucket
                    bucket.clear()
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            epoch += 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration, batch in enumerate(self.batches()):
            if iteration >= self.start:
                yield batch[self.piece]


class ScenePlan(BatchPlan):
    """A plan whose keys also say which iteration and which place of its batch they are for."""

    def __iter__(self) -> Iterator[list[SceneKey]]:  # type: ignore[override]
        for iteration, batch in enumerate(self.batches()):
            if iteration >= self.start:
                yield [SceneKey(*pair, iteration, place) for place, pair in enumerate(batch)][self.piece]


class PlannedDataset(Dataset[dict[str, Any]]):
    """Records addressed by (epoch, index); the pair and the seed decide the augmentation.

    With `views` given, a record has that many augmentations, which return in turn: epoch e shows view e mod `views`.
    """

    def __init__(self, records: list[dict[str, Any]], mapper: FewShotMapper, seed: int, *, views: int = 0) -> None:
        self.records = DatasetFromList(records, copy=False)  # serialised once, shared by the workers
        self.mapper, self.seed, self.views = mapper, seed, views

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        view = epoch % self.views if self.views else epoch
        return self.mapper({**self.records[index], "augmentation_seed": (self.seed, view, index)})


def _as_list(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detection batches stay lists of dicts."""
    return batch


def _heed_main_process_alone(worker: int) -> None:
    """Set up a worker that SIGINT and SIGTERM do not end, unless the main process sends the latter.

    A terminal or a job scheduler signals all processes at once. The main process then finishes its iteration and saves,
    which it could not without its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_main_process, daemon=True).start()


def _wait_for_main_process() -> None:
    """End this process when its parent asks for it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def training_records(cfg: Any) -> list[Record]:
    """Dataset dicts of `cfg.DATASETS.TRAIN`. Raises: ValueError when none is left."""
    try:
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, check_consistency=False
        )
    except AssertionError as error:
        raise ValueError(
            f"{', '.join(cfg.DATASETS.TRAIN)}: no image with an object is left to train on; check the annotations, "
            "the class split and FEWSHOT.LEAK"
        ) from error


def build_train_loader(
    cfg: Any, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
) -> DataLoader[list[dict[str, Any]]]:
    """Loader of the planned batches of `cfg.DATASETS.TRAIN`, from iteration `start` on.

    With INPUT.FS.ENABLED the records are split into queries, and each item carries supports (`EpisodicDataset`); with
    INPUT.PATCH.ENABLED the items are patches with supports (`SceneDataset`).

    Args:
        cfg: a resolved configuration; reads DATASETS.TRAIN, SOLVER.IMS_PER_BATCH, DATALOADER.*, INPUT.*.
        seed: of order, augmentation and supports. Any number of workers gives the same batches.
        start: first iteration.
        rank, world_size: the piece of each batch that this process trains on.
    Raises: ValueError for an empty data set, a batch that the processes cannot share or an unknown sampler; as
        `build_episodes` and `build_scenes`.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}; only TrainingSampler resumes exactly"
        )
    records = training_records(cfg)
    share = {"seed": seed, "start": start, "rank": rank, "world_size": world_size}
    patch = cfg.INPUT.get("PATCH")  # a plain Detectron2 configuration has neither
    if patch is not None and patch.ENABLED:
        scenes = build_scenes(cfg, records, seed=seed, start=start)
        return _data_loader(cfg, scenes, ScenePlan(len(scenes), cfg.SOLVER.IMS_PER_BATCH, **share))
    fs = cfg.INPUT.get("FS")
    episodes = None
    if fs is not None and fs.ENABLED:
        records, episodes = build_episodes(cfg, records, seed=seed)
    wide = [r["width"] > r["height"] for r in records] if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
    group_size = cfg.DATALOADER.GROUP_SIZE
    plan = BatchPlan(len(records), cfg.SOLVER.IMS_PER_BATCH, wide=wide, group_size=group_size, **share)
    dataset: Dataset[dict[str, Any]] = PlannedDataset(
        records, FewShotMapper(cfg, True), seed, views=cfg.DATALOADER.VIEWS
    )
    if episodes is not None:
        dataset = EpisodicDataset(dataset, episodes, crop_size=fs.CROP_SIZE, cache_mib=fs.CACHE_MIB)
    return _data_loader(cfg, dataset, plan)


def _data_loader(cfg: Any, dataset: Dataset[dict[str, Any]], plan: BatchPlan) -> DataLoader[list[dict[str, Any]]]:
    return DataLoader(
        dataset,
        batch_sampler=plan,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
        worker_init_fn=_heed_main_process_alone,
    )


def build_test_loader(cfg: Any, dataset_name: str, *, keep_original: bool = False) -> DataLoader[list[dict[str, Any]]]:
    """Detectron2's test loader (one image a batch, every image once over all processes) with fsdet's mapper.

    Args:
        cfg, dataset_name: Detectron2's.
        keep_original: let the inputs carry "original_image", which calibration needs, so that a file is read once.
    """
    mapper = FewShotMapper(cfg, False, keep_original=keep_original)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)
