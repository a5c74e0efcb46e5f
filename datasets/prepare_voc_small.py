#!/usr/bin/env python3
"""Make voc_small from a full VOC2007: 980 trainval and 480 test images for experiments on few cores.

    python datasets/prepare_voc_small.py --source datasets/VOC2007 --output datasets/voc_small

Both parts come from the official VOC2007 trainval (its train and its val half), so the figures made with it compare
with each other and not with papers. Images are shrunk to 400 pixels (longer side, JPEG quality 85), boxes scaled, body
parts dropped. The annotation files come out byte for byte as those of the results in docs/benchmarks.md (checked by
digest); pixels may differ slightly with the JPEG library.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fsdet.data.seeds import write_files
from fsdet.data.shrink_voc import differing_files, voc_small_pictures, voc_small_texts

IDS = Path(__file__).resolve().parent / "voc_small_ids"


def main(argv: list[str] | None = None) -> int:
    """Make the set; 1 with one message on input that cannot be used, 2 when the annotations are not as published."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=root / "VOC2007", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=root / "voc_small", help="default: %(default)s")
    parser.add_argument("--ids", type=Path, default=IDS, help="folder with the id lists (default: the committed ones)")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist with other content")
    args = parser.parse_args(argv)
    try:
        if args.source.resolve() == args.output.resolve():
            raise ValueError(f"--source and --output are both {args.source}; the full set would be overwritten.")
        texts = voc_small_texts(args.source, args.output, args.ids)
        pictures = voc_small_pictures(args.source, args.output, args.ids)
        write_files({**pictures, **texts}, force=args.force)
        differing = differing_files(texts, args.ids / "SHA256SUMS")
    except (OSError, ValueError) as error:
        print(f"prepare_voc_small: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {len(pictures)} pictures, {len(texts)} text files")
    if differing:
        print(f"Not as published: {differing}; {args.source} is not the original VOC2007 trainval.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
