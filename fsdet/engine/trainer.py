"""The training loop: every iteration is a function of (configuration, seed, iteration) alone.

Batches come from a plan (`fsdet.data.loader`), and the generator that the model samples anchors and regions with is
seeded per iteration and piece of the batch. So a run that was killed and resumed, or split over two processes instead
of two accumulation passes, computes what the uninterrupted single process computes.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase, default_writers, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fsdet.checkpoint.checkpointer import FewShotCheckpointer
from fsdet.data.loader import build_train_loader
from fsdet.engine.hooks import EvaluationHook, GracefulStop
from fsdet.engine.patch_mining import PatchMining
from fsdet.modeling.feature_cache import MIB, FeatureCache
from fsdet.modeling.freeze import apply_freeze
from fsdet.modeling.region_sampling import apply_thinning

logger = logging.getLogger(__name__)


def step_seed(seed: int, iteration: int, piece: int) -> int:
    """Seed of the model's own draws (anchor and region sampling, dropout) for one piece of one iteration's batch."""
    return int(np.random.SeedSequence([seed, iteration, piece]).generate_state(1, np.uint64)[0] >> 1)


def build_detector(cfg: CfgNode) -> nn.Module:
    """Detectron2 model of a configuration, with the parts that it freezes frozen and its ways of training faster.

    Raises: ValueError for switches that find nothing to act on.
    """
    model = build_model(cfg)
    trainable = apply_freeze(model, cfg)
    apply_thinning(model, cfg)
    if cfg.MODEL.BACKBONE.CHANNELS_LAST:
        model.backbone.to(memory_format=torch.channels_last)
    if cfg.MODEL.BACKBONE.CACHE_MIB:
        FeatureCache(model, cfg.MODEL.BACKBONE.CACHE_MIB * MIB)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%d trainable parameters in %s", count, ", ".join(trainable))
    return model


def make_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's optimizer of the trainable parameters, whose step is one pass over memory with SOLVER.FUSED.

    The box predictor learns at SOLVER.HEAD_LR_FACTOR times the rate of the rest.
    """
    optimizer = build_optimizer(cfg, model)
    if cfg.SOLVER.HEAD_LR_FACTOR != 1:
        _speed_up_heads(optimizer, model, cfg.SOLVER.HEAD_LR_FACTOR)
    fuse(optimizer, cfg)
    return optimizer


def _speed_up_heads(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Move the box predictor's parameters into groups of their own, with `factor` times the learning rate."""
    heads = {id(parameter) for name, parameter in model.named_parameters() if "box_predictor" in name}
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in heads]
        if not mine:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in heads]
        if group["params"]:
            optimizer.add_param_group({**group, "params": mine, "lr": group["lr"] * factor})
        else:
            group["params"], group["lr"] = mine, group["lr"] * factor


def fuse(optimizer: torch.optim.Optimizer, cfg: CfgNode) -> None:
    """Set how the steps are computed; call it again for an optimizer whose state was loaded."""
    for group in optimizer.param_groups if cfg.SOLVER.FUSED else ():
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if state.get("momentum_buffer") is not None:
                # The fused kernel does not look at strides: saved momentum must lie in memory as its parameter does.
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])


def precision(cfg: CfgNode) -> torch.dtype | None:
    """Data type of mixed precision on the configured device, or None for full precision.

    Raises: ValueError for float16 on the CPU, which has no loss scaling worth the name.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    name = cfg.SOLVER.AMP.DTYPE
    if name == "auto":
        name = "bfloat16" if not on_gpu or torch.cuda.is_bf16_supported() else "float16"
    if name == "float16" and not on_gpu:
        raise ValueError("SOLVER.AMP.DTYPE float16 needs a GPU; use bfloat16 on the CPU")
    return getattr(torch, name)


def autocast(cfg: CfgNode) -> AbstractContextManager[Any]:
    """Mixed-precision context of a configuration; does nothing in full precision."""
    dtype = precision(cfg)
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=dtype) if dtype else nullcontext()


class Trainer(TrainerBase):
    """SGD on planned batches with mixed precision, gradient accumulation, exact resume and orderly stops."""

    def __init__(self, cfg: CfgNode, *, metadata: dict[str, Any] | None = None) -> None:
        """Build model, optimizer and schedule; data is read when `train` starts.

        Args:
            cfg: resolved configuration.
            metadata: plain values stored in every checkpoint, e.g. the class names in predictor order.
        """
        super().__init__()
        self.cfg = cfg
        pieces = comm.get_world_size() * cfg.SOLVER.ACCUMULATION_STEPS
        if cfg.SOLVER.IMS_PER_BATCH % pieces:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is no multiple of {pieces} = processes x "
                "SOLVER.ACCUMULATION_STEPS: every pass needs as many images"
            )
        self.seconds = 0.0  # spent in training without evaluations, over all resumed parts
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        model = build_detector(cfg)
        self.optimizer = make_optimizer(cfg, model)
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self.model = self._distribute(model)
        self.grad_scaler = torch.amp.GradScaler(enabled=precision(cfg) is torch.float16)
        self.checkpointer = FewShotCheckpointer(model, cfg.OUTPUT_DIR, metadata=metadata, trainer=weakref.proxy(self))
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.stop = GracefulStop()
        self.evaluate: Callable[[], dict[str, Any]] | None = None

    def _distribute(self, model: nn.Module) -> nn.Module:
        """Wrap for several processes."""
        if comm.get_world_size() == 1:
            return model
        devices = [comm.get_local_rank()] if self.cfg.MODEL.DEVICE.startswith("cuda") else None
        return DistributedDataParallel(
            model,
            device_ids=devices,
            broadcast_buffers=False,
            find_unused_parameters=self.cfg.SOLVER.FIND_UNUSED_PARAMETERS,
        )

    def train(self) -> None:  # type: ignore[override]
        """Train from `start_iter` to MAX_ITER; `evaluate`, if set, is called every TEST.EVAL_PERIOD and at the end.

        Raises: FloatingPointError on every process when a loss is not finite; StoppedBySignal after SIGTERM or SIGINT,
            with a checkpoint saved.
        """
        self.register_hooks(self.build_hooks())
        if self.start_iter < self.max_iter:
            self.start_batches(self.start_iter)
        self.model.train()
        self._started = time.perf_counter() - self.seconds
        super().train(self.start_iter, self.max_iter)

    def start_batches(self, iteration: int) -> None:
        """Plan the batches from an iteration on, with the mined patches that lie in OUTPUT_DIR for it."""
        place = {"rank": comm.get_rank(), "world_size": comm.get_world_size()}
        self._batches = iter(build_train_loader(self.cfg, seed=self.seed, start=iteration, **place))

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Schedule, checkpoints, orderly stop, evaluation and writers, in the order they must run."""
        solver, main = self.cfg.SOLVER, comm.is_main_process()
        saver = hooks.PeriodicCheckpointer(
            self.checkpointer, solver.CHECKPOINT_PERIOD, max_to_keep=solver.CHECKPOINTS_KEPT
        )
        # A resumed run goes on counting the files of its former parts.
        former = sorted(Path(self.cfg.OUTPUT_DIR).glob("model_" + "[0-9]" * 7 + ".pth"))
        saver.recent_checkpoints = [str(path) for path in former if int(path.stem[6:]) < self.start_iter]
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            saver if main else None,
            self.stop,
            PatchMining(self.cfg, self.model) if self.cfg.INPUT.PATCH.MINING_PERIOD else None,
            EvaluationHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate) if self.evaluate else None,
            hooks.PeriodicWriter(default_writers(self.cfg.OUTPUT_DIR, self.max_iter), period=20) if main else None,
        ]

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate off the clock: `seconds` is the cost of training alone."""
        started = time.perf_counter()
        results = self.evaluate()
        self._started += time.perf_counter() - started
        return results

    def run_step(self) -> None:
        """One optimizer step over all pieces of the batch."""
        started = time.perf_counter()
        try:
            batch = next(self._batches)
            data_time = time.perf_counter() - started
            losses = self._forward_backward(batch)
        except FloatingPointError as error:  # Detectron2's RPN finds it before the losses are known
            raise FloatingPointError(self._divergence(str(error))) from error
        except Exception:
            self._save_before_failing()
            raise
        self._check_and_log(losses, data_time)
        if self._clip():
            self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.seconds = time.perf_counter() - self._started

    def _forward_backward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Accumulate the gradient of the mean loss over the pieces; returns that mean, per loss."""
        passes = self.cfg.SOLVER.ACCUMULATION_STEPS
        size = len(batch) // passes
        totals: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        for number in range(passes):
            torch.manual_seed(step_seed(self.seed, self.iter, comm.get_rank() * passes + number))
            wait = number + 1 < passes and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if wait else nullcontext():  # type: ignore[operator]
                with autocast(self.cfg):
                    losses = self.model(batch[number * size : (number + 1) * size])
                self.grad_scaler.scale(sum(losses.values()) / passes).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.detach().float() / passes
        return totals

    def _clip(self) -> bool:
        """Bound the norm of the whole gradient; returns whether the step can be taken, which needs a finite norm."""
        limit = self.cfg.SOLVER.CLIP_TOTAL_NORM
        if not limit:
            return True
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        finite = bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        if not finite:
            logger.warning("Iteration %d: the gradient is not finite; this step is left out", self.iter)
        return finite

    def _check_and_log(self, losses: dict[str, Tensor], data_time: float) -> None:
        """Average over the processes, stop every one of them if a loss is not finite, write the rest.

        The wish to stop travels with the losses, so that all processes leave in the same iteration.
        """
        names = sorted(losses)
        packed = torch.stack([losses[name].reshape(()) for name in names])
        packed = torch.cat([packed, packed.new_tensor([float(self.stop.requested)])])
        if comm.get_world_size() > 1:
            dist.all_reduce(packed)
            packed /= comm.get_world_size()
        *values, stop = packed.tolist()
        self.stop.agreed = stop > 0
        means = dict(zip(names, values, strict=True))
        if not np.isfinite(sum(values)):
            raise FloatingPointError(self._divergence(f"losses {means}"))
        if comm.is_main_process():
            self.storage.put_scalar("data_time", data_time)
            self.storage.put_scalars(total_loss=sum(values), **means)

    def _divergence(self, what: str) -> str:
        """Message of a run whose numbers are no longer finite."""
        solver = self.cfg.SOLVER
        return (
            f"Iteration {self.iter}: training has diverged ({what}). Lower SOLVER.BASE_LR (now {solver.BASE_LR:g}), "
            f"lengthen SOLVER.WARMUP_ITERS (now {solver.WARMUP_ITERS}), and check that MODEL.WEIGHTS "
            f"({self.cfg.MODEL.WEIGHTS or 'none: random start'}) was matched."
        )

    def _save_before_failing(self) -> None:
        """Keep the finished iterations when data or memory fails in the middle of one."""
        if comm.is_main_process() and self.iter > self.start_iter:
            self.checkpointer.save(f"model_{self.iter - 1:07d}", iteration=self.iter - 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors alone, so that a checkpoint loads weights-only."""
        return {
            "iteration": self.iter,
            "seed": self.seed,
            "seconds": self.seconds,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore seed, optimizer and schedule."""
        self.iter, self.seed, self.seconds = (state_dict[key] for key in ("iteration", "seed", "seconds"))
        self.optimizer.load_state_dict(state_dict["optimizer"])
        fuse(self.optimizer, self.cfg)
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
