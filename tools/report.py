#!/usr/bin/env python3
"""Summarise result.json files: mean and interval over seeds by method and shots.

python tools/report.py output/                                  # everything below a folder, as text
python tools/report.py output/ --format html --output report.html
python tools/report.py output/ --compare tfa_cos frcn_ft_full   # paired by seed
"""

import argparse
import sys
from pathlib import Path

from fsdet.evaluation.report import FORMATS, write_report

SUFFIXES = {".html": "html", ".md": "markdown", ".csv": "csv", ".json": "json", ".txt": "text"}


def seed_range(text: str) -> list[int]:
    """Seeds from text such as "0-9" or "0,1,4"."""
    seeds = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            seeds.extend(range(int(first), int(last or first) + 1))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f'"{text}" is no list of seeds; write 0-9 or 0,1,4') from error
    return seeds


def main() -> int:
    """Parse the arguments and write the report; 1 on input that cannot be reported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="result.json files, or folders that hold them")
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of --output, else text")
    parser.add_argument("--output", type=Path, help="file to write; without it the report is printed")
    parser.add_argument("--metrics", nargs="+", default=[], help="headline metrics, e.g. nAP50 bAP50 AP50")
    parser.add_argument("--seeds", type=seed_range, help="seeds to average over, e.g. 0-9 (default: 0 to the largest)")
    parser.add_argument("--allow-missing", action="store_true", help="average over the seeds that are there")
    parser.add_argument("--compare", nargs=2, default=[], metavar="METHOD", help="paired difference of two methods")
    args = parser.parse_args()
    style = args.format or (SUFFIXES.get(args.output.suffix, "text") if args.output else "text")
    try:
        text = write_report(
            args.paths,
            args.output,
            style=style,
            metrics=args.metrics,
            seeds=args.seeds,
            allow_missing=args.allow_missing,
            compare=args.compare,
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output} written" if args.output else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
