#!/usr/bin/env python3
"""Paired timings: the same work done in two ways, in turn, with the ratio of each pair.

Examples:
    python tools/benchmark.py
    python tools/benchmark.py --only evaluator tfa-freeze --rounds 9 --size 400
"""

import argparse

from fsdet.engine.benchmark import BENCHMARKS, run_benchmarks


def main() -> None:
    """Parse the command line, time, print one line a pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHMARKS), help="pairs to time (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each pair")
    parser.add_argument("--size", type=int, default=240, help="shorter side of the pictures in pixels")
    args = parser.parse_args()
    for pair in run_benchmarks(args.only or list(BENCHMARKS), rounds=args.rounds, size=args.size):
        print(pair.line(), flush=True)


if __name__ == "__main__":
    main()
