#!/usr/bin/env python3
"""Make the training files of FewX's release from a COCO json, one step a call.

    python datasets/prepare_fewx.py base --json coco/annotations/instances_train2017.json   # base, no small boxes
    python datasets/prepare_fewx.py balance --json coco/new_annotations/final_split_non_voc_instances_train2017.json
                                                              # optional: fewer images of frequent classes
    python datasets/prepare_fewx.py novel --json coco/annotations/instances_train2017.json  # all boxes of novel classes
    python datasets/prepare_fewx.py shots --json coco/annotations/instances_train2017.json  # 10 objects of each of them
    python datasets/prepare_fewx.py lists --json final_split_voc_10_shot_instances_train2017.json    # as K-shot lists
    python datasets/prepare_fewx.py table --json FILE.json --images coco/train2017    # support table and its crops

Every step writes beside its input, in new_annotations/, unless --output names a place. Crops are cut while training; a
support table is for draws equal to the release's, and for exchange with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdet.data.prepare_fewx import CROP_FOLDER, IMAGE_LIMIT, STEPS, run_step
from fsdet.data.support_table import FORMATS


def place_of(step: str, path: Path, shots: int, suffix: str) -> Path:
    """Where a step writes what it makes of the file at `path`: names of the release, as far as it has them."""
    folder = path.parent if path.parent.name == "new_annotations" else path.parent / "new_annotations"
    if path.parent.name == "annotations":
        folder = path.parent.parent / "new_annotations"
    names = {
        "base": f"final_split_non_voc_{path.name}",
        "balance": f"{path.stem}_balanced.json",
        "novel": f"final_split_voc_{path.name}",
        "shots": f"final_split_voc_{shots}_shot_{path.name}",
        "lists": "samples",
        "table": f"{path.stem}_supports{suffix}",
    }
    return folder / names[step]


def main(argv: list[str] | None = None) -> int:
    """Do one step; 1 with one message on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS, help="what to make")
    parser.add_argument("--json", type=Path, required=True, help="annotations in COCO format")
    parser.add_argument("--output", type=Path, help="file to write, for lists a folder (default: see above)")
    parser.add_argument("--novel", nargs="+", default=[], help="novel classes (default: the 20 of COCO that VOC has)")
    parser.add_argument("--shots", type=int, default=10, help="shots: objects of each class (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=IMAGE_LIMIT, help="balance: images of a class (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="lists: number of the seed folder (default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="table: format (default: %(default)s)")
    parser.add_argument("--images", type=Path, help="table: folder of the pictures; then the crops are written too")
    parser.add_argument(
        "--crops",
        default=CROP_FOLDER,
        help="table: folder of the crops, below that of the table (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that exist with other content")
    args = parser.parse_args(argv)
    try:
        if args.shots < 1 or args.limit < 0 or args.seed < 0:
            raise ValueError(
                f"--shots {args.shots}, --limit {args.limit}, --seed {args.seed}: expected at least 1, 0 and 0"
            )
        done = run_step(
            args.step,
            args.json,
            args.output or place_of(args.step, args.json, args.shots, args.format),
            novel=args.novel,
            shots=args.shots,
            limit=args.limit,
            seed=args.seed,
            images=args.images,
            folder=args.crops,
            force=args.force,
        )
    except (OSError, ValueError) as error:
        print(f"prepare_fewx: {error}", file=sys.stderr)
        return 1
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
