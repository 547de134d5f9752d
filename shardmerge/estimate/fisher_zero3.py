"""Fisher information of a model that no single device holds: DeepSpeed ZeRO-3, offloaded to CPUs.

Every process takes examples of its own. Layers are gathered while they are used, by DeepSpeed; a
parameter's gradient is squared in each process before the squares are added up, and each process
keeps its part of the sum. ``torchrun`` starts the processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shardmerge.errors import UsageError
from shardmerge.estimate.models import Described, Loaded, load_model, torch_device
from shardmerge.estimate.sums import Sums

if TYPE_CHECKING:
    import torch

_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        # Whatever stays whole on every process is a part of the model that must fit.
        "stage3_param_persistence_threshold": 0,
    },
}


class Zero3:
    """One of the processes that ``torchrun`` has started.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        what: arithmetic and devices, in words.
        keeps_graph: False: gathered layers are given back during the first backward pass.

    Raises:
        UsageError: without DeepSpeed, or where nothing has started the processes.
    """

    keeps_graph = False

    def __init__(self, device: str) -> None:
        if "RANK" not in os.environ:
            raise UsageError(
                "--deepspeed zero3 shares the work among processes; start them with\n"
                "  torchrun --nproc-per-node N -m shardmerge fisher ... --deepspeed zero3"
            )
        torch_device(device)  # before DeepSpeed looks for one
        os.environ.setdefault("DS_ACCELERATOR", device)
        try:
            import deepspeed
            from torch import distributed
            from transformers.integrations.deepspeed import HfDeepSpeedConfig
        except ImportError as problem:
            raise UsageError(
                f"--deepspeed needs {problem.name}, which is not installed "
                "(pip install 'shardmerge[deepspeed]')"
            ) from None
        deepspeed.init_distributed("gloo" if device == "cpu" else "nccl")
        # transformers asks for it while it loads a model, as long as it lives.
        self._config = HfDeepSpeedConfig(_CONFIG)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.what = f"float32 on {device}, {self.size} processes with ZeRO-3"

    def load(self, described: Described) -> Loaded:
        """The model, of which this process keeps its part of every parameter."""
        import deepspeed

        loaded = load_model(described)
        self._engine, *_ = deepspeed.initialize(model=loaded.model, config=_CONFIG)
        return loaded

    def sums(self, loaded: Loaded) -> Sums:
        """Parts of sums."""
        return _Parts(loaded, self._engine)

    def agree(self, wish: int) -> int:
        """The largest wish."""
        import torch
        from torch import distributed

        held = torch.tensor([wish], device=self._engine.device)
        distributed.all_reduce(held, distributed.ReduceOp.MAX)
        return int(held)

    def told(self, names: Sequence[str]) -> Sequence[str]:
        """What process 0 says."""
        from torch import distributed

        held = [names]
        distributed.broadcast_object_list(held, 0)
        return held[0]

    def meet(self) -> None:
        """Wait for all."""
        self.agree(0)

    def leave(self) -> None:
        """Wait for all, and close connections: a process that just ends has brought others down."""
        from torch import distributed

        self.meet()
        distributed.destroy_process_group()


class _Parts(Sums):
    """The part of each sum that this process holds: float32, flat, on the CPU.

    Parts are of one size, the last one padded with zeros.
    """

    def __init__(self, loaded: Loaded, engine: Any) -> None:
        from torch import distributed

        self._engine = engine
        self._size, self._rank = distributed.get_world_size(), distributed.get_rank()
        super().__init__(loaded.parameters)
        self._shapes = {name: p.ds_shape for name, p in loaded.parameters.items()}  # type: ignore[attr-defined]

    def empty(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A part of zeros."""
        import torch

        return torch.zeros(-(-parameter.ds_numel // self._size))  # type: ignore[attr-defined]

    def add(self, name: str, square: torch.Tensor) -> None:
        """Add the squares of all processes, each to the parts that hold its elements."""
        import torch
        from torch import distributed

        held = self._held[name]
        padded = square.new_zeros(held.numel() * self._size)
        padded[: square.numel()] = square.reshape(-1)
        part = torch.empty_like(held, device=square.device)
        distributed.reduce_scatter_tensor(part, padded)
        held += part.to(held.device)

    def unsound(self) -> list[str]:
        """As of one device; also gives back every parameter that is still gathered."""
        self._engine.optimizer.partition_all_parameters()
        return super().unsound()

    def whole(self, name: str) -> torch.Tensor | None:
        """The parts together, in process 0; None elsewhere."""
        import torch
        from torch import distributed

        part = self._held[name].to(self._engine.device)
        parts = [torch.empty_like(part) for _ in range(self._size)] if self._rank == 0 else None
        distributed.gather(part, parts)
        if parts is None:
            return None
        shape = self._shapes[name]
        return torch.cat(parts)[: shape.numel()].reshape(shape).cpu()
