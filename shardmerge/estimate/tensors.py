"""The tensors of a checkpoint that a transformers model's parameters are.

transformers may rename what a checkpoint holds, split or stack it, and tie parameters to each
other. Whatever it does with the values it loads, we do with their positions: so for each tensor of
the checkpoint we know which element of which parameter its elements became.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardmerge.errors import CheckpointError
from shardmerge.sources import Checkpoint
from shardmerge.sources.folder import few

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of the checkpoint that become parameters together.

    Args:
        sources: names of these tensors.
        targets: names, in the model's ``state_dict``, of what they become.
        convert: makes the values of ``targets`` of those of ``sources``; None where one tensor
            becomes one parameter as it is.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    convert: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None


def groups_of(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> Iterator[Group]:
    """What becomes of the checkpoint's tensors: the steps of transformers' loading, by names.

    Args:
        state: entries of the model's ``state_dict``.
    Raises:
        CheckpointError: where several tensors would be the same entry.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, list[tuple[str, str | None]]] = {}
    prefix, entries = model.base_model_prefix, dict(state)
    for source in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, prefix, entries)
        if target not in state and source in state:
            target, pattern = rename_source_key(source, [], [], prefix, entries)
        if target in state:
            found.setdefault(target, []).append((source, pattern))
    for target, sources in found.items():
        pattern = sources[0][1]
        if pattern is not None:
            yield _converted(checkpoint, model, target, sources, by_pattern[pattern])
        elif len(sources) > 1:
            raise CheckpointError(
                f"{checkpoint.url}: {few(source for source, _ in sources)} of its checkpoint are "
                f"all read as {target}. Remove those that do not belong there."
            )
        else:
            yield Group((sources[0][0],), (target,), None)


def _converted(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    target: str,
    sources: Sequence[tuple[str, str | None]],
    rule: Any,
) -> Group:
    """Tensors that become one or more others: what they become is known without their values."""
    import torch

    def convert(values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        fresh = copy.deepcopy(rule)
        for source, pattern in sources:
            fresh.add_tensor(target, source, pattern, values[source])
        made = fresh.convert(target, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}

    shapes = {
        source: torch.empty(checkpoint.tensors[source].shape, device="meta")
        for source, _ in sources
    }
    return Group(tuple(shapes), tuple(convert(shapes)), convert)


def stored(
    checkpoint: Checkpoint, group: Group, value: Callable[[str], torch.Tensor | None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Values of parameters as the checkpoint's tensors hold the parameters themselves.

    The conversion is done to the numbers of elements, which tell where each value belongs.

    Args:
        value: of an entry of the state_dict, by name, on the CPU and of the parameter's shape;
            None for one that is no parameter, which gives zeros.
    Raises:
        CheckpointError: where elements of the parameters are not, one by one, elements of tensors.
    """
    import torch

    shapes = {name: checkpoint.tensors[name].shape for name in group.sources}
    if group.convert is None:
        (source,), (target,) = group.sources, group.targets
        found = value(target)
        yield (
            source,
            torch.zeros(shapes[source]) if found is None else found.reshape(shapes[source]),
        )
        return
    begin, numbered = 0, {}
    for source, shape in shapes.items():
        numel = torch.Size(shape).numel()
        numbered[source] = torch.arange(begin, begin + numel).reshape(shape)
        begin += numel
    flat, seen = torch.zeros(begin), torch.zeros(begin, dtype=torch.bool)
    for target, positions in group.convert(numbered).items():
        at = positions.reshape(-1)
        seen[at] = True
        begin -= at.numel()
        if (found := value(target)) is not None:
            flat[at] = found.reshape(-1)
    if begin or not seen.all():
        raise CheckpointError(
            f"{checkpoint.url}: {few(group.targets)} is not made of the elements of "
            f"{few(group.sources)} one by one, so nothing can be said of these tensors."
        )
    for source, positions in numbered.items():
        yield source, flat[positions.reshape(-1)].reshape(positions.shape)
