"""A tiny own data set and a tiny detector, enough to run the whole engine in seconds."""

import json

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from fsdet.data.seeds import write_coco_shots

CLASSES = ("red", "green", "blue", "white")  # white is novel
COLOURS = ((0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 255))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def hidden_gpu(request, monkeypatch):
    """Tests without the marker `gpu` test the CPU, on every machine and in every process that they start."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(autouse=True)
def clean_catalogs():
    """Forget what a test registers."""
    before = set(DatasetCatalog), set(MetadataCatalog)
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        for name in set(catalog) - names:
            catalog.pop(name)


def draw_set(folder, name, count, rng):
    """`count` pictures, half wide and half tall, with one square of every class; returns the COCO dict."""
    images, annotations = [], []
    (folder / name).mkdir(parents=True)
    for i in range(count):
        height, width = (48, 64) if i % 2 else (64, 48)
        picture = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        for class_id, colour in enumerate(COLOURS):
            side = int(rng.integers(10, 16))
            x = int(rng.integers(0, width // 2 - side)) + (class_id % 2) * width // 2
            y = int(rng.integers(0, height // 2 - side)) + (class_id // 2) * height // 2
            picture[y : y + side, x : x + side] = colour
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": class_id + 1,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        cv2.imwrite(str(folder / name / f"{i + 1}.png"), picture)
        images.append({"id": i + 1, "file_name": f"{i + 1}.png", "height": height, "width": width})
    categories = [{"id": i + 1, "name": n} for i, n in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """Folder with train.json, test.json, their pictures and K-shot lists for K = 1, 2 and seeds 0, 1."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for name, count in (("train", 10), ("test", 4)):
        data = draw_set(folder, name, count, rng)
        (folder / f"{name}.json").write_text(json.dumps(data))
        if name == "train":
            for seed in (0, 1):
                for shot in (1, 2):
                    for class_id, class_name in enumerate(CLASSES):
                        wanted = [a for a in data["annotations"] if a["category_id"] == class_id + 1]
                        wanted = wanted[seed * 3 : seed * 3 + shot]
                        ids = {a["image_id"] for a in wanted}
                        shots = {**data, "images": [i for i in data["images"] if i["id"] in ids], "annotations": wanted}
                        path = folder / "samples" / f"seed{seed}" / f"full_box_{shot}shot_{class_name}_trainval.json"
                        write_coco_shots(path, shots)
    return folder


def tiny_model():
    return {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": "",
        "MASK_ON": False,
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 50,
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 16,
            "WIDTH_PER_GROUP": 4,
            "NORM": "BN",
            "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        },
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 8},
        "ANCHOR_GENERATOR": {"SIZES": [[8], [12], [16], [32], [64]], "ASPECT_RATIOS": [[1.0]]},
        "PROPOSAL_GENERATOR": {"NAME": "FewShotRPN"},
        "RPN": {
            "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "POST_NMS_TOPK_TRAIN": 50,
            "POST_NMS_TOPK_TEST": 30,
            "BATCH_SIZE_PER_IMAGE": 32,
        },
        "ROI_HEADS": {"NAME": "FewShotROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"], "BATCH_SIZE_PER_IMAGE": 16},
        "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 1, "FC_DIM": 16, "POOLER_RESOLUTION": 3},
    }


@pytest.fixture(scope="session")
def narrow():
    """Overrides that turn a shipped ResNet into one of a few thousand parameters."""
    sizes = {"DEPTH": 50, "WIDTH_PER_GROUP": 4, "RES2_OUT_CHANNELS": 16, "STEM_OUT_CHANNELS": 8}
    return tuple(flatten({"MODEL": {"RESNETS": sizes}}))


def flatten(config, prefix=""):
    """Nested dict -> KEY VALUE words."""
    words = []
    for key, value in config.items():
        words += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key, str(value)]
    return words


@pytest.fixture
def tiny_network():
    """Overrides that turn a shipped FPN config into a network for pictures of 64 pixels; random start."""
    model = tiny_model()
    for key in ("META_ARCHITECTURE", "MASK_ON", "PROPOSAL_GENERATOR"):
        del model[key]  # as the shipped configs have them
    del model["BACKBONE"]["NAME"], model["ROI_HEADS"]["NAME"], model["ROI_BOX_HEAD"]["NAME"]
    sizes = {"MIN_SIZE_TRAIN": (64,), "MAX_SIZE_TRAIN": 96, "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 96}
    return flatten({"MODEL": model, "INPUT": sizes, "DATALOADER": {"NUM_WORKERS": 0}})


def update(config, values):
    """Nested dict.update."""
    for key, value in values.items():
        if isinstance(value, dict):
            update(config.setdefault(key, {}), value)
        else:
            config[key] = value


@pytest.fixture
def write_config(tmp_path, squares):
    """Write a config file for the tiny set; keyword arguments update whole sections."""

    def write(name="config.yaml", **sections):
        config = {
            "VERSION": 2,
            "OUTPUT_DIR": str(tmp_path / "run"),
            "FEWSHOT": {
                "METHOD": "tiny",
                "DATASET": "squares",
                "LAYOUT": "custom",
                "ROOT": str(squares),
                "TRAIN_JSON": "train.json",
                "TRAIN_IMAGES": "train",
                "TEST_JSON": "test.json",
                "TEST_IMAGES": "test",
                "NOVEL_CLASSES": ["white"],
            },
            "MODEL": tiny_model(),
            "INPUT": {"MIN_SIZE_TRAIN": [48, 56], "MAX_SIZE_TRAIN": 80, "MIN_SIZE_TEST": 48, "MAX_SIZE_TEST": 80},
            "SOLVER": {
                "IMS_PER_BATCH": 4,
                "BASE_LR": 0.01,
                "MAX_ITER": 6,
                "STEPS": [4],
                "WARMUP_ITERS": 1,
                "CHECKPOINT_PERIOD": 2,
            },
            "DATALOADER": {"NUM_WORKERS": 0},
        }
        for section, values in sections.items():
            if isinstance(values, dict):
                update(config.setdefault(section, {}), values)
            else:
                config[section] = values
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


@pytest.fixture
def calm_weights(tmp_path):
    """Write random weights for a config with frozen batch norm that keep activations of order 1."""

    def write(config):
        from fsdet.engine.setup import load_config, on_this_machine
        from fsdet.engine.trainer import build_detector

        torch.manual_seed(0)
        model = build_detector(on_this_machine(load_config(config)))
        state = model.state_dict()
        for name, value in state.items():
            if name.endswith("conv3.norm.weight"):
                value.fill_(0.2)
        torch.save({"model": state}, tmp_path / "calm.pth")
        return ["MODEL.WEIGHTS", str(tmp_path / "calm.pth")]

    return write
