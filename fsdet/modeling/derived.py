"""Tensors computed from a module's weights, kept as long as these are the same.

They belong to inference: no part of a state dict, and never trained. Weights count as changed when PyTorch has counted
a write to one of them or one lies elsewhere in memory. Some optimizers write uncounted (SOLVER.FUSED), so owners also
call `forget` whenever they are switched between training and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
WeightsKey = tuple[tuple[int, int, torch.device], ...]


def weights_key(module: nn.Module) -> WeightsKey | None:
    """What tells one state of a module's parameters and buffers from the next; None where PyTorch keeps no count."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version, tensor.device) for tensor in tensors)


def is_cpu_inference(module: nn.Module, x: Tensor) -> bool:
    """Whether a module may compute x in the ways that pay at inference on a CPU, in single precision."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not module.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


class Derived(Generic[T]):
    """One value derived from a module; copies and pickles of it are empty."""

    def __init__(self, make: Callable[..., T]) -> None:
        """`make`: (module, and what else is given with it) -> value; called without gradients."""
        self._make = make
        self.forget()

    def __call__(self, module: nn.Module, *extra: Any) -> T:
        """The value for the module as it is now.

        Args:
            module: whose weights the value depends on.
            extra: what else it depends on; compared by `==`.
        """
        key = weights_key(module)
        if key is None:
            return self._made(module, *extra)
        if self._key != (key, extra):
            self._value, self._key = self._made(module, *extra), (key, extra)
        return self._value  # type: ignore[return-value]

    def forget(self) -> None:
        """Free the value."""
        self._key: Any = None
        self._value: T | None = None

    def _made(self, module: nn.Module, *extra: Any) -> T:
        # Ordinary tensors, whatever the mode of the first call is.
        with torch.inference_mode(False), torch.no_grad():
            return self._make(module, *extra)

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived[T]:
        return type(self)(self._make)

    def __getstate__(self) -> dict[str, Any]:
        return {"_make": self._make, "_key": None, "_value": None}
