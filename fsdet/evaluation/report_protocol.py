"""The protocol of a section in words: what its numbers stand for, and what differs between its rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .report_labels import calibration_words
from .report_rows import Row, seed_words
from .report_section import Fact
from .result import Protocol

NAMES = {
    "benchmark": "data",
    "test_set": "test set",
    "split": "class split",
    "shot": "shots",
    "sampling": "K-shot lists",
    "choice": "choice of shots",
    "records": "K-shot record",
    "leak": "novel objects in base images",
    "difficult": "difficult objects in training",
    "tta": "test-time augmentation",
    "proposals": "regions per image at test",
    "base_model": "base model",
}  # other fields are called what they are

K_SHOT = ("setting", "shot", "sampling", "choice", "records")  # fields that mean nothing before fine-tuning

MEANINGS = {
    ("setting", "gfsod"): "base and novel classes are detected together",
    ("setting", "fsod"): "novel classes alone",
    ("stage", "base"): "before any novel class is seen",
    ("stage", "novel"): "after fine-tuning on K shots",
    ("evaluation", "coco"): "101-point precision; AP is the mean over IoU 0.50 to 0.95",
    ("evaluation", "voc-11point"): "11-point precision of VOC 2007",
    ("evaluation", "voc-area"): "area under the curve, VOC 2010 and later",
    ("sampling", "legacy"): "drawn as the official scripts do",
    ("sampling", "strict"): "exactly K objects a class",
    ("sampling", "unrecorded"): "lists without a record of their drawing, as the official ones",
    ("choice", "seeded"): "which K of a longer list follows from split, seed and class",
    ("choice", "official"): "which K of a longer list is left to chance",
    ("records", "instance"): "one object of one image",
    ("records", "image"): "all chosen objects of one image",
    ("leak", "background"): "they are left in and count as background",
    ("leak", "drop"): "such images are left out",
    ("leak", "ignore"): "their regions give no negatives",
}

EVALUATIONS = {"coco": "COCO-style", "voc-11point": "VOC-style 11-point", "voc-area": "VOC-style area"}
_TEST_LIST = re.compile(r"(?P<set>.+):(?P<list>[^:]+):(?P<digest>[0-9a-f]{8})")
_DIGEST = re.compile(r"[0-9a-f]{12}")


def section_title(rows: Sequence[Row]) -> str:
    """What the rows of a section share, in words; data and setting stand before ": "."""
    p = rows[0].protocol
    test_set, chosen = _test_set(p)
    images = f"{p.test_images} images of {test_set}{f' {chosen}' if chosen else ''}"
    return f"{_data_and_setting(rows)}: {images}, {EVALUATIONS.get(p.evaluation, p.evaluation)} evaluation"


def section_id(rows: Sequence[Row]) -> str:
    """`section_title` in ids, for files."""
    p = rows[0].protocol
    return f"{_data_and_setting(rows)}: {p.test_set}, {p.test_images} images, {p.evaluation}"


def _data_and_setting(rows: Sequence[Row]) -> str:
    p = rows[0].protocol
    setting = "base stage" if all(row.protocol.stage == "base" for row in rows) else p.setting
    return f"{p.benchmark}{f' split {p.split}' if p.split else ''}, {setting}"


def shared_facts(rows: Sequence[Row]) -> tuple[Fact, ...]:
    """Fields of the protocol that all rows share, and the classes behind "base" and "novel"."""
    protocols = [dict(row.protocol.group()) for row in rows]
    base = all(row.protocol.stage == "base" for row in rows)
    facts = []
    for name, value in protocols[0].items():
        unsaid = value in ("", None) or (name == "proposals" and not value) or (base and name in K_SHOT)
        unsaid |= name == "test_images"  # the test set says it
        if not unsaid and all(protocol[name] == value for protocol in protocols):
            facts.append(_fact(name, value, rows[0].protocol))
    classes = [run.classes for row in rows for _, run in row.runs]
    for group in ("novel", "base"):
        members = classes[0].get(group, ())
        if members and all(found.get(group) == members for found in classes):
            facts.append(Fact(f"{group} classes", str(len(members)), ", ".join(members)))
    return tuple(facts)


def _fact(name: str, value: object, protocol: Protocol) -> Fact:
    """A field in words."""
    text, meaning = str(value), MEANINGS.get((name, value), "")
    if name == "test_set":
        test_set, chosen = _test_set(protocol)
        images = f"{protocol.test_images} images"
        text, meaning = (f"{images} {chosen}", f"of {test_set}") if chosen else (test_set, images)
    elif name == "evaluation":
        text = EVALUATIONS.get(text, text)
    elif name == "calibration":
        meaning = calibration_words(text)
    elif name == "base_model" and _DIGEST.fullmatch(text):
        meaning = "start of its file's SHA-256"
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    return Fact(NAMES.get(name, name), text, meaning)


def _test_set(protocol: Protocol) -> tuple[str, str]:
    """Name of the test set, and what chose its images: "listed in test160 (digest 25062e99)", or ""."""
    found = _TEST_LIST.fullmatch(protocol.test_set)
    name, _, file = (found["set"] if found else protocol.test_set).partition(":")
    chosen = f"listed in {found['list']} (digest {found['digest']})" if found else ""
    return f"{name} ({file})" if file else name, chosen


def remarks(rows: Sequence[Row], labels: Sequence[str]) -> Iterable[str]:
    """Seeds, missing runs, and what else a reader must know to trust the numbers; `labels` are those of the rows."""
    named = [pair for pair in zip(labels, rows, strict=True) if pair[1].protocol.stage != "base"]
    drawn = [row for _, row in named]
    yield from _seeds([(f"{label}, {row.protocol.shot}-shot", row) for label, row in named])
    few = sorted({len(row.runs) for row in drawn if len(row.runs) < 3})
    if few:
        yield (
            f"Some rows have {' or '.join(map(str, few))} run{'s' if few[-1] > 1 else ''}: one run has no interval, "
            "and that of two rests on one difference."
        )
    if any(len({seed for seed, _ in row.keys}) not in (1, len(row.keys)) for row in drawn):
        yield (
            "Some rows hold several seeds and repetitions of them. Every run counts alike, and repetitions share their "
            "K shots, so that the interval is too narrow for new draws."
        )
    digests: dict[tuple[int, int], set] = {}
    for run in (run for row in drawn for _, run in row.runs):
        if run.protocol.samples_digest:
            digests.setdefault((run.protocol.shot, run.protocol.seed), set()).add(run.protocol.samples_digest)
    differing = [f"{shot}-shot seed {seed}" for (shot, seed), found in sorted(digests.items()) if len(found) > 1]
    if differing:
        yield f"Rows were trained on different K-shot files at {', '.join(differing)}."
    yield from _versions(rows)


def _seeds(rows: Sequence[tuple[str, Row]]) -> Iterable[str]:
    """The seeds of most rows, those of the others, and which are missing."""
    seeds: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for name, row in rows:
        seeds.setdefault(seed_words(row.keys), []).append(name)
        if row.missing:
            missing.setdefault(seed_words(row.missing), []).append(name)
    usual = max(seeds, key=lambda text: len(seeds[text]), default="")
    if usual:
        yield f"Seeds: {usual}{', but' if len(seeds) > 1 else '.'}"
    yield from (f"{' · '.join(names)}: seeds {text}." for text, names in seeds.items() if text != usual)
    yield from (f"{' · '.join(names)}: WITHOUT seeds {text}." for text, names in missing.items())


def _versions(rows: Sequence[Row]) -> Iterable[str]:
    for name in ("fsdet", "detectron2", "torch", "device"):
        found = sorted({run.versions.get(name, "unknown") for row in rows for _, run in row.runs})
        if len(found) > 1:
            yield f"Runs were made with different {name}: {', '.join(found)}."
    commits = {run.git_commit or "" for row in rows for _, run in row.runs}
    if any(commit.endswith("+changes") for commit in commits):
        yield "Some runs were made with uncommitted changes in the code (+changes in their result files)."
    for topic, count in _topics(rows).items():
        yield f'{count} of the runs carry a remark "{topic}" in their result files.'


def _topics(rows: Sequence[Row]) -> dict[str, int]:
    found: dict[str, int] = {}
    for run in (run for row in rows for _, run in row.runs):
        for topic in run.notes:
            found[topic] = found.get(topic, 0) + 1
    return found
