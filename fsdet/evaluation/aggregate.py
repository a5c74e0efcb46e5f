"""Statistics over the seeds of one protocol, and the official summary table.

The few-shot literature prints 1.96 * population standard deviation / sqrt(n) as a 95 % interval. With few seeds that is
too narrow; the honest width is Student's t with the sample standard deviation (1.58 times as wide at 5 seeds, 1.22 at
10). Both are computed and never share a name.

Source: TFA (Wang et al., ICML 2020) section 4.3 and its multi-seed tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from tabulate import tabulate


@dataclass(frozen=True)
class Summary:
    """One metric over n runs.

    Attributes:
        values: the runs' values.
        mean: their mean.
        sample_std: standard deviation with n - 1; nan for one run.
        population_std: with n, as the official tools print.
        student: half width of the 95 % Student t interval of the mean; nan for one run.
        legacy: 1.96 * population_std / sqrt(n), as the official tools print; 0 for one run.
        quartiles: 25 %, 50 % and 75 % points.
    """

    values: tuple[float, ...]
    mean: float
    sample_std: float
    population_std: float
    student: float
    legacy: float
    quartiles: tuple[float, float, float]


@dataclass(frozen=True)
class PairedDifference:
    """Difference between two methods on the same seeds.

    Attributes:
        seeds: compared (seed, repeat) pairs.
        values: first minus second of each pair.
        means: (first, second), over the pairs.
        mean: mean of first minus second.
        student: half width of the 95 % t interval of that mean; nan for one pair.
        t_test: p value of the paired t test; nan for one pair.
        wilcoxon: p value of Wilcoxon's signed-rank test; with fewer than 6 seeds it cannot fall below 0.05.
    """

    seeds: tuple[tuple[int, int], ...]
    values: tuple[float, ...]
    means: tuple[float, float]
    mean: float
    student: float
    t_test: float
    wilcoxon: float

    @property
    def higher(self) -> int:
        """Number of pairs in which the first is above the second."""
        return sum(value > 0 for value in self.values)


def summarize(values: Sequence[float]) -> Summary:
    """Mean, spread and both intervals of one metric over runs.

    Raises: ValueError without values.
    """
    if len(values) == 0:
        raise ValueError("summarize() needs at least one value")
    data = np.asarray(values, dtype=np.float64)
    count = len(data)
    population = float(data.std())
    sample = float(data.std(ddof=1)) if count > 1 else float("nan")
    return Summary(
        values=tuple(data.tolist()),
        mean=float(data.mean()),
        sample_std=sample,
        population_std=population,
        student=_student(sample, count),
        legacy=1.96 * population / count**0.5,
        quartiles=tuple(np.percentile(data, (25, 50, 75)).tolist()),
    )


def paired_difference(
    first: Mapping[tuple[int, int], float], second: Mapping[tuple[int, int], float]
) -> PairedDifference:
    """Compare two methods seed by seed, which removes the luck of the draw that both share.

    Args:
        first: (seed, repeat) -> value.
        second: the same pairs.
    Returns: of one pair only the difference is known; its interval and p values are nan (Wilcoxon's is 1).
    Raises: ValueError where the runs differ or there are none.
    """
    if set(first) != set(second):
        only = sorted(set(first) ^ set(second))
        raise ValueError(f"A paired comparison needs the same seeds on both sides; (seed, repeat) {only} stand alone")
    if not first:
        raise ValueError("A paired comparison needs at least one seed that both sides have")
    pairs = tuple(sorted(first))
    left = np.array([first[pair] for pair in pairs])
    right = np.array([second[pair] for pair in pairs])
    difference = left - right
    student, t_test = _paired_test(left, right)
    return PairedDifference(
        seeds=pairs,
        values=tuple(difference.tolist()),
        means=(float(left.mean()), float(right.mean())),
        mean=float(difference.mean()),
        student=student,
        t_test=t_test,
        wilcoxon=_wilcoxon(difference),
    )


def legacy_table(runs: Mapping[str, Sequence[float]], header: Sequence[str], shots: Sequence[int]) -> str:
    """The summary text of the official few-shot tools, character by character.

    Args:
        runs: run folder "{K}shot_..." -> values, one per header entry.
        header: metric names.
        shots: numbers of shots to list, in this order.
    Returns: one table per shot: runs in the order of their names, mean, and the legacy half width.
    Raises: ValueError where a shot has no run or a run another number of values.
    """
    text = []
    for shot in shots:
        names = sorted(name for name in runs if re.match(rf"{shot}shot(_|$)", name))
        if not names:
            raise ValueError(f'No run named "{shot}shot_..." among {sorted(runs)}')
        wrong = [name for name in names if len(runs[name]) != len(header)]
        if wrong:
            raise ValueError(f"Run {wrong[0]} has {len(runs[wrong[0]])} values for {len(header)} metrics")
        summaries = [summarize(column) for column in zip(*(runs[name] for name in names), strict=True)]
        rows = [[str(i), *runs[name]] for i, name in enumerate(names)]
        rows += [["μ", *(s.mean for s in summaries)], ["c", *(s.legacy for s in summaries)]]
        cells = [[row[0], *(f"{value:.2f}" for value in row[1:])] for row in rows]
        # The official tool reads the names from a log line and keeps the blank before the first.
        names_as_logged = ["", " " + header[0], *header[1:]]
        text.append(f"--> {shot}-shot\n{tabulate(cells, names_as_logged, 'pipe', disable_numparse=True)}\n\n")
    return "".join(text)


def _paired_test(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Half width of the interval of the mean difference, and p value of the t test."""
    difference = left - right
    if len(difference) < 2 or np.isnan(difference).any():
        return float("nan"), float("nan")
    if np.all(difference == difference[0]):  # no spread, and the test divides by it
        return 0.0, 1.0 if difference[0] == 0 else float("nan")
    return _student(float(difference.std(ddof=1)), len(difference)), float(stats.ttest_rel(left, right).pvalue)


def _wilcoxon(difference: np.ndarray) -> float:
    if np.isnan(difference).any():
        return float("nan")
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0


def _student(sample_std: float, count: int) -> float:
    if count < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, count - 1) * sample_std / count**0.5)
