"""Which tensors of a model become LoRA layers, which are stored whole, which are left out. Pure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shardmerge.architectures import (
    HEADS,
    added_prefix,
    is_of_media,
    is_transposed,
    loaded_name,
    task_type,
)
from shardmerge.errors import PlanError, UsageError
from shardmerge.layers import input_embedding, is_tied, output_embeddings
from shardmerge.methods.opcm import NOT_PROJECTED
from shardmerge.numerics import DType
from shardmerge.sources.folder import few
from shardmerge.sources.tensor import Checkpoint, TensorRef

WEIGHT = ".weight"
_EXPERT = re.compile(r"\.(experts?|block_sparse_moe)\.")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for.

    Args:
        rank: of every matrix, as far as its sides allow; None: by ``energy``.
        energy: the share of the squared singular values that is kept of every matrix.
        most: the largest rank by ``energy``; None: no limit.
        dtype: of the adapter: float32, bfloat16 or float16.
        include: patterns of names of tensors that may become LoRA layers.
        exclude: patterns of those that may not.
        save: patterns of names of modules that are stored whole.
    """

    rank: int | None = None
    energy: float | None = None
    most: int | None = None
    dtype: DType = DType.F32
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    save: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            UsageError: for anything but a rank, or a share with or without a limit.
        """
        if (self.rank is None) == (self.energy is None):
            raise UsageError("give --rank R, or --energy E for the least rank that holds a share.")
        if self.rank is not None and self.most is not None:
            raise UsageError("--max-rank limits ranks that --energy chooses; --rank R says them.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--energy {self.energy:g}: a share above 0, up to 1, such as 0.99.")


@dataclass(frozen=True, slots=True)
class Layer:
    """A matrix that may become a LoRA layer.

    Args:
        model: the tensor in the model; ``base``: in the base model.
        module: the layer's name in the model that transformers loads.
        transposed: whether the matrix is stored as [in, out].
    """

    model: TensorRef
    base: TensorRef
    module: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of every tensor of a model.

    Args:
        layers: in the model's order.
        saved: modules that are stored whole, by their names in the model that transformers loads;
            ``saved_tensors``: theirs, likewise.
        others: all other tensors that both models have in one shape, in both.
        lacking: names of those that they do not, and why; all are excluded.
        modules: of all matrices, as transformers names them.
        config: of the base model, else of the model.
    """

    layers: tuple[Layer, ...]
    saved: tuple[str, ...]
    saved_tensors: Mapping[str, TensorRef]
    others: tuple[tuple[TensorRef, TensorRef], ...]
    lacking: Mapping[str, str]
    modules: tuple[str, ...]
    config: Mapping[str, object]


def choose(model: Checkpoint, base: Checkpoint, wanted: Wanted) -> Choice:
    """What becomes of every tensor.

    Raises:
        PlanError: for models that do not fit together, or that an adapter cannot be made of.
        UsageError: for a pattern that no name matches.
    """
    config = base.config or model.config
    if is_of_media(config):
        raise PlanError(
            f"{base.url}: a model for images or sound, or with parts for them. transformers loads "
            "it under other names than it\n  is stored by, so that PEFT would not find the layers. "
            "Only of a language model, saved alone, an adapter can be extracted."
        )
    model, base = _in_one_style(model, base, config)
    lacking = _lacking(model, base, wanted)
    shared = [name for name in model.tensors if name in base.tensors and name not in lacking]
    _refuse_idle([*wanted.include, *wanted.exclude], [*shared, *lacking], "tensor")
    prefix = added_prefix(config, base.tensors)
    saved, whole = _saved(model, wanted.save, config, prefix)
    left = [name for name in shared if loaded_name(name, prefix) not in whole]
    tied = set(output_embeddings(left) if is_tied(config) else ())
    chosen = [
        name
        for name in left
        if name not in tied and _is_layer(name, model.tensors[name], base.tensors[name], wanted)
    ]
    _refuse_experts(chosen)
    _refuse_shadowed(saved, chosen, model.tensors, prefix)
    layers = set(chosen)
    return Choice(
        layers=tuple(_layer(model.tensors[n], base.tensors[n], config, prefix) for n in chosen),
        saved=saved,
        saved_tensors=whole,
        others=tuple((model.tensors[n], base.tensors[n]) for n in left if n not in layers),
        lacking={n: why for n, why in lacking.items() if loaded_name(n, prefix) not in whole},
        modules=_matrices(model.tensors.values(), prefix),
        config=config,
    )


def _in_one_style(
    model: Checkpoint, base: Checkpoint, config: Mapping[str, object]
) -> tuple[Checkpoint, Checkpoint]:
    """Both models, by the names that transformers loads where they are saved in two ways.

    A base model without a head (the published gpt2) has no ``transformer.`` before its names; the
    fine-tune that transformers saves has.
    """
    prefixes = added_prefix(config, model.tensors), added_prefix(config, base.tensors)
    if prefixes[0] == prefixes[1]:
        return model, base
    return _as_loaded(model, prefixes[0]), _as_loaded(base, prefixes[1])


def _as_loaded(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    named = ((loaded_name(name, prefix), ref) for name, ref in checkpoint.tensors.items())
    return replace(checkpoint, tensors={name: replace(ref, name=name) for name, ref in named})


def _layer(model: TensorRef, base: TensorRef, config: Mapping[str, object], prefix: str) -> Layer:
    module = model.name.removesuffix(WEIGHT)
    return Layer(model, base, loaded_name(module, prefix), is_transposed(module, config))


def _lacking(model: Checkpoint, base: Checkpoint, wanted: Wanted) -> dict[str, str]:
    """Tensors that only one model has, or in two shapes; all must be excluded.

    A tied output embedding may be stored once more in one of them.
    """
    found = {
        **{name: "only in the base model" for name in base.tensors if name not in model.tensors},
        **{name: "only in the model" for name in model.tensors if name not in base.tensors},
    }
    tied = output_embeddings(found) if is_tied(model.config) and is_tied(base.config) else []
    found = {name: why for name, why in found.items() if name not in tied}
    for name in model.tensors:
        shapes = [list(c.tensors[name].shape) for c in (model, base) if name in c.tensors]
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            found[name] = f"{shapes[0]} in the model, {shapes[1]} in the base model"
    wrong = [f"{name} ({why})" for name, why in found.items() if not _hit(name, wanted.exclude)]
    if wrong:
        raise PlanError(
            f"{model.url} and its base model {base.url} differ in {len(wrong):,} of their tensors' "
            f"names or shapes:\n  {few(wrong, 5)}.\n"
            "  An adapter needs both to be of one architecture, saved in the same way. Check the "
            "paths,\n  or leave these tensors out with --exclude."
        )
    return found


def _is_layer(name: str, model: TensorRef, base: TensorRef, wanted: Wanted) -> bool:
    """Whether a tensor is the weight of a linear layer that is asked for."""
    return (
        len(model.shape) == 2
        and 0 not in model.shape
        and model.dtype.is_float
        and base.dtype.is_float
        and name.endswith(WEIGHT)
        and not _hit(name, NOT_PROJECTED)
        and _hit(name, wanted.include)
        and not _hit(name, wanted.exclude)
    )


def _saved(
    model: Checkpoint, globs: Sequence[str], config: Mapping[str, object], prefix: str
) -> tuple[tuple[str, ...], dict[str, TensorRef]]:
    """Modules that are stored whole, and their tensors, by what transformers calls them.

    They are those whose names match, with all that is in them, and the head that PEFT stores for
    the model's task: each module whose name ends with that of the head, dot or not.
    """
    names = _modules(model.tensors)
    lists = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2].isdigit()}
    single = [name for name in names if name not in lists]
    _refuse_idle(globs, single, "module")
    heads = tuple(head for head in HEADS.get(task_type(config) or "", ()) if head in names)
    modules = _outermost(
        [
            *(name for name in names if name.endswith(heads)),
            *(name for name in single if _hit(name, globs)),
        ]
    )
    tensors = {
        loaded_name(name, prefix): tensor
        for name, tensor in model.tensors.items()
        if any(name.startswith(f"{module}.") for module in modules)
    }
    integers = [tensor.name for tensor in tensors.values() if not tensor.dtype.is_float]
    if integers:
        raise PlanError(
            f"{few(integers)}: integers, which an adapter of floats cannot store. Narrow "
            "--save-modules."
        )
    twin = _tied_head(tensors, model, config)
    tensors |= {f"{module}{WEIGHT}": tensor for module, tensor in twin.items()}
    named = [loaded_name(module, prefix) for module in modules]
    return tuple(dict.fromkeys([*named, *twin])), tensors


def _modules(names: Iterable[str]) -> list[str]:
    """All modules that these tensors lie in, the inner ones after those that they are part of."""
    steps = [name.split(".") for name in names]
    found = (".".join(parts[:depth]) for parts in steps for depth in range(1, len(parts)))
    return list(dict.fromkeys(found))


def _outermost(modules: Sequence[str]) -> list[str]:
    """These modules without those that are part of others of them."""
    taken = set(modules)
    whole = (m for m in modules if not any(m[:i] in taken for i, c in enumerate(m) if c == "."))
    return list(dict.fromkeys(whole))


def _tied_head(
    saved: Mapping[str, TensorRef], model: Checkpoint, config: Mapping[str, object]
) -> Mapping[str, TensorRef]:
    """The output embedding that is tied to an input embedding that is stored whole, by module.

    PEFT puts another module in the place of the input embedding, and leaves its twin as it was.

    Raises:
        PlanError: where it is not known what the twin is called.
    """
    embedding = input_embedding(model.tensors)
    tensor = next((ref for ref in saved.values() if ref.name == embedding), None)
    task = task_type(config)
    if tensor is None or not is_tied(config) or task in (*HEADS, "FEATURE_EXTRACTION"):
        return {}
    if task == "CAUSAL_LM":
        return {"lm_head": tensor}
    raise PlanError(
        f"{embedding} may be tied to an output embedding, which PEFT would leave as it is in the "
        "base model.\n  Both can be stored for causal language models only (by the config's "
        "'architectures').\n  Leave it out of --save-modules."
    )


def _matrices(tensors: Iterable[TensorRef], prefix: str) -> tuple[str, ...]:
    """The modules of all matrices, as transformers names them."""
    return tuple(
        loaded_name(tensor.name.removesuffix(WEIGHT), prefix)
        for tensor in tensors
        if len(tensor.shape) == 2 and tensor.name.endswith(WEIGHT)
    )


def _refuse_idle(globs: Iterable[str], names: Sequence[str], kind: str) -> None:
    idle = [glob for glob in globs if not any(_hit(name, (glob,)) for name in names)]
    if idle:
        raise UsageError(
            f"no {kind} has a name like '{idle[0]}'; there are {few(names)}.\n"
            "  '*' stands for anything, dots too."
        )


def _refuse_experts(names: Iterable[str]) -> None:
    experts = [name for name in names if _EXPERT.search(name)]
    if experts:
        raise PlanError(
            f"{len(experts):,} {'matrix is' if len(experts) == 1 else 'matrices are'} of experts "
            f"({few(experts, 2)}). transformers loads all "
            "experts of\n  a layer as one tensor, which is no module that PEFT could find. Leave "
            "them out with --exclude '*expert*'\n  (and their router: --exclude '*.gate.*')."
        )


def _refuse_shadowed(
    saved: Sequence[str], chosen: Iterable[str], names: Iterable[str], prefix: str
) -> None:
    """Refuse modules to save that PEFT would take others for.

    It saves each module whose name ends with that of one to save, dot or not.

    Args:
        saved: as transformers names them.
        chosen: names of the layers' tensors.
        names: of all tensors.
    """
    layers = [loaded_name(name.removesuffix(WEIGHT), prefix) for name in chosen]
    modules = _modules(loaded_name(name, prefix) for name in names)
    for module in saved:
        within = [layer for layer in layers if f".{module}." in f".{layer}."]
        others = [each for each in modules if each.endswith(module) and each not in saved]
        if within or others:
            raise PlanError(
                f"PEFT finds modules to save by the end of their names: '{module}' would also be "
                f"{few(sorted({*within, *others}))}.\n"
                f"  Give --save-modules '*{module.removeprefix(prefix)}', which is all of them, or "
                "a pattern for none of them."
            )


def _hit(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
