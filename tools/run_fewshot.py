#!/usr/bin/env python3
"""Base run, surgery, then every method x shot x seed, one after the other; finished runs are skipped.

Examples:
    python tools/run_fewshot.py --base configs/tfa/voc_base.yaml --novel configs/tfa/voc_cos.yaml \
        --shots 1 2 3 5 10 --seeds 0 1 2 FEWSHOT.SPLIT 2
    python tools/run_fewshot.py --base configs/tfa/coco_base.yaml --novel configs/tfa/coco_cos.yaml \
        --novel-only configs/tfa/coco_novel_only.yaml --shots 10 30 --seeds 0
"""

import argparse
import re
import sys
from pathlib import Path

from fsdet.engine.sweep import Sweep, run_sweep
from fsdet.evaluation.report import write_report


def overrides_first(words: list[str]) -> list[str]:
    """Move KEY VALUE pairs to the front: behind a list option such as --seeds they would be taken for its items."""
    opts, rest = [], []
    while words:
        is_key = re.fullmatch(r"SEED|[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", words[0]) is not None
        (opts if is_key else rest).extend(words[: 1 + is_key])
        words = words[1 + is_key :]
    return [*opts, *rest]


def main() -> None:
    """Parse the command line, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="config file of the base stage; leave out when its checkpoint exists")
    parser.add_argument("--novel", nargs="+", required=True, help="config files of the novel stages")
    parser.add_argument("--novel-only", help="config file of the novel-only predictor, for FEWSHOT.SURGERY combine")
    parser.add_argument("--shots", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--settings", nargs="+", choices=("gfsod", "fsod"), default=["gfsod"])
    parser.add_argument("--model", help="another network for all runs: a name of configs/base")
    parser.add_argument("--report", type=Path, help="also write the report as HTML to this file")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of every run, anywhere on the line")
    args = parser.parse_args(overrides_first(sys.argv[1:]))
    try:
        sweep = Sweep(
            base=args.base,
            novel=tuple(args.novel),
            shots=tuple(int(shot) for shot in args.shots),
            seeds=tuple(int(seed) for seed in args.seeds),
            settings=tuple(args.settings),
            novel_only=args.novel_only,
            model=args.model,
            opts=tuple(args.opts),
        )
        results = run_sweep(sweep)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(write_report(results, style="brief", seeds=sweep.seeds))
    if args.report:
        write_report(results, args.report, style="html", seeds=sweep.seeds)


if __name__ == "__main__":
    main()
