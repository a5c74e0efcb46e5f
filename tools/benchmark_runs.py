#!/usr/bin/env python3
"""What finished runs cost: seconds a picture, peak memory, and seconds to learn a class; the runs take turns.

python tools/benchmark_runs.py --runs output/tfa_cos/RUN output/fewx_direct/RUN --inputs pictures
"""

import argparse
import sys

from fsdet.engine.benchmark_runs import HEADER, run_costs


def main() -> None:
    """Parse the command line, measure, print one line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="folders of finished runs")
    parser.add_argument("--inputs", nargs="+", required=True, help="pictures, or folders of them")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default %(default)s)")
    parser.add_argument("--limit", type=int, default=10, help="pictures, at most (default %(default)s)")
    args = parser.parse_args()
    sizes = {"rounds": args.rounds, "threads": args.threads, "limit": args.limit}
    try:
        costs = run_costs(args.runs, args.inputs, **sizes)
        print(HEADER)
        for cost in costs:
            print(cost.line(), flush=True)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
