#!/usr/bin/env python3
"""Detect objects in images and folders with a finished run: drawn pictures and detections.json.

Examples:
    python tools/predict.py street.jpg --run output/tfa_cos/r101_fpn/voc_split1/gfsod/5shot_seed0
    python tools/predict.py holiday/ more/cat.png --run RUN --threshold 0.3 --output output/holiday --device cpu
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdet.engine.predictor import Predictor, find_images, predict_files


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, predict, say what was written; 1 when nothing could be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="image files and folders (with their sub-folders)")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished training")
    parser.add_argument("--weights", type=Path, help="another checkpoint than RUN/model_final.pth")
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), help="folder to write")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score, 0-1 (default 0.5)")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1 ... (default: that of the run, else the CPU)")
    parser.add_argument("--batch-size", type=int, default=8, help="images in the network at once")
    args = parser.parse_args(argv)
    try:
        find_images(args.images)  # before the model is built
        predictor = Predictor.from_run(
            args.run, weights=args.weights or "", threshold=args.threshold, device=args.device
        )
        content = predict_files(predictor, args.images, args.output, batch_size=args.batch_size)
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, UnicodeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(content['detections'])} objects in {len(content['images'])} images: {args.output}/detections.json")
    if content["failed"]:
        print(f'{len(content["failed"])} image(s) could not be read (listed there under "failed")', file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
