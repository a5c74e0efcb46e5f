#!/usr/bin/env python3
"""Whether evaluated runs differ by more than the choice of the test pictures: paired bootstrap of AP50 and AP75.

python tools/compare_runs.py --first output/defrcn/RUN --second output/tfa_cos/RUN
python tools/compare_runs.py --first A/5shot_seed0 A/5shot_seed1 --second B/5shot_seed0 B/5shot_seed1 --classes novel
"""

import argparse
import sys

from fsdet.engine.tested_run import GROUPS, compare_runs
from fsdet.evaluation.bootstrap import DRAWS, LEVEL


def main() -> None:
    """Parse the command line, compare, print one line an overlap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in ("first", "second"):
        parser.add_argument(f"--{side}", nargs="+", required=True, metavar="RUN", help="folders; AP is their mean")
    parser.add_argument("--classes", choices=GROUPS, default="all", help="classes to average over (default: all)")
    parser.add_argument("--iou", type=float, nargs="+", default=(0.5, 0.75), help="overlaps (default: 0.5 0.75)")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the test pictures (default %(default)s)")
    parser.add_argument("--data-root", help="where the data is, when it has moved since the runs")
    args = parser.parse_args()
    try:
        for found in compare_runs(
            args.first, args.second, group=args.classes, ious=args.iou, draws=args.draws, data_root=args.data_root
        ):
            print(found.line(), flush=True)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"In brackets: {LEVEL} % of {args.draws} draws of the test pictures, the same for both sides")


if __name__ == "__main__":
    main()
