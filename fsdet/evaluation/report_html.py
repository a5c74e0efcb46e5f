"""A report as one self-contained HTML page: no script, no request, readable on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape

from .report_gallery import Gallery, render_galleries
from .report_pairs import telling
from .report_plot import differences_plot, is_wide, legend, shots_plot
from .report_section import Comparison, Section, Table
from .report_style import STYLE
from .report_tables import INTERVAL_NOTE, metric_group

TITLE = "Few-shot detection results"


def render_html(sections: Sequence[Section], galleries: Sequence[Gallery] = ()) -> str:
    """The page as text; pictures are embedded, nothing is loaded from elsewhere."""
    parts = [(_anchor(index, section), section) for index, section in enumerate(sections, start=1)]
    pictures = [(f"gallery-{index}", gallery) for index, gallery in enumerate(galleries, start=1)]
    body = "".join(_section(anchor, section) for anchor, section in parts)
    for (anchor, gallery), content in zip(pictures, render_galleries(galleries), strict=True):
        body += f'<section id="{anchor}"><h2>Gallery: {escape(gallery.title)}</h2>{content}</section>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{STYLE}</style></head><body><div class=page>"
        f"<header><h1>{TITLE}</h1><p class=sub>{_extent(sections)}</p></header>"
        f"{_contents(parts, pictures)}<main>{body}</main><footer>{_footer(sections)}</footer></div></body></html>\n"
    )


def _anchor(index: int, section: Section) -> str:
    return f"section-{index}" if section.rows else "unfinished"


def _extent(sections: Sequence[Section]) -> str:
    rows = [row for section in sections for row in section.rows]
    runs = sum(len(row.runs) for row in rows)
    parts = [_count(runs, "run"), f"{_count(len(rows), 'protocol')} (none averaged with another)"]
    unfinished = sum(len(table.rows) for section in sections if not section.rows for table in section.tables)
    if unfinished:
        parts.append(f'<a href="#unfinished">{_count(unfinished, "run")} without a result</a>')
    return " · ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _contents(sections: Sequence[tuple[str, Section]], galleries: Sequence[tuple[str, Gallery]]) -> str:
    """Table of contents."""
    names = [_split_title(section)[0] for _, section in sections]
    entries = []
    for anchor, section in sections:
        links = "".join(
            f'<li><a href="#{anchor}-{name}">{text}</a></li>' for name, text in _parts(section) if section.rows
        )
        below = f"<ol>{links}</ol>" if links else ""
        name = _split_title(section)[0]
        name = name if names.count(name) == 1 else section.title
        entries.append(f'<li><a href="#{anchor}">{escape(name)}</a>{below}</li>')
    entries += [f'<li><a href="#{anchor}">Gallery: {escape(gallery.title)}</a></li>' for anchor, gallery in galleries]
    return f'<nav aria-label="Contents"><ol>{"".join(entries)}</ol></nav>'


def _parts(section: Section) -> Iterator[tuple[str, str]]:
    """Anchor and name of what a section has."""
    yield "protocol", "Protocol"
    if section.novel:
        yield "curves", "AP against shots"
    yield "results", "Results"
    if section.comparisons:
        yield "pairs", "Paired comparisons"
    yield "details", "Details"


def _split_title(section: Section) -> tuple[str, str]:
    name, _, rest = section.title.partition(": ")
    return name, rest


def _section(anchor: str, section: Section) -> str:
    name, rest = _split_title(section)
    head = f'<h2>{escape(name)}</h2><p class="sub">{escape(rest)}</p>'
    if not section.rows:
        tables = "".join(_card("", _table(table, words=True), table.note) for table in section.tables)
        return f'<section id="{anchor}">{head}{tables}</section>'
    headlines, others = section.tables[: section.headlines], section.tables[section.headlines :]
    groups = section.groups()
    pairs = dict(zip(groups, others, strict=False))  # their tables follow the headline tables, in the same order
    body = [head, _protocol(anchor, section)]
    if section.novel:
        body.append(_curves(anchor, section))
    blocks = "".join(f"<div><h4>{_metric_words(m)}</h4>{_table(t)}</div>" for m, t in _by_metric(section, headlines))
    notes = (INTERVAL_NOTE, *section.naming.key())
    body.append(_card(f"{anchor}-results", f'<h3>Results</h3><div class="tables">{blocks}</div>', *notes))
    anchors = iter([f' id="{anchor}-pairs"'])
    for title, table in pairs.items():
        body.append(f"<div{next(anchors, '')}>{_comparison(groups[title], table)}</div>")
    details = "".join(_details(table) for table in others[len(groups) :])
    return f'<section id="{anchor}">{"".join(body)}<div id="{anchor}-details">{details}</div></section>'


def _by_metric(section: Section, tables: Sequence[Table]) -> Iterator[tuple[str, Table]]:
    yield from zip(section.metrics, tables, strict=True)


def _protocol(anchor: str, section: Section) -> str:
    facts = "".join(
        f"<div><dt>{escape(fact.name)}</dt><dd>{escape(fact.value)}"
        f"{f'<small>{escape(fact.meaning)}</small>' if fact.meaning else ''}</dd></div>"
        for fact in section.protocol
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in section.notes)
    content = f'<h3>Protocol</h3><dl class="protocol">{facts}</dl><ul class="notes">{notes}</ul>'
    return _card(f"{anchor}-protocol", content)


def _curves(anchor: str, section: Section) -> str:
    plots = [(metric, shots_plot(section, metric)) for metric in section.metrics]
    grid = "".join(f"<div><h4>{_metric_words(metric)}</h4>{plot}</div>" for metric, plot in plots if plot)
    note = (
        "Large mark: mean over runs. Bar: 95 % Student t interval; dotted with fewer than 3 runs, without a cap where "
        "it leaves the panel. Small dots: single runs."
    )
    if any(row.protocol.calibration for _, row in section.novel):
        note += " Dashed with hollow marks: the same runs without calibration."
    kind = "grid wide" if is_wide(section) else "grid"
    return _card(
        f"{anchor}-curves", f'<h3>AP against shots</h3>{legend(section)}<div class="{kind}">{grid}</div>', note
    )


def _comparison(items: Sequence[Comparison], table: Table) -> str:
    metrics = dict.fromkeys(item.metric for item in telling(items))
    plots = ((metric, differences_plot(items, metric)) for metric in metrics)
    grid = "".join(f"<div><h4>{_metric_words(metric)}</h4>{plot}</div>" for metric, plot in plots if plot)
    below = f'<div class="grid">{grid}</div><br>{_pairs(table)}' if table.rows else ""
    return _card("", f"<h3>{escape(table.title)}</h3>{below}", table.note)


def _pairs(table: Table) -> str:
    """A table of comparisons; its last column, which is wide, folded below it."""
    names = table.header.index("metric") + 1
    header, *rows = ((*row[:names], row[-1]) for row in (table.header, *table.rows))
    means = replace(table, header=table.header[:-1], rows=tuple(row[:-1] for row in table.rows))
    single = replace(table, header=header, rows=tuple(rows))
    return f"{_table(means)}<details class=single><summary>Pair by pair</summary>{_table(single)}</details>"


def _details(table: Table) -> str:
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'<details class="card"><summary>{escape(table.title)}</summary>{_table(table)}{note}</details>'


def _card(anchor: str, content: str, *notes: str) -> str:
    place = f' id="{anchor}"' if anchor else ""
    below = "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note)
    return f'<div class="card"{place}>{content}{below}</div>'


def _metric_words(metric: str) -> str:
    return f"{metric_group(metric)} <span>{escape(metric)}, %</span>"


def _table(table: Table, *, words: bool = False) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.header)
    body = "".join(
        f"<tr{' class=novel' if 'novel' in row[1:2] else ''}>{''.join(f'<td>{_mark(text)}</td>' for text in row)}</tr>"
        for row in table.rows
    )
    kind = ' class="words"' if words else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _mark(text: str) -> str:
    """Set the interval behind a mean in a lighter type."""
    value, sign, width = text.partition(" ± ")
    return f'{escape(value)} <span class="width">± {escape(width)}</span>' if sign and value else escape(text)


def _footer(sections: Sequence[Section]) -> str:
    runs = [run for section in sections for row in section.rows for _, run in row.runs]
    versions = sorted({run.versions.get("fsdet", "unknown") for run in runs})
    commits = sorted({(run.git_commit or "no commit")[:10] for run in runs})
    shown = ", ".join(commits[:4]) + (" …" if len(commits) > 4 else "")
    return f"Results of fsdet {escape(', '.join(versions))} ({escape(shown)})."
