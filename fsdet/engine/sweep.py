"""Base runs -> surgery -> methods x settings x shots x seeds.

`sweep_plan` says what there is to do. `Workers` do it: in this process, in processes of their own (`sweep_jobs`), or as
Slurm jobs (`sweep_slurm`). What is done is read from the run folders alone, so a sweep may be killed at any moment, and
the same sweep started again goes on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fsdet.checkpoint.surgery import surgery_file
from fsdet.engine.record import RESULT_FILE
from fsdet.engine.run import run as do_run
from fsdet.engine.setup import MODEL_FILE, config_classes, load_config, run_classes
from fsdet.engine.sweep_plan import Sweep, check_shots, make_plan
from fsdet.engine.sweep_progress import finished_result, remaining, result_line
from fsdet.engine.sweep_run import InProcess, PlannedRun, Workers, run_lock
from fsdet.evaluation.result import RunResult

__all__ = ["IncompleteSweep", "Sweep", "make_plan", "make_weights", "perform", "result_files", "run_sweep"]

logger = logging.getLogger(__name__)

_LEFT = "left for the next call"
LOCK_SECONDS = 30.0  # a run whose sweep was killed is still saving when the same sweep starts again


class IncompleteSweep(RuntimeError):
    """Some runs have no result.

    Attributes:
        missing: folder -> why.
        results: result.json of every run that has one.
        complete: those in rows (runs that differ in seed and repetition alone) of which no run is missing.
    """

    def __init__(self, plan: Sequence[PlannedRun], missing: Mapping[str, str]) -> None:
        lines = [f"{folder}: {reason}" for folder, reason in missing.items() if reason != _LEFT]
        if left := len(missing) - len(lines):
            lines.append(f"{left} {_LEFT}")
        super().__init__(
            f"{len(missing)} of {len(plan)} runs have no result. The others are kept, and the same command does only "
            "these:\n  " + "\n  ".join(lines)
        )
        lost = {run.row for run in plan if run.folder in missing}
        self.missing = dict(missing)
        self.results = result_files([run for run in plan if run.folder not in missing])
        self.complete = result_files([run for run in plan if run.folder not in missing and run.row not in lost])


def result_files(plan: Sequence[PlannedRun]) -> list[Path]:
    """Where the runs leave their results; runs that only feed a surgery are no results of a sweep."""
    return [Path(run.folder) / RESULT_FILE for run in plan if run.kind != "novel-only"]


def run_sweep(
    sweep: Sweep,
    *,
    quiet: bool = False,
    on_result: Callable[[Path], None] = lambda path: None,
    workers: Workers | None = None,
    limit: int | None = None,
    say: Callable[[str], None] = logger.info,
) -> list[Path]:
    """Do all runs that are not done; a failing one is reported at the end and stops only those that need it.

    Args:
        sweep: what to run.
        quiet: keep the runs' log lines off the console (they are in each run's log.txt).
        on_result: called with each run's result.json, as soon as it is there.
        workers: who does the runs; None for this process, one after the other.
        limit: do at most so many runs now.
        say: receives a line for each run that ends, with the time left.
    Returns: the result.json of every run, the base runs' first.
    Raises: ValueError for a plan that cannot work, before any work; IncompleteSweep (a RuntimeError) naming the runs
        without a result; SystemExit with 128 + the signal's number after an orderly stop.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"A limit of {limit} runs leaves nothing to do")
    plan = make_plan(sweep)
    workers = workers or InProcess()
    done = {run: result for run in plan if (result := finished_result(run))}
    check_shots(plan, done)
    todo = [run for run in plan if run not in done][:limit]
    for path in result_files([*done]):
        on_result(path)
    say(f"{len(plan)} runs, {len(done)} done; {remaining(todo, done, workers.width)}")
    missing: dict[str, str] = {}
    with contextlib.closing(workers.work_off(todo, partial(perform, quiet=quiet), make_weights)) as ended:
        for run, told in ended:
            result, reason = _outcome(run, told)
            if result:
                done[run] = result
            else:
                missing[run.folder] = reason
            what = result_line(run, result) if result else f"{run.folder}: NO RESULT, {reason}"
            ahead = [other for other in todo if other not in done and other.folder not in missing]
            say(f"[{len(done) + len(missing)}/{len(plan)}] {what}; {remaining(ahead, done, workers.width)}")
            for path in result_files([run] if result else []):
                on_result(path)
    left = {run.folder: _LEFT for run in plan if run not in done and run.folder not in missing}
    if missing or left:
        raise IncompleteSweep(plan, missing | left)
    return result_files(plan)


def _outcome(run: PlannedRun, reason: str) -> tuple[RunResult | None, str]:
    """The result of a run that has ended, or why there is none: its folder decides, not what the worker says."""
    try:
        result = finished_result(run)
    except ValueError as error:
        return None, str(error)
    if result and reason:
        logger.warning("%s has its result, but: %s", run.folder, reason)
    return result, reason or "ended without a result"


def perform(run: PlannedRun, *, quiet: bool = True) -> None:
    """Do one planned run (resuming what a kill left) unless it has its result.

    Raises: ValueError when a result of another configuration lies in its folder; RunLockedError while another process
        does this run; what `fsdet.engine.run.run` raises.
    """
    if finished_result(run):
        logger.info("%s is finished: skipped", run.folder)
        return
    evaluates = run.kind == "evaluation"
    with run_lock(run.folder, wait=LOCK_SECONDS):
        if not finished_result(run):  # another sweep may have ended it just now
            do_run(run.config_file, run.opts, run.model, resume=not evaluates, eval_only=evaluates, quiet=quiet)


def make_weights(run: PlannedRun) -> None:
    """Make the surgered file that a novel run starts from, unless it is there."""
    if run.kind not in ("novel", "novel-only"):
        return
    cfg = load_config(run.config_file, run.opts, model=run.model)
    weights = Path(cfg.MODEL.WEIGHTS)
    source = Path(cfg.FEWSHOT.BASE_RUN) / MODEL_FILE
    if weights.exists() or weights.parent != source.parent or not source.exists() or weights == source:
        return  # own weights, or nothing to make them from: the run's own check says what is missing
    classes = config_classes(cfg)
    novel_source = Path(run.novel_source) / MODEL_FILE if run.novel_source else None
    surgery_file(
        source,
        weights,
        cfg.FEWSHOT.SURGERY,
        novel_source=novel_source,
        source_classes=classes.base,
        target_classes=run_classes(cfg),
        novel_classes=classes.novel if novel_source else None,
    )
    logger.info("Wrote %s (%s)", weights, cfg.FEWSHOT.SURGERY)
