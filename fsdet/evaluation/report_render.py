"""A report as text, Markdown, CSV or JSON; `report_html` makes the page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from .report_protocol import section_id
from .report_rows import Row, seed_list
from .report_section import Comparison, Fact, Section


def render_text(sections: Sequence[Section]) -> str:
    """Plain text for a terminal."""
    return "\n".join(_section_lines(section, "simple", "{}\n" + "=" * 100, "{}\n" + "-" * 100) for section in sections)


def render_brief(sections: Sequence[Section], table_format: str = "simple") -> str:
    """The headline tables alone, for the end of a run; "pipe" makes Markdown of them.

    Titles of sections are left out where only one has novel-stage rows.
    """
    parts = []
    several = sum(bool(section.novel) for section in sections) > 1
    for section in sections:
        if several and section.rows:
            parts.append(f"**{section.title}**" if table_format == "pipe" else section.title)
        for table in section.tables[: section.headlines]:
            title = f"{table.title}:\n\n" if table_format == "pipe" else f"{table.title}\n"
            parts.append(title + tabulate(table.rows, table.header, table_format, disable_numparse=True))
        parts += section.naming.key()
    return "\n\n".join(parts) + "\n"


def render_markdown(sections: Sequence[Section]) -> str:
    """Markdown for docs."""
    return "\n".join(_section_lines(section, "pipe", "## {}\n", "### {}\n") for section in sections)


def render_csv(sections: Sequence[Section]) -> str:
    """One line per protocol and metric, for all metrics; missing runs stand in a column of their own."""
    buffer = io.StringIO()
    rows = [row for section in sections for row in section.rows]
    names = [name for name, _ in rows[0].protocol.group()]
    statistics = ("metric", "mean", "student", "legacy", "sample_std", "population_std", "q25", "q50", "q75")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, *statistics, "runs", "seeds", "missing_seeds"])
    for row in rows:
        protocol = dict(row.protocol.group())
        for metric in row.metrics:
            s = row.summary(metric)
            numbers = (s.mean, s.student, s.legacy, s.sample_std, s.population_std, *s.quartiles)
            cells = ["" if math.isnan(value) else f"{value:.4f}" for value in numbers]
            labels = (protocol[name] for name in names)
            writer.writerow([*labels, metric, *cells, len(s.values), seed_list(row.keys), seed_list(row.missing)])
    return buffer.getvalue()


def render_pairs_csv(sections: Sequence[Section]) -> str:
    """One line per comparison, metric and pair of runs: both sides of a difference and its statistics."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    statistics = ("mean_difference", "student", "t_test", "wilcoxon", "pairs", "higher")
    writer.writerow(["section", "first", "second", "shot", "metric", "seed", "repeat", "difference", *statistics])
    for title, item in ((section_id(section.rows), item) for section in sections for item in section.comparisons):
        d = item.difference
        numbers = ["" if math.isnan(value) else f"{value:.4f}" for value in (d.mean, d.student, d.t_test, d.wilcoxon)]
        for (seed, repeat), value in zip(d.seeds, d.values, strict=True):
            labels = (title, item.first, item.second, item.shot, item.metric, seed, repeat)
            writer.writerow([*labels, f"{value:.4f}", *numbers, len(d.seeds), d.higher])
    return buffer.getvalue()


def render_json(sections: Sequence[Section]) -> str:
    """Everything, for other programs: protocols, seeds, files, all metrics and classes with their values."""
    data = [
        {
            "title": section_id(section.rows) if section.rows else section.title,
            "notes": section.notes,
            "rows": [_row(row) for row in section.rows],
            "comparisons": [_comparison(item) for item in section.comparisons],
            "tables": [asdict(table) for table in section.tables] if not section.rows else [],
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
        "metrics": {metric: _plain(asdict(row.summary(metric))) for metric in row.metrics},
        "per_class": {
            name: {metric: _plain(asdict(row.class_summary(name, metric))) for metric in values}
            for name, values in row.runs[0][1].per_class.items()
        },
    }


def _comparison(item: Comparison) -> dict[str, Any]:
    return asdict(item) | {"difference": _plain(asdict(item.difference)) | {"higher": item.difference.higher}}


def _plain(value: Any) -> Any:
    """Copy that JSON can hold: nan becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _protocol_sentence(facts: Sequence[Fact]) -> str:
    shown = (f"{fact.name} {fact.value}" + (f" ({fact.meaning})" if fact.meaning else "") for fact in facts)
    return f"Protocol: {', '.join(shown)}."


def _section_lines(section: Section, table_format: str, title: str, heading: str) -> str:
    notes = [*([_protocol_sentence(section.protocol)] if section.protocol else []), *section.notes]
    parts = ["\n".join([title.format(section.title), *(f"- {note}" for note in notes)])]
    for number, table in enumerate(section.tables, start=1):
        rows = [[_cell(text, table_format) for text in row] for row in table.rows]
        body = tabulate(rows, table.header if rows else (), table_format, disable_numparse=True)
        parts.append(heading.format(table.title) + "\n" + body)
        if table.note:
            parts.append(table.note)
        if number == section.headlines:
            parts += section.naming.key()
    return "\n\n".join(parts) + "\n"


def _cell(text: str, table_format: str) -> str:
    """A bar would end a cell of a Markdown table."""
    return text.replace("|", "\\|") if table_format == "pipe" else text
