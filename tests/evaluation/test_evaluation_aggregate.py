"""Statistics worked out by hand, and the official summary table."""

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from fsdet.evaluation.aggregate import legacy_table, paired_difference, summarize

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "defrcn" / "g_aggregate.json").read_text())


def test_known_vector():
    """1, 2, 3, 4: sample variance 5/3, population variance 5/4, t(0.975, 3) = 3.182446."""
    s = summarize([1.0, 2.0, 3.0, 4.0])
    assert s.mean == 2.5
    assert s.sample_std == pytest.approx(math.sqrt(5 / 3))
    assert s.population_std == pytest.approx(math.sqrt(5 / 4))
    assert s.student == pytest.approx(3.182446305284263 * math.sqrt(5 / 3) / 2)
    assert s.legacy == pytest.approx(1.96 * math.sqrt(5 / 4) / 2)
    assert s.quartiles == (1.75, 2.5, 3.25)


@pytest.mark.parametrize(("count", "ratio"), [(5, 1.58), (10, 1.22), (30, 1.06)])
def test_honest_interval_is_wider_by_the_published_factor(count, ratio):
    s = summarize([float(i % 7) for i in range(count)])
    assert s.student / s.legacy == pytest.approx(ratio, abs=0.01)


def test_one_value_has_no_interval():
    s = summarize([5.0])
    assert (s.mean, s.legacy) == (5.0, 0.0)
    assert math.isnan(s.student)
    with pytest.raises(ValueError, match="at least one value"):
        summarize([])


def test_official_table_character_by_character():
    assert legacy_table(GOLDEN["runs"], GOLDEN["header"], (1, 2, 10)) == GOLDEN["summary_text"]


def test_official_mean_and_interval_to_two_decimals():
    lines = GOLDEN["summary_text"].split("--> 10-shot")[1].splitlines()
    rows = [values for name, values in GOLDEN["runs"].items() if name.startswith("10shot_")]
    for symbol, key in (("μ", "mean"), ("c", "legacy")):
        printed = next(line for line in lines if line.startswith(f"| {symbol}")).split("|")[2:-1]
        ours = [f"{getattr(summarize(column), key):.2f}" for column in zip(*rows, strict=True)]
        assert ours == [text.strip() for text in printed]


def test_official_table_faults():
    with pytest.raises(ValueError, match='No run named "3shot_'):
        legacy_table(GOLDEN["runs"], GOLDEN["header"], (3,))
    with pytest.raises(ValueError, match="1shot_seed0 has 6 values for 2 metrics"):
        legacy_table(GOLDEN["runs"], ["AP", "AP50"], (1,))


def test_paired_difference_removes_the_shared_luck():
    luck = [0.0, 8.0, -5.0, 3.0, 11.0, -9.0]
    first = {(i, 0): 30 + x + [0.5, -0.5][i % 2] for i, x in enumerate(luck)}
    second = {(i, 0): 28 + x for i, x in enumerate(luck)}
    d = paired_difference(first, second)
    assert d.mean == pytest.approx(2.0)
    assert d.student == pytest.approx(stats.t.ppf(0.975, 5) * math.sqrt(0.3) / math.sqrt(6))
    assert d.t_test < 0.001
    assert d.wilcoxon == pytest.approx(2 / 2**6)
    assert d.student < summarize(list(first.values())).student / 5
    same = paired_difference(first, first)
    assert (same.mean, same.student, same.t_test, same.wilcoxon) == (0.0, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="same seeds"):
        paired_difference(first, {(0, 0): 1.0})
    with pytest.raises(ValueError, match="at least one seed"):
        paired_difference({}, {})


def test_every_pair_is_kept():
    d = paired_difference({(0, 0): 3.0, (1, 0): 2.0, (2, 0): 5.0}, {(2, 0): 4.0, (1, 0): 2.5, (0, 0): 1.0})
    assert (d.values, d.means, d.higher) == ((2.0, -0.5, 1.0), (10 / 3, 2.5), 2)
    assert d.mean == pytest.approx(2.5 / 3)


def test_one_pair_is_a_difference_without_interval():
    d = paired_difference({(0, 0): 3.0}, {(0, 0): 1.0})
    assert (d.mean, d.values, d.wilcoxon) == (2.0, (2.0,), 1.0)
    assert math.isnan(d.student) and math.isnan(d.t_test)


def test_a_pair_without_value_leaves_none():
    d = paired_difference({(0, 0): math.nan, (1, 0): 1.0}, {(0, 0): 1.0, (1, 0): 1.0})
    assert all(map(math.isnan, (d.mean, d.student, d.t_test, d.wilcoxon)))
