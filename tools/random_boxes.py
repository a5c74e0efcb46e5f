#!/usr/bin/env python3
"""Evaluate boxes drawn at random on a configuration's test set: the floor that a detector must clear.

python tools/random_boxes.py --config-file configs/tfa/voc_small_cos.yaml FEWSHOT.SHOT 1
"""

import argparse
import sys

from fsdet.engine.chance import evaluate_chance
from fsdet.evaluation.result import read_result


def main() -> None:
    """Parse the command line, evaluate, print the headline numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="whose test set and classes are taken")
    parser.add_argument("--seed", type=int, default=0, help="of the boxes")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="[KEY VALUE ...]", help="overrides")
    args = parser.parse_args()
    try:
        path = evaluate_chance(args.config_file, args.opts, seed=args.seed)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    shown = {key: round(value, 2) for key, value in read_result(path).metrics.items() if key.endswith("AP50")}
    print(f"{path}: {shown}")


if __name__ == "__main__":
    main()
