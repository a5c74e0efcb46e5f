#!/usr/bin/env python3
"""Detect objects in images and folders with a finished run: drawn pictures and detections.json.

Examples:
    python tools/predict.py street.jpg --run output/tfa_cos/r101_fpn/voc_split1/gfsod/5shot_seed0
    python tools/predict.py holiday/ more/cat.png --run RUN --threshold 0.3 --output output/holiday --device cpu

New classes without training, with a detector that learns from examples (FewX, OS2D): one folder of pictures for each
class below DIR, boxes from COCO json files beside them, or else whole pictures. OS2D's scores are cosines: begin with a
low --threshold. What was learnt can be kept:
    python tools/predict.py desk.jpg --run RUN --support DIR
    python tools/predict.py --run RUN --support DIR --save-memory cups
    python tools/predict.py desk.jpg --run RUN --memory cups
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdet.engine.predict_files import find_images, predict_files
from fsdet.engine.predictor import Predictor
from fsdet.modeling.class_memory_files import pair_of


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, predict, say what was written; 1 when nothing could be done."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.images and not args.save_memory:
        parser.error("name images or folders to look into, or --save-memory")
    try:
        _predict(args)
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, UnicodeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _predict(args: argparse.Namespace) -> None:
    # Before the model is built.
    if args.images:
        find_images(args.images)
    if args.save_memory:
        pair_of(args.save_memory)
    predictor = Predictor.from_run(
        args.run,
        weights=args.weights or "",
        threshold=args.threshold,
        device=args.device,
        support=args.support,
        memory=args.memory or "",
    )
    if args.save_memory:
        predictor.save_memory(args.save_memory)
        print(f"{len(predictor.class_names)} classes written: {pair_of(args.save_memory)[1]} and .safetensors")
    if not args.images:
        return
    content = predict_files(predictor, args.images, args.output, batch_size=args.batch_size)
    print(f"{len(content['detections'])} objects in {len(content['images'])} images: {args.output}/detections.json")
    if content["failed"]:
        print(f'{len(content["failed"])} image(s) could not be read (listed there under "failed")', file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, help="image files and folders (with their sub-folders)")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished training")
    parser.add_argument("--weights", type=Path, help="another checkpoint than RUN/model_final.pth")
    parser.add_argument("--support", type=Path, metavar="DIR", help="detect the classes of this folder of examples")
    parser.add_argument("--memory", type=Path, metavar="FILE", help="detect the classes of a saved memory")
    parser.add_argument("--save-memory", type=Path, metavar="FILE", help="write FILE.json and FILE.safetensors")
    parser.add_argument(
        "--output", type=Path, default=Path("output/predictions"), help="folder to write (default %(default)s)"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score, 0-1 (default %(default)s)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1 ... (default: that of the run, else the CPU)")
    parser.add_argument("--batch-size", type=int, default=8, help="images in the network at once (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
