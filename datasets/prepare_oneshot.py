#!/usr/bin/env python3
"""Check a one-shot set in OS2D's CSV format, and write its parts as COCO-format json beside it.

    python datasets/prepare_oneshot.py --csv grozi/classes/grozi.csv --scenes grozi/src/3264     # -> grozi_train.json …
    python datasets/prepare_oneshot.py --csv logos/classes/logos.csv --check                     # writes nothing

Training reads the CSV itself; the json files are for other tools. Every scene must be there, every class have a
picture, every box lie in its scene; faults are listed with their rows, and nothing is written then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdet.data.prepare_oneshot import prepare_oneshot
from fsdet.data.seeds import write_files


def main(argv: list[str] | None = None) -> int:
    """Check and write; 1 with one message on input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="annotations: a row for each box")
    parser.add_argument("--scenes", type=Path, help="folder of the scenes (default: src beside the CSV's folder)")
    parser.add_argument(
        "--class-images", type=Path, help="folder of the class pictures (default: images beside the CSV)"
    )
    parser.add_argument("--output", type=Path, help="folder of the json files (default: beside the CSV)")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist with other content")
    args = parser.parse_args(argv)
    try:
        files, sets = prepare_oneshot(args.csv, scenes=args.scenes, class_images=args.class_images, output=args.output)
        if not args.check:
            write_files(files, force=args.force)
    except (OSError, ValueError) as error:
        print(f"prepare_oneshot: {error}", file=sys.stderr)
        return 1
    for summary, path in zip(sets, files, strict=True):
        print(summary.text() if args.check else f"{path}: {summary.text()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
