"""The tables of a report, as plain text cells that every format renders alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from .aggregate import summarize
from .report_rows import Row
from .report_section import Table

INTERVAL_NOTE = "± is half the 95 % Student t interval over runs."
LEGACY_NOTE = (
    "± t 95 % is half of Student's interval; legacy ± is 1.96 · population σ / √n, the figure of the few-shot "
    "literature, which is too narrow for few seeds."
)

GROUPS = {"n": "Novel classes", "b": "Base classes"}  # by the first letter of a metric


def headline_tables(rows: Sequence[Row], metrics: Sequence[str], label: Callable[[Row], str]) -> Iterable[Table]:
    """The field's usual table for each metric: methods down, shots across.

    n stands beside the means where runs are missing, or rows have other numbers of them.
    """
    same = len({len(row.runs) for row in rows if row.protocol.stage != "base"}) < 2
    same = same and not any(row.missing for row in rows)
    for metric in metrics:
        having = [row for row in rows if metric in row.metrics]
        shots = sorted({row.protocol.shot for row in having})
        cells = {}
        for row in having:
            summary = row.summary(metric)
            runs = "" if same or row.protocol.stage == "base" else f" (n={len(row.runs)})"
            cells[label(row), row.protocol.shot] = cell(summary.mean, summary.student) + runs
        names = dict.fromkeys(label(row) for row in having)
        lines = tuple((name, *(cells.get((name, shot), "") for shot in shots)) for name in names)
        header = ("method", *(shot_name(shot) for shot in shots))
        yield Table(f"{metric} by shots", header, lines, INTERVAL_NOTE if metric == metrics[0] else "")


def spread_table(rows: Sequence[Row], metrics: Sequence[str], label: Callable[[Row], str]) -> Table:
    """Every statistic of the headline metrics, the legacy figure under its own name."""
    lines = []
    for row in rows:
        for metric in (metric for metric in metrics if metric in row.metrics):
            s = row.summary(metric)
            numbers = (s.mean, s.student, s.legacy if len(s.values) > 1 else math.nan, s.sample_std, *s.quartiles)
            lines.append(
                (label(row), str(row.protocol.shot), metric, str(len(s.values)), *(number(value) for value in numbers))
            )
    header = ("method", "shots", "metric", "runs", "mean", "± t 95 %", "legacy ±", "std", "25 %", "median", "75 %")
    return Table("Spread over runs", header, tuple(lines), LEGACY_NOTE, detail=True)


def class_tables(rows: Sequence[Row], label: Callable[[Row], str]) -> Iterable[Table]:
    """AP50 of every class, one table a method: novel, then base classes down, shots across."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        names = tuple(row.runs[0][1].per_class)
        if names and all("AP50" in run.per_class.get(name, ()) for _, run in row.runs for name in names):
            groups.setdefault((label(row), names), []).append(row)
    for (method, names), members in groups.items():
        novel = members[0].runs[0][1].classes.get("novel", ())
        lines = []
        for name in sorted(names, key=lambda name: name not in novel):
            summaries = [row.class_summary(name, "AP50") for row in members]
            cells = [cell(summary.mean, summary.student, digits=1) for summary in summaries]
            lines.append((name, "novel" if name in novel else "base", *cells))
        header = ("class", "group", *(shot_name(row.protocol.shot) for row in members))
        yield Table(f"AP50 by class: {method}", header, tuple(lines), detail=True)


def cost_table(rows: Sequence[Row], label: Callable[[Row], str]) -> Table:
    """Mean wall time and largest memory of a run."""
    lines = []
    for row in rows:
        runs = [run for _, run in row.runs]
        seconds = [summarize([run.seconds.get(key, math.nan) for run in runs]).mean for key in ("train", "eval")]
        memory = [max(run.peak_memory_mib.get(key, math.nan) for run in runs) for key in ("rss", "cuda")]
        devices = ", ".join(sorted({run.versions.get("device", "unknown") for run in runs}))
        counts = (row.protocol.shot, runs[0].iterations, runs[0].images_per_step)
        lines.append((label(row), *map(str, counts), *(number(value, 0) for value in (*seconds, *memory)), devices))
    header = ("method", "shots", "iterations", "images/step", "train s", "eval s", "peak MiB", "GPU MiB", "device")
    return Table("Cost of a run", header, tuple(lines), detail=True)


def protocol_table(rows: Sequence[Row], fields: Sequence[str], label: Callable[[Row], str]) -> Table | None:
    """Protocol fields in which rows differ without their label saying so; None where there are none."""
    protocols = [asdict(row.protocol) for row in rows]
    hidden = [
        name
        for name, _ in rows[0].protocol.group()
        if name not in (*fields, "shot") and len({str(protocol[name]) for protocol in protocols}) > 1
    ]
    if not hidden:
        return None
    lines = [
        (label(row), str(protocol["shot"]), *(str(protocol[name]) for name in hidden))
        for row, protocol in zip(rows, protocols, strict=True)
    ]
    note = "Rows that differ here are not comparable in every respect."
    return Table("Protocols that differ", ("method", "shots", *hidden), tuple(lines), note, detail=True)


def metric_group(metric: str) -> str:
    """Which classes a metric is over, in words."""
    return GROUPS.get(metric[:1], "All classes")


def shot_name(shot: int) -> str:
    """Column name of a number of shots; the base stage has none."""
    return f"{shot}-shot" if shot else "base stage"


def number(value: float, digits: int = 2) -> str:
    """A number, or a dash for nan."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def cell(mean: float, half_width: float, digits: int = 2, sign: str = "") -> str:
    """Mean with its half width; the mean alone where one run gives no width."""
    if math.isnan(mean):
        return "–"
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half_width) else f" ± {half_width:.{digits}f}")
