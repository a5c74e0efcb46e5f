"""The two files of a class memory: tensors as safetensors, everything else as JSON, exchanged together or not at all.

The JSON names the SHA-256 of the tensor file and is the last word. New tensors are first written beside the old ones
under a hidden name that holds their digest; then the JSON is replaced, in one step; then the tensors take their final
name. A reader takes whichever of the two tensor files has the digest that the JSON names. So a kill at any moment
leaves the old pair or the new one. Writers wait for each other, readers need no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fsdet.data.files import flush_folder, replacing, save_text_atomic
from fsdet.modeling.class_memory_entry import dtype_name

try:
    import fcntl
except ImportError:  # no such locks outside Unix
    fcntl = None

FORMAT = "fsdet class memory"
VERSION = 1
# Characters of the digest in a hidden name; the content is checked against the whole digest.
_NAME_DIGITS = 16
# A reader starts over when a writer has replaced the JSON meanwhile; more than a few times in a row is no accident.
_ATTEMPTS = 5
_REMEDY = "encode the supports again, or copy both files of the memory again"


def pair_of(path: str | Path) -> tuple[Path, Path]:
    """(tensor file, JSON file) of a class memory; `path` is their common name, or one of the two.

    Raises: ValueError for a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the memory in it, such as {path / 'class_memory'}")
    if path.suffix in (".safetensors", ".json"):
        path = path.with_suffix("")
    return path.with_name(path.name + ".safetensors"), path.with_name(path.name + ".json")


def write_pair(path: str | Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace both files of a memory as one.

    Args:
        path: common name of the two files; a missing folder is made.
        content: what goes into the JSON beside format, version and the table of tensors.
        tensors: stored name -> contiguous CPU tensor; one tensor may stand under several names.
    Raises: OSError when the disk refuses; the old pair or the new one is whole then.
    """
    tensor_file, json_file = pair_of(path)
    tensor_file.parent.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(_apart(tensors))
    digest = hashlib.sha256(data).hexdigest()
    head = {"format": FORMAT, "version": VERSION, "tensor_file_sha256": digest}
    table = {name: {"dtype": dtype_name(value), "shape": list(value.shape)} for name, value in tensors.items()}
    text = json.dumps({**head, **content, "tensors": table}, indent=1)  # ASCII: any name survives

    waiting = _waiting(tensor_file, digest)
    with _locked(tensor_file.parent):
        with replacing(waiting) as temporary:
            temporary.write_bytes(data)
        save_text_atomic(text, json_file)
        waiting.replace(tensor_file)
        flush_folder(tensor_file.parent)
        for left in _left_behind(tensor_file):
            left.unlink(missing_ok=True)


def read_pair(
    path: str | Path, check: Callable[[Mapping[str, Any]], None] = lambda content: None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON and the tensors that belong to it.

    Args:
        path: common name of the two files, or one of them.
        check: called with the content of the JSON before the tensors are read; raises for what it refuses.
    Returns: content of the JSON, and stored name -> CPU tensor as the table in the JSON describes them.
    Raises: FileNotFoundError when a file is missing; ValueError when a file is damaged, when the two do not belong
        together, or for another format or version; what `check` raises.
    """
    _, json_file = pair_of(path)
    for _ in range(_ATTEMPTS):
        content = _read_content(json_file)
        check(content)
        try:
            return content, _read_tensors(path, content)
        except (FileNotFoundError, ValueError):
            if _read_content(json_file) == content:  # else a writer came between, and there is a new pair
                raise
    raise ValueError(f"{json_file} was replaced {_ATTEMPTS} times while it was read; try again when the writer is done")


def _read_content(json_file: Path) -> dict[str, Any]:
    try:
        content = json.loads(json_file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"Class memory {json_file} not found; check the path, or encode the supports") from None
    except ValueError as error:
        raise ValueError(f"{json_file} is damaged ({error}); {_REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{json_file} is no class memory: "format" is not "{FORMAT}"; check the path')
    if content.get("version") != VERSION:
        raise ValueError(
            f"{json_file}: class memory of version {content.get('version')!r}, this program reads version {VERSION}; "
            "encode the supports again"
        )
    return content


def _read_tensors(path: str | Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    tensor_file, json_file = pair_of(path)
    digest, table = str(content.get("tensor_file_sha256")), content.get("tensors")
    data = _matching_bytes(tensor_file, digest)
    if data is None:
        if not tensor_file.is_file():
            raise FileNotFoundError(f"{tensor_file} not found, which {json_file} describes; {_REMEDY}")
        raise ValueError(f"{tensor_file} is not the file that {json_file} describes (SHA-256 {digest}); {_REMEDY}")
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{tensor_file} is damaged ({error}); {_REMEDY}") from error
    found = {name: {"dtype": dtype_name(value), "shape": list(value.shape)} for name, value in tensors.items()}
    if found != table:
        known = table if isinstance(table, dict) else {}
        name = min((name for name in {*found, *known} if found.get(name) != known.get(name)), default="")
        raise ValueError(
            f'{tensor_file}: tensor "{name}" is {found.get(name)}, {json_file} says {known.get(name)}; {_REMEDY}'
        )
    return tensors


def _matching_bytes(tensor_file: Path, digest: str) -> bytes | None:
    """Content of the tensor file with this digest; it waits under its hidden name where a writer was killed."""
    # The hidden name first: where it is gone, the tensors have taken the final one.
    for candidate in (_waiting(tensor_file, digest), tensor_file):
        with contextlib.suppress(FileNotFoundError):
            # Hashed and parsed from the same bytes: the file may be replaced between two readings.
            data = candidate.read_bytes()
            if hashlib.sha256(data).hexdigest() == digest:
                return data
    return None


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy what stands under two names, as one entry of two classes does; safetensors refuses shared memory."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        result[name] = value.clone() if id(value) in seen else value
        seen.add(id(value))
    return result


def _waiting(tensor_file: Path, digest: str) -> Path:
    return tensor_file.with_name(f".{tensor_file.stem}.{digest[:_NAME_DIGITS]}.safetensors")


def _left_behind(tensor_file: Path) -> Iterator[Path]:
    """Hidden files of this memory that a killed writer has left."""
    stem = re.escape(tensor_file.stem)
    hidden = rf"\.{stem}\.[0-9a-f]{{{_NAME_DIGITS}}}\.safetensors"
    pattern = re.compile(rf"{hidden}|(\.{stem}\.json|\.{hidden})\.\d+\.tmp", re.DOTALL)
    return (path for path in tensor_file.parent.iterdir() if pattern.fullmatch(path.name))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other writers out of the folder, where the system and its file system can; leaves no file."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
