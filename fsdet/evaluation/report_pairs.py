"""Paired comparisons of rows: two methods that were asked for, and the same runs with and without calibration.

Two rows are compared where nothing but the method (and the base model that its surgery made) or the calibration tells
their protocols apart, and then run by run: the same seed, trained on the same K-shot files. A result that does not
record its files is paired by its seed alone, and the table says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from .aggregate import paired_difference
from .report_labels import Labels
from .report_rows import Row, seed_words
from .report_section import Comparison, Table
from .report_tables import cell, metric_group, number, shot_name

Key = tuple[int, int]  # seed, repeat

SHOWN_PAIRS = 10  # longer lists of differences are left to the files
SHORT = 16  # characters that a label may have to head a column
NOTE = (
    "Differences are taken seed by seed, so that the luck of a draw, which both sides share, cancels. ± is half the "
    "95 % Student t interval of the mean difference. With fewer than 6 pairs Wilcoxon's p cannot fall below 0.05; no p "
    "is corrected for the number of comparisons."
)
FEW = (
    "Fewer than 3 pairs are no evidence: one difference has no interval, and that of two rests on a single degree of "
    "freedom."
)


def asked_comparisons(
    rows: Sequence[Row], naming: Labels, metrics: Sequence[str], pair: tuple[str, str]
) -> Iterator[Comparison]:
    """Compare two methods, or two rows by their labels (those may differ in calibration too).

    Args:
        rows: of the novel stage.
        naming: their labels.
        metrics: to compare on.
        pair: ids of two methods, or labels, as the tables show them or in full.
    Raises: ValueError where two runs of one seed were trained on other K shots; names the files.
    """
    methods = {row.protocol.method for row in rows}
    by_label = any(name not in methods for name in pair)
    free = {"method", "base_model", "calibration"} if by_label else {"method", "base_model"}

    def chosen(name: str) -> list[Row]:
        return [row for row in rows if name in (naming.accepted(row) if by_label else {row.protocol.method})]

    for first in chosen(pair[0]):
        for second in chosen(pair[1]):
            differing = _differing(first, second)
            if differing and differing <= free:
                if other := _other_samples(first, second):
                    left, right = next(iter(other.values()))
                    raise ValueError(
                        f"{left} and {right} have the same seed but other K-shot files, so that they are no pair; draw "
                        "the files once and run both methods on them"
                    )
                title = f"{naming.shown(first)} minus {naming.shown(second)}"
                yield from _compare(title, "", first, second, naming, metrics)


def calibration_comparisons(rows: Sequence[Row], naming: Labels, metrics: Sequence[str]) -> Iterator[Comparison]:
    """Compare every calibrated row with the plain row of the same runs, where it is there."""
    for first in rows:
        calibration = first.protocol.calibration
        title = f"Calibration ({naming.short(calibration)}): with minus without"
        for second in rows:
            if calibration and not second.protocol.calibration and _differing(first, second) == {"calibration"}:
                yield from _compare(title, naming.shown(second), first, second, naming, metrics)


def why_not(rows: Sequence[tuple[Collection[str], Row]], pair: tuple[str, str]) -> str:
    """Why nothing can be compared between two names; `rows` come with the labels that name them."""
    known = sorted({row.protocol.method for _, row in rows})
    found = [[row for labels, row in rows if name in labels or name == row.protocol.method] for name in pair]
    if pair[0] == pair[1]:
        return "they are one name"
    if all(found):
        apart = [_differing(left, right) - {"method", "base_model"} for left in found[0] for right in found[1]]
        fields = sorted(min(apart, key=len))
        return f"their rows differ in {', '.join(fields)}" if fields else "they have no seed in common"
    return f"the results have the methods {known}"


def telling(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """One group of comparisons without the metrics in which all pairs of runs are equal."""
    unequal = {item.metric for item in comparisons if any(value != 0 for value in item.difference.values)}
    return [item for item in comparisons if item.metric in unequal]


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One group of comparisons with intervals, p values and the difference of every pair; of equal ones only a note."""
    items = any(item.item for item in comparisons)
    lines = []
    for item in telling(comparisons):
        d = item.difference
        shown = [f"{value:+.2f}" for value in d.values[:SHOWN_PAIRS]]
        lines.append(
            (
                *((item.item,) if items else ()),
                shot_name(item.shot),
                item.metric,
                *(number(value) for value in d.means),
                cell(d.mean, d.student, sign="+"),
                str(len(d.seeds)),
                f"{d.higher} of {len(d.seeds)}",
                _p_value(d.t_test),
                _p_value(d.wilcoxon if len(d.seeds) > 1 else math.nan),
                " ".join(shown) + (" …" if len(d.values) > SHOWN_PAIRS else ""),
            )
        )
    sides = (comparisons[0].first, comparisons[0].second)
    names = ("with", "without") if items else sides if max(map(len, sides)) <= SHORT else ("first", "second")
    header = ("shots", "metric", *names, "difference", "pairs", "higher", "p (t test)", "p (Wilcoxon)", "each pair")
    alone = list(dict.fromkeys(text for item in comparisons for text in item.alone))
    notes = [*_equal(comparisons), NOTE, *_unverified(comparisons)]
    if any(len(item.difference.seeds) < 3 for item in comparisons):
        notes.append(FEW)
    if alone:
        notes.append(f"Left out, without a partner: {'; '.join(alone)}.")
    title = f"{comparisons[0].title}, paired by seed"
    return Table(title, (*(("method",) if items else ()), *header), tuple(lines), " ".join(notes))


def _equal(comparisons: Sequence[Comparison]) -> Iterator[str]:
    shown = {item.metric for item in telling(comparisons)}
    groups: dict[str, list[str]] = {}
    for metric in dict.fromkeys(item.metric for item in comparisons if item.metric not in shown):
        groups.setdefault(metric_group(metric), []).append(metric)
    yield from (f"{group} ({', '.join(metrics)}): equal in every run." for group, metrics in groups.items())


def _unverified(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """How many pairs of runs, which all metrics share, may have other K-shot files."""
    pairs = {(c.item, c.first, c.second, c.shot): (c.unverified, len(c.difference.seeds)) for c in comparisons}
    unknown, total = (sum(numbers) for numbers in zip(*pairs.values(), strict=True))
    if unknown:
        yield (
            f"Not verified: in {unknown} of {total} pairs a result does not record its K-shot files, so that the two "
            "runs are paired by their seed alone."
        )


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else number(value, 3)


def _compare(
    title: str, item: str, left: Row, right: Row, naming: Labels, metrics: Sequence[str]
) -> Iterator[Comparison]:
    other, digests = _other_samples(left, right), _digests(left, right)
    shared = sorted((set(left.keys) & set(right.keys)) - set(other))
    alone = [
        f"{naming.shown(row)}, {row.protocol.shot}-shot, seed {seed_words(missing)}"
        for row, partner in ((left, right), (right, left))
        if (missing := [key for key in row.keys if key not in partner.keys])
    ]
    if other:
        alone.append(f"{item or title}, {left.protocol.shot}-shot, seed {seed_words(other)} (other K-shot files)")
    for metric in metrics:
        if shared and metric in left.metrics and metric in right.metrics:
            ours, theirs = left.values(metric), right.values(metric)
            difference = paired_difference({key: ours[key] for key in shared}, {key: theirs[key] for key in shared})
            yield Comparison(
                title=title,
                item=item,
                shot=left.protocol.shot,
                first=naming.full(left),
                second=naming.full(right),
                metric=metric,
                difference=difference,
                alone=tuple(alone),
                unverified=sum(not all(digests[key]) for key in shared),
            )


def _differing(left: Row, right: Row) -> set[str]:
    """Protocol fields in which two rows differ."""
    return {name for (name, a), (_, b) in zip(left.protocol.group(), right.protocol.group(), strict=True) if a != b}


def _other_samples(left: Row, right: Row) -> dict[Key, tuple[Path, Path]]:
    """(seed, repeat) -> files of the two runs, where they are known to be trained on other K-shot files."""
    ours, theirs = _files(left), _files(right)
    return {
        key: (ours[key], theirs[key])
        for key, digests in _digests(left, right).items()
        if all(digests) and digests[0] != digests[1]
    }


def _files(row: Row) -> dict[Key, Path]:
    return {key: path for key, (path, _) in zip(row.keys, row.runs, strict=True)}


def _digests(left: Row, right: Row) -> dict[Key, tuple[str | None, str | None]]:
    """(seed, repeat) -> digests of the K-shot files of the two runs; None where a result does not record them."""
    ours, theirs = (
        {key: run.protocol.samples_digest for key, (_, run) in zip(row.keys, row.runs, strict=True)}
        for row in (left, right)
    )
    return {key: (ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys())}
