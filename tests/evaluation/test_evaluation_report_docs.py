"""Marks of the documentation's tables: repeated ones are mended, broken ones are refused."""

import pytest
from evaluation_cases import make_run

from fsdet.evaluation.report_docs import fill_tables

START, END = "<!-- table: demo nAP50 -->", "<!-- end of table -->"


@pytest.fixture
def results(tmp_path):
    make_run(tmp_path / "demo", nap50=30.0)
    return tmp_path


def test_filling_twice_changes_nothing(results):
    once = fill_tables(f"a\n\n{START}\n{END}\n\nb\n", results)
    assert "| tfa      | 30.00    |" in once and once.startswith("a\n\n") and once.endswith(f"{END}\n\nb\n")
    assert fill_tables(once, results) == once


@pytest.mark.parametrize("between", ["\n", "\n\n", "\n\n\n"])
def test_doubled_ends_become_one(results, between):
    clean = fill_tables(f"{START}\n{END}\n\nb\n", results)
    assert fill_tables(clean.replace(END, f"{END}{between}{END}"), results) == clean


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{START}\n| 1 |\n\ntext\n\n{START}\n{END}\n", "Line 6 .* after the former table has ended"),
        (f"{START}\n| 1 |\n", "last table of the document has no end"),
        (f"text\n{END}\n", "Line 2 .* ends a table that does not start"),
        (f"{START}\n{END}\ntext\n{END}\n", "Line 4 .* ends a table that does not start"),
        (f"x {START}\n{END}\n", "on a line of its own"),
    ],
)
def test_broken_marks_are_refused(results, text, message):
    with pytest.raises(ValueError, match=message):
        fill_tables(text, results)


def test_joined_folders_and_seeds(tmp_path):
    """Two methods from two folders, of which one has a seed that the other lacks."""
    for seed, nap50 in enumerate((30.0, 40.0, 99.0)):
        make_run(tmp_path / "one", method="tfa", seed=seed, nap50=nap50)
    for seed, nap50 in enumerate((10.0, 20.0)):
        make_run(tmp_path / "two" / "deep", method="other", seed=seed, nap50=nap50)
    filled = fill_tables(f"<!-- table: one+two/deep nAP50 seeds=0-1 -->\n{END}\n", tmp_path)
    assert "35.00" in filled and "15.00" in filled and "99" not in filled
    assert fill_tables(filled, tmp_path) == filled
    with pytest.raises(ValueError, match='"seeds=two" is no range of seeds'):
        fill_tables(f"<!-- table: one+two/deep nAP50 seeds=two -->\n{END}\n", tmp_path)
    with pytest.raises(ValueError, match="seed"):
        fill_tables(f"<!-- table: one+two/deep nAP50 -->\n{END}\n", tmp_path)
