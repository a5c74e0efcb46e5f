"""One class of a class memory: its tensors, and the digests of the supports and of the encoder behind them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fsdet.data.files import sha256_of

if TYPE_CHECKING:
    from fsdet.data.support import Support

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What safetensors stores and every device computes with.
_TYPES = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_MAX_NAMED = 3  # pictures named in an error


@dataclass(frozen=True)
class SupportDigest:
    """One support that an entry was made of.

    Attributes:
        file_name: path of the picture when it was encoded.
        digest: SHA-256 of the file's content, hexadecimal.
        box: XYXY in pixels of the picture.
    """

    file_name: str
    digest: str
    box: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        """Raise ValueError for a box that is not four finite numbers, and for a digest that is no string."""
        if not isinstance(self.digest, str):
            raise ValueError(f"{self.file_name}: digest {self.digest!r} of a support; expected a string")
        box = tuple(float(value) for value in self.box)
        if len(box) != 4 or not all(map(math.isfinite, box)):
            raise ValueError(f"{self.file_name}: box {self.box} of a support; expected four finite numbers, XYXY")
        object.__setattr__(self, "file_name", str(self.file_name))
        object.__setattr__(self, "box", box)


@dataclass(frozen=True, eq=False)
class ClassEntry:
    """What is kept of one class.

    Attributes:
        tensors: name -> tensor of any shape and of a float, integer or bool type, e.g. {"prototype": (D,)}. Kept as
            detached contiguous copies on the CPU, of the type given.
        supports: what they were made of; empty where that is no pictures (word vectors).
    """

    tensors: Mapping[str, Tensor]
    supports: tuple[SupportDigest, ...] = ()

    def __post_init__(self) -> None:
        """Copy the tensors. Raises: ValueError when there is none, and for a name or value that cannot be kept."""
        object.__setattr__(self, "supports", tuple(self.supports))
        if not self.tensors:
            raise ValueError("A class entry without tensors; expected at least one, such as {'prototype': ...}")
        for key, value in self.tensors.items():
            self._check(key, value)
        copies = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in self.tensors.items()
        }
        object.__setattr__(self, "tensors", copies)

    def _check(self, key: str, value: Tensor) -> None:
        if not isinstance(key, str) or not key or not key.isprintable():
            raise ValueError(f"Tensor name {key!r} in a class entry; expected a printable word such as prototype")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in _TYPES:
            kind = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f'"{key}" of a class entry is {kind}; expected a dense float, integer or bool tensor')
        if value.dtype in _FLOATS and not torch.isfinite(value).all():
            files = list(dict.fromkeys(support.file_name for support in self.supports))
            origin = f" (made of {', '.join(files[:_MAX_NAMED])}{', ...' if files[_MAX_NAMED:] else ''})"
            raise ValueError(
                f'"{key}" of a class entry{origin if files else ""} holds nan or inf; check the encoder\'s weights and '
                "the supports"
            )

    def digest(self) -> str:
        """SHA-256 over the tensors and over content and boxes of the supports, not over where the files lie."""
        return _digest_of(self.tensors, support_keys(self.supports))

    def likeness(self, other: ClassEntry) -> dict[str, tuple[float, float]]:
        """Tensor name -> (cosine, relative distance), for the tensors that both have in the same shape.

        The cosine of the flattened tensors lies in [-1, 1] and is 1 for two zeros, 0 for one. The distance is the norm
        of the difference by the larger norm, in [0, 2].
        """
        shared = [key for key in self.tensors if key in other.tensors]
        pairs = {key: (self.tensors[key], other.tensors[key]) for key in shared}
        return {key: _likeness(a, b) for key, (a, b) in pairs.items() if a.shape == b.shape}


def support_keys(supports: Sequence[SupportDigest]) -> list[tuple[str, tuple[float, ...]]]:
    """Content digest and box of supports, sorted: equal for the same supports elsewhere or in other order."""
    return sorted((support.digest, support.box) for support in supports)


def module_digest(module: nn.Module, *settings: Any) -> str:
    """SHA-256 of what makes a module's output: its state, and the settings that stand in no tensor.

    Names, types, shapes and values of the parameters and of all buffers count, also of buffers outside the state dict
    (Detectron2's pixel mean). Device, memory format and the order of registration do not.

    Args:
        module: the encoder; a wrapper for parallel training is looked through.
        settings: plain values (numbers, strings, None, lists and string-keyed dicts of them), in this order.
    Returns: 64 hexadecimal digits.
    Raises: ValueError for a setting that is no plain value, and for a module whose values are not in memory yet.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        module = module.module
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return _digest_of({**dict(parameters), **dict(buffers)}, settings)


def digest_supports(supports: Sequence[Support]) -> tuple[SupportDigest, ...]:
    """Digests of supports, in their order. Each file is read once, so pass the supports of all classes in one call.

    Raises: FileNotFoundError naming a picture that is missing; OSError for one that cannot be read.
    """
    digests: dict[str, str] = {}
    for support in supports:
        if support.file_name not in digests:
            digests[support.file_name] = _file_digest(support.file_name)
    return tuple(SupportDigest(s.file_name, digests[s.file_name], s.box) for s in supports)


def dtype_name(tensor: Tensor) -> str:
    """Name of a tensor's type, e.g. "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def _file_digest(file_name: str) -> str:
    try:
        return sha256_of(file_name)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file_name}: picture of a support not found; unpack the data set again, or correct the K-shot list"
        ) from None


def _digest_of(tensors: Mapping[str, Tensor], settings: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_meta or isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f'"{name}" has no values yet; load the weights before taking the digest')
        digest.update(json.dumps([name, dtype_name(tensor), list(tensor.shape)]).encode())
        # reshape gives the values in logical order, whatever the memory format.
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    try:
        digest.update(json.dumps(settings, sort_keys=True).encode())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"A setting of {settings} is no plain value ({error}); give numbers, strings, and lists or dicts of them"
        ) from error
    return digest.hexdigest()


def _likeness(a: Tensor, b: Tensor) -> tuple[float, float]:
    a, b = a.flatten().double(), b.flatten().double()
    norms = float(a.norm()), float(b.norm())
    distance = float((b - a).norm()) / (max(norms) or 1.0)
    if not min(norms):
        return float(not max(norms)), distance
    return max(-1.0, min(1.0, float((a / norms[0]) @ (b / norms[1])))), distance
