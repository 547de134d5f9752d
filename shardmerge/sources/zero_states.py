"""What the optimizer states of one of DeepSpeed's ranks say of its flat groups. Pure.

PyTorch's optimizer is given one flat tensor for each group of parameters, so that its states are
flat tensors of the same size under the group's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickles import Made
from shardmerge.sources.torch_file import StoredTensor, sizes_of

SECOND_MOMENT = "exp_avg_sq"
"""As PyTorch and DeepSpeed call it."""
_KEYS = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}


def flat_states(
    states: Mapping[object, object],
    stage: int,
    masters: Sequence[StoredTensor],
    state: str,
    place: str,
) -> list[StoredTensor]:
    """The optimizer's state of each flat group, without what fills up the last rank's.

    Args:
        states: ``optimizer_state_dict`` of a rank.
        stage: 1, 2 or 3.
        masters: the flat master weights of each group.
        state: its name, such as ``exp_avg_sq``.
        place: the rank's file, as messages name it.
    Raises:
        CheckpointError: where it is not there, or of another size than the weights.
    """
    held = states.get(_KEYS[stage])
    by_number = held.get("state") if isinstance(held, dict) else None
    if not isinstance(by_number, dict) or not by_number:
        raise CheckpointError(
            f"{place}: no states of an optimizer in it ({_KEYS[stage]}): it was trained without "
            "Adam, saved\n  without the optimizer, 'elastic', or its states are offloaded to a "
            "disk. Take the squared task vector instead: --from task-vector."
        )
    listed = states.get("group_paddings")
    fills = listed if isinstance(listed, list) and len(listed) == len(masters) else []
    found = []
    for number, master in enumerate(masters):
        own = by_number.get(number)
        tensor = own.get(state) if isinstance(own, dict) else None
        if not isinstance(tensor, StoredTensor):
            raise CheckpointError(
                f"{place}: no {state} of group {number} of parameters: the optimizer is not Adam, "
                "or had made no step.\n  Take the squared task vector instead: --from task-vector."
            )
        fill = fills[number] if fills and isinstance(fills[number], int) else 0
        if len(tensor.shape) != 1 or tensor.numel not in (master.numel, master.numel + fill):
            raise CheckpointError(
                f"{place}: {state} of group {number} has {tensor.numel:,} elements, its master "
                f"weights {master.numel:,}.\n  Files of two checkpoints lie together, or one is "
                "damaged. Copy it again."
            )
        found.append(replace(tensor, shape=master.shape))
    return found


def fragments(
    states: Mapping[object, object], count: int
) -> tuple[Mapping[str, tuple[int, int]], ...]:
    """What ``param_slice_mappings`` says: begin and count of each parameter in each group."""
    listed = states.get("param_slice_mappings")
    if not isinstance(listed, list) or len(listed) != count:
        return ()
    found = []
    for group in listed:
        own: dict[str, tuple[int, int]] = {}
        for name, address in group.items() if isinstance(group, dict) else ():
            state = address.state if isinstance(address, Made) else None
            state = state if isinstance(state, dict) else {}
            start, numel = state.get("start"), state.get("numel")
            if not isinstance(start, int) or not isinstance(numel, int):
                return ()
            if isinstance(name, str):
                own[name] = (start, numel)
        found.append(own)
    return tuple(found)


def paddings(listed: object) -> tuple[tuple[int, ...], ...] | None:
    """Elements after each parameter of each group that belong to none."""
    if not isinstance(listed, list):
        return None
    groups = [sizes_of(group) for group in listed]
    return tuple(group for group in groups if group is not None)
