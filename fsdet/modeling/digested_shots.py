"""Supports of classes with the digests of their pictures: what tells whether a kept class memory still holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fsdet.data.support import Support, SupportSet, seeded_generator
from fsdet.modeling.class_memory import ClassMemory, SupportDigest, digest_supports, support_keys

# Class name -> its supports and their digests.
DigestedShots = dict[str, tuple[tuple[Support, ...], tuple[SupportDigest, ...]]]


def digest_shots(shots: Mapping[str, Sequence[Support]]) -> DigestedShots:
    """Pair the supports of each class with their digests; every picture is read once.

    Raises: FileNotFoundError for a missing picture.
    """
    digests = iter(digest_supports([support for supports in shots.values() for support in supports]))
    return {name: (tuple(supports), tuple(next(digests) for _ in supports)) for name, supports in shots.items()}


def draw_shots(support_set: SupportSet, limit: int, seed: int) -> DigestedShots:
    """At most `limit` supports of every class, and their digests.

    Which ones of a class with more is drawn with (seed, class name); their order stays.

    Raises: ValueError naming the classes without any support; FileNotFoundError for a missing picture.
    """
    if empty := [name for name, shots in support_set if not shots]:
        raise ValueError(
            f"No support for the classes {empty}, so nothing tells what they look like. Add examples of them (crowd "
            "boxes do not count), or leave them out of the support set"
        )
    return digest_shots({name: _draw(shots, limit, seed, name) for name, shots in support_set})


def _draw(shots: Sequence[Support], limit: int, seed: int, name: str) -> tuple[Support, ...]:
    if len(shots) <= limit:
        return tuple(shots)
    places = seeded_generator(seed, 0, name).permutation(len(shots))[:limit]
    return tuple(shots[place] for place in sorted(places))


def stale_classes(memory: ClassMemory | None, shots: DigestedShots) -> list[str]:
    """Classes that `memory` lacks or has made of other pictures or boxes; where files lie does not count."""
    made_of = {} if memory is None else {name: support_keys(memory[name].supports) for name in memory}
    return [name for name, (_, digests) in shots.items() if made_of.get(name) != support_keys(digests)]
