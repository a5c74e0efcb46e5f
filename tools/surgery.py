#!/usr/bin/env python3
"""Refit the box predictor of a base checkpoint to the classes of the next stage.

    python tools/surgery.py randinit --split voc1 --src base/model_final.pth --output base/model_randinit.pth

remove drops the predictor, randinit adds random rows for the new classes, combine takes them from a novel-only
checkpoint. --split names the class lists of VOC and COCO; other data gives the lists themselves (the source classes
may be left out when the checkpoint records them).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdet.checkpoint.class_lists import named_split, read_class_names
from fsdet.checkpoint.surgery import METHODS, surgery_file

_NAMES = "file (.txt: one name a line; .json: a list) or comma-separated names, in predictor order"


def main(argv: list[str] | None = None) -> int:
    """Operate, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--src", type=Path, required=True, help="base checkpoint (.pth, .pkl, .safetensors)")
    parser.add_argument("--novel-src", type=Path, help="novel-only checkpoint, for combine")
    parser.add_argument("--output", type=Path, required=True, help="file to write (.pth or .safetensors)")
    parser.add_argument("--split", help="voc1, voc2, voc3 or coco: source = base classes, target = all classes")
    parser.add_argument("--source-classes", help=f"of the base checkpoint: {_NAMES}")
    parser.add_argument("--target-classes", help="of the output, likewise")
    parser.add_argument("--novel-classes", help="of --novel-src; default: target less source")
    parser.add_argument("--seed", type=int, default=0, help="of randinit's random rows")
    args = parser.parse_args(argv)
    try:
        split = named_split(args.split) if args.split else None
        source, target, novel = (
            read_class_names(names) if names else None
            for names in (args.source_classes, args.target_classes, args.novel_classes)
        )
        record = surgery_file(
            args.src,
            args.output,
            args.method,
            novel_source=args.novel_src,
            source_classes=source or (split.base if split else None),
            target_classes=target or (split.all if split else None),
            novel_classes=novel or (split.novel if split and args.novel_src else None),
            seed=args.seed,
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"surgery: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.method} of {args.src}, predictor with {len(record['classes'])} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
