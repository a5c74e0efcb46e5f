"""What finished runs cost: a picture, a class, memory. They take turns: a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fsdet.data.pictures import read_pixels
from fsdet.engine.benchmark_parts import Measure, cpu_seconds, in_a_process, peak_of_process_mib, wall_seconds
from fsdet.engine.open_classes import has_open_classes
from fsdet.engine.predict_files import find_images
from fsdet.engine.predictor import Predictor
from fsdet.engine.record import RESULT_FILE
from fsdet.engine.validate import is_untrained
from fsdet.evaluation.result import read_result


@dataclass(frozen=True)
class RunCost:
    """Cost of one run.

    Attributes:
        run: its folder.
        classes: that it detects.
        picture: seconds for one picture, median over pictures and rounds.
        memory: peak of a fresh process that detects the pictures one by one, in MiB; on a GPU the device's.
        learning: seconds to learn one class from the examples that the run has; None where classes come by training.
        training: recorded seconds of the training on all its classes; 0 for a run without, None for one not evaluated.
    """

    run: str
    classes: int
    picture: float
    memory: float
    learning: float | None
    training: float | None

    def line(self) -> str:
        """One row of the table."""
        if self.learning is not None:
            learnt = f"{self.learning:8.2f} s a class"
        else:
            learnt = "       not recorded" if self.training is None else f"{self.training:8.0f} s for all"
        return f"{self.classes:>7} {self.picture:9.3f} s {self.memory:8.0f} MiB  {learnt}  {self.run}"


HEADER = f"{'classes':>7} {'a picture':>11} {'memory':>12}  {'learning':>18}  run"


def run_costs(
    runs: Sequence[str | Path], inputs: Sequence[str | Path], *, rounds: int = 3, threads: int = 1, limit: int = 10
) -> Iterator[RunCost]:
    """Measure finished runs on the same pictures.

    Args:
        runs: run folders, see `Predictor.from_run`.
        inputs: pictures and folders of them.
        rounds: times that every run detects every picture; one more at the start is not counted.
        threads: of PyTorch. Without a GPU, processor time is measured.
        limit: pictures, at most.
    Raises: FileNotFoundError and ValueError, as `Predictor.from_run`, before anything is measured.
    """
    torch.set_num_threads(threads)
    measure = wall_seconds if torch.cuda.is_available() else cpu_seconds
    paths = [path for path, _ in find_images(inputs)][:limit]
    predictors = [Predictor.from_run(run) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for path in paths:
            for own, predictor in zip(seconds, predictors, strict=True):
                pixels = read_pixels(path, predictor.format)
                cost = measure(lambda predictor=predictor, pixels=pixels: predictor.detect([pixels]))
                if number:
                    own.append(cost)
    for run, predictor, own in zip(runs, predictors, seconds, strict=True):
        result = Path(run) / RESULT_FILE
        yield RunCost(
            run=str(run),
            classes=len(predictor.class_names),
            picture=statistics.median(own),
            memory=in_a_process(peak_of_run, str(run), paths, threads),
            learning=_learning_seconds(predictor, rounds, measure),
            training=read_result(result).seconds.get("train", 0.0) if result.is_file() else None,
        )


def _learning_seconds(predictor: Predictor, rounds: int, measure: Measure) -> float | None:
    """Median seconds for a class of a detector that reads examples; None if it was fine-tuned."""
    cfg = predictor.cfg
    if not has_open_classes(cfg, predictor.model) or (cfg.FEWSHOT.STAGE == "novel" and not is_untrained(cfg)):
        return None
    memory, costs = predictor.model.class_memory, []
    for number in range(rounds + 1):
        for name in tuple(predictor.class_names):
            examples = [(support.file_name, support.box) for support in memory[name].supports]
            new = f"{name}, learnt again"  # under its own name nothing would be encoded anew
            cost = measure(lambda new=new, examples=examples: predictor.learn({new: examples}))
            predictor.forget(new)
            if number:
                costs.append(cost)
    return statistics.median(costs)


def peak_of_run(run: str, paths: Sequence[Path], threads: int) -> float:
    """Peak memory in MiB of this process while a run detects pictures one by one; on a GPU the device's."""
    torch.set_num_threads(threads)
    predictor = Predictor.from_run(run)
    return peak_of_process_mib(lambda: [predictor(path) for path in paths])
