"""Many result files -> tables of mean and interval over seeds, in text, Markdown, HTML, CSV or JSON.

Runs are averaged only where their whole protocol agrees. A report stops on what would make its numbers wrong: a missing
seed (unless told), a run given twice, runs of one protocol that followed different configs.

Source: TFA (Wang et al., ICML 2020) section 4.3 and its multi-seed tables: seed 0 alone is a lucky draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .aggregate import paired_difference
from .report_render import render_brief, render_csv, render_json, render_markdown, render_text
from .report_rows import Row, check_seeds, group_runs, load_results, seed_list
from .report_tables import (
    Comparison,
    Table,
    class_tables,
    comparison_table,
    cost_table,
    headline_tables,
    label_fields,
    protocol_table,
    row_label,
    spread_table,
)
from .result import RunResult

FORMATS = ("text", "brief", "markdown", "html", "csv", "json")
# What a report shows when not asked for particular metrics: the field's headline numbers.
HEADLINES = {"coco": ("nAP", "nAP50", "nAP75", "bAP", "AP"), "other": ("nAP50", "bAP50", "AP50")}


# Numbers are put side by side only where these agree; everything else that differs is shown beside the rows.
SECTION_FIELDS = ("benchmark", "split", "setting", "test_set", "test_images", "evaluation")


@dataclass(frozen=True)
class Section:
    """Rows measured in the same way on the same test set.

    Attributes:
        title: what they share.
        rows: one per protocol.
        metrics: headline metrics.
        fields: protocol fields that make up a row's label.
        tables: in reading order.
        headlines: how many of the first tables hold the headline numbers.
        notes: common protocol, seeds, remarks on versions.
        comparisons: of two methods, where asked for.
    """

    title: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    fields: tuple[str, ...]
    tables: tuple[Table, ...]
    headlines: int
    notes: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()

    def label(self, row: Row) -> str:
        """Short name of a row; with the number of shots it is unique in the section."""
        return row_label(row, self.fields)


def write_report(
    paths: Iterable[str | Path],
    output: str | Path | None = None,
    *,
    style: str = "text",
    metrics: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    allow_missing: bool = False,
    compare: Sequence[str] = (),
) -> str:
    """Read results, build the report and render it.

    Args:
        paths: result files, or folders searched for result.json.
        output: file to write; None to only return the text.
        style: one of `FORMATS`.
        metrics: headline metrics; empty for those usual on the benchmark.
        seeds: seeds to average over; None for 0 ... the largest seed found.
        allow_missing: average over the seeds that are there.
        compare: two methods to compare seed by seed; empty for none.
    Returns: the rendered text.
    Raises: FileNotFoundError for missing results; ValueError on an unknown style and as `build_report`.
    """
    if style not in FORMATS:
        raise ValueError(f'Unknown report format "{style}"; expected one of {FORMATS}')
    results = load_results(paths)
    sections = build_report(results, metrics=metrics, seeds=seeds, allow_missing=allow_missing, compare=compare)
    if style == "html":
        from .report_html import render_html  # matplotlib is slow to import and only this format draws

        text = render_html(sections)
    else:
        renderers = {
            "text": render_text,
            "brief": render_brief,
            "markdown": render_markdown,
            "csv": render_csv,
            "json": render_json,
        }
        text = renderers[style](sections)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8")
    return text


def build_report(
    results: Sequence[tuple[Path, RunResult]],
    *,
    metrics: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    allow_missing: bool = False,
    compare: Sequence[str] = (),
) -> tuple[Section, ...]:
    """Group results by protocol, check them, and make the tables; arguments as `write_report`.

    Raises: ValueError without results, on missing or repeated runs, differing configs, unknown metrics or methods.
    """
    if not results:
        raise ValueError("A report needs at least one result")
    rows = check_seeds(group_runs(results), seeds, allow_missing)
    available = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    unknown = [metric for metric in metrics if metric not in available]
    if unknown:
        raise ValueError(f"No result has the metric {unknown[0]}; available are {available}")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row.protocol, name) for name in SECTION_FIELDS), []).append(row)
    sections = tuple(_section(members, metrics, compare) for members in groups.values())
    if compare and not any(section.comparisons for section in sections):
        known = sorted({row.protocol.method for row in rows})
        raise ValueError(
            f"Nothing to compare between {' and '.join(compare)}: the results have the methods {known}; apart from the "
            "method all protocol fields of two rows must agree"
        )
    return sections


def _section(rows: Sequence[Row], metrics: Sequence[str], compare: Sequence[str]) -> Section:
    available = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    usual = HEADLINES.get(rows[0].protocol.benchmark, HEADLINES["other"])
    shown = tuple(metric for metric in metrics or usual if metric in available) or tuple(available[:3])
    fields = label_fields(rows)

    def label(row: Row) -> str:
        return row_label(row, fields)

    comparisons = tuple(_compare(rows, shown, compare)) if compare else ()
    headlines = list(headline_tables(rows, shown, label))
    tables = [
        *headlines,
        *([comparison_table(comparisons)] if comparisons else []),
        spread_table(rows, shown, label),
        *class_tables(rows, label),
        cost_table(rows, label),
    ]
    differing = protocol_table(rows, fields, label)
    if differing is not None:
        tables.append(differing)
    return Section(
        title=_title(rows[0]),
        rows=tuple(rows),
        metrics=shown,
        fields=fields,
        tables=tuple(tables),
        headlines=len(headlines),
        notes=tuple(_notes(rows)),
        comparisons=comparisons,
    )


def _title(row: Row) -> str:
    p = row.protocol
    split = f" split {p.split}" if p.split else ""
    return f"{p.benchmark}{split}, {p.setting}: {p.test_set}, {p.test_images} images, {p.evaluation}"


def _notes(rows: Sequence[Row]) -> Iterable[str]:
    protocols = [dict(row.protocol.group()) for row in rows]
    common = [
        f"{name} {value}"
        for name, value in protocols[0].items()
        if value not in ("", None) and all(protocol[name] == value for protocol in protocols)
    ]
    yield f"Protocol: {', '.join(common)}."
    drawn = [row for row in rows if row.protocol.stage != "base"]
    if len({row.keys for row in drawn}) == 1:
        yield f"Seeds: {seed_list(drawn[0].keys)}."
    else:
        yield from (f"{row.name}: seeds {seed_list(row.keys)}." for row in drawn)
    yield from (f"{row.name}: WITHOUT seeds {seed_list(row.missing)}." for row in drawn if row.missing)
    digests: dict[tuple[int, int], set] = {}
    for run in (run for row in drawn for _, run in row.runs):
        digests.setdefault((run.protocol.shot, run.protocol.seed), set()).add(run.protocol.samples_digest)
    differing = [f"{shot}-shot seed {seed}" for (shot, seed), found in sorted(digests.items()) if len(found) > 1]
    if differing:
        yield f"Rows were trained on different K-shot files at {', '.join(differing)}."
    for name in ("fsdet", "detectron2", "torch", "device"):
        found = sorted({run.versions.get(name, "unknown") for row in rows for _, run in row.runs})
        if len(found) > 1:
            yield f"Runs were made with different {name}: {', '.join(found)}."


def _compare(rows: Sequence[Row], metrics: Sequence[str], methods: Sequence[str]) -> Iterable[Comparison]:
    if len(methods) != 2:
        raise ValueError(f"A comparison is between two methods, got {list(methods)}")
    first, second = methods

    def others(row: Row) -> tuple:
        # The methods' own surgery gives each its own start, so `base_model` may differ.
        return tuple(item for item in row.protocol.group() if item[0] not in ("method", "base_model"))

    partners = {others(row): row for row in rows if row.protocol.method == second}
    for row in rows:
        if row.protocol.method != first or row.protocol.stage == "base" or others(row) not in partners:
            continue
        partner = partners[others(row)]
        _check_samples(row, partner)
        for metric in metrics:
            if metric in row.metrics and metric in partner.metrics:
                left, right = row.values(metric), partner.values(metric)
                # Seeds differ only where the report was told to do without some; the table says how many pairs.
                both = left.keys() & right.keys()
                difference = paired_difference({key: left[key] for key in both}, {key: right[key] for key in both})
                yield Comparison(row.protocol.shot, first, second, metric, difference)


def _check_samples(row: Row, partner: Row) -> None:
    samples = {run.protocol.seed: (path, run.protocol.samples_digest) for path, run in row.runs}
    for path, run in partner.runs:
        twin, digest = samples.get(run.protocol.seed, (path, run.protocol.samples_digest))
        if digest != run.protocol.samples_digest:
            raise ValueError(
                f"{twin} and {path} have the same seed but other K-shot files, so that they are no pair; draw the "
                "files once and run both methods on them"
            )
