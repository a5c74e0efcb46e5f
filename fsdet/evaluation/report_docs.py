"""Tables of the documentation, built from committed result files and never typed.

A document marks a table with a pair of comments, `<!-- table: NAME METRIC METRIC ... -->` and `<!-- end of table -->`;
what stands between them is replaced by the headline tables of the results below docs/results/NAME. End marks that
follow each other, as a merge may leave them, become one.
"""

from __future__ import annotations

import re
from pathlib import Path

from .report import build_report
from .report_render import render_brief
from .report_rows import load_results

_START, _END = "<!-- table:", "<!-- end of table -->"
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
        sections = build_report(load_results([results / mark[2]]), metrics=tuple(mark[3].split()))
        return f"{mark[1]}\n{render_brief(sections, 'pipe')}\n{mark[5]}"

    return _MARK.sub(table, text)


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
