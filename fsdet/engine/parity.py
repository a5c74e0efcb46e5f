"""Compare fsdet with golden files: numbers that the methods' official implementations computed on small inputs.

A golden folder holds the files of one method. For each file of its schema a checker computes the same arrays with
fsdet's own classes and reports the largest difference per array. Nothing is passed over in silence: every array is
compared or stands in the checker's table of inputs, and an unknown, missing or skipped one fails, as does a file
without checker. Only arrays that the schema calls optional never fail.

The checkers of a method are a module with `SCHEMA` (stems of all its files) and `CHECKERS` (stem -> function).
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

# Absolute tolerance, taken relative for numbers above 1; the golden folders' README names the exceptions.
TOLERANCE = 1e-5

# Modules with the checkers of one method each.
FAMILIES = ("fsdet.engine.parity_defrcn", "fsdet.engine.parity_fewx", "fsdet.engine.parity_os2d")
SUFFIXES = (".npz", ".json", ".json.gz")


@dataclass(frozen=True)
class Comparison:
    """What became of one array.

    Attributes:
        name: of the array, "/"-separated.
        max_abs, max_rel: largest absolute and relative difference; inf where shapes, types or texts differ.
        passed: whether they are within the tolerance.
        optional: reported, never a failure.
        note: "input", or what differs.
    """

    name: str
    max_abs: float
    max_rel: float
    passed: bool
    optional: bool = False
    note: str = ""


Checker = Callable[[Path], Iterable[Comparison]]


def failure(name: str, note: str) -> Comparison:
    """A comparison that could not be made."""
    return Comparison(name, math.inf, math.inf, False, note=note)


def check_folder(folder: Path, only: Sequence[str] = ()) -> dict[str, list[Comparison]]:
    """Run every file of a golden folder through fsdet.

    Args:
        folder: golden folder of one method.
        only: first letters or stems of the files to check (`c` stands for c_surgery); all when empty.
    Returns: comparisons by file stem, in alphabetical order.
    Raises: FileNotFoundError or ValueError when the folder is none, or `only` names no file of it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a golden folder of one method")
    present = {_stem(path): path for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)}
    family = find_family(folder, present)
    stems = sorted(set(present) | set(family.SCHEMA))
    for word in only:
        if not any(_selected(stem, [word]) for stem in stems):
            raise ValueError(f"--only {word}: no such file in {folder}; it has {', '.join(stems)}")
    stems = [stem for stem in stems if not only or _selected(stem, only)]
    return {stem: list(_check_file(folder, stem, stem in present, family)) for stem in stems}


def find_family(folder: Path, stems: Iterable[str]) -> ModuleType:
    """The checkers whose schema shares most files with the folder.

    Raises: ValueError when none shares any.
    """
    modules = [importlib.import_module(name) for name in FAMILIES]
    best = max(modules, key=lambda module: len(set(module.SCHEMA) & set(stems)))
    if not set(best.SCHEMA) & set(stems):
        known = "; ".join(", ".join(module.SCHEMA) for module in modules)
        raise ValueError(f"{folder}: no file of a known schema; expected some of {known}")
    return best


def _stem(path: Path) -> str:
    return path.name.split(".", 1)[0]


def _selected(stem: str, only: Sequence[str]) -> bool:
    return stem in only or stem.split("_", 1)[0] in only


def _check_file(folder: Path, stem: str, present: bool, family: ModuleType) -> Iterator[Comparison]:
    """Comparisons of one file; whatever stops its checker becomes a failure."""
    if stem not in family.SCHEMA:
        yield failure("(file)", "unknown file: the schema does not have it")
    elif not present:
        yield failure("(file)", "missing file: the schema has it")
    elif stem not in family.CHECKERS:
        yield failure("(file)", "no checker for this file")
    else:
        count = 0
        try:
            for comparison in family.CHECKERS[stem](folder):
                count += 1
                yield comparison
        except Exception as error:  # one broken file must not hide the others
            yield failure("(file)", f"the check stopped: {type(error).__name__}: {error}")
        if not count:
            yield failure("(file)", "the checker compared nothing")


def golden_file(folder: Path, stem: str) -> Path:
    """Path of a file of a golden folder.

    Raises: FileNotFoundError when the folder does not have it.
    """
    for suffix in SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise FileNotFoundError(f"{folder} has no {stem}{{{','.join(SUFFIXES)}}}; copy the golden folder again")


def read_json(path: Path) -> Any:
    """Content of a .json or .json.gz file."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz file by name."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


class Ledger:
    """The arrays of one file, and which of them have been dealt with.

    Args:
        values: name -> array or JSON value, as found in the file.
        inputs: names that are inputs of the computation.
        expected: names that must be compared.
        optional: names whose comparison is reported but never fails.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        inputs: Iterable[str] = (),
        expected: Iterable[str] = (),
        optional: Iterable[str] = (),
    ) -> None:
        self.values = values
        self.inputs, self.expected, self.optional = tuple(inputs), tuple(expected), tuple(optional)
        self._compared: set[str] = set()

    def compare(self, name: str, got: Any, tolerance: float = TOLERANCE) -> Comparison:
        """Compare a computed value with the file's; each name once."""
        if name not in self.values:
            return failure(name, "missing in the file")
        self._compared.add(name)
        return compare(name, self.values[name], got, tolerance=tolerance, optional=name in self.optional)

    def custom(self, comparison: Comparison) -> Comparison:
        """Take over a comparison that was made by other means than equality (statistics of random numbers)."""
        self._compared.add(comparison.name)
        return comparison

    def rest(self) -> Iterator[Comparison]:
        """One row per input, and one failure per name that is unknown, missing or was never compared."""
        known = (*self.inputs, *self.expected, *self.optional)
        for name in self.inputs:
            if name in self.values:
                yield Comparison(name, 0.0, 0.0, True, note="input")
        for name in known:
            if name not in self.values and name not in self.optional:
                yield failure(name, "missing in the file")
        for name in self.values:
            if name not in known:
                yield failure(name, "unknown: the schema does not have it")
            elif name not in self._compared and name not in self.inputs:
                yield failure(name, "skipped: never compared")


def compare(name: str, expected: Any, got: Any, *, tolerance: float = TOLERANCE, optional: bool = False) -> Comparison:
    """Compare arrays, or JSON values of any depth. Integers, texts and structure must agree exactly.

    Args:
        tolerance: for floating-point numbers: absolute, relative where the expected number is above 1.
    """
    worst = [0.0, 0.0, 0.0]  # absolute, relative, absolute difference over the allowed one
    note = _difference(expected, got, tolerance, worst, "")
    if note:
        return Comparison(name, math.inf, math.inf, False, optional, note)
    return Comparison(name, worst[0], worst[1], worst[2] <= 1.0, optional)


def _difference(expected: Any, got: Any, tolerance: float, worst: list[float], where: str) -> str:
    """Collect the largest differences in `worst`; returns what cannot be expressed as a number, or ""."""
    if isinstance(expected, Mapping):
        return _mapping_difference(expected, got, tolerance, worst, where)
    if isinstance(expected, list | tuple) and not _is_numbers(expected):
        return _list_difference(expected, got, tolerance, worst, where)
    if isinstance(expected, str) or expected is None or isinstance(got, str | Mapping) or got is None:
        return "" if type(expected) is type(got) and expected == got else _unequal(where, expected, got)
    return _number_difference(np.asarray(expected), np.asarray(got), tolerance, worst, where)


def _is_numbers(values: Sequence[Any]) -> bool:
    """Whether a list holds only numbers, so that it can be compared as one array."""
    return bool(values) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _unequal(where: str, expected: Any, got: Any) -> str:
    return f"{where or 'value'}: expected {_short(expected)}, got {_short(got)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _mapping_difference(expected: Mapping, got: Any, tolerance: float, worst: list[float], where: str) -> str:
    if not isinstance(got, Mapping):
        return _unequal(where, expected, got)
    if set(expected) != set(got):
        missing, extra = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
        return f"{where or 'keys'}: missing {_short(missing)}, unexpected {_short(extra)}"
    notes = (_difference(expected[key], got[key], tolerance, worst, f"{where}/{key}") for key in expected)
    return next((note for note in notes if note), "")


def _list_difference(expected: Sequence, got: Any, tolerance: float, worst: list[float], where: str) -> str:
    if not isinstance(got, list | tuple) or len(expected) != len(got):
        length = len(got) if isinstance(got, list | tuple) else _short(got)
        return f"{where or 'list'}: expected {len(expected)} entries, got {length}"
    pairs = enumerate(zip(expected, got, strict=True))
    notes = (_difference(left, right, tolerance, worst, f"{where}[{i}]") for i, (left, right) in pairs)
    return next((note for note in notes if note), "")


def _number_difference(expected: np.ndarray, got: np.ndarray, tolerance: float, worst: list[float], where: str) -> str:
    if expected.shape != got.shape:
        return f"{where or 'shape'}: expected {expected.shape}, got {got.shape}"
    if not (np.issubdtype(expected.dtype, np.number) and np.issubdtype(got.dtype, np.number)):
        return (
            "" if expected.dtype.kind == got.dtype.kind and (expected == got).all() else _unequal(where, expected, got)
        )
    if expected.size == 0:
        return ""
    left, right = expected.astype(np.float64), got.astype(np.float64)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not a number ends up as infinitely far away
        difference = np.where(same, 0.0, np.abs(left - right))
        magnitude = np.abs(np.where(same, 1.0, left))
        integers = np.issubdtype(expected.dtype, np.integer) and np.issubdtype(got.dtype, np.integer)
        relative = np.where(same, 0.0, difference / magnitude)
        excess = np.where(same, 0.0, difference / (0.0 if integers else tolerance * np.maximum(1.0, magnitude)))
    for index, values in enumerate((difference, relative, excess)):
        worst[index] = max(worst[index], float(np.nan_to_num(values, nan=np.inf, posinf=np.inf).max()))
    return ""


def all_passed(results: Mapping[str, Sequence[Comparison]]) -> bool:
    """Whether no comparison failed, optional ones aside, and there was at least one."""
    rows = [comparison for comparisons in results.values() for comparison in comparisons]
    return bool(rows) and all(row.passed or row.optional for row in rows)


def render(results: Mapping[str, Sequence[Comparison]], *, brief: bool = False) -> str:
    """One line per array (with `brief`: per failed array), one per file, and the verdict."""
    lines = []
    for stem, comparisons in results.items():
        lines.extend(_line(stem, row) for row in comparisons if not brief or not row.passed)
        lines.append(_summary(stem, comparisons))
    lines.append("PASSED" if all_passed(results) else "FAILED")
    return "\n".join(lines) + "\n"


def _line(stem: str, row: Comparison) -> str:
    verdict = "pass" if row.passed else "optional, differs" if row.optional else "FAIL"
    note = f"  ({row.note})" if row.note else ""
    return f"{verdict}  {stem}  {row.name}  abs {row.max_abs:.1e}  rel {row.max_rel:.1e}{note}"


def _summary(stem: str, rows: Sequence[Comparison]) -> str:
    failed = sum(not row.passed and not row.optional for row in rows)
    inputs = sum(row.note == "input" for row in rows)
    worst = max((row.max_abs for row in rows if row.passed), default=0.0)
    compared = len(rows) - inputs
    return f"== {stem}: {compared} compared, {inputs} inputs, {failed} failed; worst passing difference {worst:.1e}"
