"""Tables of the documentation, built from committed result files and never typed.

A document marks a table with a pair of comments, `<!-- table: NAME METRIC METRIC ... -->` and `<!-- end of table -->`;
what stands between them is replaced by the headline tables of the results below docs/results/NAME.
"""

from __future__ import annotations

import re
from pathlib import Path

from .report import build_report
from .report_render import render_brief
from .report_rows import load_results

_MARK = re.compile(r"(<!-- table: (\S+)((?: \S+)*) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def fill_tables(text: str, results: Path) -> str:
    """Replace the marked tables of a document.

    Args:
        text: the document.
        results: folder with one subfolder of result files a table.
    Returns: the document with every marked table built anew.
    Raises: FileNotFoundError, ValueError as the report does, e.g. for a missing seed.
    """

    def table(mark: re.Match[str]) -> str:
        sections = build_report(load_results([results / mark[2]]), metrics=tuple(mark[3].split()))
        return f"{mark[1]}\n{render_brief(sections, 'pipe')}\n{mark[5]}"

    return _MARK.sub(table, text)
