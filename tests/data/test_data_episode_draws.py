"""How supports are drawn: golden draws of the release, fresh draws where images are many, few, one or none."""

import zlib
from collections import Counter

import golden_fewx
import numpy as np
import pytest

from fsdet.data.episode_draws import FreshEpisodes, LegacyEpisodes
from fsdet.data.queries import QUERY, Query
from fsdet.data.support import Support, SupportSet

# The release's rules

SHOTS = golden_fewx.RULES["sampling_shots_per_way"]


@pytest.fixture(scope="module")
def golden_queries():
    return golden_fewx.queries()


@pytest.fixture(scope="module")
def golden_pool():
    return golden_fewx.support_pool()


def test_golden_legacy_draws(golden_queries, golden_pool):
    episodes = LegacyEpisodes(golden_pool, n_shot=SHOTS)
    assert len(golden_queries) == len(golden_fewx.RULES["sampled_supports"])
    failed = 0
    for record, expected in zip(golden_queries, golden_fewx.RULES["sampled_supports"], strict=True):
        assert record[QUERY].annotation_id == expected["first_ann_id"]
        if "error" in expected:
            failed += 1
            with pytest.raises(
                ValueError, match=r"4 supports from different images needed .*INPUT.FS.SAMPLING fresh or a"
            ):
                episodes.draw(record[QUERY])
            continue
        episode = episodes.draw(record[QUERY])
        assert [support.annotation_id for support in episode.supports] == expected["support_ann_ids"]
        own = [support.class_id == record[QUERY].class_id for support in episode.supports]
        assert own == [flag == 0 for flag in expected["flags"]]
        assert not any(episode.flips) and episode == episodes.draw(record[QUERY], epoch=7)
    assert failed == 32


def test_legacy_faults_are_found_before_training(golden_queries, golden_pool):
    with pytest.raises(ValueError, match=r"32 of 171 queries cannot be drawn: .*; and 29 more"):
        LegacyEpisodes(golden_pool, n_shot=SHOTS).check(golden_queries)
    fine = [r for r, e in zip(golden_queries, golden_fewx.RULES["sampled_supports"], strict=True) if "error" not in e]
    assert LegacyEpisodes(golden_pool, n_shot=SHOTS).check(fine) == fine
    episodes = LegacyEpisodes(golden_pool, n_shot=1)
    for number in (None, True, -1, 2**32):
        record = {**fine[0], QUERY: Query(4, fine[0][QUERY].class_id, (), number)}
        with pytest.raises(ValueError, match=r"000000000004\.jpg: annotation id .* Use INPUT.FS.SAMPLING fresh"):
            episodes.check([record])
    record = {**fine[0], QUERY: Query(9999, fine[0][QUERY].class_id, (), 5)}
    with pytest.raises(ValueError, match=r'no "carrot" of image 9999 .*TABLE and the training annotations must be'):
        episodes.check([record])
    everywhere = SupportSet("ab", [Support("1", 1, 1, 0, (0, 0, 1, 1)), Support("1", 1, 2, 1, (0, 0, 1, 1))])
    with pytest.raises(ValueError, match="Image 1 shows every class"):
        LegacyEpisodes(everywhere, n_shot=1).check([{"file_name": "1", QUERY: Query(1, 0, (0, 1), 1)}])


def test_legacy_draws_of_ids_that_are_texts(golden_pool):
    """VOC's ids name a picture and an object; their CRC-32 is the seed, so the draws differ and are repeatable."""
    episodes = LegacyEpisodes(golden_pool, n_shot=1)
    name = golden_pool.appearance[0]
    shots, class_id = golden_pool.shots(name), golden_pool.classes.index(name)

    def draw(annotation_id):
        return episodes.draw(Query(shots[0].image_id, class_id, (class_id,), annotation_id)).supports

    texts = [draw(f"2007_000032/{number}") for number in range(6)]
    assert len(set(texts)) > 1 and texts == [draw(f"2007_000032/{number}") for number in range(6)]
    assert draw("2007_000032/0") == draw(zlib.crc32(b"2007_000032/0"))
    query = Query(shots[0].image_id, class_id, (class_id,), "2007_000032/0")
    records = [{"file_name": "2007_000032.jpg", QUERY: query}]
    assert episodes.check(records) == records


def test_legacy_draws_against_the_plain_rule(golden_queries, golden_pool):
    """Stepping over the gaps gives what building each list of candidates gives, with many supports in an image."""
    shots = [
        Support("", image, 20 * c + n, c, (0, 0, 1, 1)) for c in range(3) for n, image in enumerate("aabcbadeca" * 2)
    ]
    episodes = LegacyEpisodes(SupportSet("xyz", shots), n_shot=4)
    for number in range(40):
        used, expected = {"e"}, []
        for _ in range(4):
            left = [s for s in shots if s.class_id == 1 and s.image_id not in used]
            drawn = left[np.random.RandomState(number).permutation(len(left))[0]]
            expected.append(drawn)
            used.add(drawn.image_id)
        assert episodes._draw("y", ["e"], Query("e", 1, (1,), number)) == expected


# Fresh draws


def pool_of(*images_of_classes):
    """A pool with a support of class c on each of the images given for it."""
    shots = [(c, i) for c, images in enumerate(images_of_classes) for i in images]
    supports = [Support(f"{i}.jpg", i, number, c, (0, 0, 5, 5)) for number, (c, i) in enumerate(shots)]
    return SupportSet([f"class{c}" for c in range(len(images_of_classes))], supports)


def fresh(pool, n_shot, n_way=2, seed=3):
    return FreshEpisodes(pool, n_way=n_way, n_shot=n_shot, seed=seed)


def query_of(image, class_id, *shown):
    return {"file_name": f"{image}.jpg", QUERY: Query(image, class_id, shown or (class_id,), None)}


def test_positives_then_negatives_from_other_images():
    """Class 1 and 3 are on the query image, by its labels and by the pool; class 4 has no support."""
    episodes = fresh(pool_of(range(10), range(5, 15), range(20), [*range(30), 2], [], range(8, 28)), 4)
    others = set()
    for epoch in range(60):
        episode = episodes.draw(Query(2, 0, (0, 1), None), epoch)
        images = [support.image_id for support in episode.supports]
        assert len(images) == 8 and len(set(images)) == 8 and 2 not in images
        assert [support.class_id for support in episode.supports[:4]] == [0] * 4
        (other,) = {support.class_id for support in episode.supports[4:]}
        assert episode.classes == ("class0", f"class{other}") and not any(episode.flips)
        others.add(other)
    assert others == {5}  # 2 and 3 have supports on the query image
    ways = fresh(pool_of(range(9), range(20, 29), range(40, 49)), 2, n_way=3).draw(Query(2, 0, (0,), None), 0)
    assert (
        ways.classes[0] == "class0" and set(ways.classes) == {"class0", "class1", "class2"} and len(ways.supports) == 6
    )


def test_draws_depend_on_seed_epoch_and_query_alone():
    pool = pool_of(range(50), range(50, 100), range(100, 150))
    episodes = fresh(pool, 3)
    one = episodes.draw(Query(7, 0, (0, 1), None), 4)
    episodes.draw(Query(8, 0, (0,), None), 9)
    assert episodes.draw(Query(7, 0, (0, 1), 5), 4) == one
    assert fresh(pool, 3).draw(Query(7, 0, (0, 1), None), 4) == one
    assert fresh(pool, 3, seed=4).draw(Query(7, 0, (0, 1), None), 4).supports != one.supports
    assert len({episodes.draw(Query(7, 0, (0, 1), None), epoch).supports for epoch in range(9)}) == 9
    # Two queries on one image do not meet the same places of their classes.
    places = [
        [[pool.shots(s_class).index(s) for s in episode.supports[:3]] for s_class in episode.classes[:1]]
        for episode in (episodes.draw(Query(7, c, (c,), None), 0) for c in (0, 1))
    ]
    assert places[0] != places[1]


def test_every_support_is_drawn_equally_often():
    """9 other images, 3 a draw, 600 draws: 200 each, within five standard deviations (11.5)."""
    episodes = fresh(pool_of(range(10), [20]), 3)
    counts = Counter(s.image_id for e in range(600) for s in episodes.draw(Query(0, 0, (0,), None), e).supports[:3])
    assert set(counts) == set(range(1, 10)) and all(abs(count - 200) < 58 for count in counts.values())


def test_too_few_images_repeat_supports_with_one_warning(caplog):
    """Class 0 has two other images, one of them with two supports: these three, then again from the first on."""
    episodes = fresh(pool_of([0, 1, 2, 2], range(10, 20), [30]), 5)
    queries = [query_of(image, 0) for image in (0, 1, 2)] + [query_of(image, 1) for image in (10, 11)]
    assert episodes.check(queries) == queries
    assert [record.getMessage() for record in caplog.records] == [
        "3 of 5 queries have fewer than 5 other images with their class, so that supports repeat; 0 of them have none "
        "and are their own support. Classes: class0 (3 queries)"
    ]
    for epoch in range(20):
        shots = episodes.draw(queries[0][QUERY], epoch).supports
        counts = Counter(support.annotation_id for support in shots[:5])
        assert sorted(counts.values()) == [1, 2, 2] and set(counts) == {1, 2, 3}
        assert shots[0].image_id != shots[1].image_id  # other images come first
    negatives = [episodes.draw(queries[3][QUERY], epoch) for epoch in range(20)]
    assert {len(set(e.supports[5:])) for e in negatives} == {1, 4}  # class 2 has one support, class 0 four


def test_a_lone_shot_is_its_own_support_and_mirrored_at_random(caplog):
    episodes = fresh(pool_of([0], [1], [2]), 4)
    queries = [query_of(image, image) for image in range(3)]
    assert episodes.check(queries) == queries
    assert "3 of 3 queries" in caplog.text and "3 of them have none and are their own" in caplog.text
    drawn = [episodes.draw(queries[1][QUERY], epoch) for epoch in range(40)]
    assert {support.image_id for e in drawn for support in e.supports[:4]} == {1}
    assert {support.image_id for e in drawn for support in e.supports[4:]} == {0, 2}
    assert all(e.classes[0] == "class1" and len(e.supports) == len(e.flips) == 8 for e in drawn)
    assert not any(flip for e in drawn for flip in e.flips[4:])  # others are not the query's pixels
    mirrored = sum(flip for e in drawn for flip in e.flips[:4])
    assert 55 < mirrored < 105  # 160 fair coins: 80, within four standard deviations
    assert episodes.draw(queries[1][QUERY], 5) == drawn[5]


def test_images_that_show_every_class(caplog):
    episodes = fresh(pool_of(range(5), range(5, 9), []), 1)
    queries = [query_of(0, 0, 0, 1), query_of(1, 0)]
    assert episodes.check(queries) == queries[1:]
    assert "1 of 2 queries left out: their images show every class" in caplog.text
    with pytest.raises(
        ValueError, match=r"No query is left: an episode needs 1 class.*there are 2 classes with supports"
    ):
        episodes.check(queries[:1])
    with pytest.raises(ValueError, match=r"No support for the classes \['class2'\]"):
        episodes.check([query_of(1, 2)])
