#!/usr/bin/env python3
"""Build the tables of docs/benchmarks.md anew from the result files in docs/results/.

python tools/update_docs.py            # rewrite
python tools/update_docs.py --check    # exit 1 if the document is out of date
"""

import argparse
import sys
from pathlib import Path

from fsdet.evaluation.report_docs import fill_tables

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    """Rewrite or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    path = DOCS / "benchmarks.md"
    text = path.read_text(encoding="utf-8")
    try:
        filled = fill_tables(text, DOCS / "results")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {path.name}: {error}")
    if args.check and filled != text:
        sys.exit(f"{path.name} does not show what docs/results holds; run tools/update_docs.py")
    if not args.check:
        path.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()
