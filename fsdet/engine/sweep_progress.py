"""What of a sweep is done, read from its run folders; the plan as a table, a line per run, and the time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fsdet.engine.record import RESULT_FILE
from fsdet.engine.sweep_run import PlannedRun, is_locked
from fsdet.evaluation.result import RunResult, read_result


def finished_result(run: PlannedRun) -> RunResult | None:
    """The result in the run's folder, or None.

    Raises: ValueError when it belongs to another configuration.
    """
    path = Path(run.folder) / RESULT_FILE
    if not path.exists():
        return None
    result = read_result(path)
    if result.config_digest != run.digest:
        raise ValueError(
            f"{path} belongs to another configuration than {run.config_file} {' '.join(run.opts)}. Remove its folder "
            "to run again, or set FEWSHOT.OUTPUT to a new one"
        )
    return result


def state(run: PlannedRun) -> str:
    """One of "done", "conflict" (result of another configuration), "running" (elsewhere), "resumable", "to do"."""
    try:
        if finished_result(run):
            return "done"
    except ValueError:
        return "conflict"
    if is_locked(run.folder):
        return "running"
    return "resumable" if (Path(run.folder) / "last_checkpoint").is_file() else "to do"


def plan_table(plan: Sequence[PlannedRun], width: int) -> str:
    """One line per run with its state, then their counts and the time left."""
    states = {run: state(run) for run in plan}
    lines = [f"{found:9}  {run.kind:10}  {run.folder}" for run, found in states.items()]
    done = {run: finished_result(run) for run, found in states.items() if found == "done"}
    ahead = [run for run in plan if run not in done]
    found = list(states.values())
    counts = ", ".join(f"{found.count(name)} {name}" for name in dict.fromkeys(found))
    return "\n".join([*lines, f"{len(plan)} runs: {counts}; {remaining(ahead, done, width)}"])


def result_line(run: PlannedRun, result: RunResult) -> str:
    """One line about a finished run."""
    metrics = [f"{key} {result.metrics[key]:.1f}" for key in ("nAP50", "bAP50", "AP50") if key in result.metrics]
    spent = result.seconds.get("eval", 0.0)
    if run.kind != "evaluation":  # which costs nothing of the training whose weights it takes
        spent += result.seconds.get("train", 0.0)
    return f"{run.folder}: {', '.join(metrics[:2])} ({duration(spent)})"


def remaining(ahead: Sequence[PlannedRun], done: Mapping[PlannedRun, RunResult], width: int) -> str:
    """The time left in words; arguments as `seconds_left`."""
    seconds = seconds_left(ahead, done, width)
    if not ahead:
        return "nothing left to do"
    return "time left unknown" if seconds is None else f"about {duration(seconds)} left"


def seconds_left(ahead: Sequence[PlannedRun], done: Mapping[PlannedRun, RunResult], width: int) -> float | None:
    """Seconds that runs will take, after the times of the finished ones that are most like them.

    Args:
        ahead: the runs.
        done: the finished ones.
        width: runs at once.
    Returns: None while no run is finished that could tell.
    """
    if ahead and not done:
        return None
    return sum(_expected(run, done) for run in ahead) / max(1, min(width, len(ahead)))


def _expected(run: PlannedRun, done: Mapping[PlannedRun, RunResult]) -> float:
    """Seconds of a run: its iterations at the speed of runs alike, and their mean evaluation."""
    trained = [other for other in done if bool(other.iterations) == bool(run.iterations)] or list(done)
    kin = [other for other in trained if other.kind == run.kind]
    alike = [done[other] for other in [r for r in kin if r.config_file == run.config_file] or kin or trained]
    iterations = sum(result.iterations for result in alike)
    speed = sum(result.seconds.get("train", 0.0) for result in alike) / iterations if iterations else 0.0
    return speed * run.iterations + sum(result.seconds.get("eval", 0.0) for result in alike) / len(alike)


def duration(seconds: float) -> str:
    """A time for people: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
