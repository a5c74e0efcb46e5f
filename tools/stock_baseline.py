#!/usr/bin/env python3
r"""Train plain Detectron2, without any of fsdet, on the base classes of a COCO-format set: the yardstick of benchmarks.

Stock trainer, mapper, sampler and evaluator; only the data set is registered here. Example (docs/benchmarks.md):

    python tools/stock_baseline.py --root datasets/voc_small --train coco_trainval.json --test coco_test.json \
        --novel bird bus cow motorbike sofa --weights weights/r50_msra_d2_fp16.safetensors \
        --output output/stock
"""

import argparse
import json
import time
from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.evaluation import COCOEvaluator
from safetensors.torch import load_file


def write_base_json(source: Path, target: Path, novel: set[str], *, train: bool) -> None:
    """Copy a COCO file without the novel classes; their objects stay in the pictures, unlabelled."""
    data = json.loads(source.read_text())
    data["categories"] = [c for c in data["categories"] if c["name"] not in novel]
    kept = {c["id"] for c in data["categories"]}
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] in kept]
    if train:
        for annotation in data["annotations"]:  # VOC's difficult objects, which fsdet trains on, stand as crowds
            annotation["iscrowd"] = 0
    target.write_text(json.dumps(data))


def build_config(args: argparse.Namespace, num_classes: int) -> CfgNode:
    """Detectron2's own Faster R-CNN FPN file with the sizes of a two-core machine."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.WEIGHTS = str(args.output / "backbone.pth")
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("stock_train",), ("stock_test",)
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (240,), 400
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 240, 400
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 4, 0.005, 100
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1300, (1000, 1200)
    cfg.SOLVER.CHECKPOINT_PERIOD = 200
    cfg.SEED, cfg.OUTPUT_DIR = 1, str(args.output)
    cfg.merge_from_list(args.opts)
    return cfg


class StockTrainer(DefaultTrainer):
    """Detectron2's trainer with its COCO evaluator."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO-style evaluation with pycocotools."""
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR, use_fast_impl=False)


def main() -> None:
    """Register, train, evaluate, write result.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with JPEGImages and the two json files")
    parser.add_argument("--images", default="JPEGImages", help="image folder below --root")
    parser.add_argument("--train", required=True, help="json file below --root")
    parser.add_argument("--test", required=True, help="json file below --root")
    parser.add_argument("--novel", nargs="+", required=True, help="class names to leave out")
    parser.add_argument("--weights", type=Path, required=True, help="ResNet-50 safetensors with Detectron2 names")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--bf16", action="store_true", help="mixed precision; Detectron2's own needs a GPU")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint there")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="[KEY VALUE ...]", help="overrides")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        target = args.output / f"{name}.json"
        write_base_json(args.root / getattr(args, name), target, set(args.novel), train=name == "train")
        register_coco_instances(f"stock_{name}", {}, str(target), str(args.root / args.images))
    backbone = {f"backbone.bottom_up.{k}": v.float() for k, v in load_file(args.weights).items()}
    torch.save({"model": backbone}, args.output / "backbone.pth")
    classes = len(json.loads((args.output / "train.json").read_text())["categories"])
    cfg = build_config(args, classes)
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False, opts=[]))
    trainer = StockTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    started = time.perf_counter()
    # Without its cache, which would keep the weights of the first step: the context is left only after the last one.
    device = torch.device(cfg.MODEL.DEVICE).type
    with torch.autocast(device, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
        trainer.train()  # which returns the metrics only where a test expects some
    metrics = {name: dict(values) for name, values in trainer._last_eval_results.items()}
    record = {"metrics": metrics, "bf16": args.bf16, "seconds": time.perf_counter() - started, "config": cfg.dump()}
    (args.output / "result.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
