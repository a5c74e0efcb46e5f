"""Many result files -> tables of mean and interval over seeds, in text, Markdown, HTML, CSV or JSON.

Runs are averaged only where their whole protocol agrees. A report stops on what would make its numbers wrong: a missing
seed (unless told), a run given twice, runs of one protocol that followed different configs. Run folders without a
result are listed and counted nowhere.

Source: TFA (Wang et al., ICML 2020) section 4.3 and its multi-seed tables: seed 0 alone is a lucky draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .report_gallery import Gallery
from .report_html import render_html
from .report_labels import Labels
from .report_pairs import asked_comparisons, calibration_comparisons, comparison_table, why_not
from .report_protocol import remarks, section_title, shared_facts
from .report_render import render_brief, render_csv, render_json, render_markdown, render_pairs_csv, render_text
from .report_rows import Row, check_seeds, group_runs, load_results
from .report_section import Section
from .report_tables import class_tables, cost_table, headline_tables, protocol_table, spread_table
from .report_unfinished import find_unfinished, unfinished_section
from .result import RunResult

RENDERERS = {
    "text": render_text,
    "brief": render_brief,
    "markdown": render_markdown,
    "csv": render_csv,
    "json": render_json,
}
FORMATS = (*RENDERERS, "html")
SUFFIXES = {".html": "html", ".md": "markdown", ".csv": "csv", ".json": "json", ".txt": "text"}
FOLDER_FILES = ("index.html", "report.md", "report.csv")
# What a report shows when not asked for particular metrics: the field's headline numbers.
HEADLINES = {"coco": ("nAP", "nAP50", "nAP75", "bAP", "AP"), "other": ("nAP50", "bAP50", "AP50")}
# Numbers are put side by side only where these agree; everything else that differs is shown beside the rows.
SECTION_FIELDS = ("benchmark", "split", "setting", "test_set", "test_images", "evaluation")


def write_report(
    paths: Iterable[str | Path],
    output: str | Path | None = None,
    *,
    style: str = "text",
    metrics: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    allow_missing: bool = False,
    compare: Sequence[tuple[str, str]] = (),
    galleries: Sequence[Gallery] = (),
    repeats: int | None = None,
) -> str:
    """Read results, build the report and render it.

    Args:
        paths: result files, or folders searched for result.json.
        output: file to write; None to only return the text.
        style: one of `FORMATS`.
        metrics: headline metrics; empty for those usual on the benchmark.
        seeds: seeds to average over; None for 0 ... the largest seed found in a section.
        allow_missing: average over the seeds that are there.
        compare: pairs of methods by their ids, or of row labels, to compare seed by seed.
        galleries: pictures for the HTML page.
        repeats: repetitions of each seed to average over, from the first; None for all.
    Returns: the rendered text.
    Raises: FileNotFoundError for missing results; ValueError on an unknown style and as `build_report`.
    """
    if style not in FORMATS:
        raise ValueError(f'Unknown report format "{style}"; expected one of {FORMATS}')
    sections = read_report(
        paths, metrics=metrics, seeds=seeds, allow_missing=allow_missing, compare=compare, repeats=repeats
    )
    text = render_report(sections, style, galleries)
    if output is not None:
        _write(Path(output), text)
    return text


def read_report(
    paths: Iterable[str | Path],
    *,
    metrics: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    allow_missing: bool = False,
    compare: Sequence[tuple[str, str]] = (),
    repeats: int | None = None,
) -> tuple[Section, ...]:
    """Sections of the results below some paths, and one of the runs that have none; arguments as `write_report`."""
    paths = list(paths)
    results = load_results(paths)
    sections = build_report(
        results, metrics=metrics, seeds=seeds, allow_missing=allow_missing, compare=compare, repeats=repeats
    )
    unfinished = find_unfinished(paths)
    return (*sections, unfinished_section(unfinished)) if unfinished else sections


def render_report(sections: Sequence[Section], style: str, galleries: Sequence[Gallery] = ()) -> str:
    """A report in one of `FORMATS`.

    Raises: ValueError where galleries are given and the format has no pictures, or too many of them.
    """
    if style == "html":
        return render_html(sections, galleries)
    if galleries:
        raise ValueError("Only an HTML page shows a gallery; write one with --output NAME.html or into a folder")
    return RENDERERS[style](sections)


def save_report(
    sections: Sequence[Section],
    output: str | Path,
    *,
    style: str | None = None,
    also: Sequence[str] = (),
    galleries: Sequence[Gallery] = (),
) -> list[Path]:
    """Write a report into one file or several.

    Args:
        sections: from `read_report` or `build_report`.
        output: a file, or a folder (one that exists, or a name without suffix where no style is given) for index.html,
            report.md and report.csv.
        style: one of `FORMATS`; None: by the suffix of the file.
        also: suffixes without their dot of files to write beside the first: "md", "csv", "json", "txt", "html".
        galleries: pictures for the HTML page.
    Returns: the files. Paired comparisons go beside a CSV file, in NAME_paired.csv.
    Raises: ValueError for an unknown suffix, or galleries without a page to show them.
    """
    output = Path(output)
    if style is None and output.suffix and output.suffix not in SUFFIXES and not output.is_dir():
        raise ValueError(f"{output}: no format has this suffix; expected {', '.join(SUFFIXES)}, or choose a format")
    if unknown := [suffix for suffix in also if f".{suffix}" not in SUFFIXES]:
        raise ValueError(
            f'Unknown format "{unknown[0]}" beside the report; expected {", ".join(s[1:] for s in SUFFIXES)}'
        )
    if output.is_dir() or (style is None and not output.suffix):
        styles = {output / name: SUFFIXES[Path(name).suffix] for name in FOLDER_FILES}
        output = output / "report"
    else:
        styles = {output: style or SUFFIXES[output.suffix]}
    for suffix in also:
        styles.setdefault(output.with_suffix(f".{suffix}"), SUFFIXES[f".{suffix}"])
    shows = galleries if "html" not in styles.values() else ()  # then refused by the first format
    for path, kind in list(styles.items()):
        _write(path, render_report(sections, kind, galleries if kind == "html" else shows))
        if kind == "csv" and any(section.comparisons for section in sections):
            pairs = path.with_name(f"{path.stem}_paired.csv")
            _write(pairs, render_pairs_csv(sections))
            styles[pairs] = kind
    return list(styles)


def build_report(
    results: Sequence[tuple[Path, RunResult]],
    *,
    metrics: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    allow_missing: bool = False,
    compare: Sequence[tuple[str, str]] = (),
    repeats: int | None = None,
) -> tuple[Section, ...]:
    """Group results by protocol, check them, and make the tables; arguments as `write_report`.

    Raises: ValueError without results, on missing or repeated runs, differing configs, unknown metrics or methods.
    """
    if not results:
        raise ValueError("A report needs at least one result")
    for pair in compare:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"A comparison is between two methods, got {pair!r}")
    rows = check_seeds(group_runs(results), seeds, allow_missing, repeats=repeats, together=_section_key)
    available = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    unknown = [metric for metric in metrics if metric not in available]
    if unknown:
        raise ValueError(f"No result has the metric {unknown[0]}; available are {available}")
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(_section_key(row), []).append(row)
    sections = tuple(_section(members, metrics, compare) for members in groups.values())
    for first, second in compare:
        _check_compared(sections, (first, second))
    return sections


def _section_key(row: Row) -> tuple:
    return tuple(getattr(row.protocol, name) for name in SECTION_FIELDS)


def _check_compared(sections: Sequence[Section], pair: tuple[str, str]) -> None:
    """Raise where a pair that was asked for leads to no comparison."""
    named = []
    for section in sections:
        rows = [row for _, row in section.novel]
        if any(asked_comparisons(rows, section.naming, section.metrics, pair)):
            return
        named += [(section.naming.accepted(row), row) for row in rows]
    raise ValueError(
        f"Nothing to compare between {' and '.join(pair)}: {why_not(named, pair)}. Apart from the method all "
        "protocol fields of two rows must agree; rows can also be named as the tables label them"
    )


def _section(rows: Sequence[Row], metrics: Sequence[str], compare: Sequence[tuple[str, str]]) -> Section:
    available = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    usual = HEADLINES.get(rows[0].protocol.benchmark, HEADLINES["other"])
    shown = tuple(metric for metric in metrics or usual if metric in available) or tuple(available[:3])
    naming = Labels.of(rows)
    novel = [row for row in rows if row.protocol.stage != "base"]
    comparisons = [item for pair in compare for item in asked_comparisons(novel, naming, shown, pair)]
    comparisons += calibration_comparisons(novel, naming, shown)
    headlines = list(headline_tables(rows, shown, naming.shown))
    section = Section(
        title=section_title(rows),
        rows=tuple(rows),
        metrics=shown,
        tables=(),
        naming=naming,
        headlines=len(headlines),
        protocol=shared_facts(rows),
        notes=tuple(remarks(rows, list(map(naming.shown, rows)))),
        # A pair may be asked for by several names.
        comparisons=tuple({(item.title, item.item, item.shot, item.metric): item for item in comparisons}.values()),
    )
    tables = [
        *headlines,
        *map(comparison_table, section.groups().values()),
        spread_table(rows, shown, naming.shown),
        *class_tables(rows, naming.shown),
        cost_table(rows, naming.shown),
    ]
    differing = protocol_table(rows, naming.fields, naming.shown)
    return replace(section, tables=(*tables, *([differing] if differing else [])))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
