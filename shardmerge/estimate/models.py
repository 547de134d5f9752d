"""A transformers model for a task: what it is, its examples, its weights, what it says."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shardmerge.errors import CheckpointError, DataError, DeviceError, UsageError
from shardmerge.estimate.examples import (
    MAX_LENGTH,
    Example,
    Question,
    Sample,
    Task,
    Text,
    Tokenizer,
    read_sample,
    tokenised,
)
from shardmerge.estimate.tensors import Group, groups_of
from shardmerge.ledger import fingerprint
from shardmerge.progress import counted
from shardmerge.sources import Checkpoint, open_checkpoint
from shardmerge.sources.folder import INDEX, SINGLE, few
from shardmerge.stores import Stores
from shardmerge.stores.api import scheme_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
_VOCABULARY = re.compile(
    r"(tokenizer|vocab|tekken)\.json|vocab\.txt|.*\.(model|tiktoken|spm|bpe|codes)"
)
"""Files that say what a token is."""
_COUNTED_FROM_PADDING = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert"),
        *("mpnet", "longformer", "data2vec-text", "xmod", "luke", "mluke", "ibert", "esm"),
    }
)
"""Types whose positions begin after the number of the padding token."""
_AUTO = {
    Task.CAUSAL_LM: ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    Task.MASKED_LM: ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    Task.CLASSIFICATION: (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
}
"""Of each task the class that loads a model, and transformers' table of the classes it may be."""


@dataclass(frozen=True, slots=True)
class Described:
    """A model of which no weight is in memory.

    Args:
        place: what transformers loads it by: a folder, or a name of the Hub.
        revision: the commit of a model of the Hub.
        task: what it is asked.
        checkpoint: its tensors.
        config: transformers' config.
        tokenizer: the model's own.
        max_length: the most tokens that it takes, as far as it says so.
        labels: number of each label of a classifier, by name.
    """

    place: str
    revision: str | None
    task: Task
    checkpoint: Checkpoint
    config: Any
    tokenizer: Tokenizer
    max_length: int | None
    labels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, in evaluation mode, in float32.

    Args:
        described: what was known before.
        model: of transformers.
        parameters: each parameter once, by the first of its names in the model.
        groups: which tensors of the checkpoint become which entries of the model's state_dict;
            tensors that the model has no place for are in none.
        parameter_of: for each entry of the state_dict that is a parameter, its name in
            ``parameters``: two names, where it is tied.
    """

    described: Described
    model: PreTrainedModel
    parameters: Mapping[str, torch.nn.Parameter]
    groups: tuple[Group, ...]
    parameter_of: Mapping[str, str]

    def tensors_of(self, parameter: str) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that a parameter, by any of its names, is made of."""
        first = self.parameter_of[parameter]
        return tuple(
            source
            for group in self.groups
            if any(self.parameter_of.get(target) == first for target in group.targets)
            for source in group.sources
        )


# --- before loading -------------------------------------------------------------------------------


def describe_model(model: str, task: str | None, stores: Stores) -> Described:
    """What there is to know of a model without its weights.

    Args:
        model: a local folder in transformers' format, or a name of the Hugging Face Hub.
        task: one of ``Task``; None: the one that config.json names a class of.
    Raises:
        UsageError: without transformers; for a place that it cannot read; for a task that the model
            has no class for.
        CheckpointError: for what is no model with a config and a tokenizer; an adapter; quantised.
    """
    with _needed():
        import transformers
    checkpoint, names = _checkpoint(model, stores)
    local = Path(model).expanduser().is_dir()
    place = str(Path(model).expanduser()) if local else model
    revision = None if local else _commit(checkpoint)
    where = {"revision": revision, "local_files_only": local, "trust_remote_code": False}
    with _in_words(model, "its config.json"):
        config = transformers.AutoConfig.from_pretrained(place, **where)
    if "quantization_config" in checkpoint.config or any(
        tensor.decode for tensor in checkpoint.tensors.values()
    ):
        raise CheckpointError(
            f"{model}: its weights are quantised, so they have no gradients of their own.\n"
            "  Give the model that it was made of, or its dequantised weights."
        )
    chosen = Task(task) if task is not None else _task_of(model, config)
    _refuse_encoder(model, chosen, config)
    labels = _labels(model, config) if chosen is Task.CLASSIFICATION else {}
    tokenizer = _tokenizer(model, names, place, config=config, **where)
    longest = _max_length(tokenizer, config)
    return Described(place, revision, chosen, checkpoint, config, tokenizer, longest, labels)


@contextlib.contextmanager
def _needed() -> Iterator[None]:
    try:
        yield
    except ImportError as problem:
        raise UsageError(
            f"this command runs models, and {problem.name} is not installed "
            "(pip install 'shardmerge[transformers]')"
        ) from None


@contextlib.contextmanager
def _in_words(model: str, what: str) -> Iterator[None]:
    """transformers' refusals as ours. It raises whatever the code in question raises."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as problem:
        raise CheckpointError(f"{model}: transformers cannot load {what}: {problem}") from problem


def _checkpoint(model: str, stores: Stores) -> tuple[Checkpoint, list[str]]:
    """The model's tensors, and the names of the files beside them."""
    if scheme_of(model) != "file" or model.endswith((".safetensors", ".bin")):
        raise UsageError(
            f"{model}: transformers loads a model from a local folder or by its name on the Hub. "
            "Copy it to a folder first."
        )
    folder = Path(model).expanduser()
    if (folder / ADAPTER).exists() or ("+" in model and not folder.exists()):
        _refuse_adapter(model)
    checkpoint = open_checkpoint(str(folder) if folder.is_dir() else model, None, stores)
    names = stores.open(checkpoint.url).names(checkpoint.url)
    if ADAPTER in names:
        _refuse_adapter(model)
    if {SINGLE, INDEX} <= set(names):
        raise CheckpointError(
            f"{model}: {SINGLE} and {INDEX} are both there, two checkpoints of which transformers "
            "and shardmerge would take another one. Remove one of them."
        )
    if "config.json" not in names:
        raise CheckpointError(f"{model}: no config.json in it, so transformers cannot load it.")
    if not any(name.endswith((".safetensors", ".bin")) for name in checkpoint.shards):
        raise CheckpointError(
            f"{model}: not in a format that transformers loads. Write it as safetensors first: "
            "`shardmerge merge` with merge_method passthrough does."
        )
    return checkpoint, names


def _refuse_adapter(model: str) -> NoReturn:
    raise CheckpointError(
        f"{model}: an adapter; transformers loads whole models here.\n"
        "  Make a whole model of it first: `shardmerge merge` with merge_method passthrough and "
        "`model: MODEL+ADAPTER`."
    )


def _tokenizer(model: str, names: Sequence[str], place: str, **options: Any) -> Any:
    """The tokenizer that lies beside the weights; transformers may make one up where none does."""
    from transformers import AutoTokenizer

    if any(_VOCABULARY.fullmatch(name) for name in names):
        with _in_words(model, "its tokenizer"):
            return AutoTokenizer.from_pretrained(place, **options)
    raise CheckpointError(
        f"{model}: no tokenizer in it (tokenizer.json, vocab.txt, tokenizer.model, ...).\n"
        "  Copy the tokenizer's files there from the model that this one was made of."
    )


def _commit(checkpoint: Checkpoint) -> str:
    """The commit of a model of the Hub: in its URL, or the name of its folder in the cache."""
    if scheme_of(checkpoint.url) == "hf":
        return checkpoint.url.rpartition("@")[2].partition("/")[0]
    return Path(checkpoint.url).name


def _task_of(model: str, config: Any) -> Task:
    """The task of the class that wrote the model."""
    from transformers.models.auto import modeling_auto

    named = list(config.architectures or ())
    for task, (_, table) in _AUTO.items():
        if any(name in _names_in(getattr(modeling_auto, table)) for name in named):
            return task
    raise UsageError(
        f"{model}: config.json says {', '.join(named) or 'no architecture'}, which is none of "
        f"{', '.join(Task)}. Give --task."
    )


def _refuse_encoder(model: str, task: Task, config: Any) -> None:
    """Refuse to ask the next token of a model whose tokens see those that follow."""
    from transformers.models.auto import modeling_auto

    encodes = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    sees_all = getattr(config, "is_decoder", True) is False and not config.is_encoder_decoder
    if task is Task.CAUSAL_LM and encodes and sees_all:
        raise UsageError(
            f"{model}: an encoder (is_decoder is false in config.json): each token sees the ones "
            f"that {task} would ask for. Give --task {Task.MASKED_LM}, or leave it out."
        )


def _names_in(table: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    found: set[str] = set()
    for names in table.values():
        found |= {names} if isinstance(names, str) else set(names)
    return found


def _labels(model: str, config: Any) -> dict[str, int]:
    kind = getattr(config, "problem_type", None)
    if config.num_labels < 2 or kind not in (None, "single_label_classification"):
        raise UsageError(
            f"{model}: {config.num_labels} label(s), problem type {kind}: only a classifier with "
            "one label of several for each text is supported."
        )
    named = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if sorted(named.values()) != list(range(config.num_labels)):
        raise CheckpointError(
            f"{model}: label2id of config.json does not number {config.num_labels} labels: {named}."
        )
    return named


def _max_length(tokenizer: Any, config: Any) -> int | None:
    """Of what tokenizer and config say; tokenizers that know no limit say 10^30."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = getattr(text, "max_position_embeddings", None)
    if isinstance(places, int) and config.model_type in _COUNTED_FROM_PADDING:
        places -= (text.pad_token_id or 0) + 1
    limits = [tokenizer.model_max_length, places]
    return min((int(n) for n in limits if isinstance(n, int) and 0 < n < 10**9), default=None)


def sample_for(
    described: Described, question: Question, *, label_field: str | None = None
) -> Sample:
    """The examples that are used.

    Raises:
        UsageError: for pairs of texts that the task does not take.
        DataError: for examples that cannot be read.
    """
    if len(question.text_fields) > 1 and described.task is not Task.CLASSIFICATION:
        raise UsageError("two text fields are a pair, which only classifiers take.")
    return read_sample(
        question.data,
        text_fields=question.text_fields,
        label_field=label_field,
        samples=question.samples,
        seed=question.seed,
    )


def identity_of(
    described: Described, question: Question, sample: Sample, *, made: str, arithmetic: str
) -> dict[str, str]:
    """All that estimated values depend on; of a model, its files, or its commit of the Hub.

    Args:
        made: what they are.
        arithmetic: dtype, devices and processes, in words.
    """
    import torch
    import transformers

    checkpoint, commit = described.checkpoint, described.revision
    return {
        "made": made,
        "model": checkpoint.url if commit is None else described.place,
        "files": fingerprint(checkpoint.versions) if commit is None else commit,
        "task": str(described.task),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data": ", ".join(Path(file).name for file in question.data),
        "examples": f"{len(sample.chosen)} of {sample.total}, {sample.digest}",
        "max_length": str(question.max_length),
        "seed": str(question.seed),
        "arithmetic": arithmetic,
    }


def examples_for(
    described: Described, texts: Iterable[Text], *, max_length: int | None, seed: int
) -> tuple[Example, ...]:
    """Examples as this model takes them.

    Args:
        max_length: tokens of an example; None: ``MAX_LENGTH``, or what the model takes if fewer.
    Raises:
        UsageError: for examples longer than the model takes; for a task that its tokenizer has not.
        DataError: for a text of which nothing can be asked, or a label that the model has not.
        CheckpointError: for a tokenizer of another model.
    """
    most = described.max_length
    if max_length is not None and most is not None and max_length > most:
        raise UsageError(
            f"--max-length {max_length}: {described.place} takes at most {most} tokens."
        )
    made = tokenised(
        texts,
        described.tokenizer,
        described.task,
        max_length=max_length or min(MAX_LENGTH, most or MAX_LENGTH),
        seed=seed,
        labels=described.labels,
    )
    known = getattr(described.config.get_text_config(), "vocab_size", None)
    largest = max(max(example.inputs["input_ids"]) for example in made)
    if known is not None and largest >= known:
        raise CheckpointError(
            f"{described.place}: its tokenizer makes token {largest}, and the model knows {known}. "
            "It belongs to another model."
        )
    return made


# --- loading --------------------------------------------------------------------------------------


def torch_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        DeviceError: where torch has no such device.
    """
    with _needed():
        import torch
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no CUDA device here. Give --device cpu.")
    return torch.device(name)


def load_model(described: Described, device: torch.device | None = None) -> Loaded:
    """Load a model, whole, without any weight that its checkpoint does not have.

    Arithmetic is in float32 whatever the stored dtype is, and nothing of the model's own code is
    run: what is not part of transformers is refused.

    Args:
        device: to move it to; None leaves it where transformers puts it (DeepSpeed's partitions).
    Raises:
        CheckpointError: for weights that are missing, of another shape, or that cannot be told.
    """
    import torch
    import transformers

    model_class = getattr(transformers, _AUTO[described.task][0])
    with _quiet(), _in_words(described.place, f"it for {described.task}"):
        model, report = model_class.from_pretrained(
            described.place,
            config=copy.deepcopy(described.config),
            revision=described.revision,
            local_files_only=described.revision is None,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    if report["mismatched_keys"] or report["error_msgs"]:
        raise CheckpointError(
            f"{described.place}: {few(map(str, report['mismatched_keys'] or report['error_msgs']))}"
        )
    loaded = _traced(described, model)
    model.eval()
    model.requires_grad_(True)
    if device is not None:
        model.to(device)
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report and bars: what matters of them is an error here."""
    from transformers.utils import logging as its

    before, bars = its.get_verbosity(), its.is_progress_bar_enabled()
    its.set_verbosity(logging.ERROR)
    its.disable_progress_bar()
    try:
        yield
    finally:
        its.set_verbosity(before)
        if bars:
            its.enable_progress_bar()


def logits_of(loaded: Loaded, example: Example) -> torch.Tensor:
    """What the model says to one example, alone in its batch.

    Returns:
        float32 [tokens, vocabulary] of a language model, [1, labels] of a classifier.
    """
    import torch

    device = loaded.model.device
    inputs = {name: torch.tensor([ids], device=device) for name, ids in example.inputs.items()}
    task = loaded.described.task
    more = {"use_cache": False} if task is Task.CAUSAL_LM else {}  # a cache is of no use here
    found: torch.Tensor = loaded.model(**inputs, **more).logits
    return found if task is Task.CLASSIFICATION else found[0]


def _traced(described: Described, model: PreTrainedModel) -> Loaded:
    """Which tensor became which parameter; every parameter must have one."""
    state = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    parameter_of = {
        name: names[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    groups = tuple(groups_of(model, state, described.checkpoint))
    found = {parameter_of[t] for group in groups for t in group.targets if t in parameter_of}
    if missing := [name for name in parameters if name not in found]:
        raise CheckpointError(
            f"{described.place}: its checkpoint has no tensor for {len(missing)} of "
            f"{len(parameters)} parameters of {type(model).__name__} ({few(missing)}).\n"
            f"  A model made for another task has no head for {described.task}. Give --task, or "
            "a model that was trained for it."
        )
    return Loaded(described, model, parameters, groups, parameter_of)


@contextlib.contextmanager
def in_words_of(example: Example) -> Iterator[None]:
    """What torch says of an example that is too long."""
    import torch

    tokens = counted(len(example.inputs["input_ids"]), "token")
    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise DeviceError(
            f"{example.where}: the device has too little memory for its {tokens}: {problem}\n"
            "  Give a smaller --max-length, with --fresh, or --deepspeed zero3."
        ) from problem
    except (IndexError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "out of bounds" not in str(problem):
            raise
        raise DataError(
            f"{example.where}: the model does not take its {tokens} ({problem}). Give a smaller "
            "--max-length, with --fresh."
        ) from problem
