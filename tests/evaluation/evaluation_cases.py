"""A random test set in COCO format with detections of it, as files, registered data and model outputs."""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from fsdet.evaluation import result

CLASSES = ("cup", "dog", "hand-saw", "owl", "pen")
NOVEL = ("dog", "owl")


@dataclass
class Toy:
    """One random test set; `dataset_ids` have gaps and another order than the class ids."""

    path: Path
    data: dict
    detections: list[dict]  # image_id, boxes (XYXY), scores, classes (class ids)
    dataset_ids: dict[int, int]

    def register(self, classes=CLASSES, *, records=False, with_map=True, novel=NOVEL):
        """Register these classes of the set; returns the name."""
        name = f"toy_{uuid.uuid4().hex}"
        ids = {c["name"]: c["id"] for c in self.data["categories"]}
        mapping = {ids[n]: i for i, n in enumerate(classes)}
        base = [n for n in CLASSES if n not in novel]
        MetadataCatalog.get(name).set(thing_classes=list(classes), base_classes=base, novel_classes=list(novel))
        if records:
            DatasetCatalog.register(name, lambda: self.records(mapping))
        else:
            MetadataCatalog.get(name).set(json_file=str(self.path))
            if with_map:
                MetadataCatalog.get(name).set(thing_dataset_id_to_contiguous_id=mapping)
        return name

    def records(self, mapping):
        by_image = {}
        for item in self.data["annotations"]:
            if item["category_id"] in mapping:
                annotation = {
                    "bbox": item["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": mapping[item["category_id"]],
                    "area": item["area"],
                    "difficult": item["iscrowd"],
                }
                by_image.setdefault(item["image_id"], []).append(annotation)
        return [
            {
                "image_id": image["id"],
                "file_name": image["file_name"],
                "height": image["height"],
                "width": image["width"],
                "annotations": by_image.get(image["id"], []),
            }
            for image in self.data["images"]
        ]


def make_toy(folder, seed=0, images=20, ties=False):
    """Objects of five classes, some crowds, and detections that hit, miss, repeat and confuse."""
    rng = np.random.default_rng(seed)
    dataset_ids = [7, 3, 90, 12, 55]
    data = {
        "images": [
            {"id": int(i), "file_name": f"{i}.jpg", "height": 200, "width": 300}
            for i in rng.permutation(np.arange(images) * 3 + 1)
        ],
        "categories": [{"id": dataset_ids[i], "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [],
    }
    detections = []
    for image in data["images"]:
        objects = []
        for _ in range(int(rng.integers(0, 7))):
            class_id = int(rng.integers(0, len(CLASSES)))
            box = np.round([rng.uniform(0, 180), rng.uniform(0, 100), *np.exp(rng.uniform(2.5, 5.2, 2))], 2).tolist()
            objects.append((class_id, box))
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": dataset_ids[class_id],
                    "bbox": box,
                    "area": round(box[2] * box[3] * rng.uniform(0.5, 1), 2),
                    "iscrowd": int(rng.random() < 0.12),
                    "ignore": int(rng.random() < 0.3),
                }
            )
        boxes, scores, classes = [], [], []
        for _ in range(int(rng.integers(0, 14))):
            class_id, box = int(rng.integers(0, len(CLASSES))), rng.uniform(5, 150, 4)
            if objects and rng.random() < 0.75:
                chosen = objects[int(rng.integers(0, len(objects)))]
                box = np.array(chosen[1]) + rng.normal(0, 2, 4)
                class_id = chosen[0] if rng.random() < 0.9 else class_id
            boxes.append([box[0], box[1], box[0] + max(box[2], 1), box[1] + max(box[3], 1)])
            scores.append(round(float(rng.random()), 1 if ties else 9))
            classes.append(class_id)
        detections.append({"image_id": image["id"], "boxes": boxes, "scores": scores, "classes": classes})
    path = Path(folder) / f"toy_{seed}.json"
    path.write_text(json.dumps(data))
    return Toy(path, data, detections, dict(enumerate(dataset_ids)))


def to_batches(detections, classes=CLASSES):
    """Model inputs and outputs; class ids are renumbered to a subset of the classes, others left out."""
    inputs, outputs = [], []
    renumber = {CLASSES.index(name): i for i, name in enumerate(classes)}
    for item in detections:
        rows = [i for i, class_id in enumerate(item["classes"]) if class_id in renumber]
        instances = Instances((200, 300))
        instances.pred_boxes = Boxes(torch.tensor([item["boxes"][i] for i in rows]).reshape(-1, 4).float())
        instances.scores = torch.tensor([item["scores"][i] for i in rows]).float()
        instances.pred_classes = torch.tensor([renumber[item["classes"][i]] for i in rows], dtype=torch.int64)
        inputs.append({"image_id": item["image_id"]})
        outputs.append({"instances": instances})
    return inputs, outputs


def make_run(folder, method="tfa", shot=1, seed=0, *, nap50=30.0, digest="ab" * 32, **changes):
    """Write one plausible result file; `changes` go to the protocol. Returns its path."""
    protocol = {
        "benchmark": "voc", "test_set": "voc_test_all1", "test_images": 480, "split": 1, "setting": "gfsod",
        "stage": "novel", "evaluation": "voc-11point", "backbone": "R50-FPN", "pretraining": "r50.safetensors",
        "sampling": "legacy", "samples_digest": f"{seed:064d}",
    } | changes  # fmt: skip
    names = {"base": ("dog", "person"), "novel": ("bird", "cow")}
    values = {"nAP50": nap50, "bAP50": 70.0 + seed, "AP50": (nap50 + 70.0 + seed) / 2, "nAP": nap50 / 2}
    per_class = {name: {"AP": 1.0, "AP50": 70.0 + seed, "AP75": 3.0} for name in names["base"]}
    per_class |= {name: {"AP": 1.0, "AP50": nap50, "AP75": 3.0} for name in names["novel"]}
    run = result.RunResult(
        protocol=result.Protocol(method=method, shot=shot, seed=seed, **protocol),
        classes=names,
        metrics=values,
        per_class=per_class,
        config_digest=digest,
        versions={"fsdet": "0.1.0", "device": "CPU"},
        seconds={"train": 100.0 + seed, "eval": 10.0},
        peak_memory_mib={"rss": 900.0 + seed},
        train_images=20,
        iterations=400,
        images_per_step=4,
    )
    path = Path(folder) / method / f"{shot}shot_seed{seed}_{changes.get('repeat', 0)}" / "result.json"
    result.write_result(path, run)
    return path
