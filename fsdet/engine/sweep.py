"""Base run -> surgery -> methods x settings x shots x seeds, one run after the other, finished runs skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from detectron2.config import CfgNode

from fsdet.checkpoint.surgery import surgery_file
from fsdet.engine.record import RESULT_FILE, result_digest
from fsdet.engine.run import run
from fsdet.engine.setup import config_classes, load_config, run_classes
from fsdet.evaluation.result import read_result

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
        base: config file of the base stage; None when the novel stages start from files that exist.
        novel: config files of the novel stages, one a method.
        shots: K values.
        seeds: draws of the K shots.
        settings: "gfsod" and/or "fsod".
        novel_only: config file of the novel-only predictor that a `combine` surgery takes its novel rows from.
        model: network that replaces the configs' own, see `load_config`.
        opts: KEY VALUE overrides of every run.
        base_opts: further overrides of the base run.
    """

    base: str | None
    novel: tuple[str, ...]
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ("gfsod",)
    novel_only: str | None = None
    model: str | None = None
    opts: tuple[str, ...] = ()
    base_opts: tuple[str, ...] = ()

    def novel_runs(self) -> Iterator[tuple[str, list[str]]]:
        """(config file, overrides) of every novel run; seeds vary fastest."""
        for config_file, setting, shot, seed in product(self.novel, self.settings, self.shots, self.seeds):
            yield config_file, [*self.opts, *novel_opts(setting, shot, seed)]


def novel_opts(setting: str, shot: int, seed: int) -> list[str]:
    """Overrides that name one novel run."""
    return ["FEWSHOT.SETTING", setting, "FEWSHOT.SHOT", str(shot), "FEWSHOT.SEED", str(seed)]


def run_sweep(
    sweep: Sweep, *, quiet: bool = False, on_result: Callable[[Path], None] = lambda path: None
) -> list[Path]:
    """Do all runs; a failing novel run is reported at the end and does not stop the others.

    Args:
        sweep: what to run.
        quiet: keep the runs' log lines off the console (they are in each run's log.txt).
        on_result: called with each run's result.json, as soon as it is there.
    Returns: the result.json of every run, the base run's first.
    Raises: ValueError for a plan that cannot work, before any work; RuntimeError naming the runs that failed.
    """
    plan = [(file, opts, load_config(file, opts, model=sweep.model)) for file, opts in sweep.novel_runs()]
    if any(cfg.FEWSHOT.SURGERY == "combine" for _, _, cfg in plan) and not sweep.novel_only:
        raise ValueError("FEWSHOT.SURGERY combine needs --novel-only, the config of the novel-only predictor")
    results, failed = [], []
    if sweep.base:
        results.append(finish(sweep.base, [*sweep.opts, *sweep.base_opts], sweep.model, quiet=quiet))
        on_result(results[-1])
    for file, opts, cfg in plan:
        try:
            prepare_weights(cfg, sweep)
            results.append(finish(file, opts, sweep.model, quiet=quiet))
            on_result(results[-1])
        except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
            logger.exception("%s failed", cfg.OUTPUT_DIR)
            failed.append(f"{cfg.OUTPUT_DIR}: {error}")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(plan)} runs failed; the others are kept, the same command repeats only these:\n  "
            + "\n  ".join(failed)
        )
    return results


def finish(config_file: str, opts: Sequence[str], model: str | None, *, quiet: bool = False) -> Path:
    """Run (resuming what a kill left) unless the run has its result; returns the path of result.json.

    Raises: ValueError when a result of another configuration lies in the same folder.
    """
    cfg = load_config(config_file, opts, model=model)
    path = Path(cfg.OUTPUT_DIR) / RESULT_FILE
    if path.exists():
        if read_result(path).config_digest != result_digest(cfg):
            raise ValueError(
                f"{path} belongs to another configuration than {config_file} {' '.join(opts)}. Remove its folder to run"
                " again, or set FEWSHOT.OUTPUT to a new one"
            )
        logger.info("%s is finished: skipped", cfg.OUTPUT_DIR)
        return path
    run(config_file, opts, model=model, resume=True, quiet=quiet)
    return path


def prepare_weights(cfg: CfgNode, sweep: Sweep) -> None:
    """Make the surgered file that a novel run starts from, unless it is there."""
    weights = Path(cfg.MODEL.WEIGHTS)
    source = Path(cfg.FEWSHOT.BASE_RUN) / "model_final.pth"
    if weights.exists() or weights.parent != source.parent or not source.exists():
        return  # own weights, or nothing to make them from: the run's own check says what is missing
    classes, novel_source = config_classes(cfg), None
    if cfg.FEWSHOT.SURGERY == "combine":
        novel_source = _novel_predictor(cfg, sweep)
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


def _novel_predictor(cfg: CfgNode, sweep: Sweep) -> Path:
    """Train the novel-only predictor on the same K shots; returns its checkpoint."""
    assert sweep.novel_only, "run_sweep has checked this"
    opts = [*sweep.opts, *novel_opts("fsod", cfg.FEWSHOT.SHOT, cfg.FEWSHOT.SEED)]
    novel_cfg = load_config(sweep.novel_only, opts, model=sweep.model)
    prepare_weights(novel_cfg, sweep)
    return finish(sweep.novel_only, opts, sweep.model).with_name("model_final.pth")
