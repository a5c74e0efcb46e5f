#!/usr/bin/env python3
"""Summarise result.json files: mean and interval over seeds by method and shots, paired comparisons, curves, gallery.

python tools/report.py output/                                  # everything below a folder, as text
python tools/report.py output/ --output report/                 # index.html, report.md and report.csv in a folder
python tools/report.py output/ --output report.html --also md csv json
python tools/report.py output/ --compare defrcn tfa_cos --compare tfa_cos frcn_ft_full   # paired by seed
python tools/report.py output/ --output report.html --gallery output/RUN   # its supports, and what it detects
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fsdet.evaluation.report import FORMATS, SUFFIXES, read_report, render_report, save_report
from fsdet.evaluation.report_gallery import Gallery


def seed_range(text: str) -> list[int]:
    """Seeds from text such as "0-9" or "0,1,4"."""
    seeds = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            found = range(int(first), int(last or first) + 1)
        except ValueError:
            found = range(0)
        if not found:
            raise argparse.ArgumentTypeError(f'"{text}" is no list of seeds; write 0-9 or 0,1,4')
        seeds.extend(found)
    return seeds


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="result.json files, or folders that hold them")
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of --output, else text")
    parser.add_argument("--output", type=Path, help="file or folder to write; without it the report is printed")
    also = [suffix[1:] for suffix in SUFFIXES]
    parser.add_argument("--also", nargs="+", default=[], choices=also, help="write these beside --output")
    parser.add_argument("--metrics", nargs="+", default=[], help="headline metrics, e.g. nAP50 bAP50 AP50")
    parser.add_argument("--seeds", type=seed_range, help="seeds to average over, e.g. 0-9 (default: 0 to the largest)")
    parser.add_argument("--repeats", type=int, help="repetitions of each seed to average over (default: all)")
    parser.add_argument("--allow-missing", action="store_true", help="average over the seeds that are there")
    parser.add_argument(
        "--compare",
        nargs=2,
        action="append",
        default=[],
        metavar="METHOD",
        help="paired difference of two methods by their ids (tfa_cos), or of two rows by their labels as tables show "
        "them, with names or ids and the calibration short or in full (tfa_cos + pcb); may be repeated",
    )
    parser.add_argument("--gallery", nargs="+", type=Path, default=[], metavar="RUN", help="run folders to show")
    parser.add_argument("--gallery-classes", nargs="+", default=[], metavar="CLASS", help="default: all novel classes")
    parser.add_argument("--gallery-images", type=int, default=6, metavar="N", help="test pictures of a class")
    parser.add_argument("--data-root", type=Path, help="where the gallery's data is, when it has moved since the run")
    return parser.parse_args(words)


def galleries(args: argparse.Namespace) -> list[Gallery]:
    """The pictures that were asked for."""
    if not args.gallery:
        return []
    from fsdet.engine.gallery import gather_gallery  # the whole engine: seconds that other reports need not wait

    return [
        gather_gallery(run, classes=args.gallery_classes, examples=args.gallery_images, data_root=args.data_root)
        for run in args.gallery
    ]


def main() -> int:
    """Write or print the report; 1 on input that cannot be reported."""
    args = parse()
    try:
        sections = read_report(
            args.paths,
            metrics=args.metrics,
            seeds=args.seeds,
            allow_missing=args.allow_missing,
            compare=[tuple(pair) for pair in args.compare],
            repeats=args.repeats,
        )
        pictures = galleries(args)
        if args.output:
            files = save_report(sections, args.output, style=args.format, also=args.also, galleries=pictures)
            print("\n".join(f"{file} written" for file in files))
        elif args.also:
            raise ValueError("--also writes files beside --output; name one")
        else:
            print(render_report(sections, args.format or "text", pictures))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
