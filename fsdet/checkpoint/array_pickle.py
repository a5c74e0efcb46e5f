"""Pickles of arrays, read as data: nothing that a file names is ever called, except the rebuilders written here.

Old model zoos store weights as pickled dictionaries of numpy arrays, and unpickling such a file may run any code. The
names that numpy writes into a pickle are mapped to small stand-ins that keep what the file says; only afterwards, from
checked values, do they become arrays. Numpy's own rebuilders are not used either: the state of a dtype is input too,
and a forged one can make raw bytes pass for object pointers.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np

# Numbers, truth values and fixed-width strings; no objects, no records.
_PLAIN_DTYPE = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,6})")

# numpy 1 and 2 use different module paths; Python 2 called builtins differently.
_NUMPY_CORE = ("numpy.core", "numpy._core")
_BUILTINS = ("builtins", "__builtin__")


class _Dtype:
    """A dtype as the pickle writes it: kind and width first, byte order in the state."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"dtype {code!r} is not admitted (numbers and fixed-width strings only)")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        # (version, byte order, subarray, names, fields, width, alignment, flags, ...); the middle is None if plain.
        if any(part is not None for part in state[2:5]) or state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("a record dtype is not admitted")
        if state[1] != "|":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array as the pickle writes it; `array` is set once the state has been read."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, is_fortran, data = state[-4:]
        self.array = _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """Copy raw bytes into a new array of native byte order."""
    if isinstance(data, str):  # Python 2 wrote bytes as a string, decoded as latin1 here
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array of objects is not admitted")
    array = np.ndarray(shape, dtype.dtype, buffer=data, order=order)
    if array.nbytes != len(data):
        raise pickle.UnpicklingError(f"an array of shape {shape} has {len(data)} bytes, expected {array.nbytes}")
    return array.astype(array.dtype.newbyteorder("="))


def admitted_globals() -> dict[str, Any]:
    """Full name -> what a file gets for it. New at every call, so that no file can alter what the next one gets."""

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"bytes written as {encoding!r} are not admitted")
        return text.encode("latin1")

    def empty_bytes() -> bytes:
        return b""

    def reconstruct(*_: Any) -> _Array:
        return _Array()

    def scalar(dtype: _Dtype, data: bytes | str) -> np.generic:
        return _array(data, dtype, (), "C")[()]

    def from_buffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
        return _array(data, dtype, shape, "F" if order == "F" else "C")

    names: dict[str, Any] = {"collections.OrderedDict": OrderedDict, "_codecs.encode": encode}
    for module in _BUILTINS:
        names |= {f"{module}.{kind.__name__}": kind for kind in (set, frozenset, complex)}
        names[f"{module}.bytes"] = empty_bytes
    names |= {"numpy.ndarray": _Array, "numpy.dtype": _Dtype}
    for module in _NUMPY_CORE:
        names[f"{module}.multiarray._reconstruct"] = reconstruct
        names[f"{module}.multiarray.scalar"] = scalar
        names[f"{module}.numeric._frombuffer"] = from_buffer
    return names


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self._admitted = admitted_globals()

    def find_class(self, module: str, name: str) -> Callable:
        """Stand-in of an admitted name; anything else is refused before it is imported."""
        if f"{module}.{name}" not in self._admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only numpy arrays and containers are admitted")
        return self._admitted[f"{module}.{name}"]


def resolve_arrays(value: Any) -> Any:
    """Replace every stand-in inside dicts, lists and tuples by its array or dtype; other values are kept."""
    if isinstance(value, _Array):
        if value.array is None:
            raise pickle.UnpicklingError("an array without content")
        return value.array
    if isinstance(value, _Dtype):
        return value.dtype
    if isinstance(value, dict):
        for key in value:
            value[key] = resolve_arrays(value[key])
    elif isinstance(value, list):
        value[:] = [resolve_arrays(item) for item in value]
    elif isinstance(value, tuple) and type(value) is tuple:
        return tuple(resolve_arrays(item) for item in value)
    return value


def load_arrays(file: IO[bytes]) -> Any:
    """Read one pickle of plain containers and numpy arrays, protocols 0 to 5, also written by Python 2.

    Raises: pickle.UnpicklingError naming the first thing that is not admitted; whatever pickle raises for torn files.
    """
    return resolve_arrays(_ArrayUnpickler(file).load())
