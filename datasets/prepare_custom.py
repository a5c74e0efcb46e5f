#!/usr/bin/env python3
"""Draw K-shot lists from own data: any detection set in COCO format.

    python datasets/prepare_custom.py --json my_set/train.json --shots 1 5 10 --seeds 0-4

writes my_set/samples/seedN/full_box_{K}shot_{class}_trainval.json, exactly K annotations each, nested over K, and a
manifest of every draw. All faults of the file are reported before anything is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdet.data.prepare import Recipe, draw_coco, parse_seeds
from fsdet.data.sampling import UNITS
from fsdet.data.seeds import COCO_SHOTS, write_files


def main(argv: list[str] | None = None) -> int:
    """Draw; 1 with one message on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="training annotations in COCO format")
    parser.add_argument("--output", type=Path, help="folder of the lists (default: samples beside the json)")
    parser.add_argument("--shots", nargs="+", type=int, default=list(COCO_SHOTS), help="default: %(default)s")
    parser.add_argument("--seeds", default="0-9", help='seeds such as 0-9 or 0,3,5 (default: "%(default)s")')
    parser.add_argument("--classes", nargs="+", default=[], help="classes to draw (default: all of the file)")
    parser.add_argument(
        "--unit",
        choices=UNITS,
        default="image",
        help="image: images are taken with all their objects of the class, so that none is left unlabelled; "
        "instance: single objects, which is possible wherever there are K (default: %(default)s)",
    )
    parser.add_argument("--difficult", action="store_true", help="draw objects marked difficult too")
    parser.add_argument(
        "--name", default="custom", help="name of the data set, part of the seed (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite lists that exist with other content")
    args = parser.parse_args(argv)
    output = args.output or args.json.parent / "samples"
    try:
        if args.name == "coco":
            raise ValueError('The name "coco" belongs to COCO itself, see prepare_coco.py; choose another --name.')
        recipe = Recipe(
            parse_seeds(args.seeds), tuple(args.shots), unit=args.unit, difficult=args.difficult, dataset=args.name
        )
        files = draw_coco(args.json, output, recipe, classes=args.classes)
        write_files(files, force=args.force)
    except (OSError, ValueError) as error:
        print(f"prepare_custom: {error}", file=sys.stderr)
        return 1
    print(f"{output}: {len(files)} files from {args.json}, seeds {args.seeds}, shots {args.shots}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
