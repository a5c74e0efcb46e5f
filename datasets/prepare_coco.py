#!/usr/bin/env python3
"""Draw K-shot lists for COCO, in the format of the official ones; make the training and test parts; check lists.

    python datasets/prepare_coco.py --val-ids 5k.txt --json ROOT/coco/annotations/instances_{train,val}2014.json
                                                           # -> ROOT/cocosplit/datasplit/{trainvalno5k,5k}.json
    python datasets/prepare_coco.py --seeds 0-9                       # exactly K, nested -> ROOT/cocosplit_strict
    python datasets/prepare_coco.py --algorithm legacy --seeds 1-9    # as the official script -> ROOT/cocosplit
    python datasets/prepare_coco.py --check datasets/cocosplit        # count short, overfull and repeating lists

Pictures are found by the prefix of their names (2014) or in train2017; see datasets/README.md for the tree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from fsdet.data.coco import annotation_file
from fsdet.data.prepare import (
    ALGORITHMS,
    Recipe,
    check_coco_lists,
    draw_coco,
    missing_images,
    parse_seeds,
    split_coco,
)
from fsdet.data.sampling import UNITS
from fsdet.data.seeds import COCO_SHOTS, count_warnings, write_files


def run(args: argparse.Namespace) -> str:
    """Do what the arguments ask for; returns what was done."""
    if args.check:
        reports = check_coco_lists(args.check)
        for line in (line for report in reports for line in report.warnings.values()):
            print(line)
        return f"{len(reports)} lists, with {count_warnings(reports) or 'nothing to report'}"
    given = args.json or [annotation_file(args.root, "train")]
    if args.val_ids:
        folder = args.output or args.root / "cocosplit" / "datasplit"
        parts = zip(("trainvalno5k.json", "5k.json"), split_coco(given, args.val_ids), strict=True)
        write_files({folder / name: json.dumps(part) for name, part in parts}, force=args.force)
        return f"{folder}: trainvalno5k.json and 5k.json from {', '.join(map(str, given))}"
    if len(given) > 1:
        raise ValueError("Lists are drawn from one --json; several are for --val-ids, which merges and parts them.")
    output = args.output or args.root / ("cocosplit" if args.algorithm == "legacy" else "cocosplit_strict")
    recipe = Recipe(parse_seeds(args.seeds), tuple(args.shots), args.algorithm, args.unit, args.difficult, "coco")
    files = draw_coco(given[0], output, recipe, classes=args.classes)
    write_files(files, force=args.force)
    missing = missing_images(args.root / "coco", files)
    if missing:
        print(
            f"{len(missing)} drawn pictures are not below {args.root / 'coco'}, such as {missing[0]}", file=sys.stderr
        )
    return f"{output}: {len(files)} files from {given[0]}, seeds {args.seeds}, {args.algorithm} algorithm"


def main(argv: list[str] | None = None) -> int:
    """Draw, part or check; 1 with one message on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument("--root", type=Path, default=default_root, help="default: $DETECTRON2_DATASETS, else datasets")
    parser.add_argument("--json", type=Path, nargs="+", help="annotations (default: trainvalno5k, else 2017 train)")
    parser.add_argument("--val-ids", type=Path, metavar="FILE", help="ids of the held-out images, one a line")
    parser.add_argument("--seeds", default="1-9", help='seeds such as 0-9 or 0,3,5 (default: "%(default)s")')
    parser.add_argument("--shots", nargs="+", type=int, default=list(COCO_SHOTS), help="default: %(default)s")
    parser.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        default="strict",
        help="strict: generator by class, exactly K; legacy: the official script's lists (default: %(default)s)",
    )
    parser.add_argument("--unit", choices=UNITS, default="image", help="whole images, or single instances (strict)")
    parser.add_argument("--difficult", action="store_true", help="strict draws take objects marked difficult too")
    parser.add_argument("--classes", nargs="+", default=[], help="default: all of the file")
    parser.add_argument("--output", type=Path, help="default: below ROOT, see above")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist with other content")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only check the lists below FOLDER")
    try:
        print(run(parser.parse_args(argv)))
    except (OSError, ValueError) as error:
        print(f"prepare_coco: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
