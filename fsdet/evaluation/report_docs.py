"""Tables of the documentation, built from committed result files and never typed.

A document marks a table with a pair of comments, `<!-- table: NAME METRIC METRIC ... -->` and `<!-- end of table -->`;
what stands between them is replaced by the headline tables of the results below docs/results/NAME. Several folders are
joined by "+", and a word such as `seeds=0-1` among the metrics says which seeds are averaged. End marks that follow
each other, as a merge may leave them, become one.
"""

from __future__ import annotations

import re
from pathlib import Path

from .report import build_report
from .report_render import render_brief
from .report_rows import load_results

_START, _END = "<!-- table:", "<!-- end of table -->"
_SEEDS = "seeds="
_MARK = re.compile(rf"({_START} (\S+)((?: \S+)*) -->\n)(.*?)({_END})(?:\s*{_END})*", re.DOTALL)


def fill_tables(text: str, results: Path) -> str:
    """Replace the marked tables of a document.

    Args:
        text: the document.
        results: folder with one subfolder of result files a table.
    Returns: the document with every marked table built anew.
    Raises: ValueError for a start without an end or an end without a start; FileNotFoundError and ValueError as the
        report does, e.g. for a missing seed.
    """
    _check_marks(text)

    def table(mark: re.Match[str]) -> str:
        words = mark[3].split()
        metrics = tuple(word for word in words if not word.startswith(_SEEDS))
        ranges = [word.removeprefix(_SEEDS) for word in words if word.startswith(_SEEDS)]
        seeds = _seeds(ranges[-1]) if ranges else None
        found = load_results([results / name for name in mark[2].split("+")])
        sections = build_report(found, metrics=metrics, seeds=seeds)
        return f"{mark[1]}\n{render_brief(sections, 'pipe')}\n{mark[5]}"

    return _MARK.sub(table, text)


def _seeds(text: str) -> range:
    """The seeds of "0-9". Raises: ValueError for another word."""
    if not (found := re.fullmatch(r"(\d+)-(\d+)", text)):
        raise ValueError(f'"{_SEEDS}{text}" is no range of seeds; write {_SEEDS}0-9')
    return range(int(found[1]), int(found[2]) + 1)


def _check_marks(text: str) -> None:
    """An unclosed table would take the text up to the next one's end with it."""
    is_open = False
    for number, line in enumerate(text.splitlines(), start=1):
        if _START in line:
            if is_open or not re.fullmatch(rf"{_START} \S+(?: \S+)* -->", line):
                raise ValueError(
                    f'Line {number} of the document, "{line}": a table starts with "{_START} NAME METRIC ... -->" on '
                    f'a line of its own, after the former table has ended with "{_END}"'
                )
            is_open = True
        elif _END in line:
            if not is_open and not _is_repeated(text, number):
                raise ValueError(f'Line {number} of the document ends a table that does not start; remove "{_END}"')
            is_open = False
    if is_open:
        raise ValueError(f'The last table of the document has no end; write "{_END}" below it')


def _is_repeated(text: str, number: int) -> bool:
    """Whether the mark on a line follows another one, with blank lines between them at most."""
    above = [line for line in text.splitlines()[: number - 1] if line.strip()]
    return bool(above) and above[-1] == _END
