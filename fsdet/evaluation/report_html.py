"""A report as one self-contained HTML page: tables, and curves over shots as embedded pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report_rows import Row
from .report_tables import Table

if TYPE_CHECKING:
    from .report import Section

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
MARKERS = "osD^vPX"

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; color: #1c2430; background: #f5f6f8;
  margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 12px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 36px 0 8px; }
h3 { font-size: 16px; margin: 0 0 12px; }
section { background: #fff; border: 1px solid #e2e5ea; border-radius: 10px; padding: 20px 24px; margin: 20px 0; }
ul.notes { margin: 0; padding-left: 18px; color: #4a5568; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }
.plots img { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { text-align: right; font-weight: 600; color: #4a5568; border-bottom: 2px solid #d5dae2; padding: 6px 0 6px 26px; }
td { text-align: right; border-bottom: 1px solid #edf0f4; padding: 5px 0 5px 26px; }
th:first-child, td:first-child { text-align: left; padding-left: 6px; }
th:last-child, td:last-child { padding-right: 6px; }
summary { font-weight: 600; cursor: pointer; }
details[open] summary { margin-bottom: 12px; }
tr:hover td { background: #f3f7fc; }
tr.novel td { background: #fff8ec; }
td .width { color: #7a8597; font-size: 0.88em; }
p.note { color: #5b6575; font-size: 13px; margin: 12px 0 0; }
"""


def render_html(sections: Sequence[Section]) -> str:
    """The page as text; pictures are embedded, nothing is loaded from elsewhere."""
    body = "".join(_section(section) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Few-shot detection results</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>Few-shot detection results</h1>{body}</main></body></html>\n"
    )


def _section(section: Section) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in section.notes)
    head = f'<h2>{escape(section.title)}</h2><ul class="notes">{notes}</ul>'
    tables = "".join(_table(table) for table in section.tables)
    if not any(row.protocol.stage != "base" for row in section.rows):
        return head + tables  # a base model has no curve over shots
    plots = "".join(
        f'<img alt="{escape(metric)} by shots" src="data:image/png;base64,{_encode(plot_metric(section, metric))}">'
        for metric in section.metrics
    )
    return (
        f'{head}<section><h3>Curves over shots</h3><div class="plots">{plots}</div>'
        '<p class="note">Line: mean over runs. Bar: 95 % Student t interval. Small dots: single runs. '
        f"Dashed: base stage.</p></section>{tables}"
    )


def plot_metric(section: Section, metric: str) -> bytes:
    """Mean, interval and single runs of one metric against the number of shots; PNG."""
    rows = [row for row in section.rows if metric in row.metrics and row.protocol.stage != "base"]
    shots = sorted({row.protocol.shot for row in rows})
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(section.label(row), []).append(row)
    figure = Figure(figsize=(4.4, 3.4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for index, (label, members) in enumerate(lines.items()):
        shift = 0.12 * (index - (len(lines) - 1) / 2) / max(1, len(lines) / 4)
        _draw_line(axes, members, metric, [shots.index(row.protocol.shot) + shift for row in members], index, label)
    base = [row for row in section.rows if metric in row.metrics and row.protocol.stage == "base"]
    for row in base:
        axes.axhline(row.summary(metric).mean, color="#9aa3b0", linestyle="--", linewidth=1, label=section.label(row))
    axes.set_xticks(range(len(shots)), [str(shot) for shot in shots])
    axes.set_xlim(-0.5, max(len(shots) - 0.5, 0.5))
    values = [value for row in (*rows, *base) for value in row.summary(metric).values]
    if not values or min(values) < 0.6 * max(values):
        axes.set_ylim(bottom=0)  # from zero, unless that would flatten all differences
    axes.set_xlabel("shots")
    axes.set_title(metric, loc="left", fontweight="bold", fontsize=11)
    axes.grid(axis="y", color="#e8ebf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_line(axes: object, rows: Sequence[Row], metric: str, places: Sequence[float], index: int, label: str) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    summaries = [row.summary(metric) for row in rows]
    for place, summary in zip(places, summaries, strict=True):
        values = summary.values
        axes.plot([place] * len(values), values, "o", color=colour, alpha=0.3, markersize=3.5, markeredgewidth=0)
    axes.errorbar(
        places,
        [summary.mean for summary in summaries],
        yerr=[0.0 if math.isnan(summary.student) else summary.student for summary in summaries],
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.6,
        elinewidth=1.2,
        capsize=3,
        label=label,
    )


def _encode(picture: bytes) -> str:
    return base64.b64encode(picture).decode("ascii")


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.header)
    body = "".join(
        f"<tr{' class=novel' if 'novel' in row[1:2] else ''}>{''.join(f'<td>{_mark(text)}</td>' for text in row)}</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    content = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'
    if table.detail:
        return f"<section><details><summary>{escape(table.title)}</summary>{content}</details></section>"
    return f"<section><h3>{escape(table.title)}</h3>{content}</section>"


def _mark(text: str) -> str:
    """Set the interval behind a mean in a lighter type."""
    value, sign, width = text.partition(" ± ")
    return f'{escape(value)} <span class="width">± {escape(width)}</span>' if sign and value else escape(text)
