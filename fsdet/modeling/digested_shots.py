"""Supports of classes with the digests of their pictures: what tells whether a kept class memory still holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fsdet.data.support import Support
from fsdet.modeling.class_memory import ClassMemory, SupportDigest, digest_supports, support_keys

# Class name -> its supports and their digests.
DigestedShots = dict[str, tuple[tuple[Support, ...], tuple[SupportDigest, ...]]]


def digest_shots(shots: Mapping[str, Sequence[Support]]) -> DigestedShots:
    """Pair the supports of each class with their digests; every picture is read once.

    Raises: FileNotFoundError for a missing picture.
    """
    digests = iter(digest_supports([support for supports in shots.values() for support in supports]))
    return {name: (tuple(supports), tuple(next(digests) for _ in supports)) for name, supports in shots.items()}


def stale_classes(memory: ClassMemory | None, shots: DigestedShots) -> list[str]:
    """Classes that `memory` lacks or has made of other pictures or boxes; where files lie does not count."""
    made_of = {} if memory is None else {name: support_keys(memory[name].supports) for name in memory}
    return [name for name, (_, digests) in shots.items() if made_of.get(name) != support_keys(digests)]
