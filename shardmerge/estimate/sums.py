"""Sums of squared gradients, and the processes that they are summed in.

A gradient is squared and freed as soon as it is whole, so that one parameter's is alive at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from shardmerge.estimate.models import Described, Loaded, load_model, torch_device

if TYPE_CHECKING:
    import torch


class Runner(Protocol):
    """The processes that share the examples, and how a model lies in their memory.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        what: arithmetic and devices, in words.
        keeps_graph: whether several gradients can be had of one forward pass.
    """

    rank: int
    size: int
    what: str
    keeps_graph: bool

    def load(self, described: Described) -> Loaded:
        """The model in memory, or this process's part of it."""

    def sums(self, loaded: Loaded) -> Sums:
        """Empty sums for its parameters."""

    def agree(self, wish: int) -> int:
        """The largest of what the processes wish for."""

    def told(self, names: Sequence[str]) -> Sequence[str]:
        """What process 0 says, to all of them."""

    def meet(self) -> None:
        """Wait for all of them."""

    def leave(self) -> None:
        """Wait for all of them, and end what connects them."""


class OneDevice:
    """A process of its own, and the whole model on its device."""

    rank = 0
    size = 1
    keeps_graph = True

    def __init__(self, device: str) -> None:
        self._device = torch_device(device)
        self.what = f"float32 on {device}"

    def load(self, described: Described) -> Loaded:
        """The model on the device."""
        return load_model(described, self._device)

    def sums(self, loaded: Loaded) -> Sums:
        """Sums on the device."""
        return Sums(loaded.parameters)

    def agree(self, wish: int) -> int:
        """There is nobody else."""
        return wish

    def told(self, names: Sequence[str]) -> Sequence[str]:
        """There is nobody else."""
        return names

    def meet(self) -> None:
        """There is nobody else."""

    def leave(self) -> None:
        """There is nobody else."""


class Sums:
    """Sums of squared gradients, taken as soon as a parameter's gradient is whole.

    Args:
        parameters: that are trained, by name; their hooks stay.
    Attributes:
        weight: of the squares that come next.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.weight: torch.Tensor | float = 1.0
        self._finite: dict[str, torch.Tensor] = {}
        self._held = {name: self.empty(p) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(functools.partial(self._take, name))

    def empty(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A sum of nothing: float32, on the parameter's device."""
        import torch

        return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)

    def _take(self, name: str, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        square = gradient.square() * self.weight
        self._finite[name] = square.isfinite().all()
        self.add(name, square)

    def add(self, name: str, square: torch.Tensor) -> None:
        """Add a weighted square, of the parameter's shape."""
        self._held[name] += square

    def unsound(self) -> list[str]:
        """Parameters whose squares were NaN or infinite since the last call."""
        import torch

        finite, self._finite = self._finite, {}
        if torch.stack(list(finite.values())).all():
            return []
        return [name for name, is_finite in finite.items() if not is_finite]

    def parts(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """What this process holds, to be saved."""
        for name, value in self._held.items():
            yield name, value.cpu().numpy()

    def restore(self, parts: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Go on from what was saved."""
        import torch

        for name, value in parts.items():
            self._held[name].copy_(torch.from_numpy(value))

    def whole(self, name: str) -> torch.Tensor | None:
        """The sum of one parameter, on the CPU; of process 0 only."""
        return self._held[name].cpu()
