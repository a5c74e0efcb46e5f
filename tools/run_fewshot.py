#!/usr/bin/env python3
r"""Base runs, surgery, then every method x setting x shot x seed; what is finished is skipped.

Examples:
    python tools/run_fewshot.py --base configs/tfa/voc_base.yaml --novel configs/tfa/voc_cos.yaml \
        --shots 1 2 3 5 10 --seeds 0-2 FEWSHOT.SPLIT 2
    python tools/run_fewshot.py --base configs/tfa/coco_base.yaml --novel configs/tfa/coco_ft_full.yaml \
        --novel-only configs/tfa/coco_novel_only.yaml --preset tfa --gpus all
    python tools/run_fewshot.py --novel configs/tfa/voc_cos.yaml --preset tfa --slurm partition=gpu,timeout_min=600
"""

import argparse
import re
import sys
from pathlib import Path

from fsdet.engine.sweep import IncompleteSweep, Sweep, make_plan, run_sweep
from fsdet.engine.sweep_jobs import LocalJobs, cpu_slots, gpu_slots
from fsdet.engine.sweep_plan import check_shots, sweep_output
from fsdet.engine.sweep_presets import PRESETS, Preset, published_shots
from fsdet.engine.sweep_progress import plan_table, state
from fsdet.engine.sweep_slurm import SlurmJobs
from fsdet.evaluation.report import write_report


def overrides_first(words: list[str]) -> list[str]:
    """Move KEY VALUE pairs to the front: behind a list option such as --seeds they would be taken for its items."""
    opts, rest = [], []
    while words:
        is_key = re.fullmatch(r"SEED|OUTPUT_DIR|[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", words[0]) is not None
        (opts if is_key else rest).extend(words[: 1 + is_key])
        words = words[1 + is_key :]
    return [*opts, *rest]


def numbers(words: list[str]) -> tuple[int, ...]:
    """Whole numbers and ranges: "0", "5-9"."""
    found = []
    for word in words:
        first, _, last = word.partition("-")
        if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first)):
            raise ValueError(f'"{word}" is no number and no range; write e.g. 0 1 2 or 0-9')
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    what.add_argument("--base", nargs="+", default=[], help="config files of the base stages; none when they are done")
    what.add_argument("--novel", nargs="+", required=True, help="config files of the novel stages")
    what.add_argument("--novel-only", help="config file of the novel-only predictor, for FEWSHOT.SURGERY combine")
    what.add_argument("--preset", choices=sorted(PRESETS), help="a published protocol; the next four options narrow it")
    what.add_argument("--shots", nargs="+", help="required without --preset")
    what.add_argument("--seeds", nargs="+", help="numbers and ranges such as 0-9 (default 0)")
    what.add_argument("--settings", nargs="+", choices=("gfsod", "fsod"), help="default gfsod")
    what.add_argument("--repeats", type=int, help="trainings on each draw of the shots (default 1)")
    what.add_argument("--calibration", choices=("config", "both"), default="config",
                      help="both: evaluate every novel run with and without calibration")  # fmt: skip
    what.add_argument("--model", help="another network for all runs: a name of configs/base")
    what.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of every run, anywhere on the line")
    how = parser.add_argument_group("how to run it")
    where = how.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help="CPU runs at once, which share the cores (default: one run at a time)")
    where.add_argument("--gpus", help='one run per GPU: "all", or numbers such as 0,1,2')
    where.add_argument("--slurm", metavar="KEY=VALUE,...", help="Slurm jobs, e.g. partition=gpu,timeout_min=600")
    how.add_argument("--limit", type=int, help="do at most so many runs now")
    how.add_argument("--dry-run", action="store_true", help="print every run with its state, and stop")
    how.add_argument("--allow-missing", action="store_true", help="average over the seeds that are there")
    how.add_argument("--report", type=Path, help="also write the report as HTML to this file")
    return parser.parse_args(overrides_first(words))


def read_sweep(args: argparse.Namespace) -> Sweep:
    """What to run; explicit options go before a preset's values."""
    if not (args.shots or args.preset):
        raise ValueError("choose --shots, or a protocol with --preset")
    default = PRESETS[args.preset] if args.preset else Preset(settings=("gfsod",), seeds=(0,))
    return Sweep(
        base=tuple(args.base),
        novel=tuple(args.novel),
        shots=numbers(args.shots) if args.shots else published_shots(args.novel, args.opts),
        seeds=numbers(args.seeds) if args.seeds else default.seeds,
        settings=tuple(args.settings or default.settings),
        novel_only=args.novel_only,
        model=args.model,
        opts=tuple(args.opts),
        repeats=default.repeats if args.repeats is None else args.repeats,
        calibration=args.calibration,
    )


def read_workers(args: argparse.Namespace, sweep: Sweep) -> LocalJobs | SlurmJobs:
    """Who does the runs."""
    if args.slurm:
        return SlurmJobs(args.slurm, sweep_output(sweep) / "slurm")
    if args.gpus:
        return LocalJobs(gpu_slots(args.gpus))
    return LocalJobs(cpu_slots(args.jobs)) if args.jobs is not None else LocalJobs()


def report(results: list[Path], sweep: Sweep, args: argparse.Namespace, *, to_file: bool) -> None:
    """Print the tables and, for all that was asked for, write the page."""
    what = {"seeds": sweep.seeds, "repeats": sweep.repeats, "allow_missing": args.allow_missing}
    if results:
        print(write_report(results, style="brief", **what))
    if results and args.report and to_file:
        write_report(results, args.report, style="html", **what)


def main() -> int:
    """Parse the command line, run, report; 1 when a run has no result."""
    args = parse(sys.argv[1:])
    try:
        sweep = read_sweep(args)
        workers = read_workers(args, sweep)
        if args.dry_run:
            plan = make_plan(sweep)
            print(plan_table(plan, workers.width), flush=True)
            check_shots(plan, {run for run in plan if state(run) == "done"})
            return 0
        try:
            results = run_sweep(
                sweep, quiet=True, workers=workers, limit=args.limit, say=lambda line: print(line, flush=True)
            )
        except IncompleteSweep as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            report(error.results if args.allow_missing else error.complete, sweep, args, to_file=args.allow_missing)
            return 0 if args.allow_missing else 1
        report(results, sweep, args, to_file=True)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
