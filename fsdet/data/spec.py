"""What a data set is (DatasetSpec) and where its files lie (DatasetSources); no file is read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fsdet.data.splits import voc_split

VALUES = {
    "benchmark": ("voc", "coco", "custom", "oneshot"),
    "part": ("train", "test"),
    "subset": ("base", "novel", "all"),
    "records": ("instance", "image"),
    "choice": ("seeded", "official"),
    "leak": ("background", "drop", "ignore"),
}


@dataclass(frozen=True)
class DatasetSpec:
    """Which data: everything that changes a record.

    Attributes:
        benchmark: "voc" (XML files), "coco" (official ids), "custom" (any COCO-format json) or "oneshot" (scenes, and
            pictures of the classes, of which K are the K shots).
        part: "train" or "test".
        subset: classes kept: "base", "novel" or "all".
        split: VOC class split 1-3; the other benchmarks have one split.
        shot: 0 = every annotation, K = the K-shot lists.
        seed: which draw of the K-shot lists.
        records: K-shot record: "instance" (TFA: one image, one instance) or "image" (DeFRCN on COCO: merged per image).
        choice: which K of a longer list: "seeded" or "official" (NumPy's global generator, as the official loaders).
        leak: unlabelled novel objects in base training images: "background", "drop" (the image) or "ignore" (region).
        difficult: training on VOC and one-shot sets keeps difficult objects (official); False drops them.
        clear_difficult: one-shot sets: difficult objects are taken for plain ones, in training and test (the set
            "paste-f" of OS2D).
    """

    benchmark: str
    part: str
    subset: str
    split: int = 1
    shot: int = 0
    seed: int = 0
    records: str = "instance"
    choice: str = "seeded"
    leak: str = "background"
    difficult: bool = True
    clear_difficult: bool = False

    def __post_init__(self) -> None:
        for key, allowed in VALUES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f'Unknown {key} "{getattr(self, key)}"; expected one of {", ".join(allowed)}')
        if self.shot < 0 or self.seed < 0:
            raise ValueError(f"Shot and seed must not be negative, got {self.shot} and {self.seed}")
        if self.shot and self.part == "test":
            raise ValueError(f"A test set has no K-shot lists; got part test with shot {self.shot}")
        if self.benchmark == "voc":
            voc_split(self.split)

    @property
    def name(self) -> str:
        """Readable, unique label, for instance "voc_train_all1_5shot_seed0"; never parsed back."""
        words = [self.benchmark, self.part, f"{self.subset}{self.split if self.benchmark == 'voc' else ''}"]
        if self.shot:
            words += [f"{self.shot}shot", f"seed{self.seed}"]
            words += [self.records] * (self.records != "instance") + [self.choice] * (self.choice != "seeded")
        elif self.removes_leak:
            words.append(f"leak-{self.leak}")
        if self.benchmark in ("voc", "oneshot") and self.part == "train" and not self.difficult:
            words.append("no-difficult")
        if self.benchmark == "oneshot" and self.clear_difficult:
            words.append("clear-difficult")
        return "_".join(words)

    @property
    def removes_leak(self) -> bool:
        """Whether unlabelled novel objects get a treatment: only full base training sets show any."""
        return self.leak != "background" and (self.part, self.subset, self.shot) == ("train", "base", 0)


@dataclass(frozen=True)
class DatasetSources:
    """Where the files are; relative paths but `test_list` are taken below `root`, which becomes absolute.

    Attributes:
        root: the folder that DETECTRON2_DATASETS names.
        samples: folder of the K-shot files; None = "vocsplit", "cocosplit", or "samples" beside an own json.
        voc_train, voc_test: (VOC folder, image set) pairs.
        train_json, train_images, test_json, test_images: COCO-format sets; None = the official places of COCO. A
            one-shot set has its CSV or json there; test None = that of training.
        test_list: file of image ids, one a line: test images to keep, in their order in the set; None = all.
        novel_classes: names, own data only.
        class_images: one-shot sets: folder of the pictures of the classes; None = beside the annotations.
        oneshot_sets: one-shot sets: values of the column "split" for training, for the test of the base classes and for
            that of the novel ones; "" = all rows.
    """

    root: Path
    samples: Path | None = None
    voc_train: tuple[tuple[str, str], ...] = (("VOC2007", "trainval"), ("VOC2012", "trainval"))
    voc_test: tuple[tuple[str, str], ...] = (("VOC2007", "test"),)
    train_json: Path | None = None
    train_images: Path | None = None
    test_json: Path | None = None
    test_images: Path | None = None
    test_list: Path | None = None
    novel_classes: tuple[str, ...] = ()
    class_images: Path | None = None
    oneshot_sets: tuple[str, ...] = ("train", "val-old-cl", "val-new-cl")

    def __post_init__(self) -> None:
        # Absolute, so that copies made with dataclasses.replace() stay the same and a changed folder does no harm.
        object.__setattr__(self, "root", Path(self.root).expanduser().absolute())
        for key in ("samples", "train_json", "train_images", "test_json", "test_images", "class_images"):
            value = getattr(self, key)
            object.__setattr__(self, key, self.root / Path(value).expanduser() if value else None)
        if self.test_list is not None:  # part of the protocol, not of the data: beside the code, not below root
            object.__setattr__(self, "test_list", Path(self.test_list).expanduser().absolute())
        for key in ("voc_train", "voc_test"):
            object.__setattr__(self, key, tuple((str(folder), str(name)) for folder, name in getattr(self, key)))
        object.__setattr__(self, "novel_classes", tuple(self.novel_classes))
        object.__setattr__(self, "oneshot_sets", tuple(self.oneshot_sets))
        if len(self.oneshot_sets) != 3:
            raise ValueError(
                f"FEWSHOT.ONESHOT_SETS is {self.oneshot_sets}; expected three names: training, test of the base "
                "classes, test of the novel ones"
            )

    def json_of(self, part: str) -> Path | None:
        """The configured COCO-format file (or CSV) of "train" or "test"."""
        return self.train_json if part == "train" else self.test_json

    def images_of(self, part: str) -> Path | None:
        """The configured folder of the pictures of "train" or "test"."""
        return self.train_images if part == "train" else self.test_images

    def voc_sets(self, part: str) -> tuple[tuple[Path, str], ...]:
        """(VOC folder, image set) pairs of "train" or "test" with full paths."""
        return tuple(
            (self.root / folder, name) for folder, name in (self.voc_train if part == "train" else self.voc_test)
        )

    def samples_of(self, benchmark: str) -> Path:
        """Folder of the K-shot files."""
        if self.samples is not None:
            return self.samples
        if benchmark == "custom":
            return class_file(self).parent / "samples"
        return self.root / f"{benchmark}split"


def class_file(sources: DatasetSources) -> Path:
    """The json whose categories are the classes of own data: that of training, else that of the test.

    Raises: ValueError when neither is configured.
    """
    path = sources.train_json or sources.test_json
    if path is None:
        raise ValueError(
            "Own data needs a COCO-format json: set FEWSHOT.TRAIN_JSON (and FEWSHOT.TEST_JSON for the evaluation)"
        )
    return path
