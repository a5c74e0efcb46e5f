"""Start a run on the CPU, on one GPU, on several GPUs and machines, or under torchrun.

Detectron2's `launch` starts GPU processes; what it lacks is added here: processes that torchrun has already started,
and CPU processes joined by gloo.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as launch_gpus
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --num-gpus, --num-processes, --num-machines, --machine-rank and --dist-url."""
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs on this machine (default 1; 0 = CPU)")
    parser.add_argument("--num-processes", type=int, default=1, help="CPU processes, when there is no GPU")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="0-based number of this machine")
    parser.add_argument("--dist-url", default="auto", help='where processes meet, e.g. "tcp://host:port"')


def create_local_group(processes_per_machine: int) -> None:
    """Tell Detectron2's `comm` which processes share a machine (its way to say so differs between versions)."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    for first in range(0, dist.get_world_size(), processes_per_machine):
        ranks = list(range(first, first + processes_per_machine))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def _run_joined(main: Callable[..., Any], args: tuple[Any, ...], processes_per_machine: int, **where: Any) -> Any:
    """Join the process group, run, leave."""
    dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT, **where)
    try:
        create_local_group(processes_per_machine)
        if torch.cuda.is_available():
            torch.cuda.set_device(comm.get_local_rank())
        comm.synchronize()
        return main(*args)
    finally:
        dist.destroy_process_group()


def _cpu_worker(rank: int, main: Callable[..., Any], args: tuple[Any, ...], world_size: int, url: str) -> None:
    """One of several CPU processes."""
    torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    _run_joined(main, args, world_size, init_method=url, rank=rank, world_size=world_size)


def _free_url() -> str:
    """Address of a free local port."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _reporting(faults: Any, main: Callable[..., Any], *args: Any) -> None:
    """Call `main` in a started process; pass the text of a foreseen error on to the parent."""
    try:
        main(*args)
    except UnicodeError:  # a ValueError, but a programming fault
        raise
    except (FileNotFoundError, ValueError) as error:
        faults.put(str(error))
        raise


def _in_processes(start: Callable[..., Any], main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Call `start(function, arguments)`, which runs `main` in several processes, and fail as a single process would.

    Raises: ValueError with the text of the first foreseen error of a process; SystemExit with the status of a process
        that left by itself (an orderly stop); ProcessRaisedException with the traceback of any other error.
    """
    faults = torch.multiprocessing.get_context("spawn").SimpleQueue()
    try:
        start(_reporting, (faults, main, *args))
    except ProcessRaisedException:
        if faults.empty():
            raise
        raise ValueError(faults.get()) from None
    except ProcessExitedException as stop:
        code = stop.exit_code
        raise SystemExit(code if code > 0 else 128 - code) from None  # a signal's number is negative here


def launch(main: Callable[..., Any], options: argparse.Namespace, args: tuple[Any, ...]) -> Any:
    """Call `main(*args)` in as many processes as `options` asks for.

    Args:
        main: picklable function; its result is returned only when a single process runs.
        options: what `add_launch_arguments` defines.
        args: its arguments.
    Raises: ValueError for options that cannot work and for foreseen errors of started processes.
    """
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun
        return _run_joined(main, args, int(os.environ["LOCAL_WORLD_SIZE"]), init_method="env://")
    wanted, machines, present = options.num_gpus, options.num_machines, torch.cuda.device_count()
    if wanted > present:
        if machines > 1:
            raise ValueError(f"--num-gpus {wanted}, but this machine has {present}; every machine needs as many")
        if present:  # without any, `on_this_machine` says so
            logger.warning("--num-gpus %d, found %d: running on %d GPU", wanted, present, present)
        wanted = present
    if machines > 1 and (wanted == 0 or options.dist_url == "auto"):
        raise ValueError(
            "Several machines need a GPU each, and --dist-url tcp://HOST:PORT of the first one; on the CPU start the "
            "processes with torchrun"
        )
    if wanted > 1 or machines > 1:
        where = (wanted, machines, options.machine_rank, options.dist_url)
        return _in_processes(lambda call, rest: launch_gpus(call, *where, rest, TIMEOUT), main, args)
    if wanted == 0 and options.num_processes > 1:
        count, url = options.num_processes, _free_url()
        spawn = torch.multiprocessing.spawn
        return _in_processes(lambda call, rest: spawn(_cpu_worker, (call, rest, count, url), nprocs=count), main, args)
    return main(*args)
