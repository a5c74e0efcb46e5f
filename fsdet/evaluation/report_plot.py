"""Plots of a report as inline SVG: AP against shots, and paired differences.

A plot is text of a few kilobytes, sharp at every size; its colours are the page's CSS variables (`--s0` ... `--s6`), so
that it follows a dark theme and prints. Every marker carries its numbers as a tooltip, and the tables hold them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .aggregate import Summary
from .report_rows import Row
from .report_section import Comparison, Section
from .report_tables import cell, shot_name

COLOURS = 7  # of the page's palette
MARKERS = 4  # coprime with COLOURS: 28 series until two look alike
RADIUS = 4.5  # of a marker, in units of the drawing as all that follows
WIDTH, WIDE, HEIGHT = 340.0, 460.0, 240.0  # of a panel of curves; a wide one has more than CROWD marks
CROWD = 14
LEFT, RIGHT, TOP, BOTTOM = 30.0, 8.0, 10.0, 36.0
DODGE = 13.0  # between the series of one number of shots
ASIDE = 0.42  # of that: single runs beside their mean, where its bar does not hide them
LINE = 25.0  # height of a line of a plot of differences
NAMES, VALUES = 54.0, 92.0  # its columns left and right of the drawing

Labelled = tuple[str, Row]


@dataclass(frozen=True)
class Look:
    """How a series is drawn; a row without calibration shares the colour of the calibrated one and is dashed."""

    colour: int
    marker: int
    dashed: bool = False

    @property
    def style(self) -> str:
        """CSS that passes the colour on to what is drawn."""
        return f"--c:var(--s{self.colour})"

    @property
    def line(self) -> str:
        """CSS classes of the line."""
        return "line dashed" if self.dashed else "line"


@dataclass(frozen=True)
class Scale:
    """Values to places: `low` lies at `start`, `high` at `end`."""

    ticks: tuple[float, ...]
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Place of a value."""
        low, high = self.ticks[0], self.ticks[-1]
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def bar(self, mean: float, half_width: float) -> tuple[tuple[float, float], list[float]]:
        """Both ends of an interval, cut at the border, and the places of the caps: ends that are not cut."""
        low, high = self.ticks[0], self.ticks[-1]
        ends = (mean - half_width, mean + half_width)
        first, last = (self(min(max(end, low), high)) for end in ends)
        return (first, last), [self(end) for end in ends if low <= end <= high]


def looks(section: Section) -> dict[str, Look]:
    """Label -> look, for all novel-stage rows of a section."""
    families: dict[str, list[Labelled]] = {}
    for label, row in section.novel:
        families.setdefault(section.naming.plain(row), []).append((label, row))
    found = {}
    for index, members in enumerate(families.values()):
        both = any(row.protocol.calibration for _, row in members)
        for label, row in members:
            found[label] = Look(index % COLOURS, index % MARKERS, both and not row.protocol.calibration)
    return found


def is_wide(section: Section) -> bool:
    """Whether a section's curves need more room than a narrow panel has."""
    return len(section.novel) > CROWD


def legend(section: Section) -> str:
    """HTML list that names the series of a section's plots."""
    entries = (
        f'<li><svg viewBox="0 0 34 14" width="34" height="14" aria-hidden="true" style="{look.style}">'
        f'<path class="{look.line}" d="M1 7H33"/>{_marker(17, 7, look)}</svg>{escape(label)}</li>'
        for label, look in looks(section).items()
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def shots_plot(section: Section, metric: str) -> str:
    """Mean, interval and single runs of a metric against the number of shots, in percent; "" where nothing has a value.

    Intervals of fewer than three runs do not stretch the axis; one that leaves the panel ends without a cap.
    """
    novel = _with_value(section.novel, metric)
    if not novel:
        return ""
    pairs = zip(section.labels, section.rows, strict=True)
    base = _with_value([pair for pair in pairs if pair[1].protocol.stage == "base"], metric)
    shots = sorted({row.protocol.shot for _, row in novel})
    width = WIDE if is_wide(section) else WIDTH
    y = Scale(_percent_ticks([row.summary(metric) for _, row in (*novel, *base)]), HEIGHT - BOTTOM, TOP)
    room = (width - LEFT - RIGHT) / len(shots)
    parts = [*_percent_axis(y, width), *_shots_axis(shots, room)]
    for label, row in base:
        height = y(row.summary(metric).mean)
        parts.append(f'<path class="base" d="M{LEFT:g} {height:.1f}H{width - RIGHT:g}"/>')
        parts.append(_label(width - RIGHT, height - 4, f"{label}, base stage", "end"))
    styles = {label: look for label, look in looks(section).items() if label in dict(novel)}
    gap = min(DODGE, 0.7 * room / len(styles))
    for index, (label, look) in enumerate(styles.items()):
        shift = (index - (len(styles) - 1) / 2) * gap
        members = sorted((row for name, row in novel if name == label), key=lambda row: row.protocol.shot)
        points = [(LEFT + room * (shots.index(row.protocol.shot) + 0.5) + shift, row) for row in members]
        parts.append(_series(label, look, points, metric, y, gap * ASIDE))
    numbers = (f"{label}, {shot_name(row.protocol.shot)}: {_summary(row.summary(metric))}" for label, row in novel)
    return _svg(width, HEIGHT, f"{metric} against shots. {'; '.join(numbers)}", parts)


def differences_plot(comparisons: Sequence[Comparison], metric: str) -> str:
    """Mean, interval and single pairs of the differences in a metric, one line each; "" where there are none."""
    items = [item for item in comparisons if item.metric == metric and not math.isnan(item.difference.mean)]
    if not items:
        return ""
    lines = list(_lines(items))
    bottom = TOP + LINE * len(lines)
    x = Scale(_difference_ticks(items), NAMES, WIDTH - VALUES)
    parts = []
    for tick in x.ticks:
        kind, text = ("grid", f"{tick:+g}") if tick else ("zero", "0")
        parts.append(f'<path class="{kind}" d="M{x(tick):.1f} {TOP - 4:g}V{bottom:g}"/>')
        parts.append(_label(x(tick), bottom + 15, text, "middle"))
    for index, line in enumerate(lines):
        y = TOP + LINE * (index + 0.5)
        if isinstance(line, str):
            parts.append(_label(0, y + 6, line, "start", "name"))
        else:
            parts += _difference(line, x, y)
    numbers = (f"{item.item} {shot_name(item.shot)}: {_difference_text(item)}".strip() for item in items)
    return _svg(WIDTH, bottom + 22, f"Differences in {metric}. {'; '.join(numbers)}", parts)


def _with_value(rows: Iterable[Labelled], metric: str) -> list[Labelled]:
    having = ((label, row) for label, row in rows if metric in row.metrics)
    return [(label, row) for label, row in having if math.isfinite(row.summary(metric).mean)]


def _percent_axis(y: Scale, width: float) -> Iterator[str]:
    for tick in y.ticks:
        yield f'<path class="grid" d="M{LEFT:g} {y(tick):.1f}H{width - RIGHT:g}"/>'
        yield _label(LEFT - 7, y(tick) + 4, f"{tick:g}", "end")


def _shots_axis(shots: Sequence[int], room: float) -> Iterator[str]:
    for index, shot in enumerate(shots):
        yield _label(LEFT + room * (index + 0.5), HEIGHT - BOTTOM + 17, str(shot), "middle")
    yield _label(LEFT + room * len(shots) / 2, HEIGHT - 4, "shots", "middle")


def _series(label: str, look: Look, points: Sequence[tuple[float, Row]], metric: str, y: Scale, aside: float) -> str:
    """Line through the means; interval, runs and marker at every number of shots."""
    summaries = [(x, row.protocol.shot, row.summary(metric)) for x, row in points]
    line = "L".join(f"{x:.1f} {y(summary.mean):.1f}" for x, _, summary in summaries)
    parts = [f'<path class="{look.line}" d="M{line}"/>']
    for x, shot, summary in summaries:
        dots = (f'<circle class="run" cx="{x + aside:.1f}" cy="{y(value):.1f}" r="2.4"/>' for value in summary.values)
        bar = ""
        if not math.isnan(summary.student):
            (first, last), caps = y.bar(summary.mean, summary.student)
            bar = f"M{x:.1f} {first:.1f}V{last:.1f}" + "".join(f"M{x - 4:.1f} {cap:.1f}h8" for cap in caps)
        title = f"<title>{escape(label)}, {shot_name(shot)}: {_summary(summary)}</title>"
        body = _bar(bar, len(summary.values)) if bar else ""
        parts.append(f"<g>{title}{''.join(dots)}{body}{_marker(x, y(summary.mean), look)}</g>")
    return f'<g style="{look.style}">{"".join(parts)}</g>'


def _lines(items: Sequence[Comparison]) -> Iterator[str | Comparison]:
    """The comparisons, each method's name on a line above its own."""
    former = ""
    for item in items:
        if item.item != former:
            former = item.item
            yield former
        yield item


def _difference(item: Comparison, x: Scale, y: float) -> Iterator[str]:
    d, look = item.difference, Look(0, 0)
    dots = "".join(f'<circle class="run" cx="{x(value):.1f}" cy="{y + 8:.1f}" r="2.4"/>' for value in d.values)
    bar = ""
    if not math.isnan(d.student):
        (first, last), caps = x.bar(d.mean, d.student)
        path = f"M{first:.1f} {y:.1f}H{last:.1f}" + "".join(f"M{cap:.1f} {y - 4:.1f}v8" for cap in caps)
        bar = _bar(path, len(d.values))
    tip = escape(f"{item.item or item.title}, {shot_name(item.shot)}: {_difference_text(item)}")
    yield f'<g style="{look.style}"><title>{tip}</title>{dots}{bar}{_marker(x(d.mean), y, look)}</g>'
    yield _label(NAMES - 8, y + 4, shot_name(item.shot), "end")
    yield _label(WIDTH, y + 4, cell(d.mean, d.student, digits=1, sign="+"), "end", "name")


def _percent_ticks(summaries: Sequence[Summary]) -> tuple[float, ...]:
    """From zero, unless that would flatten all differences."""
    values = [value for summary in summaries for value in _finite(summary.values)]
    for summary in (summary for summary in summaries if len(summary.values) > 2):
        values += _finite((summary.mean - summary.student, summary.mean + summary.student))
    low, high = max(min(values), 0.0), min(max(values), 100.0)
    return _ticks(0.0 if low < 0.6 * high or high == low else low, max(high, 1.0))


def _difference_ticks(items: Sequence[Comparison]) -> tuple[float, ...]:
    values = [0.0]
    for d in (item.difference for item in items):
        values += d.values
        if len(d.values) > 2:
            values += _finite((d.mean - d.student, d.mean + d.student))
    low, high = min(values), max(values)
    return _ticks(low, max(high, low + 1.0))


def _ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """About `count` round numbers that enclose a range."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 10) for index in range(first, max(last, first + 1) + 1))


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _summary(summary: Summary) -> str:
    return f"{cell(summary.mean, summary.student)} ({_count(len(summary.values), 'run')})"


def _difference_text(item: Comparison) -> str:
    d = item.difference
    return f"{cell(d.mean, d.student, sign='+')} ({_count(len(d.values), 'pair')}, higher in {d.higher})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bar(path: str, runs: int) -> str:
    """An interval; dotted where it rests on fewer than three runs."""
    return f'<path class="bar{" few" if runs < 3 else ""}" d="{path}"/>'


def _marker(x: float, y: float, look: Look) -> str:
    r, kind = RADIUS, "mark hollow" if look.dashed else "mark"
    if look.marker == 0:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    shape = {
        1: f"m{-r * 0.9:g} {-r * 0.9:g}h{r * 1.8:g}v{r * 1.8:g}h{-r * 1.8:g}z",
        2: f"m0 {-r * 1.25:g}l{r * 1.25:g} {r * 1.25:g}l{-r * 1.25:g} {r * 1.25:g}l{-r * 1.25:g} {-r * 1.25:g}z",
        3: f"m0 {-r * 1.2:g}l{r * 1.2:g} {r * 2.1:g}h{-r * 2.4:g}z",
    }[look.marker]
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}{shape}"/>'


def _label(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}>{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    label = escape(title, quote=True)
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )
