"""Run folders without a result: what failed, stopped or still runs. A report lists them and averages none of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .report_labels import method_name
from .report_rows import RESULT_FILE
from .report_section import Section, Table
from .run_log import ERROR_LINE, last_lines

# What tells a run folder from others: the config of a run, or the log of a worker process that may have died before.
_CONFIG, _LOGS = "config.yaml", ("log.txt", "worker.log")
_LONGEST = 160  # characters of an error message in a table


@dataclass(frozen=True)
class Unfinished:
    """A run folder without result.json.

    Attributes:
        folder: as it was found.
        keys: the FEWSHOT node of its config.yaml; empty where it failed before it wrote one.
        state: what its log and checkpoints say.
    """

    folder: Path
    keys: dict[str, Any]
    state: str


def find_unfinished(paths: Iterable[str | Path]) -> list[Unfinished]:
    """Search folders for run folders that lack a result; files are passed over."""
    found: dict[Path, Unfinished] = {}
    for path in map(Path, paths):
        marks = [mark for name in (_CONFIG, _LOGS[1]) for mark in path.rglob(name)] if path.is_dir() else []
        for folder in sorted({mark.parent for mark in marks}):
            keys = _fewshot_keys(folder / _CONFIG)
            if (keys or (folder / _LOGS[1]).is_file()) and not (folder / RESULT_FILE).exists():
                found.setdefault(folder.resolve(), Unfinished(folder, keys, _state(folder)))
    return list(found.values())


def unfinished_section(runs: Sequence[Unfinished]) -> Section:
    """A section that lists runs without a result."""
    rows = tuple(
        (
            method_name(str(run.keys.get("METHOD", ""))),
            str(run.keys.get("DATASET", "")),
            str(run.keys.get("SETTING", "")) if run.keys.get("STAGE", "novel") == "novel" else "base stage",
            str(run.keys.get("SHOT", "")),
            str(run.keys.get("SEED", "")),
            str(run.keys.get("REPEAT", "")),
            run.folder.as_posix(),
            run.state,
        )
        for run in runs
    )
    header = ("method", "data", "setting", "shots", "seed", "repeat", "folder", "state")
    note = "These runs are part of no mean, interval or comparison."
    return Section(
        title="Runs without a result",
        rows=(),
        metrics=(),
        tables=(Table("Failed, stopped or still running", header, rows, note),),
    )


def _fewshot_keys(config: Path) -> dict[str, Any]:
    """The FEWSHOT node of a config that a run has written; empty for any other YAML file, and for a missing one."""
    if not config.is_file():
        return {}
    try:
        data = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    keys = data.get("FEWSHOT") if isinstance(data, dict) else None
    return keys if isinstance(keys, dict) and keys.get("RESOLVED") else {}


def _state(folder: Path) -> str:
    logs = [folder / name for name in _LOGS if (folder / name).is_file()]
    error = _last_error(max(logs, key=lambda log: log.stat().st_mtime)) if logs else ""
    if error:
        return f"failed: {error}"
    newest = folder / "last_checkpoint"
    return f"no result; newest checkpoint {newest.read_text().strip()}" if newest.is_file() else "no result"


def _last_error(log: Path) -> str:
    """The error that a log ends with; "" where the log goes on after it (the run was resumed) or has none."""
    for line in reversed(last_lines(log)):
        if line.startswith("["):  # a new log record
            return ""
        if ERROR_LINE.match(line):
            return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    return ""
