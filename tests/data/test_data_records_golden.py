"""Records of 18 official data set names, compared with those of the official loaders (golden e)."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from fsdet.data.catalog import DatasetSources, DatasetSpec, _describe, load_records
from fsdet.data.fake_tree import write_fake_tree

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "defrcn"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "defrcn"
EVALUATORS = {"pascal_voc": "voc", "coco": "coco"}
# What our annotations carry beside the official keys.
EXTRA = {"voc": {"id", "difficult"}, "coco": {"id", "area"}}


def golden(name):
    folder = GOLDEN if (GOLDEN / name).is_file() else SHARED
    if not (folder / name).is_file():
        pytest.skip(f"{name} is neither in tests/golden/defrcn nor in the shared pack")
    with gzip.open(folder / name, "rt") as file:
        return json.load(file)


EXPECTED = golden("e_loader_records.json.gz")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake") / "datasets"
    write_fake_tree(folder, golden("e_fake_datasets.json.gz"), golden("e_fewshot_sampling.json.gz"))
    return folder


def official(name):
    """Official data set name -> spec and VOC sets; the fewest words that tell all 18 apart."""
    if name.startswith("voc"):
        year, part, subset, split, shot, seed = re.fullmatch(
            r"voc_(\d+)_(trainval|test)_([a-z]+)(\d)(?:_(\d+)shot_seed(\d+))?", name
        ).groups()
        benchmark, sets = "voc", {f"voc_{part.removesuffix('val')}": ((f"VOC{year}", part),)} if not shot else {}
    else:
        part, subset, shot, seed = re.fullmatch(
            r"coco14_(trainval|test)_([a-z]+)(?:_(\d+)shot_seed(\d+))?", name
        ).groups()
        benchmark, split, sets = "coco", 1, {}
    spec = DatasetSpec(
        benchmark,
        part.removesuffix("val"),
        subset,
        split=int(split),
        shot=int(shot or 0),
        seed=int(seed or 0),
        records="instance" if benchmark == "voc" else "image",
        choice="official",
    )
    return spec, sets


def relative(records, root, count):
    """The first records under official keys, with paths as the official loaders give them."""
    kept = []
    for record in records[:count]:
        assert set(record) == {"file_name", "image_id", "height", "width", "annotations"}
        keys = {"category_id", "bbox", "bbox_mode", "iscrowd"}
        annotations = [{k: v for k, v in a.items() if k in keys} for a in record["annotations"]]
        name = Path(record["file_name"]).relative_to(root.parent).as_posix()
        kept.append({**record, "file_name": name, "annotations": annotations})
    return kept


@pytest.mark.parametrize("name", EXPECTED)
def test_records_equal_the_official_ones(name, root):
    expected = EXPECTED[name]
    spec, sets = official(name)
    sources = DatasetSources(root=root, **sets)
    np.random.seed(expected["numpy_global_seed_before"])
    records = load_records(spec, sources)
    assert len(records) == expected["num_records"]
    assert sum(len(record["annotations"]) for record in records) == expected["num_annotations"]
    assert relative(records, root, len(expected["records"])) == expected["records"]
    metadata = _describe(spec, sources)
    assert metadata["thing_classes"] == expected["thing_classes"]
    assert metadata["evaluator_type"] == EVALUATORS[expected["evaluator_type"]]
    official_keys = {key for record in expected["records"] for a in record["annotations"] for key in a}
    ours = {key for record in records for a in record["annotations"] for key in a}
    assert ours - official_keys == EXTRA[spec.benchmark]


def test_all_18_names_are_there():
    assert len(EXPECTED) == 18 and sum("voc" in name for name in EXPECTED) == 10


def test_seeded_choice_takes_others_of_the_same_candidates_and_ignores_numpy(root):
    """The switch away from NumPy's global generator changes which instances a longer list yields, not how many."""
    spec, _ = official("voc_2007_trainval_novel3_10shot_seed2")
    seeded = DatasetSpec("voc", "train", "novel", split=3, shot=10, seed=2)
    sources = DatasetSources(root=root)
    np.random.seed(1)
    first = load_records(seeded, sources)
    state = np.random.get_state()[1].tolist()
    np.random.seed(2)
    second = load_records(seeded, sources)
    assert first == second
    assert state == np.random.RandomState(1).get_state()[1].tolist()
    np.random.seed(20211010)
    official_records = load_records(spec, sources)
    assert len(official_records) == len(first) == 50
    assert official_records != first
