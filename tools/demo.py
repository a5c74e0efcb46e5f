#!/usr/bin/env python3
"""The main job on the embedded data set, in minutes on two CPU cores (`make demo`)."""

import argparse
from pathlib import Path

from fsdet.engine.demo import run_demo

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="about two minutes: fewer runs, figures mean nothing")
    parser.add_argument("--output", type=Path, help="folder for everything (default output/demo or output/demo_short)")
    args = parser.parse_args()
    output = args.output or Path("output") / ("demo_short" if args.short else "demo")
    made = run_demo(ROOT / "configs", output, short=args.short, say=lambda line: print(line, flush=True))
    print(f"\nLook at  {made['pictures']}\n         {made['report']}  (open it in a browser)")
    print("Next:    your own pictures through the detector you have just trained")
    print(f"         python tools/predict.py --run {made['run']} --output output/mine {output}/data/test")
    print("         docs/getting-started.md: VOC, COCO, and your own classes")


if __name__ == "__main__":
    main()
