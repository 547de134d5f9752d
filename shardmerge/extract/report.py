"""How near an adapter is to the model that it was extracted from. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shardmerge.extract.finished import Matrix
from shardmerge.progress import counted, size
from shardmerge.publish import Published

REPORT = "extract_lora.json"
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that differs and is not in the adapter.

    Args:
        relative_difference: L2 norm of the difference, as a share of that of the base model's
            tensor; None where that is zero, or the tensors cannot be compared.
        why: it is not in the adapter.
    """

    tensor: str
    relative_difference: float | None
    why: str


@dataclass(frozen=True, slots=True)
class Extracted:
    """A published adapter, and how near it is to the model.

    Args:
        matrices: of the LoRA layers, in the model's order.
        relative_error: of all of them together.
        equal: number of matrices that do not differ, and have no layer.
        saved: modules that are stored whole.
        left_out: whatever else differs: the adapter does not give it back.
    """

    published: Published
    matrices: tuple[Matrix, ...]
    relative_error: float
    equal: int
    saved: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def report_of(
    asked: Mapping[str, object],
    matrices: Sequence[Matrix],
    saved: Sequence[str],
    left_out: Sequence[LeftOut],
) -> dict[str, Any]:
    """What ``extract_lora.json`` says.

    Args:
        asked: what was asked for, and of which models.
        matrices: of all that were decomposed, also those that do not differ.
    """
    layers = [matrix for matrix in matrices if matrix.rank]
    whole = math.fsum(matrix.norm**2 for matrix in layers)
    lost = math.fsum((matrix.relative_error * matrix.norm) ** 2 for matrix in layers)
    return {
        **asked,
        "relative_error": math.sqrt(lost / whole),
        "matrices": [asdict(matrix) for matrix in layers],
        "equal": len(matrices) - len(layers),
        "saved": list(saved),
        "left_out": [asdict(tensor) for tensor in left_out],
    }


def extracted(published: Published, report: Mapping[str, Any]) -> Extracted:
    """The result, from what was published."""
    return Extracted(
        published=published,
        matrices=tuple(
            Matrix(**{**matrix, "shape": tuple(matrix["shape"])}) for matrix in report["matrices"]
        ),
        relative_error=report["relative_error"],
        equal=report["equal"],
        saved=tuple(report["saved"]),
        left_out=tuple(LeftOut(**tensor) for tensor in report["left_out"]),
    )


def summary(found: Extracted) -> Iterator[str]:
    """The result for people: the worst matrices, and what is not in the adapter."""
    ranks = sorted({matrix.rank for matrix in found.matrices})
    told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    done = "was already extracted" if found.published.already else "extracted"
    yield (
        f"{found.published.out}: {done}; {_matrices(len(found.matrices))} of rank {told}, "
        f"{size(found.published.nbytes)}; relative error {found.relative_error:.3e}"
    )
    for matrix in sorted(found.matrices, key=lambda each: -each.relative_error)[:_SHOWN]:
        yield f"  {matrix.relative_error:.3e}  rank {matrix.rank:<4} {matrix.tensor}"
    if found.equal:
        verb = "does" if found.equal == 1 else "do"
        yield f"{_matrices(found.equal)} {verb} not differ from the base model's"
    if found.saved:
        yield f"stored whole: {counted(len(found.saved), 'module')}"
    if found.left_out:
        verb = "differs" if len(found.left_out) == 1 else "differ"
        yield (
            f"NOT in the adapter: {counted(len(found.left_out), 'tensor')} that {verb} from the "
            "base model's; the adapter does not give the whole model back"
        )


def _matrices(number: int) -> str:
    return f"{number:,} {'matrix' if number == 1 else 'matrices'}"


def told_left_out(left_out: Sequence[LeftOut]) -> Iterator[str]:
    """Each tensor that is not in the adapter, the most different first."""

    def order(tensor: LeftOut) -> float:
        share = tensor.relative_difference
        return -math.inf if share is None else -share

    for tensor in sorted(left_out, key=order):
        share = tensor.relative_difference
        by = "" if share is None else f", relative difference {share:.3e}"
        yield f"left out: {tensor.tensor} ({tensor.why}{by})"
