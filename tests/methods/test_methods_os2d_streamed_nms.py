"""Suppression of candidates in parts: the result of one look at all of them, with few of them held at a time."""

import pytest
import torch

from fsdet.methods.os2d import streamed_nms
from fsdet.methods.os2d.decoding import Found, exact_nms, reference_nms
from fsdet.methods.os2d.streamed_nms import exact_in_rounds, reference_in_chunks


def candidates(count, seed=0, *, decimals=None, side=120):
    """Random boxes; `decimals` of their scores, so that some are equal. Anchors and corners tell their places."""
    generator = torch.Generator().manual_seed(seed)
    corner = (torch.rand(count, 2, generator=generator) * side).round()  # whole pixels: many overlaps are equal, too
    boxes = torch.cat([corner, corner + (torch.rand(count, 2, generator=generator) * 40).round() + 1], dim=1)
    scores = torch.rand(count, generator=generator)
    places = torch.arange(count)[:, None]
    geometry = {"anchors": places.expand(-1, 4).float(), "corners": places[:, None].expand(-1, 4, 2).float()}
    return Found(
        boxes, scores if decimals is None else scores.round(decimals=decimals), places[:, 0] * 0 + 7, **geometry
    )


class Reader:
    """Gives candidates in parts and counts how often it does."""

    def __init__(self, found, sizes):
        self.parts = [found[own] for own in torch.arange(len(found)).split(sizes)]
        self.calls = 0

    def __call__(self):
        self.calls += 1
        yield from self.parts


def assert_same(found, expected):
    assert found.fields().keys() == expected.fields().keys()
    for name, value in found.fields().items():
        assert torch.equal(value, getattr(expected, name)), name


@pytest.mark.parametrize("limit", [-1, 7, 60])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(("pool", "part"), [(50, 130), (120, 40), (10**6, 399)])
def test_exact_is_that_of_all_together(limit, threshold, pool, part, monkeypatch):
    monkeypatch.setattr(streamed_nms, "_POOL", pool)
    monkeypatch.setattr(streamed_nms, "_BLOCK", 64)
    monkeypatch.setattr(streamed_nms, "_PAIRS", 500)
    found = candidates(400, side=60, decimals=1)  # forty of each score
    read = Reader(found, part)
    expected = found[exact_nms(found.boxes, found.scores, threshold, limit)]
    assert_same(exact_in_rounds(read, threshold, limit), expected)


def row(*entries):
    """Boxes of 10 x 10 pixels in a row, each by its left side and its score; those 4 px apart overlap by 0.43."""
    lefts, scores = (torch.tensor(values) for values in zip(*entries, strict=True))
    boxes = torch.stack([lefts, lefts * 0, lefts + 10, lefts * 0 + 10], dim=1)
    return Found(boxes, scores, torch.zeros(len(scores), dtype=torch.int64))


@pytest.mark.parametrize("pool", [1, 2, 100])
def test_a_better_box_that_comes_last(pool, monkeypatch):
    """It takes those that would have taken others, or that would have been the best ones wanted."""
    monkeypatch.setattr(streamed_nms, "_POOL", pool)
    frees = [row((0.0, 0.8), (-4.0, 0.7)), row((4.0, 0.9))]  # -4 fell to 0, which falls to 4
    assert exact_in_rounds(lambda: frees, 0.3).boxes[:, 0].tolist() == [4, -4]
    moves_up = [row((0.0, 0.9), (8.0, 0.8), (40.0, 0.7)), row((4.0, 0.95))]  # 0 and 8 were the two best, then fall
    assert exact_in_rounds(lambda: moves_up, 0.3, 2).boxes[:, 0].tolist() == [4, 40]


def test_rounds(monkeypatch):
    """One where twice the pool takes all candidates, or where its best ones give all that is wanted."""
    monkeypatch.setattr(streamed_nms, "_POOL", 1000)
    found = candidates(2001)
    for count, limit, is_one in ((2000, -1, True), (2001, -1, False), (2001, 5, True), (2001, 5000, False)):
        read = Reader(found[:count], 150)
        exact_in_rounds(read, 0.3, limit)
        assert (read.calls == 1) is is_one


def test_what_is_held_does_not_grow(monkeypatch):
    """Ten times the candidates: as many are joined at once, and a few rounds do."""
    monkeypatch.setattr(streamed_nms, "_POOL", 400)
    joined = []
    join = Found.join
    monkeypatch.setattr(Found, "join", lambda parts: joined.append(sum(map(len, parts))) or join(parts))
    for count in (2_000, 20_000):
        joined.clear()
        read = Reader(candidates(count, side=10), 100)
        kept = exact_in_rounds(read, 0.1)
        assert max(joined) <= 2 * 400 + 100 and len(kept) < 100 and read.calls <= 3


def test_boxes_that_do_not_overlap_themselves(monkeypatch):
    """All boxes at a threshold of 1, and one whose area is too small for a number: the rounds end, with the result."""
    monkeypatch.setattr(streamed_nms, "_POOL", 2)
    found = candidates(30)
    for limit in (-1, 5):
        assert_same(exact_in_rounds(Reader(found, 4), 1.0, limit), found.best(limit))
    speck = row((0.0, 0.9), (20.0, 0.8), (40.0, 0.7), (60.0, 0.6), (80.0, 0.5))
    speck.boxes[0] = torch.tensor([0, 0, 1e-30, 1e-30])
    assert_same(exact_in_rounds(Reader(speck, 1), 0.3), speck)


def test_no_candidate():
    nothing = candidates(5)[:0]
    for suppress in (exact_in_rounds, reference_in_chunks):
        assert_same(suppress(lambda: [nothing, nothing], 0.3), nothing)


@pytest.mark.parametrize("limit", [-1, 5])
@pytest.mark.parametrize("part", [7, 130, 5000])
@pytest.mark.parametrize("count", [99, 100, 101, 1730])
def test_reference_is_that_of_all_together(count, part, limit):
    found = candidates(count, decimals=2)
    expected = found[reference_nms(found.boxes, found.scores, 0.3, limit, 100)]
    read = Reader(found, part)
    assert_same(reference_in_chunks(read, 0.3, limit, 100), expected)
    assert read.calls == 1
