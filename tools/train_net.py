#!/usr/bin/env python3
"""Train and evaluate one configuration; writes result.json into its output folder.

Examples:
    python tools/train_net.py --config-file configs/tfa/voc_base.yaml --num-gpus 8
    python tools/train_net.py --config-file configs/tfa/voc_cos.yaml FEWSHOT.SPLIT 2 FEWSHOT.SHOT 5 FEWSHOT.SEED 3
    python tools/train_net.py --config-file configs/tfa/voc_cos.yaml --model r50_c4 FEWSHOT.SHOT 1
    torchrun --nproc-per-node 4 tools/train_net.py --config-file configs/tfa/coco_base.yaml
"""

import argparse
import sys

from fsdet.engine.launch import add_launch_arguments, launch
from fsdet.engine.run import run


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="a file of configs/, or the config.yaml of a run")
    parser.add_argument("--model", help='another network for the recipe: a name of configs/base, e.g. "r50_c4"')
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS (with --resume: the newest)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in OUTPUT_DIR")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="[KEY VALUE ...]", help="overrides, e.g. FEWSHOT.SHOT 5"
    )
    add_launch_arguments(parser)
    args = parser.parse_args()
    if args.num_gpus == 0:
        args.opts += ["MODEL.DEVICE", "cpu"]
    try:
        launch(run, args, (args.config_file, args.opts, args.model, args.resume, args.eval_only))
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, UnicodeError):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
