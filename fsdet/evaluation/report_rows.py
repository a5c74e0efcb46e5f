"""Runs grouped by protocol, the rows of a report, and the checks that keep a row honest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .aggregate import Summary, summarize
from .result import Protocol, RunResult, read_result

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Row:
    """Runs of one protocol; only seed, repeat and K-shot files differ.

    Attributes:
        protocol: of the first run.
        runs: (file, result), by seed and repeat.
        missing: (seed, repeat) that the report was told to do without.
    """

    protocol: Protocol
    runs: tuple[tuple[Path, RunResult], ...]
    missing: tuple[tuple[int, int], ...] = ()

    @property
    def keys(self) -> tuple[tuple[int, int], ...]:
        """(seed, repeat) of the runs."""
        return tuple((run.protocol.seed, run.protocol.repeat) for _, run in self.runs)

    @property
    def name(self) -> str:
        """Method and shots, for messages."""
        return f"{self.protocol.method}, {self.protocol.shot}-shot"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that every run has."""
        first, *others = [run.metrics for _, run in self.runs]
        return tuple(key for key in first if all(key in other for other in others))

    def values(self, metric: str) -> dict[tuple[int, int], float]:
        """(seed, repeat) -> value in percent."""
        return {key: run.metrics[metric] for key, (_, run) in zip(self.keys, self.runs, strict=True)}

    def summary(self, metric: str) -> Summary:
        """Statistics of a metric over the runs."""
        return summarize(list(self.values(metric).values()))

    def class_summary(self, name: str, metric: str) -> Summary:
        """Statistics of one class's metric over the runs."""
        return summarize([run.per_class[name][metric] for _, run in self.runs])


def load_results(paths: Iterable[str | Path]) -> list[tuple[Path, RunResult]]:
    """Read result files; folders are searched, each file is read once.

    Raises: FileNotFoundError for a path that does not exist or a folder without results; ValueError for a bad file.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, paths):
        found = sorted(path.rglob(RESULT_FILE)) if path.is_dir() else [path]
        if not found:
            raise FileNotFoundError(f"{path}: no {RESULT_FILE} in this folder or below")
        files.update({file.resolve(): file for file in found})
    return [(file, read_result(file)) for file in files.values()]


def group_runs(results: Sequence[tuple[Path, RunResult]]) -> list[Row]:
    """Rows of runs that share their protocol, in reading order.

    Raises: ValueError on a run given twice and on runs of one protocol with different configs; names the files.
    """
    groups: dict[tuple, dict[tuple[int, int], tuple[Path, RunResult]]] = {}
    for path, run in results:
        members = groups.setdefault(run.protocol.group(), {})
        key = (run.protocol.seed, run.protocol.repeat)
        if key in members:
            other, twin = members[key]
            same = twin.config_digest == run.config_digest
            why = "are the same run twice" if same else "have the same protocol and seed but different configs"
            raise ValueError(f"{other} and {path} {why}; keep one, or give repetitions their own `repeat` number")
        members[key] = (path, run)
    rows = [Row(*_one_recipe([members[key] for key in sorted(members)])) for members in groups.values()]
    return sorted(rows, key=lambda row: _order(row.protocol))


def _one_recipe(runs: list[tuple[Path, RunResult]]) -> tuple[Protocol, tuple[tuple[Path, RunResult], ...]]:
    (first_path, first), *others = runs
    for path, run in others:
        if run.config_digest != first.config_digest:
            raise ValueError(
                f"{first_path} and {path} have the same protocol but different configs (digests "
                f"{first.config_digest[:8]}, {run.config_digest[:8]}); average only runs of one recipe"
            )
    return first.protocol, tuple(runs)


def _order(protocol: Protocol) -> tuple:
    p = protocol
    return (p.benchmark, p.test_set, p.setting, p.split, p.stage != "base", p.method, p.shot, str(p.group()))


def check_seeds(
    rows: Sequence[Row],
    seeds: Sequence[int] | None,
    allow_missing: bool,
    *,
    repeats: int | None = None,
    together: Callable[[Row], Hashable] = lambda row: None,
) -> list[Row]:
    """Bring all rows that are shown together to the same seeds.

    Base-stage rows draw no K-shot lists, so they stay as they are. A seed that is there several times (`repeat`) must
    be there as often in the whole row.

    Args:
        rows: from `group_runs`.
        seeds: seeds to use; None for 0 ... the largest seed found.
        allow_missing: note missing runs in the rows instead of raising.
        repeats: repetitions of each seed to use; None for as many as a row has of any seed.
        together: rows are shown together where it gives the same.
    Returns: the rows; one of which nothing is left is told in the log.
    Raises: ValueError listing what is missing, or where no runs are asked for or left.
    """
    if (seeds is not None and not seeds) or (repeats is not None and repeats < 1):
        raise ValueError(f"No runs are asked for: seeds {seeds}, repetitions {repeats}; name at least one of each")
    largest: dict[Hashable, int] = {}
    for row in (row for row in rows if row.protocol.stage != "base"):
        largest[together(row)] = max(largest.get(together(row), 0), *(seed for seed, _ in row.keys))
    problems, checked = [], []
    for row in rows:
        if row.protocol.stage == "base":
            checked.append(row)
            continue
        expected = range(largest[together(row)] + 1) if seeds is None else seeds
        numbers = range(max(repeat for _, repeat in row.keys) + 1 if repeats is None else repeats)
        wanted = tuple((seed, repeat) for seed in dict.fromkeys(expected) for repeat in numbers)
        runs = tuple(pair for pair, key in zip(row.runs, row.keys, strict=True) if key in wanted)
        missing = tuple(key for key in wanted if key not in row.keys)
        if missing:
            problems.append(f"{row.name}: no run of seed {seed_words(missing)} (found {seed_words(row.keys)})")
        if runs:
            checked.append(Row(row.protocol, runs, missing))
        elif allow_missing:
            logger.warning("Not in the report: %s", problems[-1])
    if problems and not (allow_missing and any(row.protocol.stage != "base" for row in checked)):
        raise ValueError(
            "Rows over different seeds cannot be compared:\n  "
            + "\n  ".join(problems)
            + "\nRun what is missing, choose the runs (--seeds, --repeats), or pass --allow-missing to average what is "
            "there."
        )
    return checked


def seed_list(keys: Iterable[tuple[int, int]]) -> str:
    """(seed, repeat) pairs one by one, for a column of a file."""
    return " ".join(str(seed) if repeat == 0 else f"{seed} (repeat {repeat})" for seed, repeat in keys)


def seed_words(keys: Iterable[tuple[int, int]]) -> str:
    """(seed, repeat) pairs in few words: "0, 1, 7-11", "0 (repeats 0-9)"."""
    repeats: dict[int, list[int]] = {}
    for seed, repeat in keys:
        repeats.setdefault(seed, []).append(repeat)
    alike: dict[tuple[int, ...], list[int]] = {}
    for seed, numbers in repeats.items():
        alike.setdefault(tuple(numbers), []).append(seed)
    return ", ".join(
        _ranges(seeds) + ("" if numbers == (0,) else f" (repeat{'s' if len(numbers) > 1 else ''} {_ranges(numbers)})")
        for numbers, seeds in alike.items()
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as text; four or more in a row as a range."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 3 else ", ".join(map(str, run)) for run in runs)
