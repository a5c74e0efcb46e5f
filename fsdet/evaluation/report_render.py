"""A report as text, Markdown, CSV or JSON; `report_html` draws the fifth format."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from .aggregate import Summary
from .report_rows import Row, seed_list

if TYPE_CHECKING:
    from .report import Section


def render_text(sections: Sequence[Section]) -> str:
    """Plain text for a terminal."""
    return "\n".join(_section_lines(section, "simple", "{}\n" + "=" * 100, "{}\n" + "-" * 100) for section in sections)


def render_brief(sections: Sequence[Section], table_format: str = "simple") -> str:
    """The headline tables alone, for the end of a run; "pipe" makes Markdown of them."""
    parts = []
    for section in sections:
        for table in section.tables[: section.headlines]:
            title = f"{table.title}:\n\n" if table_format == "pipe" else f"{table.title}\n"
            parts.append(title + tabulate(table.rows, table.header, table_format, disable_numparse=True))
    return "\n\n".join(parts) + "\n"


def render_markdown(sections: Sequence[Section]) -> str:
    """Markdown for docs."""
    return "\n".join(_section_lines(section, "pipe", "## {}\n", "### {}\n") for section in sections)


def render_csv(sections: Sequence[Section]) -> str:
    """One line per protocol and metric, for all metrics."""
    buffer = io.StringIO()
    rows = [row for section in sections for row in section.rows]
    names = [name for name, _ in rows[0].protocol.group()]
    statistics = ("metric", "mean", "student", "legacy", "sample_std", "population_std", "q25", "q50", "q75")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, *statistics, "runs", "seeds"])
    for row in rows:
        protocol = dict(row.protocol.group())
        for metric in row.metrics:
            s = row.summary(metric)
            numbers = (s.mean, s.student, s.legacy, s.sample_std, s.population_std, *s.quartiles)
            cells = ["" if math.isnan(value) else f"{value:.4f}" for value in numbers]
            labels = (protocol[name] for name in names)
            writer.writerow([*labels, metric, *cells, len(s.values), seed_list(row.keys, " ")])
    return buffer.getvalue()


def render_json(sections: Sequence[Section]) -> str:
    """Everything, for other programs: protocols, seeds, files, all metrics and classes with their values."""
    data = [
        {
            "title": section.title,
            "notes": section.notes,
            "rows": [_row(row) for row in section.rows],
            "comparisons": [asdict(item) for item in section.comparisons],
        }
        for section in sections
    ]
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, Any]:
    return {
        "protocol": dict(row.protocol.group()),
        "runs": [
            {"seed": seed, "repeat": repeat, "file": file.as_posix()}
            for (seed, repeat), (file, _) in zip(row.keys, row.runs, strict=True)
        ],
        "missing": [list(key) for key in row.missing],
        "metrics": {metric: _plain(row.summary(metric)) for metric in row.metrics},
        "per_class": {
            name: {metric: _plain(row.class_summary(name, metric)) for metric in values}
            for name, values in row.runs[0][1].per_class.items()
        },
    }


def _plain(summary: Summary) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        key: [finite(item) for item in value] if isinstance(value, tuple) else finite(value)
        for key, value in asdict(summary).items()
    }


def _section_lines(section: Section, table_format: str, title: str, heading: str) -> str:
    parts = [title.format(section.title) + "\n" + "\n".join(f"- {note}" for note in section.notes)]
    for table in section.tables:
        body = tabulate(table.rows, table.header, table_format, disable_numparse=True)
        parts.append(heading.format(table.title) + "\n" + body)
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts) + "\n"
