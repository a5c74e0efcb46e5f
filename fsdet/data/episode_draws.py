"""How the supports of a query are drawn from a pool: anew in every epoch, or as FewX's release does.

Source: FewX (Fan et al., CVPR 2020) and its release, training data. Departures: "fresh" draws, and draws that go on
where a class has too few images, down to a single one.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

import numpy as np

from fsdet.data.queries import QUERY, Query, listed
from fsdet.data.records import Record
from fsdet.data.support import Support, SupportSet, seeded_generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episode:
    """Supports of a query: `classes` by name, the query's own first; S `supports` of each, in this order.

    `flips` tells which crops are to be mirrored.
    """

    classes: tuple[str, ...]
    supports: tuple[Support, ...]
    flips: tuple[bool, ...]


class Episodes(Protocol):
    """A way to draw episodes from a pool of supports."""

    pool: SupportSet

    def check(self, records: Sequence[Record]) -> list[Record]:
        """The query records that can be trained on; says what is missing before training starts."""
        ...

    def draw(self, query: Query, epoch: int) -> Episode:
        """The supports that a query meets in an epoch."""
        ...


class FreshEpisodes:
    """Supports drawn anew for every epoch, from (seed, epoch, query).

    Each comes from another image where the pool suffices. Where it does not, images and then supports repeat. A class
    that the pool knows from the query image alone (1-shot fine-tuning) is its own support; its crops are mirrored at
    random, so that the query does not meet its own pixels every time.
    """

    def __init__(self, pool: SupportSet, *, n_way: int, n_shot: int, seed: int) -> None:
        """Prepare draws.

        Args:
            pool: the supports.
            n_way: classes of an episode: the query's and others that its image does not show; at least 2.
            n_shot: supports of each class.
            seed: of the draws.
        """
        self.pool, self.n_way, self.n_shot, self.seed = pool, n_way, n_shot, seed
        self.empty = {name for name, shots in pool if not shots}

    def check(self, records: Sequence[Record]) -> list[Record]:
        """Leave out queries whose image shows so many classes that no other is left; count supports that repeat.

        Raises: ValueError for a class of the queries without any support, and when no query is left.
        """
        names = self.pool.classes
        without = sorted({names[r[QUERY].class_id] for r in records} & self.empty)
        if without:
            raise ValueError(f"No support for the classes {without}; every class that is trained needs one")
        kept = [record for record in records if len(names) - len(self._excluded(record[QUERY])) >= self.n_way - 1]
        if len(kept) < len(records):
            logger.warning(
                "%d of %d queries left out: their images show every class that could be the other one of their episode",
                len(records) - len(kept), len(records),
            )  # fmt: skip
        if records and not kept:
            raise ValueError(
                f"No query is left: an episode needs {self.n_way - 1} class(es) that the query's image does not show, "
                f"and there are {len(names) - len(self.empty)} classes with supports. Train with more classes."
            )
        self._warn_of_repeats([record[QUERY] for record in kept])
        return kept

    def _warn_of_repeats(self, queries: Sequence[Query]) -> None:
        others = [self.pool.count_images(self.pool.classes[q.class_id], without=q.image_id) for q in queries]
        short = Counter(self.pool.classes[q.class_id] for q, n in zip(queries, others, strict=True) if n < self.n_shot)
        if short:
            logger.warning(
                "%d of %d queries have fewer than %d other images with their class, so that supports repeat; %d of "
                "them have none and are their own support. Classes: %s",
                sum(short.values()), len(queries), self.n_shot, others.count(0),
                listed([f"{name} ({count} queries)" for name, count in short.items()]),
            )  # fmt: skip

    def _excluded(self, query: Query) -> set[str]:
        """Classes that cannot be the other one of an episode: without supports, or on the image by label or support."""
        pool, image = self.pool, query.image_id
        supported = {name for name in pool.classes if pool.places(name, image)}
        return self.empty | supported | {pool.classes[class_id] for class_id in query.shown}

    def draw(self, query: Query, epoch: int) -> Episode:
        """The supports that a query meets in an epoch."""
        pool, n_shot = self.pool, self.n_shot
        name = pool.classes[query.class_id]
        own: tuple[Support, ...] = ()
        mirrored: list[bool] = []
        if not pool.count_images(name, without=query.image_id):
            generator = seeded_generator(self.seed, epoch, f"{query.image_id}/{name}/own")
            places = generator.permutation(pool.places(name, query.image_id))
            own = tuple(islice(cycle(pool.shots(name)[place] for place in places), n_shot))
            mirrored = (generator.random(n_shot) < 0.5).tolist()
        drawn = pool.episode(
            self.n_way - bool(own),
            n_shot,
            seed=self.seed,
            epoch=epoch,
            image=query.image_id,
            query=name,
            include=() if own else (name,),
            exclude=tuple(self._excluded(query)),
            distinct_images=True,
            repeat=True,
        )
        classes = {name: own, **drawn} if own else drawn
        supports = tuple(support for shots in classes.values() for support in shots)
        return Episode(tuple(classes), supports, (*mirrored, *[False] * (len(supports) - len(mirrored))))


class LegacyEpisodes:
    """The release's draws: a function of the query alone, every one seeded with the id of its first annotation.

    Equal to the release's only with a pool in the order of its support table (INPUT.FS.TABLE) and ids that are numbers
    (COCO's). The release knows no other ids; one that is a text (VOC's) seeds with its CRC-32.
    """

    def __init__(self, pool: SupportSet, *, n_shot: int) -> None:
        """Prepare draws of 2 classes with `n_shot` supports each."""
        self.pool, self.n_shot = pool, n_shot

    def check(self, records: Sequence[Record]) -> list[Record]:
        """All records, once it is sure that everyone can be drawn.

        Raises: ValueError for annotations without a usable id, or that the pool does not have, and for classes with too
            few images.
        """
        faults = []
        for record in records:
            query, name = record[QUERY], self.pool.classes[record[QUERY].class_id]
            if _draw_seed(query.annotation_id) is None:
                raise ValueError(
                    f"{record['file_name']}: annotation id {query.annotation_id!r}; INPUT.FS.SAMPLING legacy needs ids "
                    "that are texts, or numbers in [0, 2^32), which seed its draws. Use INPUT.FS.SAMPLING fresh."
                )
            if not self.pool.places(name, query.image_id):
                raise ValueError(
                    f'{record["file_name"]}: the supports have no "{name}" of image {query.image_id} (annotation '
                    f"{query.annotation_id}); INPUT.FS.TABLE and the training annotations must be of the same making"
                )
            try:
                other = self._other_class(query)
                if self.pool.count_images(other) < 2 * self.n_shot or (
                    self.pool.count_images(name, without=query.image_id) < self.n_shot
                ):
                    self.draw(query)
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError(f"{len(faults)} of {len(records)} queries cannot be drawn: {listed(faults, 3)}")
        return list(records)

    def draw(self, query: Query, epoch: int = 0) -> Episode:
        """The supports of a query, of its class and of another one; `epoch` changes nothing.

        Raises: ValueError when there are too few images.
        """
        classes = self.pool.classes[query.class_id], self._other_class(query)
        used = [query.image_id]
        supports = tuple(support for name in classes for support in self._draw(name, used, query))
        return Episode(classes, supports, (False,) * len(supports))

    def _other_class(self, query: Query) -> str:
        """A class without a support from the query's image. Raises: ValueError when there is none."""
        absent = [name for name in self.pool.appearance if not self.pool.places(name, query.image_id)]
        if not absent:
            raise ValueError(
                f"Image {query.image_id} shows every class that has supports; use INPUT.FS.SAMPLING fresh, which "
                "leaves it out"
            )
        return absent[_first_of_permutation(len(absent), query.annotation_id)]

    def _draw(self, name: str, used: list[int | str], query: Query) -> list[Support]:
        """Supports of a class, each from an image not in `used`, to which it is added.

        A draw is a place in the list of what is left; that list is never built, only its gaps are stepped over.
        """
        shots, taken = self.pool.shots(name), []
        gaps = sorted(place for image in used for place in self.pool.places(name, image))
        for _ in range(self.n_shot):
            if len(shots) == len(gaps):
                raise ValueError(
                    f'Class "{name}": {self.n_shot} supports from different images needed for the query of annotation '
                    f"{query.annotation_id}, {len(taken)} found; use INPUT.FS.SAMPLING fresh or a smaller "
                    "INPUT.FS.SUPPORT_SHOT"
                )
            place = _first_of_permutation(len(shots) - len(gaps), query.annotation_id)
            for gap in gaps:
                if gap > place:
                    break
                place += 1
            taken.append(shots[place])
            used.append(shots[place].image_id)
            gaps = sorted([*gaps, *self.pool.places(name, shots[place].image_id)])
        return taken


def _first_of_permutation(size: int, annotation_id: int | str | None) -> int:
    """How the release draws one of `size` rows: the first entry of a permutation seeded with an annotation's id."""
    seed = _draw_seed(annotation_id)
    assert seed is not None, f"annotation id {annotation_id!r} gives no seed; check() refuses it"
    return int(np.random.RandomState(seed).permutation(size)[0])


def _draw_seed(annotation_id: int | str | None) -> int | None:
    """The seed that an annotation's id gives, or None."""
    if isinstance(annotation_id, str):
        return zlib.crc32(annotation_id.encode())
    return annotation_id if type(annotation_id) is int and 0 <= annotation_id < 2**32 else None
