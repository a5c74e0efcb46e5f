#!/usr/bin/env python3
"""Draw K-shot lists for PASCAL VOC, in the format of the official ones, or check lists.

    python datasets/prepare_voc.py --seeds 0-29                          # exactly K, nested -> ROOT/vocsplit_strict
    python datasets/prepare_voc.py --algorithm legacy --seeds 1-29       # as the official script -> ROOT/vocsplit
    python datasets/prepare_voc.py --check datasets/vocsplit             # count short, overfull and repeating lists

ROOT holds VOC2007 and VOC2012 (see datasets/README.md). Lists drawn here train with FEWSHOT.SAMPLES vocsplit_strict.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fsdet.data.prepare import ALGORITHMS, VOC_IMAGE_SETS, Recipe, check_voc_lists, draw_voc, parse_seeds
from fsdet.data.seeds import VOC_SHOTS, count_warnings, write_files


def main(argv: list[str] | None = None) -> int:
    """Draw or check; 1 with one message on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.environ.get("DETECTRON2_DATASETS", "datasets")),
        help="folder that holds the VOC folders (default: $DETECTRON2_DATASETS, else datasets)",
    )
    parser.add_argument(
        "--image-sets",
        nargs="+",
        default=[":".join(part) for part in VOC_IMAGE_SETS],
        metavar="FOLDER:SET",
        help="image sets to draw from, in this order (default: %(default)s)",
    )
    parser.add_argument("--seeds", default="1-29", help='seeds such as 0-9 or 0,3,5 (default: "%(default)s")')
    parser.add_argument("--shots", nargs="+", type=int, default=list(VOC_SHOTS), help="default: %(default)s")
    parser.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        default="strict",
        help="strict: exactly K instances or an error; legacy: the official script's lists (default: %(default)s)",
    )
    parser.add_argument("--difficult", action="store_true", help="strict draws count difficult objects too")
    parser.add_argument("--output", type=Path, help="default: ROOT/vocsplit_strict or, for legacy, ROOT/vocsplit")
    parser.add_argument("--force", action="store_true", help="overwrite lists that exist with other content")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only check the lists below FOLDER")
    args = parser.parse_args(argv)
    try:
        image_sets = [tuple(part.rsplit(":", 1)) for part in args.image_sets]
        if any(len(part) != 2 for part in image_sets):
            raise ValueError(f"--image-sets are FOLDER:SET such as VOC2007:trainval, got {args.image_sets}.")
        if args.check:
            reports = check_voc_lists(args.root, args.check, image_sets)
            for line in (line for report in reports for line in report.warnings.values()):
                print(line)
            print(f"{len(reports)} lists, with {count_warnings(reports) or 'nothing to report'}")
            return 0
        output = args.output or args.root / ("vocsplit" if args.algorithm == "legacy" else "vocsplit_strict")
        recipe = Recipe(parse_seeds(args.seeds), tuple(args.shots), args.algorithm, difficult=args.difficult)
        files = draw_voc(args.root, output, recipe, image_sets=image_sets)
        write_files(files, force=args.force)
    except (OSError, ValueError) as error:
        print(f"prepare_voc: {error}", file=sys.stderr)
        return 1
    print(f"{output}: {len(files)} files for seeds {args.seeds}, shots {args.shots}, {args.algorithm} algorithm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
