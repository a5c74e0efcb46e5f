"""Class memory: editing, comparison, the pair of files under kills and damage, digests."""

import copy
import hashlib
import json
import math
import os
import struct
import sys
import threading
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from fsdet.data.support import Support
from fsdet.modeling import class_memory_files
from fsdet.modeling.class_memory import ClassEntry, ClassMemory, SupportDigest, digest_supports, module_digest

ENCODER, OTHER = "a" * 64, "b" * 64


def entry(*values, supports=(), key="prototype"):
    return ClassEntry({key: torch.tensor(values, dtype=torch.float32)}, supports)


def memory_of(encoder=ENCODER, kind="prototypes", **entries):
    return ClassMemory(kind=kind, encoder=encoder, entries=entries)


def shot(number, box=(0, 0, 10, 10), folder="images"):
    return SupportDigest(f"{folder}/{number}.jpg", f"{number:064x}", box)


def equal(first, second):
    return (
        first.names == second.names
        and (first.kind, first.encoder) == (second.kind, second.encoder)
        and all(first[name].supports == second[name].supports for name in first)
        and not first.compare(second).changed
    )


class TestEditing:
    def test_order_is_that_of_insertion_and_edits_keep_it(self):
        memory = memory_of(cow=entry(1.0), bus=entry(2.0), art=entry(3.0))
        assert memory.names == ("cow", "bus", "art") == tuple(memory)
        memory.rename("cow", "ox")
        memory.replace("bus", entry(7.0))
        memory.add("eel", entry(4.0))
        memory.remove("art")
        assert memory.names == ("ox", "bus", "eel") and len(memory) == 3
        assert "cow" not in memory and "ox" in memory
        assert memory["bus"].tensors["prototype"].item() == 7.0

    def test_entries_of_the_constructor_are_not_shared(self):
        entries = {"cow": entry(1.0)}
        memory = memory_of(**entries)
        memory.remove("cow")
        assert list(entries) == ["cow"]

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda m: m["dog"], r"No class 'dog' in this memory of prototypes; it has \['cow', 'bus'\]"),
            (lambda m: m.remove("dog"), "No class 'dog'"),
            (lambda m: m.replace("dog", entry(1.0)), "No class 'dog'"),
            (lambda m: m.rename("dog", "cat"), "No class 'dog'"),
            (lambda m: m.rename("cow", "bus"), "'cow' cannot be renamed to 'bus', which is in this memory already"),
            (lambda m: m.rename("cow", ""), "expected a non-empty string"),
            (lambda m: m.add("cow", entry(1.0)), "'cow' is in this memory already; replace it"),
            (lambda m: m.add("", entry(1.0)), "expected a non-empty string"),
            (lambda m: m.add("dog", torch.ones(2)), "'dog': got a Tensor, expected a ClassEntry"),
            (lambda m: m.select(["cow", "cow"]), "'cow' is in this memory already"),
            (lambda m: m.stack("prototype", ["dog"]), "No class 'dog'"),
        ],
    )
    def test_wrong_edits_change_nothing(self, edit, message):
        memory = memory_of(cow=entry(1.0), bus=entry(2.0))
        with pytest.raises(ValueError, match=message):
            edit(memory)
        assert equal(memory, memory_of(cow=entry(1.0), bus=entry(2.0)))

    def test_select_orders_and_leaves_the_source(self):
        memory = memory_of(cow=entry(1.0), bus=entry(2.0), art=entry(3.0))
        chosen = memory.select(["art", "cow"])
        chosen.remove("cow")
        assert chosen.names == ("art",) and chosen.encoder == ENCODER and chosen.kind == "prototypes"
        assert memory.names == ("cow", "bus", "art")

    def test_copying_between_memories_is_all_or_nothing(self):
        memory, other = memory_of(cow=entry(1.0)), memory_of(cow=entry(5.0), bus=entry(2.0))
        with pytest.raises(ValueError, match="'cow' is in this memory already"):
            memory.copy_from(other, ["bus", "cow"])
        with pytest.raises(ValueError, match="No class 'bus'"):
            memory.copy_from(other, replace=True)
        assert memory.names == ("cow",) and memory["cow"].tensors["prototype"].item() == 1.0
        memory.copy_from(other, ["cow"], replace=True)
        memory.copy_from(other, ["bus"])
        assert equal(memory, other)

    def test_copying_from_another_encoder_or_kind_is_refused(self):
        with pytest.raises(ValueError, match=f"encoder {OTHER}, expected {ENCODER}.*encode the supports again"):
            memory_of().copy_from(memory_of(OTHER))
        with pytest.raises(ValueError, match="holds words, expected prototypes"):
            memory_of().copy_from(memory_of(kind="words"))

    def test_a_memory_needs_kind_and_encoder(self):
        with pytest.raises(ValueError, match="encoder of a class memory is ''"):
            memory_of("")
        with pytest.raises(ValueError, match="kind of a class memory is None"):
            memory_of(kind=None)

    def test_deep_copies_are_independent(self):
        memory = memory_of(cow=entry(1.0, supports=[shot(1)]))
        twin = copy.deepcopy(memory)
        twin["cow"].tensors["prototype"].zero_()
        assert memory["cow"].tensors["prototype"].item() == 1.0 and twin["cow"].supports == (shot(1),)


class TestEntry:
    def test_tensors_are_detached_contiguous_copies(self):
        source = torch.arange(6.0).reshape(2, 3).requires_grad_()
        kept = ClassEntry({"maps": source.t()}).tensors["maps"]
        with torch.no_grad():
            source.zero_()
        assert not kept.requires_grad and kept.is_contiguous() and kept.untyped_storage().nbytes() == 24
        assert kept.tolist() == [[0, 3], [1, 4], [2, 5]]

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({}, "without tensors"),
            ({"": torch.ones(1)}, "Tensor name ''"),
            ({3: torch.ones(1)}, "Tensor name 3"),
            ({"a": [1.0]}, '"a" of a class entry is list'),
            ({"a": torch.ones(1, dtype=torch.complex64)}, "is torch.strided torch.complex64"),
            ({"a": torch.eye(2).to_sparse()}, "is torch.sparse_coo"),
            ({"a": torch.tensor([1.0, math.nan])}, '"a" of a class entry holds nan or inf'),
            ({"a": torch.ones(1), "b": torch.tensor(math.inf).half()}, '"b" of a class entry holds nan or inf'),
        ],
    )
    def test_what_cannot_be_kept_is_refused(self, tensors, message):
        with pytest.raises(ValueError, match=message):
            ClassEntry(tensors)

    def test_the_error_of_bad_values_names_the_pictures(self):
        with pytest.raises(ValueError, match=r"\(made of images/1.jpg, images/2.jpg, images/3.jpg, ...\) holds nan"):
            entry(math.nan, supports=[shot(1), shot(1), shot(2), shot(3), shot(4)])

    @pytest.mark.parametrize("box", [(1, 2, 3), (1, 2, 3, math.nan)])
    def test_boxes_are_four_numbers(self, box):
        with pytest.raises(ValueError, match="images/1.jpg: box .* expected four finite numbers"):
            shot(1, box)


class TestStack:
    def test_rows_follow_the_names(self):
        memory = memory_of(cow=entry(1.0, 2.0), bus=entry(3.0, 4.0), art=entry(5.0, 6.0))
        assert memory.stack("prototype").tolist() == [[1, 2], [3, 4], [5, 6]]
        assert memory.stack("prototype", ["art", "cow"]).tolist() == [[5, 6], [1, 2]]

    def test_maps_keep_type_and_rank(self):
        entries = {str(n): ClassEntry({"maps": torch.full((2, 3, 3), n, dtype=torch.bfloat16)}) for n in range(2)}
        stacked = memory_of(**entries).stack("maps")
        assert stacked.shape == (2, 2, 3, 3) and stacked.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            (entry(1.0), r"float32 \(2,\) of class 'cow', float32 \(1,\) of class 'bus'; read the classes one by one"),
            (ClassEntry({"prototype": torch.ones(2).half()}), r"float32 \(2,\) of class 'cow', float16 \(2,\)"),
            (entry(1.0, 2.0, key="word"), r"'bus' has no tensor \"prototype\"; it has \['word'\]"),
        ],
    )
    def test_what_does_not_fit_is_named(self, second, message):
        with pytest.raises(ValueError, match=message):
            memory_of(cow=entry(1.0, 2.0), bus=second).stack("prototype")

    def test_nothing_to_stack(self):
        with pytest.raises(ValueError, match="No class to stack"):
            memory_of().stack("prototype")


class TestComparison:
    def test_hand_computed_numbers(self):
        first = memory_of(
            gone=entry(1.0), turned=entry(3.0, 4.0), scaled=entry(1.0, 0.0), void=entry(0.0), kept=entry(2.0)
        )
        second = memory_of(
            kept=entry(2.0), turned=entry(4.0, 3.0), scaled=entry(2.0, 0.0), void=entry(5.0), new=entry(1.0)
        )
        result = first.compare(second)
        assert (result.added, result.removed, result.same) == (("new",), ("gone",), ("kept",))
        assert result.changed == ("turned", "scaled", "void")
        assert result.cosine["turned"]["prototype"] == pytest.approx(24 / 25)
        assert result.distance["turned"]["prototype"] == pytest.approx(math.sqrt(2) / 5)
        assert (result.cosine["scaled"], result.distance["scaled"]) == ({"prototype": 1.0}, {"prototype": 0.5})
        assert (result.cosine["void"], result.distance["void"]) == ({"prototype": 0.0}, {"prototype": 1.0})
        assert (result.cosine["kept"], result.distance["kept"]) == ({"prototype": 1.0}, {"prototype": 0.0})
        assert result.same_encoder and not result.other_supports

    def test_two_zeros_are_alike(self):
        result = memory_of(a=entry(0.0)).compare(memory_of(a=entry(0.0)))
        assert (result.cosine["a"]["prototype"], result.distance["a"]["prototype"]) == (1.0, 0.0)

    def test_other_pictures_or_boxes_count_but_not_order_or_place(self):
        first = memory_of(**{name: entry(1.0, supports=[shot(1), shot(2)]) for name in "abc"})
        second = memory_of(
            a=entry(1.0, supports=[shot(2, folder="moved"), shot(1, folder="moved")]),
            b=entry(1.0, supports=[shot(1), shot(3)]),
            c=entry(1.0, supports=[shot(1), shot(2, (0, 0, 10, 11))]),
        )
        result = first.compare(second)
        assert (result.same, result.changed, result.other_supports) == (("a",), ("b", "c"), ("b", "c"))

    def test_other_shapes_types_and_names_are_changes_without_numbers(self):
        first = memory_of(a=entry(1.0), b=entry(1.0), c=entry(1.0))
        double = ClassEntry({"prototype": torch.ones(1).double()})
        result = first.compare(memory_of(a=entry(1.0, 2.0), b=entry(1.0, key="word"), c=double))
        assert result.changed == ("a", "b", "c")
        assert result.cosine == {"a": {}, "b": {}, "c": {"prototype": 1.0}}
        assert "a        changed  same        other shapes" in result.table()

    def test_table(self):
        first = memory_of(cow=entry(3.0, 4.0, supports=[shot(1)]), gone=entry(1.0))
        table = first.compare(memory_of(OTHER, cow=entry(4.0, 3.0, supports=[shot(2)]), new=entry(1.0))).table()
        lines = [line.split() for line in table.splitlines()]
        assert lines[2:5] == [
            ["cow", "changed", "other", "prototype", "0.960000", "2.83e-01"],
            ["new", "added"],
            ["gone", "removed"],
        ]
        assert lines[-1][:3] == ["The", "encoders", "differ,"]

    def test_kinds_are_not_compared(self):
        with pytest.raises(ValueError, match="Memories of prototypes and of words"):
            memory_of().compare(memory_of(kind="words"))

    def test_summary(self):
        memory = memory_of(cow=entry(1.0, 2.0, supports=[shot(1), shot(1, (5, 5, 9, 9)), shot(2)]), word=entry(3.0))
        head, _, header, _, *rows = memory.summary().splitlines()
        assert head == f"prototypes of 2 classes, encoder {ENCODER[:12]}"
        assert header.split() == ["class", "shots", "files", "tensors", "digest"]
        digest = memory["cow"].digest()[:12]
        assert rows[0].split() == ["cow", "3", "2", "prototype", "float32", "(2,)", digest]
        assert rows[1].split()[:3] == ["word", "0", "0"] and digest not in rows[1]


DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
NAMES = ["dining table", "a/b\\c", "../up", "Füße 犬", "1e5", '"quoted"\n', " ", "__metadata__", "\ud800"]


class TestFiles:
    def test_everything_survives(self, tmp_path):
        memory = memory_of(encoder="weights of today", kind="maps of supports")
        for number, name in enumerate(NAMES):
            maps = {f"shot {n}": torch.full((4, 3 + n, 7 - n), number + n / 3) for n in range(number % 3 + 1)}
            supports = [shot(n, (0.1, 1 / 3, 5e-324, 1e300), folder=name) for n in range(number)]
            memory.add(name, ClassEntry(maps | {"scalar": torch.tensor(number), "none": torch.ones(0, 3)}, supports))
        memory.save(tmp_path / "folder" / "voc.split 1")
        loaded = ClassMemory.load(tmp_path / "folder" / "voc.split 1")
        assert loaded.names == tuple(NAMES)
        assert equal(memory, loaded)
        for name in NAMES:
            assert list(loaded[name].tensors) == list(memory[name].tensors)
            assert all(torch.equal(loaded[name].tensors[key], value) for key, value in memory[name].tensors.items())

    def test_types_survive(self, tmp_path):
        values = torch.tensor([0.0, 1.0, 3.0])
        tensors = {name: values.to(getattr(torch, name)) for name in DTYPES}
        memory_of(cow=ClassEntry(tensors)).save(tmp_path / "m")
        loaded = ClassMemory.load(tmp_path / "m")["cow"].tensors
        assert {name: str(value.dtype) for name, value in loaded.items()} == {name: f"torch.{name}" for name in DTYPES}
        assert all(torch.equal(loaded[name], tensors[name]) for name in DTYPES)

    def test_the_files_are_what_they_say_and_reproducible(self, tmp_path):
        memory = memory_of(cow=entry(1.0, supports=[shot(1)]), bus=entry(2.0))
        memory.save(tmp_path / "a.safetensors")
        memory.save(tmp_path / "b.json")
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "a.json",
            "a.safetensors",
            "b.json",
            "b.safetensors",
        ]
        for suffix in ("json", "safetensors"):
            assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
        content = json.loads((tmp_path / "a.json").read_text(encoding="ascii"))
        assert content["tensor_file_sha256"] == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
        with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            assert sorted(file.keys()) == ["0/prototype", "1/prototype"]
        assert equal(ClassMemory.load(tmp_path / "a.json"), ClassMemory.load(tmp_path / "a.safetensors"))

    def test_one_entry_under_two_names(self, tmp_path):
        memory = memory_of(cow=entry(1.0))
        memory.add("ox", memory["cow"])
        memory.save(tmp_path / "m")
        assert ClassMemory.load(tmp_path / "m").stack("prototype").tolist() == [[1], [1]]

    def test_an_empty_memory(self, tmp_path):
        memory_of().save(tmp_path / "m")
        assert ClassMemory.load(tmp_path / "m").names == ()

    def test_expectations_that_hold(self, tmp_path):
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        assert ClassMemory.load(tmp_path / "m", encoder=ENCODER, kind="prototypes").names == ("cow",)

    def test_other_encoder_and_other_kind_are_refused(self, tmp_path):
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        (tmp_path / "m.safetensors").unlink()  # the JSON alone is enough to refuse
        with pytest.raises(ValueError, match=f"m.json was made by encoder {ENCODER}, expected {OTHER}.*encode the sup"):
            ClassMemory.load(tmp_path / "m", encoder=OTHER)
        with pytest.raises(ValueError, match="m.json holds prototypes, expected words"):
            ClassMemory.load(tmp_path / "m", kind="words")

    @pytest.mark.parametrize("missing", ["m.json", "m.safetensors"])
    def test_a_missing_file_is_named(self, tmp_path, missing):
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        (tmp_path / missing).unlink()
        with pytest.raises(FileNotFoundError, match=f"{missing} not found"):
            ClassMemory.load(tmp_path / "m")

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda c: c.update(version=2), "version 2, this program reads version 1"),
            (lambda c: c.update(format="other"), 'm.json is no class memory: "format"'),
            (lambda c: c["tensors"]["0/prototype"].update(shape=[1, 2]), r'"0/prototype" is .*\[2\].*says .*\[1, 2\]'),
            (lambda c: c["tensors"]["0/prototype"].update(dtype="int32"), "'float32'.*says.*'int32'"),
            (lambda c: c["tensors"].pop("1/prototype"), '"1/prototype" is .*says None'),
            (lambda c: c.update(tensors=None), '"0/prototype" is .*says None'),
            (lambda c: c.pop("classes"), "m.json is damaged, head: KeyError"),
            (lambda c: c["classes"].pop(), r"gives no class for tensors \['1/prototype'\]"),
            (lambda c: c["classes"][1].update(name="cow"), "class 'cow': .*in this memory already"),
            (lambda c: c["classes"][1]["tensors"].update(prototype="0/prototype"), "class 'bus': KeyError"),
            (lambda c: c["classes"][1].pop("supports"), "class 'bus': KeyError"),
            (lambda c: c["classes"][0]["supports"][0].update(box=[1, 2]), "class 'cow': .*expected four finite"),
            (lambda c: c["classes"][0]["supports"][0].update(digest=7), "class 'cow': .*digest 7"),
            (lambda c: c.update(encoder=""), "m.json is damaged, head: .*non-empty"),
        ],
    )
    def test_a_damaged_description_is_refused(self, tmp_path, damage, message):
        memory_of(cow=entry(1.0, 2.0, supports=[shot(1)]), bus=entry(3.0, 4.0)).save(tmp_path / "m")
        content = json.loads((tmp_path / "m.json").read_bytes())
        damage(content)
        (tmp_path / "m.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            ClassMemory.load(tmp_path / "m")

    @pytest.mark.parametrize("text", [b"", b'{"format": "fsdet class mem', b"\xff\xfe", b"[1]"])
    def test_a_torn_description_is_refused(self, tmp_path, text):
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        (tmp_path / "m.json").write_bytes(text)
        with pytest.raises(ValueError, match="m.json is (damaged|no class memory)"):
            ClassMemory.load(tmp_path / "m")

    def test_files_of_two_memories_do_not_pair(self, tmp_path):
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        memory_of(cow=entry(2.0)).save(tmp_path / "n")
        (tmp_path / "n.safetensors").replace(tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match="m.safetensors is not the file that .*m.json describes"):
            ClassMemory.load(tmp_path / "m")

    @pytest.mark.parametrize("size", [0, 7, 60, -1])
    def test_a_cut_tensor_file_is_refused(self, tmp_path, size):
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        data = (tmp_path / "m.safetensors").read_bytes()
        (tmp_path / "m.safetensors").write_bytes(data[:size])
        with pytest.raises(ValueError, match="m.safetensors is not the file"):
            ClassMemory.load(tmp_path / "m")

    def test_a_file_with_the_right_digest_may_still_be_no_tensor_file(self, tmp_path):
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        content = json.loads((tmp_path / "m.json").read_bytes())
        content["tensor_file_sha256"] = hashlib.sha256(b"nonsense").hexdigest()
        (tmp_path / "m.json").write_text(json.dumps(content))
        (tmp_path / "m.safetensors").write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="m.safetensors is damaged"):
            ClassMemory.load(tmp_path / "m")

    def test_stored_values_that_are_not_finite_are_refused(self, tmp_path):
        item = {"name": "cow", "tensors": {"prototype": "x"}, "supports": []}
        content = {"kind": "prototypes", "encoder": ENCODER, "classes": [item]}
        class_memory_files.write_pair(tmp_path / "m", content, {"x": torch.tensor([1.0, math.inf])})
        with pytest.raises(ValueError, match=r"m.json is damaged, class 'cow': .*\"prototype\".* holds nan or inf"):
            ClassMemory.load(tmp_path / "m")


def save_and_die(memory, path, line):
    """Save in a child that ends, without any cleaning up, at the given line of the writer; True when it got there."""
    child = os.fork()
    if child == 0:
        left = line

        def trace(frame, event, _):
            nonlocal left
            if not frame.f_code.co_filename.endswith(("class_memory_files.py", "data/files.py")):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os._exit(9)
            return trace

        try:
            sys.settrace(trace)
            memory.save(path)
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestKills:
    def kill_everywhere(self, folder, start, before, after):
        """Kill the writer of `after` at each of its lines; yield the states that it leaves."""
        line, seen = 0, []
        while True:
            line += 1
            for path in folder.iterdir():
                path.unlink()
            for name, data in start.items():
                (folder / name).write_bytes(data)
            killed = save_and_die(after, folder / "m", line)
            loaded = ClassMemory.load(folder / "m")
            assert equal(loaded, before) or equal(loaded, after)
            seen.append(equal(loaded, after))
            if not killed:
                break
            yield seen[-1], contents(folder)
        assert seen == sorted(seen), "once the new pair counts, it stays"
        assert seen.count(False) > 10 and seen.count(True) > 5
        assert len(contents(folder)) == len([name for name in start if not name.startswith(".")])

    def test_a_kill_leaves_the_old_pair_or_the_new_one(self, tmp_path):
        old = memory_of(cow=entry(1.0), bus=entry(2.0))
        new = memory_of(cow=entry(3.0, 4.0, supports=[shot(1)]))
        third = memory_of(OTHER, art=entry(5.0))
        neighbour = memory_of(cow=entry(9.0))
        old.save(tmp_path / "m")
        neighbour.save(tmp_path / "m.b")
        between = None
        for is_new, state in self.kill_everywhere(tmp_path, contents(tmp_path), old, new):
            if is_new and between is None:
                between = state  # the JSON is new, the tensors wait under their hidden name
        assert any(name.startswith(".m.") for name in between)
        list(self.kill_everywhere(tmp_path, between, new, third))
        assert equal(ClassMemory.load(tmp_path / "m.b"), neighbour)

    def test_the_first_save(self, tmp_path):
        new = memory_of(cow=entry(3.0, 4.0))
        line = 1
        while save_and_die(new, tmp_path / "m", line):
            if (tmp_path / "m.json").is_file():
                assert equal(ClassMemory.load(tmp_path / "m"), new)
                for path in tmp_path.iterdir():
                    path.unlink()
            else:
                with pytest.raises(FileNotFoundError):
                    ClassMemory.load(tmp_path / "m")
            line += 1
        assert sorted(contents(tmp_path)) == ["m.json", "m.safetensors"]

    def test_leftovers_of_other_memories_stay(self, tmp_path):
        hidden = [".m.b.0123456789abcdef.safetensors", ".mm.json.7.tmp", ".m.notes.safetensors"]
        for name in [
            *hidden,
            ".m.0123456789abcdef.safetensors",
            ".m.json.7.tmp",
            "..m." + "0" * 16 + ".safetensors.7.tmp",
        ]:
            (tmp_path / name).write_bytes(b"")
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        assert sorted(contents(tmp_path)) == sorted([*hidden, "m.json", "m.safetensors"])


class TestReadersAndWriters:
    @pytest.fixture
    def busy(self, monkeypatch, tmp_path):
        """busy(times, write): call `write` between the reading of the JSON and of the tensors, that often."""
        original = class_memory_files._matching_bytes

        def start(times, write):
            calls = []

            def interrupted(*args):
                calls.append(1)
                if len(calls) <= times:
                    write(len(calls))
                return original(*args)

            monkeypatch.setattr(class_memory_files, "_matching_bytes", interrupted)

        return start

    def test_a_reader_starts_over_when_the_pair_is_replaced(self, tmp_path, busy):
        memory_of(cow=entry(0.0)).save(tmp_path / "m")
        busy(2, lambda number: memory_of(cow=entry(float(number))).save(tmp_path / "m"))
        assert ClassMemory.load(tmp_path / "m")["cow"].tensors["prototype"].item() == 2.0

    def test_the_new_pair_is_checked_too(self, tmp_path, busy):
        memory_of(cow=entry(0.0)).save(tmp_path / "m")
        busy(1, lambda _: memory_of(OTHER, cow=entry(1.0)).save(tmp_path / "m"))
        with pytest.raises(ValueError, match=f"made by encoder {OTHER}, expected {ENCODER}"):
            ClassMemory.load(tmp_path / "m", encoder=ENCODER)

    def test_a_reader_gives_up(self, tmp_path, busy):
        memory_of(cow=entry(0.0)).save(tmp_path / "m")
        busy(99, lambda number: memory_of(cow=entry(float(number))).save(tmp_path / "m"))
        with pytest.raises(ValueError, match="replaced 5 times while it was read"):
            ClassMemory.load(tmp_path / "m")

    def test_tensors_that_take_their_final_name_meanwhile(self, tmp_path, monkeypatch):
        memory_of(cow=entry(0.0)).save(tmp_path / "m")
        old = (tmp_path / "m.safetensors").read_bytes()
        memory_of(cow=entry(1.0)).save(tmp_path / "m")
        digest = json.loads((tmp_path / "m.json").read_bytes())["tensor_file_sha256"]
        hidden = (tmp_path / "m.safetensors").rename(tmp_path / f".m.{digest[:16]}.safetensors")
        (tmp_path / "m.safetensors").write_bytes(old)
        original = Path.read_bytes

        def read_then_rename(path):
            data = original(path)
            if path.suffix == ".safetensors" and hidden.exists():
                hidden.replace(tmp_path / "m.safetensors")
            return data

        monkeypatch.setattr(Path, "read_bytes", read_then_rename)
        assert ClassMemory.load(tmp_path / "m")["cow"].tensors["prototype"].item() == 1.0

    def test_writers_wait_for_each_other(self, tmp_path):
        fcntl = pytest.importorskip("fcntl")
        folder = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        writer = threading.Thread(target=memory_of(cow=entry(1.0)).save, args=(tmp_path / "m",))
        writer.start()
        try:
            writer.join(0.1)
            assert writer.is_alive() and not contents(tmp_path)
        finally:
            os.close(folder)
        writer.join(10)
        assert ClassMemory.load(tmp_path / "m").names == ("cow",)

    def test_a_refusing_disk_leaves_the_old_pair(self, tmp_path, monkeypatch):
        memory_of(cow=entry(0.0)).save(tmp_path / "m")
        before = contents(tmp_path)

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(class_memory_files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            memory_of(cow=entry(1.0)).save(tmp_path / "m")
        assert contents(tmp_path) == before


class Encoder(nn.Module):
    def __init__(self, names=("first", "second")):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Conv2d(2, 4, 3))
            getattr(self, name).weight.data = torch.arange(72.0).reshape(4, 2, 3, 3) + len(name)
            getattr(self, name).bias.data.zero_()
        self.register_buffer("pixel_mean", torch.tensor([1.0, 2.0]), persistent=False)


class TestModuleDigest:
    def test_against_the_definition(self):
        module = nn.Linear(2, 1, bias=False)
        module.weight.data = torch.tensor([[1.5, -2.0]])
        definition = b'["weight", "float32", [1, 2]]' + struct.pack("<2f", 1.5, -2.0) + b'[224, "crop"]'
        assert module_digest(module, 224, "crop") == hashlib.sha256(definition).hexdigest()

    def test_order_of_registration_memory_format_mode_and_wrapper_do_not_count(self):
        digest = module_digest(Encoder())
        assert module_digest(Encoder(("second", "first"))) == digest
        assert module_digest(Encoder().to(memory_format=torch.channels_last)) == digest
        assert module_digest(Encoder().eval().requires_grad_(False)) == digest
        assert module_digest(nn.DataParallel(Encoder())) == digest

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.first.weight.data[0, 0, 0, 0].add_(1e-6),
            lambda m: m.pixel_mean.add_(1),
            lambda m: m.first.half(),
            lambda m: setattr(m.first.weight, "data", m.first.weight.data.reshape(2, 4, 3, 3)),
            lambda m: setattr(m, "third", m.first),
            lambda m: delattr(m, "second"),
        ],
    )
    def test_every_change_of_state_counts(self, change):
        module = Encoder()
        change(module)
        assert module_digest(module) != module_digest(Encoder())

    def test_settings_count(self):
        module = Encoder()
        settings = [(), (1,), (2,), ("1",), (1, 2), ([1, 2],), (None,), ({"a": 1},), ({"a": 2},)]
        assert len({module_digest(module, *values) for values in settings}) == len(settings)
        assert module_digest(module, {"a": 1, "b": (2,)}) == module_digest(module, {"b": [2], "a": 1})

    def test_what_has_no_digest(self):
        with pytest.raises(ValueError, match="no plain value.*give numbers, strings"):
            module_digest(Encoder(), object())
        for module in (nn.LazyLinear(3), nn.Linear(2, 2, device="meta")):
            with pytest.raises(ValueError, match='"weight" has no values yet|"bias" has no values yet'):
                module_digest(module)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    def test_the_device_does_not_count(self, tmp_path):
        assert module_digest(Encoder().cuda()) == module_digest(Encoder())
        kept = ClassEntry({"prototype": torch.ones(3, device="cuda")})
        assert kept.tensors["prototype"].device.type == "cpu"
        assert kept.digest() == entry(1.0, 1.0, 1.0).digest()


def test_supports_are_digested_in_order_and_each_file_once(tmp_path, monkeypatch):
    pictures = {"a.jpg": b"abc", "b.jpg": b""}
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    read = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or original(file, kind))
    names = ["b.jpg", "a.jpg", "b.jpg"]
    supports = [Support(str(tmp_path / name), 0, None, 0, (n, 0, 5, 5)) for n, name in enumerate(names)]
    result = digest_supports(supports)
    assert [item.file_name for item in result] == [str(tmp_path / name) for name in names]
    assert [item.digest[:8] for item in result] == ["e3b0c442", "ba7816bf", "e3b0c442"]  # SHA-256 of "" and "abc"
    assert [item.box for item in result] == [(0, 0, 5, 5), (1, 0, 5, 5), (2, 0, 5, 5)]
    assert len(read) == 2


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.jpg: picture of a support not found; unpack"):
        digest_supports([Support(str(tmp_path / "gone.jpg"), 0, None, 0, (0, 0, 5, 5))])
