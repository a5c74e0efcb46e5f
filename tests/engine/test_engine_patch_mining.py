"""Hard patch mining: what is searched and kept, files, resuming, faults; with a scripted detector and a real one."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from torch import nn

from fsdet.data.loader import build_train_loader
from fsdet.data.patches import MinedPatch
from fsdet.engine.patch_mining import PatchMining, mine_patches
from fsdet.methods.os2d.geometry import anchor_boxes
from fsdet.methods.os2d.objective import AnchorLosses

NAME = "mining_test_set"
# Picture of 100 x 70 (width x height) -> classes of its objects of 30 px, side by side; their blue is 50 * (id + 1).
SHOWN = {0: (0,), 1: (0, 1), 2: (2, 1), 3: (2,)}
SIDE = 64  # px, side of a patch


@pytest.fixture
def records(tmp_path):
    result = []
    for number, classes in SHOWN.items():
        picture, rows = np.zeros((70, 100, 3), np.uint8), []
        for place, class_id in enumerate(classes):
            x, y = 10 + 40 * place, 20
            picture[y : y + 30, x : x + 30] = 50 * (class_id + 1), 10 * number, 0
            row = {"id": 10 * number + class_id, "category_id": class_id, "bbox": [x, y, 30, 30], "iscrowd": 0}
            rows.append({**row, "bbox_mode": BoxMode.XYWH_ABS})
        assert cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
        file_name = str(tmp_path / f"{number}.png")
        record = {"file_name": file_name, "image_id": f"p{number}", "height": 70, "width": 100, "annotations": rows}
        result.append(record)
    return result


@pytest.fixture
def cfg(records, tmp_path):
    """Scenes are searched at 200 x 140 px."""
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=["ant", "bee", "cat"])
    cfg = get_cfg()
    cfg.DATALOADER.VIEWS = cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH = (NAME,), str(tmp_path / "run"), 2
    cfg.INPUT.FS = CfgNode({"ENABLED": False, "CACHE_MIB": 1})
    cfg.OS2D = CfgNode({"EVAL_SCALE": 200, "IMAGE_SIZE": 0, "CLASS_IMAGE_SIZE": 24, "PYRAMID": (1.0, 1.0)})
    patch = {"ENABLED": True, "SIZE": SIDE, "SCALE": 0.0, "SCALE_JITTER": 0.7, "ASPECT_JITTER": 0.9}
    patch |= {"MIN_COVERAGE": 0.7, "FLIP": False, "COLOUR": False, "EXTRA_NEGATIVES": 0, "OWN_OBJECTS": False}
    patch |= {"OBJECT_SIZE": 0, "MINING_PERIOD": 2, "MINING_CLASSES": 200, "MINING_SCALES": 1, "MINED_PER_IMAGE": 10}
    cfg.INPUT.PATCH = CfgNode(patch)
    return cfg


def scenes_of(cfg):
    return build_train_loader(cfg, seed=3).dataset


class Scripted(nn.Module):
    """The template of a support is its class id; what costs something:

    * the first anchor as a negative of the last class, 1;
    * the last anchor as a positive of the first object's class, 2, and its box, 3.
    """

    device = torch.device("cpu")

    def __init__(self, fails=False):
        super().__init__()
        self.fails, self.encoded, self.searched, self.targets = fails, [], [], []

    def encode_picture(self, picture):
        assert picture.shape == (24, 24, 3) and not self.training and not torch.is_grad_enabled()
        self.encoded.append((round(picture[0, 0, 0] / 50) - 1, round(picture[0, 0, 1] / 10)))
        return torch.tensor([[float(self.encoded[-1][0])]])

    def mining_losses(self, picture, templates, targets):
        assert not self.training and not torch.is_grad_enabled()
        if self.fails:
            raise RuntimeError("out of memory")
        self.searched.append((picture.shape[:2], templates.flatten().int().tolist()))
        self.targets.append(targets)
        anchors = anchor_boxes(-(-picture.shape[0] // 16), -(-picture.shape[1] // 16))
        class_loss = torch.zeros(len(templates), len(anchors))
        positive, box_loss = class_loss.bool(), class_loss.clone()
        place = int(targets.class_index[0])
        class_loss[-1, 0], class_loss[place, -1], box_loss[place, -1] = 1, 2, 3
        positive[place, -1] = True
        return AnchorLosses(class_loss, box_loss, positive, ~positive, positive), anchors


def mine(cfg, detector, numbers=range(4), iteration=2):
    return mine_patches(detector.eval(), scenes_of(cfg), cfg, iteration, numbers)


def as_tuples(patches):
    return [(p.kind, tuple(p.crop), p.class_id, p.loss) for p in patches]


def test_patches_by_hand(cfg):
    """A map of 9 x 13 cells. The last anchor's centre is (200, 136): a crop from (168, 104), on the grid (160, 96),
    leaves the picture of 200 x 140 by 24 and 20 px; moved by 32 it is at (128, 64), in the stored picture half of that.
    """
    detector = Scripted()
    found = mine(cfg, detector)
    for number, classes in SHOWN.items():
        corner = (64.0, 32.0, 96.0, 64.0)
        assert as_tuples(found[number]) == [
            ("neg", (0.0, 0.0, 32.0, 32.0), 2, 1.0),
            ("pos", corner, classes[0], 2.0),
            ("pos_loc", corner, classes[0], 3.0),
        ]
    assert detector.searched == [((140, 200), [0, 1, 2])] * 4
    assert detector.targets[2].boxes.tolist() == [[20, 40, 80, 100], [100, 40, 160, 100]]
    assert [targets.class_index.tolist() for targets in detector.targets] == [[0], [0, 1], [2, 1], [2]]


def test_classes_and_supports(cfg):
    """Without random classes a scene is searched for its own, each with an object of the other picture."""
    cfg.INPUT.PATCH.MINING_CLASSES = 0
    detector = Scripted()
    mine(cfg, detector)
    assert [classes for _, classes in detector.searched] == [[0], [0, 1], [1, 2], [2]]
    assert detector.encoded == [(0, 1), (0, 0), (1, 2), (1, 1), (2, 3), (2, 2)]
    # Templates that were needed lately are not made twice: class 0 of picture 0 serves pictures 1 and 1 again.
    again = Scripted()
    mine(cfg, again, numbers=[1, 1])
    assert again.encoded == [(0, 0), (1, 2)]
    cfg.INPUT.PATCH.MINING_CLASSES = 1
    drawn = set()
    for iteration in range(2, 40, 2):
        detector = Scripted()
        mine(cfg, detector, numbers=[0, 3], iteration=iteration)
        (one,) = {
            c for shown, (_, classes) in zip((0, 2), detector.searched, strict=True) for c in classes if c != shown
        }
        drawn.add(one)
    assert drawn == {0, 1, 2}


def test_difficult_objects_and_classes_without_support(cfg, records):
    records[1]["annotations"][0]["difficult"] = 1
    for record in records[2:]:
        for row in record["annotations"]:
            row["iscrowd"] = int(row["category_id"] == 2)
    detector = Scripted()
    scenes = scenes_of(cfg)
    mine_patches(detector.eval(), scenes, cfg, 2, [1, 2])
    assert [targets.difficult.tolist() for targets in detector.targets] == [[True, False], [True, False]]
    assert detector.targets[1].class_index.tolist() == [-1, 1]
    assert detector.searched[0][1] == [0, 1]


def test_scales_are_random_and_no_matter_how_scenes_are_shared(cfg):
    cfg.OS2D.PYRAMID, cfg.INPUT.PATCH.MINING_SCALES = (0.5, 1.0, 1.5), 3
    detector = Scripted()
    whole = mine(cfg, detector)
    heights = [size[0] for size, _ in detector.searched]
    assert len(heights) == 12 and min(heights) >= 70 and max(heights) <= 210 and len(set(heights)) > 8
    assert all(abs(width / height - 100 / 70) < 0.03 for (height, width), _ in detector.searched)
    parts = {**mine(cfg, Scripted(), [1, 3]), **mine(cfg, Scripted(), [0, 2])}
    assert parts == whole
    assert mine(cfg, Scripted(), iteration=4) != whole
    cfg.INPUT.PATCH.MINED_PER_IMAGE = 1
    kept = mine(cfg, Scripted())
    assert all([p.kind for p in kept[number]] == ["neg", "pos", "pos_loc"] for number in range(4))
    assert any(len(patches) > 3 for patches in whole.values())


class FakeTrainer(SimpleNamespace):
    """What the hook reads of a trainer."""

    def __init__(self, model, start=0):
        super().__init__(model=model, start_iter=start, iter=start, max_iter=6, seed=3, rebuilt=[], saved=[])
        self.checkpointer = SimpleNamespace(save=lambda name, iteration: self.saved.append((name, iteration)))

    def start_batches(self, iteration):
        self.rebuilt.append(iteration)


def run_hook(cfg, start=0, end=6, detector=None):
    """Train from `start` to before `end`; returns the trainer."""
    trainer = FakeTrainer((detector or Scripted()).train(), start)
    hook = PatchMining(cfg, trainer.model)
    hook.trainer = trainer
    hook.before_train()
    for trainer.iter in range(start, end):
        hook.before_step()
        hook.after_step()
        assert trainer.model.training
    return trainer


def files(cfg):
    return {path.name: path.read_bytes() for path in sorted(Path(cfg.OUTPUT_DIR).glob("*"))}


class TestHook:
    def test_it_mines_every_period_and_batches_follow(self, cfg):
        trainer = run_hook(cfg)
        assert trainer.rebuilt == [2, 4] and not trainer.saved  # behind the last iteration nothing is needed
        assert list(files(cfg)) == ["mined_patches_0000002.json", "mined_patches_0000004.json"]
        data = json.loads(files(cfg)["mined_patches_0000002.json"])
        assert list(data["patches"]) == ["p0", "p1", "p2", "p3"]
        first = {"kind": "neg", "class": "cat", "crop": [0, 0, 32, 32], "loss": 1}
        assert data["patches"]["p0"][0] == first
        loader = build_train_loader(cfg, seed=3, start=2)
        assert loader.dataset.mined["p0"][0] == MinedPatch("neg", (0.0, 0.0, 32.0, 32.0), 2, 1.0)
        batch = next(iter(loader))
        assert all("mined_class" in item and item["mined_class"] in item["support_classes"] for item in batch)

    def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(self, cfg):
        run_hook(cfg)
        whole = files(cfg)
        trainer = run_hook(cfg, start=3)  # what lies there for later iterations is made again
        assert trainer.rebuilt == [4] and files(cfg) == whole
        trainer = run_hook(cfg, start=4)
        assert trainer.rebuilt == [] and files(cfg) == whole
        # Killed between the checkpoint of iteration 3 and the end of the mining.
        (Path(cfg.OUTPUT_DIR) / "mined_patches_0000004.json").unlink()
        trainer = run_hook(cfg, start=4)
        assert trainer.rebuilt == [4] and files(cfg) == whole
        assert run_hook(cfg, start=6).rebuilt == []  # a finished run needs none

    def test_files_of_another_run_are_not_taken_up(self, cfg):
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir()
        for name in ("mined_patches_0000002.json", "mined_patches_0000900.json", "mined_patches_old.json"):
            (folder / name).write_text("{}")
        run_hook(cfg, end=1)
        assert list(files(cfg)) == ["mined_patches_old.json"]

    def test_lost_patches_stop_a_resumed_run(self, cfg):
        with pytest.raises(FileNotFoundError, match=r"mined_patches_0000002\.json is missing.*before iteration 3"):
            run_hook(cfg, start=3)

    def test_failure_keeps_the_finished_iterations(self, cfg):
        detector = Scripted(fails=True)
        trainer = FakeTrainer(detector)
        hook = PatchMining(cfg, detector)
        hook.trainer = trainer
        trainer.iter = 1
        with pytest.raises(RuntimeError, match="out of memory"):
            hook.after_step()
        assert trainer.saved == [("model_0000001", 1)] and detector.training
        assert not files(cfg) and not trainer.rebuilt

    def test_a_broken_scene_is_named(self, cfg, records):
        Path(records[2]["file_name"]).write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"2\.png: this "):
            run_hook(cfg)

    def test_a_detector_that_cannot_mine(self, cfg):
        with pytest.raises(ValueError, match="MINING_PERIOD is 2, but Linear is not trained on patches"):
            PatchMining(cfg, nn.Linear(1, 1))
        cfg.INPUT.PATCH.ENABLED = False
        with pytest.raises(ValueError, match="but Scripted is not trained on patches"):
            PatchMining(cfg, Scripted())


def test_processes_share_the_scenes(cfg, monkeypatch):
    """The second of two processes has searched scenes 1 and 3; the first one writes what both have found."""
    run_hook(cfg, end=2)
    whole = files(cfg)
    other = mine(cfg, Scripted(), [1, 3])
    detector = Scripted()
    from fsdet.engine import patch_mining

    monkeypatch.setattr(patch_mining.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(patch_mining.comm, "gather", lambda own: [own, other])
    monkeypatch.setattr(patch_mining.comm, "synchronize", lambda: None)
    (Path(cfg.OUTPUT_DIR) / "mined_patches_0000002.json").unlink()
    run_hook(cfg, end=2, detector=detector)
    assert len(detector.searched) == 2 and files(cfg) == whole
