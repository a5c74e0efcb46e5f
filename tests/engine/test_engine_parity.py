"""The parity tool's own rules: what passes, what a folder must hold, what the page says."""

import math
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from fsdet.engine import parity_defrcn
from fsdet.engine.parity import Ledger, all_passed, check_folder, compare, render

COPIES = Path(__file__).resolve().parents[1] / "golden" / "defrcn"


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "golden"
    folder.mkdir()
    for name in ("c_surgery.npz", "g_aggregate.json"):
        shutil.copyfile(COPIES / name, folder / name)
    return folder


def failures(results):
    return [
        f"{stem}/{row.name}" for stem, rows in results.items() for row in rows if not row.passed and not row.optional
    ]


def test_file_without_checker_fails(copy, monkeypatch):
    monkeypatch.delitem(parity_defrcn.CHECKERS, "c_surgery")
    (row,) = check_folder(copy, ["c_surgery"])["c_surgery"]
    assert not row.passed and row.note == "no checker for this file"


def test_missing_and_unknown_files_fail(copy):
    (copy / "g_aggregate.json").unlink()
    (copy / "h_new.npz").write_bytes(b"")
    (copy / "README.md").write_text("not a golden file")
    results = check_folder(copy, ["g_aggregate", "h"])
    assert {stem: rows[0].note for stem, rows in results.items()} == {
        "g_aggregate": "missing file: the schema has it",
        "h_new": "unknown file: the schema does not have it",
    }


def test_without_only_every_file_of_the_schema_is_checked(copy, monkeypatch):
    monkeypatch.setattr(parity_defrcn, "CHECKERS", {})
    results = check_folder(copy)
    assert set(results) == set(parity_defrcn.SCHEMA)
    assert len(failures(results)) == len(parity_defrcn.SCHEMA)


def test_checker_that_stops_or_finds_nothing_fails(copy, monkeypatch):
    def broken(folder):
        yield compare("first", 1, 1)
        raise KeyError("second")

    monkeypatch.setattr(parity_defrcn, "CHECKERS", {"c_surgery": broken, "g_aggregate": lambda folder: ()})
    results = check_folder(copy, ["c", "g"])
    assert [row.passed for row in results["c_surgery"]] == [True, False]
    assert "KeyError: 'second'" in results["c_surgery"][1].note
    assert results["g_aggregate"][0].note == "the checker compared nothing"


def test_folder_and_only_are_checked(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--only x: no such file"):
        check_folder(copy, ["x"])
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="no file of a known schema"):
        check_folder(tmp_path / "other")


class TestComparison:
    """The rules behind every array."""

    @pytest.mark.parametrize(
        ("expected", "got", "passed"),
        [
            (np.float32([1.0]), np.float32([1.0 + 9e-6]), True),
            (np.float32([1.0]), np.float32([1.0 + 2e-5]), False),
            (np.float32([0.0]), np.float32([2e-5]), False),
            (np.float32([1000.0]), np.float32([1000.009]), True),
            (np.float32([1000.0]), np.float32([1000.02]), False),
            (np.int64([7]), np.int64([8]), False),
            (np.int64([10**6]), np.int64([10**6 + 1]), False),
            (np.float64([np.nan, 1.0]), np.float64([np.nan, 1.0]), True),
            (np.float64([np.nan]), np.float64([0.0]), False),
            (np.float64([0.0]), np.float64([np.nan]), False),
            (np.float64([np.inf]), np.float64([5.0]), False),
            (np.float64([5.0]), np.float64([np.inf]), False),
            (np.zeros((2, 3)), np.zeros((3, 2)), False),
            (np.zeros((0, 4)), np.zeros((0, 4)), True),
            (np.array(["a", "b"]), np.array(["a", "b"]), True),
            (np.array(["a", "b"]), np.array(["a", "c"]), False),
            (np.array(["1"]), np.array([1]), False),
            ({"a": [1, 2.0]}, {"a": [1, 2.0 + 1e-7]}, True),
            ({"a": [1, 2]}, {"a": [1, 3]}, False),
            ({"a": 1}, {"a": 1, "b": 2}, False),
            ({"a": 1}, {}, False),
            ([{"a": "x"}], [{"a": "y"}], False),
            ([{"a": "x"}], [{"a": "x"}, {"a": "x"}], False),
            ([1, 2], [1, 2, 3], False),
            ("1", 1, False),
            (None, 0, False),
            (True, False, False),
            ([], [], True),
            ([[]], [[1]], False),
        ],
    )
    def test_what_passes(self, expected, got, passed):
        assert compare("x", expected, got).passed is passed

    def test_differences_are_reported(self):
        row = compare("x", np.float64([100.0, 1.0]), np.float64([100.5, 1.25]))
        assert (row.max_abs, row.max_rel, row.passed) == (0.5, 0.25, False)
        assert compare("x", [[1.0], ["a"]], [[1.0], ["b"]]).note == "[1][0]: expected 'a', got 'b'"

    def test_ledger_reports_missing_unknown_skipped_and_inputs(self):
        ledger = Ledger({"in": 1, "a": 1, "b": 1, "new": 1}, inputs=["in", "in2"], expected=["a", "b", "c"])
        rows = [ledger.compare("a", 1), *ledger.rest()]
        assert {row.name: (row.passed, row.note.split(":")[0]) for row in rows} == {
            "a": (True, ""), "in": (True, "input"), "in2": (False, "missing in the file"),
            "c": (False, "missing in the file"), "b": (False, "skipped"), "new": (False, "unknown"),
        }  # fmt: skip

    def test_optional_arrays_never_fail(self):
        ledger = Ledger({"a": 1.0}, optional=["a", "b"])
        rows = [ledger.compare("a", 2.0), *ledger.rest()]
        results = {"file": rows}
        assert [(row.name, row.passed, row.optional) for row in rows] == [("a", False, True)]
        assert all_passed(results)
        assert "optional, differs  file  a" in render(results)

    def test_nothing_compared_is_no_pass(self):
        assert not all_passed({})
        assert not all_passed({"file": []})

    def test_page(self):
        rows = [compare("a", 1.0, 1.0), compare("b", "x", "y"), Ledger({"c": 1}, inputs=["c"]).rest().__next__()]
        assert render(OrderedDict(file=rows)).splitlines() == [
            "pass  file  a  abs 0.0e+00  rel 0.0e+00",
            "FAIL  file  b  abs inf  rel inf  (value: expected 'x', got 'y')",
            "pass  file  c  abs 0.0e+00  rel 0.0e+00  (input)",
            "== file: 2 compared, 1 inputs, 1 failed; worst passing difference 0.0e+00",
            "FAILED",
        ]
        assert render({"file": rows}, brief=True).splitlines()[0].startswith("FAIL  file  b")
        assert math.isinf(rows[1].max_abs)
