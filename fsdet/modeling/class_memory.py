"""Class memory: what a method keeps of each class's supports, with the digests of what it was made from.

Entries hold any tensors (a prototype (D,), feature maps (C, H, W) of different sizes, a word vector), so every method
shares it. Classes are added, replaced, renamed and removed without training, and a memory that another encoder has
made is refused. Stored as safetensors and JSON, see `class_memory_files`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from fsdet.modeling.class_memory_entry import (
    ClassEntry,
    SupportDigest,
    digest_supports,
    dtype_name,
    module_digest,
    support_keys,
)
from fsdet.modeling.class_memory_files import pair_of, read_pair, write_pair

__all__ = [
    "ClassEntry", "ClassMemory", "MemoryComparison", "SupportDigest", "digest_supports", "module_digest",
    "support_keys",
]  # fmt: skip

_SHORT = 12  # characters of a digest in tables


class ClassMemory:
    """Entries by class name, in the order in which they were added.

    Attributes:
        kind: what the entries are, e.g. "prototypes".
        encoder: digest of what made the tensors, from `module_digest`.
    """

    def __init__(self, *, kind: str, encoder: str, entries: Mapping[str, ClassEntry] | None = None) -> None:
        """Make a memory. Raises: ValueError for an empty kind or encoder, and as `add`."""
        for word, value in (("kind", kind), ("encoder", encoder)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{word} of a class memory is {value!r}; expected a non-empty string")
        self.kind = kind
        self.encoder = encoder
        self._entries: dict[str, ClassEntry] = {}
        for name, entry in (entries or {}).items():
            self.add(name, entry)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in order."""
        return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> ClassEntry:
        """The entry of a class. Raises: ValueError naming the known classes."""
        if name not in self._entries:
            raise ValueError(f"No class {name!r} in this memory of {self.kind}; it has {list(self.names)}")
        return self._entries[name]

    def add(self, name: str, entry: ClassEntry) -> None:
        """Append a class. Raises: ValueError when the class is there already, and for an empty name."""
        _check_name(name)
        if name in self._entries:
            raise ValueError(f"Class {name!r} is in this memory already; replace it, or remove it first")
        self._entries[name] = _checked_entry(name, entry)

    def replace(self, name: str, entry: ClassEntry) -> None:
        """Exchange the entry of a class, which keeps its place. Raises: ValueError when the class is not there."""
        self[name]
        self._entries[name] = _checked_entry(name, entry)

    def remove(self, name: str) -> None:
        """Forget a class. Raises: ValueError when the class is not there."""
        self[name]
        del self._entries[name]

    def rename(self, old: str, new: str) -> None:
        """Give a class another name; it keeps its place. Raises: ValueError when old is not there, or new is."""
        self[old]
        _check_name(new)
        if new in self._entries:
            raise ValueError(f"Class {old!r} cannot be renamed to {new!r}, which is in this memory already")
        self._entries = {new if name == old else name: entry for name, entry in self._entries.items()}

    def copy_from(self, other: ClassMemory, names: Sequence[str] | None = None, *, replace: bool = False) -> None:
        """Take over classes of another memory; nothing changes when one of them cannot be taken.

        Args:
            other: a memory of the same kind and encoder.
            names: which classes; all when None.
            replace: exchange classes that are here (each of them must be), instead of adding new ones.
        Raises: ValueError for another kind or encoder, and as `add`, `replace` and `__getitem__`.
        """
        _check_origin(other.kind, other.encoder, self.kind, self.encoder, "The memory to copy from")
        result = ClassMemory(kind=self.kind, encoder=self.encoder, entries=self._entries)
        for name in other.names if names is None else names:
            (result.replace if replace else result.add)(name, other[name])
        self._entries = result._entries

    def select(self, names: Sequence[str]) -> ClassMemory:
        """A memory of these classes, in this order. Raises: ValueError for an unknown or repeated name."""
        result = ClassMemory(kind=self.kind, encoder=self.encoder)
        for name in names:
            result.add(name, self[name])
        return result

    def stack(self, key: str, names: Sequence[str] | None = None) -> Tensor:
        """One tensor of several classes.

        Args:
            key: which tensor of the entries.
            names: K classes in the order of the rows; all when None.
        Returns: (K, ...), a new tensor on the CPU, of the entries' type.
        Raises: ValueError for no class at all, an unknown class, a class without this tensor, and when shapes or
            types differ.
        """
        names = self.names if names is None else tuple(names)
        if not names:
            raise ValueError(f'No class to stack "{key}" of; encode a support set with at least one class')
        for name in names:
            tensors, first = self[name].tensors, self[names[0]].tensors.get(key)
            if key not in tensors:
                raise ValueError(f'Class {name!r} has no tensor "{key}"; it has {list(tensors)}')
            if _form(tensors[key]) != _form(first):
                raise ValueError(
                    f'"{key}" cannot be stacked: {_form(first)} of class {names[0]!r}, {_form(tensors[key])} of class '
                    f"{name!r}; read the classes one by one"
                )
        return torch.stack([self[name].tensors[key] for name in names])

    def compare(self, other: ClassMemory) -> MemoryComparison:
        """How `other` differs from this memory. Raises: ValueError for a memory of another kind."""
        if self.kind != other.kind:
            raise ValueError(f"Memories of {self.kind} and of {other.kind} cannot be compared; compare like with like")
        shared = [name for name in self if name in other]
        same = [name for name in shared if self[name].digest() == other[name].digest()]
        likeness = {name: self[name].likeness(other[name]) for name in shared}
        return MemoryComparison(
            added=tuple(name for name in other if name not in self),
            removed=tuple(name for name in self if name not in other),
            changed=tuple(name for name in shared if name not in same),
            same=tuple(same),
            cosine={name: {key: pair[0] for key, pair in row.items()} for name, row in likeness.items()},
            distance={name: {key: pair[1] for key, pair in row.items()} for name, row in likeness.items()},
            other_supports=tuple(
                n for n in shared if support_keys(self[n].supports) != support_keys(other[n].supports)
            ),
            same_encoder=self.encoder == other.encoder,
        )

    def summary(self) -> str:
        """A table with a line for each class: shots, distinct pictures, tensors, digest."""
        rows = [
            (
                name,
                len(entry.supports),
                len({support.digest for support in entry.supports}),
                ", ".join(f"{key} {_form(value)}" for key, value in entry.tensors.items()),
                entry.digest()[:_SHORT],
            )
            for name, entry in self._entries.items()
        ]
        head = f"{self.kind} of {len(self)} classes, encoder {self.encoder[:_SHORT]}"
        return f"{head}\n\n{_table(rows, 'class', 'shots', 'files', 'tensors', 'digest')}"

    def save(self, path: str | Path) -> None:
        """Write <path>.safetensors and <path>.json together: a kill leaves the old pair or the new one.

        Args:
            path: common name of the two files; a missing folder is made.
        Raises: OSError when the disk refuses; the old pair or the new one is whole then.
        """
        tensors: dict[str, Tensor] = {}
        classes = []
        for number, (name, entry) in enumerate(self._entries.items()):
            stored = {key: f"{number}/{key}" for key in entry.tensors}
            tensors |= {stored[key]: value for key, value in entry.tensors.items()}
            supports = [{"file_name": s.file_name, "digest": s.digest, "box": s.box} for s in entry.supports]
            classes.append({"name": name, "tensors": stored, "supports": supports})
        write_pair(path, {"kind": self.kind, "encoder": self.encoder, "classes": classes}, tensors)

    @classmethod
    def load(cls, path: str | Path, *, encoder: str | None = None, kind: str | None = None) -> ClassMemory:
        """Read a memory.

        Args:
            path: common name of the two files, or one of them.
            encoder, kind: what this run expects; None takes any.
        Raises: FileNotFoundError when a file is missing; ValueError when the memory comes from another encoder or is
            of another kind, when a file is damaged, when the two do not belong together, or for another version.
        """
        json_file = str(pair_of(path)[1])

        def check(content: Mapping[str, Any]) -> None:
            _check_origin(content.get("kind"), content.get("encoder"), kind, encoder, json_file)

        content, tensors = read_pair(path, check)
        where = "head"
        try:
            memory = cls(kind=content["kind"], encoder=content["encoder"])
            for item in content["classes"]:
                where = f"class {item['name']!r}"
                supports = tuple(SupportDigest(s["file_name"], s["digest"], s["box"]) for s in item["supports"])
                own = {key: tensors.pop(stored) for key, stored in item["tensors"].items()}
                memory.add(item["name"], ClassEntry(own, supports))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{json_file} is damaged, {where}: {error!r}; encode the supports again") from error
        if tensors:
            raise ValueError(f"{json_file} gives no class for tensors {sorted(tensors)}; encode the supports again")
        return memory


@dataclass(frozen=True)
class MemoryComparison:
    """How a second memory differs from a first one.

    Attributes:
        added, removed: classes of the second alone, and of the first alone.
        changed: classes of both whose tensors or supports differ.
        same: classes of both with equal tensors, bit for bit, from equal supports.
        cosine: class -> tensor -> cosine, see `ClassEntry.likeness`; tensors of different shapes are left out.
        distance: class -> tensor -> relative distance, likewise.
        other_supports: classes of both that were made of other pictures or boxes; their order and where the files lie
            do not count.
        same_encoder: False where tensors of different encoders were compared.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    same: tuple[str, ...]
    cosine: Mapping[str, Mapping[str, float]]
    distance: Mapping[str, Mapping[str, float]]
    other_supports: tuple[str, ...]
    same_encoder: bool

    def table(self) -> str:
        """The comparison as text, with a line for each class and tensor."""
        rows: list[tuple[str, ...]] = []
        for name, cosines in self.cosine.items():
            state = "same" if name in self.same else "changed"
            supports = "other" if name in self.other_supports else "same"
            rows += [
                (name, state, supports, key, f"{value:.6f}", f"{self.distance[name][key]:.2e}")
                for key, value in cosines.items()
            ] or [(name, state, supports, "other shapes")]
        rows += [(name, "added") for name in self.added]
        rows += [(name, "removed") for name in self.removed]
        text = _table(rows, "class", "state", "supports", "tensor", "cosine", "distance")
        return text if self.same_encoder else f"{text}\n\nThe encoders differ, so cosines and distances say little."


def _table(rows: Sequence[Sequence[Any]], *header: str) -> str:
    width = len(header)
    return tabulate([[*row, *[""] * (width - len(row))] for row in rows], header, disable_numparse=True)


def _form(tensor: Tensor) -> str:
    return f"{dtype_name(tensor)} {tuple(tensor.shape)}"


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"Class name {name!r} in a class memory; expected a non-empty string")


def _checked_entry(name: str, entry: ClassEntry) -> ClassEntry:
    if not isinstance(entry, ClassEntry):
        raise ValueError(f"Class {name!r}: got a {type(entry).__name__}, expected a ClassEntry")
    return entry


def _check_origin(kind: Any, encoder: Any, wanted_kind: str | None, wanted_encoder: str | None, what: str) -> None:
    if wanted_kind is not None and kind != wanted_kind:
        raise ValueError(f"{what} holds {kind}, expected {wanted_kind}; check the path")
    if wanted_encoder is not None and encoder != wanted_encoder:
        raise ValueError(
            f"{what} was made by encoder {encoder}, expected {wanted_encoder}: weights or settings of the encoder "
            "differ; encode the supports again"
        )
