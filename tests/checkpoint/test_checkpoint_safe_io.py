"""Reading without running code, writing without leaving half a file."""

import hashlib
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from fsdet.checkpoint import safe_io
from fsdet.checkpoint.array_pickle import load_arrays
from fsdet.checkpoint.safe_io import CheckpointFileError, load_weights, save_atomic, save_safetensors
from fsdet.data.files import save_text_atomic, sha256_of

ARRAYS = {
    "float": np.arange(6, dtype="f4").reshape(2, 3) / 7,
    "big_endian": np.arange(4, dtype=">i8"),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "bool": np.array([True, False]),
    "half": np.array([0.5, 2.0], dtype="f2"),
    "empty": np.zeros((0, 5), dtype="f4"),
    "scalar_array": np.array(3.0),
    "text": np.array(["ab", "c"]),
}


class Payload:
    """Writes a file when unpickled by a loader that trusts it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def as_numpy_1(data: bytes, protocol: int) -> bytes:
    """The same pickle as numpy 1 writes it: module numpy.core instead of numpy._core."""
    if protocol < 4:
        return data.replace(b"numpy._core.", b"numpy.core.")
    assert data[2:3] == b"\x95"  # the frame holds a length that the replacement would break; frames are optional
    data = data[:2] + data[11:]
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        short = name.replace(b"_core", b"core")
        data = data.replace(bytes([len(name)]) + name, bytes([len(short)]) + short)
    return data


@pytest.mark.parametrize("numpy_1", [False, True])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickled_arrays_of_every_protocol(protocol, numpy_1):
    zoo = {
        "model": OrderedDict(ARRAYS),
        "__author__": "somebody",
        "number": np.float64(2.5),
        "nested": [(np.int64(3), {"a"}, b"\xff\x00", b"")],
    }
    data = pickle.dumps(zoo, protocol)
    if numpy_1:
        assert b"numpy._core" in data
        data = as_numpy_1(data, protocol)
        assert b"numpy._core" not in data and b"numpy.core" in data
    loaded = load_arrays(io.BytesIO(data))
    assert list(loaded["model"]) == list(ARRAYS)
    for name, expected in ARRAYS.items():
        value = loaded["model"][name]
        assert np.array_equal(value, expected) and value.dtype == expected.dtype.newbyteorder("="), name
        assert value.dtype.isnative and value.flags.writeable
    assert loaded["number"] == 2.5 and loaded["nested"] == [(3, {"a"}, b"\xff\x00", b"")]


def test_python_2_pickle():
    raw = np.array([1.5, -2.0], dtype="<f4").tobytes()
    data = (
        b"\x80\x02}U\x06conv_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + raw + b"tbs."
    )
    assert np.array_equal(load_arrays(io.BytesIO(data))["conv_w"], [1.5, -2.0])


def test_payload_runs_in_detectron2_and_is_refused_here(tmp_path):
    file, trace = tmp_path / "R-101.pkl", tmp_path / "trace"
    zoo = {"model": {"weight": np.ones((1, 1), "f4")}, "__author__": "somebody", "note": Payload(trace)}
    file.write_bytes(pickle.dumps(zoo, 2))

    with pytest.raises(CheckpointFileError, match=r"R-101.pkl.*was not loaded.*only numpy arrays"):
        load_weights(file)
    assert not trace.exists()

    DetectionCheckpointer(nn.Linear(1, 1))._load_file(str(file))
    assert trace.exists()  # the danger is real


@pytest.mark.parametrize("legacy_format", [False, True])
def test_payload_in_pth_is_refused(tmp_path, legacy_format):
    file, trace = tmp_path / "model.pth", tmp_path / "trace"
    data = {"model": {"weight": torch.ones(1)}, "note": Payload(trace)}
    torch.save(data, file, _use_new_zipfile_serialization=not legacy_format)
    with pytest.raises(CheckpointFileError, match=r"model.pth.*was not loaded: .*(getattr|touch|Path)") as error:
        load_weights(file)
    assert not trace.exists()
    assert "weights_only" not in str(error.value)  # no advice to switch safety off


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("builtins.eval", eval),
        ("objects", np.array([{}], dtype=object)),
        ("record", np.zeros(2, dtype=[("a", "f4")])),
        ("record", np.dtype([("a", "O")])),
    ],
)
def test_more_than_plain_arrays_is_refused(name, value):
    with pytest.raises(pickle.UnpicklingError, match="not admitted|are admitted"):
        load_arrays(io.BytesIO(pickle.dumps({name: value})))


def test_array_with_wrong_size_is_refused():
    data = pickle.dumps(np.zeros(3, "f4"), 2).replace(b"K\x03\x85", b"K\x02\x85")
    with pytest.raises(pickle.UnpicklingError, match=r"12 bytes, expected 8"):
        load_arrays(io.BytesIO(data))


def test_a_file_cannot_change_what_the_next_one_gets():
    forged = (
        b"\x80\x02cnumpy.core.multiarray\nscalar\n"
        b"N}U\x0c__defaults__)s\x86b."  # sets an attribute of the function that the name stands for
    )
    load_arrays(io.BytesIO(forged))
    assert load_arrays(io.BytesIO(pickle.dumps(np.float32(4), 2))) == 4
    assert load_arrays(io.BytesIO(pickle.dumps(b"ab", 2))) == b"ab"


def test_pth_with_numpy_values_loads(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "iteration": np.int64(7), "extra": np.arange(3)}, tmp_path / "a.pth")
    loaded = load_weights(tmp_path / "a.pth")
    assert loaded["iteration"] == 7 and loaded["extra"].tolist() == [0, 1, 2]


def _write(path: Path) -> bytes:
    state = {"w": torch.arange(500.0)}
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": {"w": state["w"].numpy()}, "__author__": "somebody"}))
    elif path.suffix == ".safetensors":
        save_safetensors(state, path)
    else:
        save_atomic({"model": state}, path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_named(tmp_path, name, kept):
    data = _write(tmp_path / name)
    assert load_weights(tmp_path / name)["model"]["w"][-1] == 499
    (tmp_path / name).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointFileError, match=rf"{name} .*truncated.*again"):
        load_weights(tmp_path / name)


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.pth not found"):
        load_weights(tmp_path / "gone.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(CheckpointFileError, match=r"page.pth"):
        load_weights(tmp_path / "page.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointFileError, match=r"list.pth holds a list"):
        load_weights(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "state.pth")
    with pytest.raises(CheckpointFileError, match=r"no tensors \(epoch\)"):
        load_weights(tmp_path / "state.pth")


def test_zoo_layouts(tmp_path):
    ones = np.ones(2, "f4")
    (tmp_path / "c2.pkl").write_bytes(pickle.dumps({"blobs": {"conv1_w": ones, "conv1_w_momentum": ones}}, 2))
    loaded = load_weights(tmp_path / "c2.pkl")
    assert list(loaded["model"]) == ["conv1_w"] and loaded["matching_heuristics"] and loaded["__author__"] == "Caffe2"
    torch.save({"model_state": {"s1.w": torch.ones(1), "n.num_batches_tracked": torch.ones(1)}}, tmp_path / "p.pyth")
    assert list(load_weights(tmp_path / "p.pyth")["model"]) == ["s1.w"]
    torch.save({"net": {"w": torch.ones(1)}, "optimizer": {"state": {}}}, tmp_path / "os2d.pth")
    assert list(load_weights(tmp_path / "os2d.pth")["model"]) == ["w"]
    torch.save({"w": torch.ones(1)}, tmp_path / "bare.pth")
    assert list(load_weights(tmp_path / "bare.pth")) == ["model"]


def test_half_safetensors_become_float32(tmp_path):
    values = {"conv.weight": torch.tensor([0.1, 2.0]).half(), "b": torch.ones(2).bfloat16(), "n": torch.ones(1).long()}
    safetensors.torch.save_file(values, tmp_path / "half.safetensors")
    loaded = load_weights(tmp_path / "half.safetensors")["model"]
    assert loaded["conv.weight"].dtype == loaded["b"].dtype == torch.float32 and loaded["n"].dtype == torch.int64
    assert torch.equal(loaded["conv.weight"], values["conv.weight"].float())


def test_safetensors_with_shared_memory_and_record(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    save_safetensors({"a": weight, "b": weight, "c": weight.t()}, tmp_path / "s.safetensors", {"classes": ["x", "y"]})
    loaded = load_weights(tmp_path / "s.safetensors")
    assert loaded["fsdet"] == {"classes": ["x", "y"]}
    assert torch.equal(loaded["model"]["a"], weight) and torch.equal(loaded["model"]["c"], weight.t())


def test_saved_state_is_plain_and_keeps_module_versions(tmp_path):
    model = nn.BatchNorm2d(2)
    data = {
        "model": model.state_dict(),
        "lr": np.float64(0.1),
        "rng": np.arange(3, dtype=np.uint32),
        "t": (1, {2: "a"}),
    }
    save_atomic(data, tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert type(loaded["lr"]) is float and loaded["rng"].tolist() == [0, 1, 2] and loaded["t"] == (1, {2: "a"})
    assert loaded["model"]._metadata[""]["version"] == model._version


def test_state_that_cannot_be_read_back_is_refused_when_saved(tmp_path):
    with pytest.raises(TypeError, match=r"/trainer/hooks\[1\].*pathlib"):
        save_atomic({"trainer": {"hooks": [1, tmp_path]}}, tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


def test_failing_write_leaves_the_previous_file(tmp_path, monkeypatch):
    save_atomic({"model": {"w": torch.ones(1)}}, tmp_path / "a.pth")

    def half_a_write(data, path):
        Path(path).write_bytes(b"PK half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safe_io.torch, "save", half_a_write)
    with pytest.raises(OSError, match="No space"):
        save_atomic({"model": {"w": torch.zeros(1)}}, tmp_path / "a.pth")
    monkeypatch.undo()
    assert load_weights(tmp_path / "a.pth")["model"]["w"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_text_and_digest(tmp_path):
    save_text_atomic("model_final.pth", tmp_path / "new" / "last_checkpoint")
    assert (tmp_path / "new" / "last_checkpoint").read_text() == "model_final.pth"
    assert sha256_of(tmp_path / "new" / "last_checkpoint") == hashlib.sha256(b"model_final.pth").hexdigest()
