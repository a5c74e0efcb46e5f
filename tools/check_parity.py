#!/usr/bin/env python3
"""Compare fsdet with a folder of golden files, array by array; exit 1 when anything differs."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from fsdet.engine.parity import all_passed, check_folder, render


def main() -> int:
    """Compare, print, and tell by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="golden folder of one method")
    parser.add_argument("--only", default="", help="names of files, or what stands before their first _: c,e")
    parser.add_argument("--brief", action="store_true", help="print the failures and one line per file")
    args = parser.parse_args()
    logging.getLogger("fsdet").setLevel(logging.ERROR)  # the official lists cause many counted warnings
    try:
        results = check_folder(args.folder, [word for word in args.only.split(",") if word])
    except (FileNotFoundError, ValueError) as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 1
    print(render(results, brief=args.brief), end="")
    return 0 if all_passed(results) else 1


if __name__ == "__main__":
    sys.exit(main())
