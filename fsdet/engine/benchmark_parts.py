"""Parts of the benchmarks: two pieces of work in turn and their ratio; models and batches that need no data.

Absolute times depend on the machine and on what else runs there; the ratio of two things measured in turn does not.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fsdet.evaluation.result import peak_memory_mib, reset_peak_memory

Work = Callable[[], Any]
Measure = Callable[[Work], float]


@dataclass(frozen=True)
class Pair:
    """Result of one pair: what each round of the two sides cost, in seconds or MiB."""

    name: str
    first: str
    second: str
    first_costs: tuple[float, ...]
    second_costs: tuple[float, ...]
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """Median over the rounds of second / first: how many times cheaper the first side is."""
        pairs = zip(self.first_costs, self.second_costs, strict=True)
        return statistics.median(second / first for first, second in pairs)

    def line(self) -> str:
        """One row of the table."""
        sides = ((self.first, self.first_costs), (self.second, self.second_costs))
        cells = [f"{name:<20} {statistics.median(costs):8.3f} {self.unit}" for name, costs in sides]
        return f"{self.name:<16} {'   '.join(cells)}   {self.ratio:6.2f}x"


def wall_seconds(work: Work) -> float:
    """Wall time of a piece of work."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def cpu_seconds(work: Work) -> float:
    """CPU time of this process, over all its threads: other programs on the machine move it little."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_mib(work: Work) -> float:
    """Peak memory over what was held before, in MiB; on a GPU the device's."""
    reset_peak_memory()
    before = peak_memory_mib()
    kind = "cuda" if "cuda" in before else "rss"
    work()
    return max(peak_memory_mib()[kind] - before[kind], 1.0)


def peak_of_process_mib(work: Work) -> float:
    """Peak memory of this process during a piece of work, with what it held before, in MiB; on a GPU the device's."""
    reset_peak_memory()
    work()
    peak = peak_memory_mib()
    return peak.get("cuda", peak["rss"])


def measure_pair(
    name: str,
    first: tuple[str, Work],
    second: tuple[str, Work],
    rounds: int,
    measure: Measure = wall_seconds,
    unit: str = "s",
) -> Pair:
    """Measure two pieces of work in turn, after one round that is not counted."""
    costs: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, (_, work) in enumerate((first, second)):
            cost = measure(work)
            if number:
                costs[side].append(cost)
    return Pair(name, first[0], second[0], tuple(costs[0]), tuple(costs[1]), unit)


def fixed_batch(size: int, images: int = 2) -> list[dict[str, Any]]:
    """Noise pictures of `size` x 4/3 `size` with four boxes each."""
    generator = torch.Generator().manual_seed(0)
    height, width = size, size * 4 // 3
    batch = []
    for _ in range(images):
        corner = torch.rand(4, 2, generator=generator) * size * 0.5
        boxes = torch.cat([corner, corner + size * (0.2 + 0.3 * torch.rand(4, 2, generator=generator))], dim=1)
        instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.arange(4))
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def seeded_model(build: Callable[[CfgNode], torch.nn.Module], cfg: CfgNode) -> torch.nn.Module:
    """Model with the same random weights each time; a small last norm a block keeps them finite under frozen norms."""
    torch.manual_seed(0)
    model = build(cfg)
    for name, value in model.state_dict().items():
        if name.endswith("conv3.norm.weight"):
            value.fill_(0.3)
    return model


def train_step(model: torch.nn.Module, cfg: CfgNode, size: int) -> Work:
    """One step of Detectron2's SimpleTrainer on a fixed batch."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR = 1e-6
    trainer = SimpleTrainer(model, _Endless(fixed_batch(size)), build_optimizer(cfg, model))

    def step() -> None:
        torch.manual_seed(0)  # both sides sample the same anchors and regions
        with EventStorage() as trainer.storage:
            trainer.iter = 0
            trainer.run_step()

    return step


class _Endless:
    """The same batch for ever."""

    def __init__(self, batch: list[dict[str, Any]]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            yield self.batch


@contextmanager
def one_thread() -> Iterator[Callable[[Callable[[], Any]], float]]:
    """One thread for PyTorch; gives the measure: CPU time, or wall time where there is a GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield wall_seconds if torch.cuda.is_available() else cpu_seconds
    finally:
        torch.set_num_threads(threads)


def in_a_process(function: Callable[..., float], *args: Any) -> float:
    """Result of a function in a fresh process, which has not used any memory yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory_pair(
    name: str, peak_of: Callable[..., float], size: int, few: int, many: int, rounds: int, opts: Any
) -> Pair:
    """Peak memory of a process that detects `few` classes and of one that detects `many`.

    Args:
        peak_of: (size, classes, opts) -> MiB, of the process that calls it; a function of a module.
        size, opts: handed on to it.
    """
    few_costs, many_costs = zip(
        *([in_a_process(peak_of, size, count, opts) for count in (few, many)] for _ in range(rounds)), strict=True
    )
    return Pair(name, f"{few} classes", f"{many} classes", few_costs, many_costs, "MiB")
