"""Gram matrices of the inputs of a model's linear layers on examples, which RegMean merges by.

Of a layer that is given inputs x, one of each token (padding is none: examples run one by one), it
is the mean of x x^T.

Reference: Jin, Ren, Preotiuc-Pietro, Cheng. Dataless Knowledge Fusion by Merging Weights of
    Language Models. ICLR 2023. arXiv:2212.09849, algorithm 1.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter as Counts
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shardmerge.assets import as_json
from shardmerge.computed import write_computed
from shardmerge.errors import CheckpointError, MemoryBudgetError, Stopped
from shardmerge.estimate.counting import Counter
from shardmerge.estimate.examples import Example, Question, Sample
from shardmerge.estimate.models import (
    Loaded,
    describe_model,
    examples_for,
    identity_of,
    in_words_of,
    load_model,
    logits_of,
    sample_for,
    torch_device,
)
from shardmerge.layout import Spec
from shardmerge.methods.regmean import GRAM, ROWS
from shardmerge.numerics import DType
from shardmerge.outputs import open_output
from shardmerge.progress import counted, size
from shardmerge.publish import Published
from shardmerge.recipe_parts import ModelName
from shardmerge.sources.folder import few
from shardmerge.staging import refuse_sources
from shardmerge.stores import Settings, Stores

if TYPE_CHECKING:
    import torch

WITHOUT = "without"
"""Key, in config.json, of the names of matrices that there are no Gram matrices for."""
BLOCK_TOKENS = 256
"""Tokens that are multiplied at a time, in float32; such products are added up in float64."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer.

    Args:
        module: its name in the model.
        tensor: name of its weight in the checkpoint.
        inputs: their number.
        rows: whether they are the rows of the weight (``Conv1D``), not the columns (``Linear``).
    """

    module: str
    tensor: str
    inputs: int
    rows: bool


def collect_gram(
    model: str,
    out: str,
    question: Question,
    *,
    device: str,
    memory_bytes: int,
    counter: Counter,
    stop: threading.Event,
    settings: Settings,
    overwrite: bool = False,
    fresh: bool = False,
) -> Published:
    """Collect the Gram matrices of a model and publish them as a checkpoint of its own.

    Under the name of each linear layer's weight it has a float32 matrix of [inputs, inputs].

    Args:
        model: a local folder in transformers' format, or a name of the Hub.
        out: where to publish.
        device: ``cpu`` or ``cuda``: where the model and the matrices are.
        memory_bytes: of the matrices that are collected in one pass over the examples, beside the
            model; with less of it there are more passes, and the same bytes.
        stop: set to stop after the next example.
        overwrite: replace another checkpoint at ``out``.
        fresh: forget a stopped run.
    Raises:
        UsageError: for what cannot be asked of this model.
        DataError: for examples that cannot be used.
        CheckpointError: for a model that cannot be loaded, whole.
        MemoryBudgetError: for a matrix that does not fit alone.
        NonFiniteError: where inputs are NaN or infinite.
        Stopped: by ``stop``; the same call goes on.
    """
    stores = Stores(settings, stopping=stop)
    output = open_output(out, stores)
    place = torch_device(device)
    described = describe_model(model, question.task, stores)
    refuse_sources(output, {ModelName(model): described.checkpoint})
    sample = sample_for(described, question)
    examples = examples_for(
        described, sample.chosen, max_length=question.max_length, seed=question.seed
    )
    loaded = load_model(described, place)
    layers = linear_layers(loaded)
    if not layers:
        raise CheckpointError(
            f"{model}: no linear layer (torch.nn.Linear or Conv1D) has a weight of its own in the "
            "checkpoint, so regmean would average all of it. Merge it by linear."
        )
    groups(layers, memory_bytes)  # refuses what does not fit, before anything is written
    run = _Run(
        loaded, examples, {layer.tensor: layer for layer in layers}, memory_bytes, counter, stop
    )
    without = without_gram(loaded, layers)
    facts = {ROWS: [layer.tensor for layer in layers if layer.rows], WITHOUT: without}
    return write_computed(
        output,
        [Spec(layer.tensor, DType.F32, (layer.inputs, layer.inputs)) for layer in layers],
        run.values,
        identity=identity_of(
            described,
            question,
            sample,
            made="Gram matrices of inputs",
            arithmetic=f"float32 on {device}",
        ),
        files={"config.json": as_json({GRAM: facts})},
        overwrite=overwrite,
        fresh=fresh,
        notes=_notes(sample, without),
    )


def _notes(sample: Sample, without: Sequence[str]) -> tuple[str, ...]:
    notes = [f"{len(sample.chosen):,} of {counted(sample.total, 'example')} were used"]
    if without:
        notes.append(
            f"no Gram matrix for {counted(len(without), 'tensor')}, which regmean averages: "
            f"{few(without)}"
        )
    return tuple(notes)


# --- layers ---------------------------------------------------------------------------------------


def linear_layers(loaded: Loaded) -> tuple[Layer, ...]:
    """The linear layers whose weight is a tensor of the checkpoint as it is, in the model's order.

    Without those whose weight is another parameter too (a tied output embedding).
    """
    group_of = {target: group for group in loaded.groups for target in group.targets}
    names = Counts(loaded.parameter_of.values())
    found = []
    for module, layer in loaded.model.named_modules():
        rows = _inputs_in_rows(layer)
        weight = f"{module}.weight"
        group = group_of.get(weight)
        if rows is None or group is None or group.convert is not None:
            continue
        if names[loaded.parameter_of[weight]] == 1:
            shape = loaded.parameters[weight].shape
            found.append(Layer(module, group.sources[0], shape[0 if rows else 1], rows))
    return tuple(found)


def _inputs_in_rows(module: torch.nn.Module) -> bool | None:
    """Whether the inputs of a linear layer are its weight's rows; None for another module."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    return False if isinstance(module, torch.nn.Linear) else None


def without_gram(loaded: Loaded, layers: Sequence[Layer]) -> list[str]:
    """Tensors of the checkpoint that are matrices, or hold some, and belong to no layer."""
    tensors, held = loaded.described.checkpoint.tensors, {layer.tensor for layer in layers}
    return [
        name
        for name, ref in tensors.items()
        if name not in held and len(ref.shape) > 1 and ref.dtype.is_float
    ]


def groups(layers: Sequence[Layer], memory_bytes: int) -> list[list[Layer]]:
    """Consecutive layers whose matrices fit into memory together.

    Each takes a sum in float64; beside the sums there are a product of as many bytes, one of a
    block, and the result, both in float32.

    Raises:
        MemoryBudgetError: for one that does not fit alone.
    """
    found: list[list[Layer]] = []
    held = largest = 0
    for layer in layers:
        numel = layer.inputs**2
        held, largest = held + numel, max(largest, numel)
        if found and _held_bytes(held, largest) <= memory_bytes:
            found[-1].append(layer)
            continue
        held = largest = numel
        needed = _held_bytes(held, largest)
        if needed > memory_bytes:
            raise MemoryBudgetError(
                f"the Gram matrix of {layer.tensor} needs {size(needed)}; --memory gives "
                f"{size(memory_bytes)}.\n"
                f"  It has {layer.inputs:,} inputs: {layer.inputs:,}^2 numbers, 20 bytes for "
                f"each.\n  Give --memory {-(-needed // 2**20)}MiB or more."
            )
        found.append([layer])
    return found


def _held_bytes(numel: int, largest: int) -> int:
    """Of sums of so many elements in all, and of the largest of them."""
    return 8 * numel + (8 + 4) * largest


# --- sums -----------------------------------------------------------------------------------------


class Sums:
    """Sums of x x^T over the inputs x of some layers, taken while the model runs."""

    def __init__(self, loaded: Loaded, layers: Sequence[Layer]) -> None:
        import torch

        self._loaded = loaded
        self._layers = layers
        device = loaded.model.device
        self._sums = {
            layer.tensor: torch.zeros(
                (layer.inputs, layer.inputs), dtype=torch.float64, device=device
            )
            for layer in layers
        }
        self._tokens = dict.fromkeys(self._sums, 0)
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """What layers are given from now on is added."""
        hooks = []
        for layer in self._layers:
            module = self._loaded.model.get_submodule(layer.module)

            def take(_: object, inputs: tuple[torch.Tensor, ...], layer: Layer = layer) -> None:
                self.add(layer, inputs[0])

            hooks.append(module.register_forward_pre_hook(take))
        try:
            yield
        finally:
            self._last = None
            for hook in hooks:
                hook.remove()

    def add(self, layer: Layer, inputs: torch.Tensor) -> None:
        """Add the inputs of a layer, [..., inputs]."""
        # Several layers may be given one and the same tensor: queries, keys and values.
        last = self._last
        if last is None or last[0] is not inputs or last[1] != inputs._version:
            self._last = last = None  # given back before the next is made
            last = self._last = (inputs, inputs._version, _product(inputs, layer.inputs))
        self._sums[layer.tensor] += last[2]
        self._tokens[layer.tensor] += inputs.numel() // layer.inputs

    def means(self) -> Iterator[npt.NDArray[np.float32]]:
        """Of x x^T of each layer, float32 [inputs, inputs]; zeros where it was given none.

        A sum is given back when its mean was taken.
        """
        for layer in self._layers:
            total, tokens = self._sums.pop(layer.tensor), self._tokens[layer.tensor]
            if not tokens:
                _LOG.warning(
                    "%s: no example reached this layer, so its Gram matrix is zero", layer.tensor
                )
            yield (total / max(1, tokens)).float().cpu().numpy()


def _product(inputs: torch.Tensor, width: int) -> torch.Tensor:
    """The sum of x x^T over the rows x of inputs [..., width]; float64, from float32 products."""
    import torch

    rows = inputs.detach().reshape(-1, width).float()
    total = torch.zeros((width, width), dtype=torch.float64, device=rows.device)
    for block in rows.split(BLOCK_TOKENS):
        total += block.T @ block
    return total


@dataclass(frozen=True, slots=True)
class _Run:
    """Everything that the means are computed from."""

    loaded: Loaded
    examples: Sequence[Example]
    layers: Mapping[str, Layer]
    memory_bytes: int
    counter: Counter
    stop: threading.Event

    def values(self, names: Sequence[str]) -> Iterator[npt.NDArray[np.float32]]:
        """The means of these layers, by their tensors' names; a pass over the examples a group."""
        import torch

        passes = groups([self.layers[name] for name in names], self.memory_bytes)
        done, total = 0, len(passes) * len(self.examples)
        self.counter.start(total=total, done=0)
        for layers in passes:
            sums = Sums(self.loaded, layers)
            with sums.watching(), torch.no_grad():
                for example in self.examples:
                    if self.stop.is_set():
                        raise Stopped(
                            f"stopped after {done:,} of {total:,} examples in "
                            f"{counted(len(passes), 'pass')}; matrices that were written stay, and "
                            "the same command goes on with the others"
                        )
                    with in_words_of(example):
                        logits_of(self.loaded, example)
                    done += 1
                    self.counter.done(done)
            yield from sums.means()
