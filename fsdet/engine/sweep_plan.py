"""The plan of a sweep: base runs, methods x settings x shots x seeds x repetitions, and what each of them needs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from detectron2.config import CfgNode

from fsdet.data.catalog import sample_files
from fsdet.engine.record import result_digest
from fsdet.engine.setup import MODEL_FILE, dataset_sources, dataset_specs, load_config, surgered_weights
from fsdet.engine.sweep_run import PlannedRun
from fsdet.engine.validate import is_untrained

logger = logging.getLogger(__name__)

# Keys that a sweep gives each run, and what a user sets instead.
_PLANNED_KEYS = {
    "OUTPUT_DIR": "below FEWSHOT.OUTPUT",
    "FEWSHOT.SETTING": "from --settings",
    "FEWSHOT.SHOT": "from --shots",
    "FEWSHOT.SEED": "from --seeds",
    "FEWSHOT.REPEAT": "from --repeats",
}


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
        base: config file of the base stage, or several, one a family of methods; None when the novel stages start from
            files that exist. A novel stage belongs to the base run that its FEWSHOT.BASE_RUN names.
        novel: config files of the novel stages, one a method.
        shots: K values.
        seeds: draws of the K shots.
        settings: "gfsod" and/or "fsod".
        novel_only: config file of the novel-only predictor that a `combine` surgery takes its novel rows from.
        model: network that replaces the configs' own, see `load_config`.
        opts: KEY VALUE overrides of every run.
        base_opts: further overrides of the base runs.
        repeats: trainings on each draw (FEWSHOT.REPEAT).
        calibration: "config": evaluate as the configs say; "both": also the other way, with the same weights.
    """

    base: str | tuple[str, ...] | None
    novel: tuple[str, ...]
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ("gfsod",)
    novel_only: str | None = None
    model: str | None = None
    opts: tuple[str, ...] = ()
    base_opts: tuple[str, ...] = ()
    repeats: int = 1
    calibration: str = "config"

    def __post_init__(self) -> None:
        if self.calibration not in ("config", "both"):
            raise ValueError(f'Sweep.calibration is "{self.calibration}"; expected "config" or "both"')
        for name in ("novel", "settings", "shots", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"Sweep.{name} is empty: there is nothing to run")
        if fixed := [key for key in self.opts[::2] if key in _PLANNED_KEYS]:
            raise ValueError(f"{fixed[0]} differs from run to run; a sweep sets it ({_PLANNED_KEYS[fixed[0]]})")
        if self.bases and "MODEL.WEIGHTS" in self.opts[::2]:
            raise ValueError(
                "MODEL.WEIGHTS would hold for the novel runs too, which then would not start from their base run. Put "
                "the file where the base config looks for it, or train the base run first with tools/train_net.py"
            )
        if len(self.bases) > 1 and "FEWSHOT.INIT" in self.opts[::2]:
            raise ValueError(
                "FEWSHOT.INIT would hold for every base run, also for the one that it names. Put it into the base "
                "config, or train the base runs one by one with tools/train_net.py"
            )
        if self.repeats < 1:
            raise ValueError(f"Sweep.repeats is {self.repeats}; each draw is trained at least once")

    @property
    def bases(self) -> tuple[str, ...]:
        """Config files of the base stages."""
        return (self.base,) if isinstance(self.base, str) else tuple(self.base or ())

    def novel_runs(self) -> Iterator[tuple[str, list[str]]]:
        """(config file, overrides) of every novel run; repetitions vary fastest, then seeds."""
        draws = product(self.novel, self.settings, self.shots, self.seeds, range(self.repeats))
        for config_file, setting, shot, seed, repeat in draws:
            yield config_file, [*self.opts, *novel_opts(setting, shot, seed, repeat)]


def novel_opts(setting: str, shot: int, seed: int, repeat: int = 0) -> list[str]:
    """Overrides that name one novel run."""
    opts = ["FEWSHOT.SETTING", setting, "FEWSHOT.SHOT", str(shot), "FEWSHOT.SEED", str(seed)]
    return [*opts, "FEWSHOT.REPEAT", str(repeat)] if repeat else opts


def make_plan(sweep: Sweep) -> tuple[PlannedRun, ...]:
    """Every run of a sweep, in an order in which they can be done one by one.

    Raises: ValueError for two runs with one folder, a novel stage without its base run, and a `combine` surgery
        without its source.
    """
    plan = _Plan(sweep)
    for config_file in sweep.bases:
        opts = [*sweep.opts, *sweep.base_opts]
        cfg = plan.load(config_file, opts)
        # A base stage may start from another one's detector.
        plan.add("base", config_file, opts, cfg, row="base", after=[str(Path(cfg.MODEL.WEIGHTS).parent)])
    for config_file, opts in sweep.novel_runs():
        plan.add_novel(config_file, opts)
    return tuple(plan.runs.values())


class _Plan:
    """Runs by folder, in the making."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.runs: dict[str, PlannedRun] = {}

    def load(self, config_file: str, opts: Sequence[str]) -> CfgNode:
        """Configuration of one run."""
        return load_config(config_file, opts, model=self.sweep.model)

    def add(
        self,
        kind: str,
        config_file: str,
        opts: Sequence[str],
        cfg: CfgNode,
        *,
        row: str,
        after: Sequence[str] = (),
        novel_source: str = "",
    ) -> str:
        """Plan one run, once; returns its folder."""
        folder = str(Path(cfg.OUTPUT_DIR))
        planned = PlannedRun(
            kind=kind,
            config_file=config_file,
            opts=tuple(opts),
            model=self.sweep.model,
            folder=folder,
            digest=result_digest(cfg),
            row=f"{config_file} {row}",
            after=tuple(other for other in after if other in self.runs),
            iterations=0 if kind == "evaluation" else cfg.SOLVER.MAX_ITER,
            novel_source=novel_source,
        )
        other = self.runs.get(folder)
        if other and (other.config_file, other.opts) != (planned.config_file, planned.opts):
            raise ValueError(
                f"{other.config_file} {' '.join(other.opts)} and {config_file} {' '.join(opts)} would both write to "
                f"{folder}. Give each method its own FEWSHOT.METHOD, and no config file an OUTPUT_DIR"
            )
        if other is None or other.kind == "novel-only":
            self.runs[folder] = planned
        return folder

    def add_novel(self, config_file: str, opts: Sequence[str]) -> None:
        """Plan a novel run, what it needs, and the evaluation of its weights with the other calibration."""
        cfg = self.load(config_file, opts)
        base, source = str(Path(cfg.FEWSHOT.BASE_RUN)), ""
        if surgered_weights(cfg) == cfg.MODEL.WEIGHTS and not Path(cfg.MODEL.WEIGHTS).exists():
            self._check_base(config_file, base)
            source = self._add_novel_source(cfg, base) if cfg.FEWSHOT.SURGERY == "combine" else ""
        row = f"{cfg.FEWSHOT.SETTING} {cfg.FEWSHOT.SHOT}-shot"
        folder = self.add("novel", config_file, opts, cfg, row=row, after=(base, source), novel_source=source)
        if self.sweep.calibration == "both":
            enabled = cfg.TEST.CALIBRATION.ENABLED
            name = "uncalibrated" if enabled else "calibrated"
            weights = cfg.MODEL.WEIGHTS if is_untrained(cfg) else f"{folder}/{MODEL_FILE}"
            other = [*opts, "OUTPUT_DIR", f"{folder}/{name}", "MODEL.WEIGHTS", weights]
            other += ["TEST.CALIBRATION.ENABLED", str(not enabled)]
            cfg = self.load(config_file, other)
            self.add("evaluation", config_file, other, cfg, row=f"{row} {name}", after=(folder,))

    def _check_base(self, config_file: str, base: str) -> None:
        if base not in self.runs and not (Path(base) / MODEL_FILE).exists():
            raise ValueError(
                f"{config_file} starts from the base run {base} (FEWSHOT.BASE_METHOD, FEWSHOT.BASE_RUN), which is "
                f"neither finished nor planned; planned are: {', '.join(self.runs) or 'none'}. Add its config file to "
                "--base"
            )

    def _add_novel_source(self, cfg: CfgNode, base: str) -> str:
        """Plan the novel-only predictor on the same K shots; returns its folder."""
        config_file, fewshot = self.sweep.novel_only, cfg.FEWSHOT
        if not config_file:
            raise ValueError("FEWSHOT.SURGERY combine needs --novel-only, the config of the novel-only predictor")
        # One file holds the combined weights of a draw, so that its repetitions start from the same ones.
        opts = [*self.sweep.opts, *novel_opts("fsod", fewshot.SHOT, fewshot.SEED)]
        cfg = self.load(config_file, opts)
        return self.add("novel-only", config_file, opts, cfg, row=f"fsod {fewshot.SHOT}-shot", after=(base,))


def check_shots(plan: Sequence[PlannedRun], done: Collection[PlannedRun]) -> None:
    """Warn of missing K-shot lists before a base run takes hours.

    Args:
        plan: all runs.
        done: those that are finished.
    Raises: FileNotFoundError naming one of the lists, when no novel run has its lists.
    """
    novel = [run for run in plan if run.kind in ("novel", "novel-only")]
    lost = {}
    for run in [run for run in novel if run not in done]:
        cfg = load_config(run.config_file, run.opts, model=run.model)
        lists = sample_files(dataset_specs(cfg)[0], dataset_sources(cfg))
        missing = [path for path in lists if not path.is_file()]
        if missing:
            lost[run.folder] = missing[0]
    if lost:
        folder, path = next(iter(lost.items()))
        text = (
            f"{len(lost)} of {len(novel)} novel runs lack K-shot lists and will fail, e.g. {folder}: {path} is missing"
        )
        if len(lost) == len(novel):
            raise FileNotFoundError(f"{text}; docs/datasets.md says where lists come from")
        logger.warning(text)


def sweep_output(sweep: Sweep) -> Path:
    """The folder above the run folders of a sweep's first method."""
    config_file, opts = next(sweep.novel_runs())
    return Path(load_config(config_file, opts, model=sweep.model).FEWSHOT.OUTPUT)
