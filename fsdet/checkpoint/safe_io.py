"""Read weight files without running code, write them without ever leaving half a file.

`.pth` is read by PyTorch's weights-only loader, `.pkl` by an unpickler that admits only numpy arrays and containers
(see `array_pickle`), `.safetensors` holds nothing but tensors. Every fault is one `CheckpointFileError` that names the
file. Files are written under a temporary name in the same folder and renamed once they are on disk, so that a run that
is killed while saving leaves the previous file whole.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from fsdet.checkpoint.array_pickle import admitted_globals, load_arrays, resolve_arrays
from fsdet.data.files import replacing

# What the weights-only loader takes as it is.
_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)

# Key of the safetensors metadata under which this project keeps its own entry, as JSON.
METADATA_KEY = "fsdet"


class CheckpointFileError(ValueError):
    """A weight file that cannot be used; the message names the file, the reason and the remedy."""


def load_weights(path: str | Path) -> dict[str, Any]:
    """Read a weight file into Detectron2's checkpoint layout, whatever its format.

    Args:
        path: .pkl (Detectron2, Caffe2 or other zoo dictionary), .safetensors, .pyth (pycls), anything else as .pth.
    Returns: dict with "model" (name -> tensor or array) and what else the file holds; files of Caffe2 and pycls carry
        "matching_heuristics" for Detectron2's name matching. Half-precision safetensors come as float32.
    Raises: FileNotFoundError; CheckpointFileError for a torn file and for one that holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Weight file {path} not found; check MODEL.WEIGHTS or the path on the command line")
    reader = {".pkl": _read_pickle, ".safetensors": _read_safetensors}.get(path.suffix, _read_torch)
    try:
        data = reader(path)
    except (MemoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise _torn(path, error) from error
        raise CheckpointFileError(
            f"{path} is damaged or holds more than plain weights, and was not loaded: {_reason(error)}. Weights are "
            "tensors and plain Python values; if you trust the file, save its tensors as .safetensors in the program "
            "that made it."
        ) from error
    except Exception as error:  # readers raise anything from EOFError to UnicodeDecodeError on a torn file
        raise _torn(path, error) from error
    return _as_checkpoint(data, path)


def _torn(path: Path, error: Exception) -> CheckpointFileError:
    kind = path.suffix or "weight"
    return CheckpointFileError(
        f"{path} ({path.stat().st_size} bytes) is truncated or no {kind} file: {_reason(error)}. Copy or download it "
        "again."
    )


def _reason(error: Exception) -> str:
    """The reason alone: PyTorch wraps it in advice to switch safety off, or in a guess about the file system."""
    text = str(error)
    for marker in ("WeightsUnpickler error:", "Trying to load ", "PytorchStreamReader failed"):
        if marker in text:
            text = text[text.index(marker) + len(marker) :]
    text = text.strip().split("\n")[0].split(". ")[0].strip().rstrip(".")
    return text or type(error).__name__


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return load_arrays(file)


def _read_torch(path: Path) -> Any:
    admitted = [(kind, name) for name, kind in admitted_globals().items() if name.startswith("numpy.")]
    with torch.serialization.safe_globals(admitted):
        return resolve_arrays(torch.load(path, map_location="cpu", weights_only=True))


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    half = (torch.float16, torch.bfloat16)
    tensors = {name: value.float() if value.dtype in half else value for name, value in tensors.items()}
    data: dict[str, Any] = {"model": tensors}
    if METADATA_KEY in metadata:
        data[METADATA_KEY] = json.loads(metadata.pop(METADATA_KEY))
    return data | {"metadata": metadata} if metadata else data


def _as_checkpoint(data: Any, path: Path) -> dict[str, Any]:
    """Bring the layouts of the known model zoos to {"model": ...}, as Detectron2's own reader does."""
    if not isinstance(data, dict):
        raise CheckpointFileError(f"{path} holds a {type(data).__name__}, expected a dictionary of weights")
    if path.suffix == ".pyth" and "model_state" in data:
        state = {k: v for k, v in data["model_state"].items() if not k.endswith("num_batches_tracked")}
        data = {"model": state, "__author__": "pycls", "matching_heuristics": True}
    elif path.suffix == ".pkl" and not ("model" in data and "__author__" in data):
        blobs = data.get("blobs", data)
        state = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
        data = {"model": state, "__author__": "Caffe2", "matching_heuristics": True}
    elif not isinstance(data.get("model"), dict):
        data = {"model": data["net"] if isinstance(data.get("net"), dict) else data}  # "net": OS2D's files
    odd = [name for name, value in data["model"].items() if not isinstance(value, torch.Tensor | np.ndarray)]
    if odd or not data["model"]:
        what = f"entries that are no tensors ({', '.join(map(str, odd[:5]))})" if odd else "no tensors"
        raise CheckpointFileError(f"{path} holds {what}; expected a state dict, or one under the key 'model'")
    return data


def save_atomic(obj: Mapping[str, Any], path: str | Path) -> None:
    """Write tensors and plain Python values as a `.pth` that loads weights-only; numpy values become plain ones.

    Raises: TypeError naming the first entry that a weights-only load would refuse; nothing is written then.
    """
    data = _plain(obj, "")
    with replacing(path) as temporary:
        torch.save(data, temporary)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN_TYPES:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, OrderedDict):  # a state dict keeps the versions of its modules in an attribute
        result = OrderedDict((key, _plain(item, f"{where}/{key}")) for key, item in value.items())
        result.__dict__.update(value.__dict__)
        return result
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        return kind(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise TypeError(
        f"Checkpoint entry {where or '/'} is a {type(value).__module__}.{type(value).__name__}, which cannot be loaded "
        "weights-only; store tensors, numbers, strings and containers of them"
    )


def save_safetensors(
    state_dict: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict as safetensors.

    Args:
        state_dict: name -> tensor or array; tensors that share memory are written separately.
        path: file to write, replaced only when the new one is complete.
        metadata: plain values kept as JSON under the key "fsdet"; `load_weights` returns them under that key.
    """
    tensors = {name: torch.as_tensor(value).detach().cpu().contiguous() for name, value in state_dict.items()}
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.untyped_storage().data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.untyped_storage().data_ptr())
    header = {METADATA_KEY: json.dumps(metadata)} if metadata else None
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, header)
