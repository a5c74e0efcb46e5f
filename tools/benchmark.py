#!/usr/bin/env python3
"""Paired timings: the same work done in two ways, in turn, with the ratio of each pair.

Examples:
    python tools/benchmark.py
    python tools/benchmark.py --only evaluator tfa-freeze --rounds 9 --size 400
    python tools/benchmark.py --only calibration --size 800 --threads 1
    python tools/benchmark.py --only fewx-class --size 480 --classes 5 20
    python tools/benchmark.py --only os2d-class os2d-chunk --size 960
"""

import argparse

from fsdet.engine.benchmark import BENCHMARKS, MEASURED, MEMORY, run_benchmarks


def main() -> None:
    """Parse the command line, time, print one line a pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*BENCHMARKS, *MEMORY, *MEASURED]
    parser.add_argument("--only", nargs="+", choices=sorted(names), default=names, help="pairs (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each pair (default %(default)s)")
    parser.add_argument(
        "--size", type=int, default=240, help="shorter side of the pictures in pixels (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="n > 0: n threads, and CPU time instead of wall time")
    parser.add_argument("--classes", type=int, nargs="+", default=(), help="numbers of classes of fewx and os2d pairs")
    args = parser.parse_args()
    sizes = {"rounds": args.rounds, "size": args.size, "threads": args.threads, "classes": args.classes}
    for pair in run_benchmarks(args.only, **sizes):
        print(pair.line(), flush=True)


if __name__ == "__main__":
    main()
