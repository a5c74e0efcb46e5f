"""Every table of the documentation shows what the committed result files hold."""

from pathlib import Path

import pytest

from fsdet.evaluation.report_docs import fill_tables

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_documentation_is_up_to_date():
    text = (DOCS / "benchmarks.md").read_text()
    assert "<!-- table: demo" in text
    assert fill_tables(text, DOCS / "results") == text


def test_changed_figure_is_noticed():
    text = (DOCS / "benchmarks.md").read_text()
    start = text.index("<!-- table: demo")
    place = next(i for i in range(text.index("tfa_cos", start), len(text)) if text[i].isdigit())
    wrong = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
    assert fill_tables(wrong, DOCS / "results") == text != wrong


def test_unknown_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        fill_tables("<!-- table: nothing nAP50 -->\n<!-- end of table -->", tmp_path)
