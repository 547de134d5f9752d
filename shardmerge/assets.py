"""The files beside the shards: config, tokenizer, model card, provenance. Pure: does no I/O.

The config says which layers there are and of what kind. Where layers were picked or repeated, all
that it says per layer is picked with them; what it derives from a layer's number is refused where
the number would now mean another kind of layer.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import yaml

from shardmerge import methods
from shardmerge.errors import PlanError
from shardmerge.layers import LAYER_COUNT_KEYS, TEXT_SECTIONS, layer_count_of
from shardmerge.match import Outputs, OutputTensor
from shardmerge.methods.api import STAND_INS
from shardmerge.numerics import DType
from shardmerge.recipe import ModelName, Recipe
from shardmerge.recipe_parts import public_text as public_text
from shardmerge.sources.tensor import Checkpoint

CONFIG = "config.json"
CARD = "README.md"

# --- config.json --------------------------------------------------------------------------------

_QUANTISATION = ("quantization_config", "compression_config")
_PER_LAYER = frozenset({"intermediate_size", "activation_sparsity_pattern", "block_configs"})
"""Keys of lists with one entry per layer, besides those that have ``layer`` in their name."""
_LAYER_NUMBERS = frozenset({"mlp_only_layers", "moe_layers", "cross_attention_layers"})
"""Keys of lists of the numbers of some layers."""
_FIRST_LAYERS = ("first_k_dense_replace",)
"""Keys of a number of layers, from the first, that are of another kind than the rest."""
_PERIODS: Mapping[str, str] = {
    "sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": "",
    "decoder_sparse_step": "",
    "moe_layer_freq": "",
    "moe_layer_interval": "",
}
"""Keys of every how many layers one is of another kind, and the list that says it outright."""
_IMPLIED_PERIODS = {"gemma2": 2}
"""The same for types of models whose config has no key for it."""


def patched_config(
    config: Mapping[str, object],
    *,
    dtype: DType | None,
    layer_count: int | None = None,
    layers: Sequence[int] | None = None,
    untied: bool = False,
    vocab_size: int | None = None,
    dequantised: bool = True,
) -> dict[str, object]:
    """A copy of ``config.json`` that describes the output; keys keep their order.

    Args:
        config: of the donor.
        dtype: that most of the output is stored in; None leaves it as it is.
        layer_count: of the output; None where it has the donor's.
        layers: for each output layer, the donor's layer whose settings it has.
        untied: whether the output stores its output embedding by itself.
        vocab_size: rows of the token embedding; None where it has the donor's.
        dequantised: whether what is said about quantisation no longer holds.
    Raises:
        PlanError: for layers that the config cannot describe.
    """
    if layer_count is not None and layers is None:
        layers = range(layer_count)
    old_count = layer_count_of(config)
    patched = _copied(config)
    if dtype is not None:
        _set_dtype(patched, dtype)
    for section in _language_sections(patched):
        if dequantised:
            for key in _QUANTISATION:
                section.pop(key, None)
        if vocab_size is not None and "vocab_size" in section:
            section["vocab_size"] = vocab_size
        if untied:
            section["tie_word_embeddings"] = False
        if layers is not None and old_count is not None:
            _pick_layers(section, layers, old_count)
    if layers is not None and old_count is None and patched:
        patched["num_hidden_layers"] = len(layers)
    return patched


def written_dtype(tensors: Iterable[OutputTensor]) -> DType | None:
    """The floating dtype that most bytes of the output are stored in; None without floats."""
    sizes: dict[DType, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_float:
            nbytes = tensor.models[0].numel * tensor.dtype.itemsize
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _copied(section: Mapping[str, object]) -> dict[str, object]:
    """A copy whose sections can be changed."""
    return {
        key: _copied(value) if isinstance(value, dict) else value for key, value in section.items()
    }


def _language_sections(config: dict[str, object]) -> Iterable[dict[str, object]]:
    """The config and the sections of its language model, however deep."""
    yield config
    for key in TEXT_SECTIONS:
        section = config.get(key)
        if isinstance(section, dict):
            yield from _language_sections(section)


def _set_dtype(config: dict[str, object], dtype: DType) -> None:
    if "dtype" not in config and "torch_dtype" not in config and config:
        config["dtype"] = dtype.torch_name
    _set_known_dtype(config, dtype)


def _set_known_dtype(section: dict[str, object], dtype: DType) -> None:
    """The dtype of this section and those in it, wherever one is given."""
    for key, value in section.items():
        if key in ("dtype", "torch_dtype"):
            section[key] = dtype.torch_name
        elif isinstance(value, dict) and key not in _QUANTISATION:
            _set_known_dtype(value, dtype)


# --- what a config says per layer ---------------------------------------------------------------


def _pick_layers(section: dict[str, object], layers: Sequence[int], old_count: int) -> None:
    """Let a section describe these of its layers, in this order."""
    counts = [key for key in LAYER_COUNT_KEYS if section.get(key) == old_count]
    section.update(dict.fromkeys(counts, len(layers)))
    if not counts or list(layers) == list(range(old_count)):
        return
    for key, value in section.items():
        if key in _LAYER_NUMBERS and isinstance(value, list):
            section[key] = [i for i, layer in enumerate(layers) if layer in value]
        elif isinstance(value, list | str) and _is_per_layer(key, value, old_count):
            section[key] = _picked(key, value, layers)
    _pick_windows(section, layers, old_count)
    for key in _FIRST_LAYERS:
        if isinstance(section.get(key), int):
            section[key] = _first_layers(section, key, layers)
    _check_periods(section, layers)


def _is_per_layer(key: str, value: list[object] | str, count: int) -> bool:
    if len(value) != count:
        return False
    if isinstance(value, str):
        return key == "hybrid_override_pattern"
    return "layer" in key or key in _PER_LAYER


def _picked(key: str, values: list[object] | str, layers: Sequence[int]) -> list[object] | str:
    beyond = [layer for layer in layers if layer >= len(values)]
    if beyond:
        raise PlanError(
            f"config.json: {key} has entries for {len(values)} layers, and the output has a layer "
            f"made from layer {beyond[0]}.\n"
            "  The config comes from base_model, else from the first model: name the model with "
            "the most layers."
        )
    picked = [values[layer] for layer in layers]
    return "".join(map(str, picked)) if isinstance(values, str) else picked


def _pick_windows(section: dict[str, object], layers: Sequence[int], old_count: int) -> None:
    """``max_window_layers``: from that layer on, attention is to a window (if used at all)."""
    old = section.get("max_window_layers")
    if not isinstance(old, int):
        return
    if "layer_types" in section or not section.get("use_sliding_window"):
        section["max_window_layers"] = len(layers) if old >= old_count else min(old, len(layers))
    else:
        section["max_window_layers"] = _first_layers(section, "max_window_layers", layers)


def _first_layers(section: Mapping[str, object], key: str, layers: Sequence[int]) -> int:
    """How many of the picked layers, from the first, are among the ``key`` first ones."""
    old = section[key]
    assert isinstance(old, int)
    first = [layer < old for layer in layers]
    count = sum(first)
    if not all(first[:count]):
        number = first.index(False)
        raise PlanError(
            f"config.json: {key} {old} makes the first {old} layers different from the others,\n"
            f"  and output layer {number}, made from layer {layers[number]}, stands before one of "
            "them.\n  Such a model cannot be described: keep these layers first in `slices`."
        )
    return count


def _check_periods(section: Mapping[str, object], layers: Sequence[int]) -> None:
    """Refuse layers that would become of another kind by their new number."""
    periods = {
        key: section.get(key) for key, outright in _PERIODS.items() if not section.get(outright)
    }
    model_type = section.get("model_type")
    if isinstance(model_type, str) and "layer_types" not in section:
        periods[f"model_type {model_type}, every"] = _IMPLIED_PERIODS.get(model_type)
    for key, period in periods.items():
        if not isinstance(period, int) or period < 2:
            continue
        for number, layer in enumerate(layers):
            if number % period != layer % period:
                raise PlanError(
                    f"config.json: by {key} {period}, the kind of a layer follows from its number; "
                    f"output layer {number}\n  is made from layer {layer}, which is of another "
                    f"kind. Shift layers in `slices` by multiples of {period}."
                )


# --- files that are copied ----------------------------------------------------------------------

_TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template).*"
    r"|.*\.(model|tiktoken|spm|bpe|codes)|tokenization_.*\.py|additional_chat_templates/.*"
)
_WRITTEN = frozenset({CONFIG, CARD, "shardmerge.json"})


def files_to_copy(donor: Checkpoint, tokenizer: Checkpoint) -> list[tuple[Checkpoint, str]]:
    """The files of the output that are copied, with the checkpoint each is from, in name order.

    Args:
        donor: gives everything but the tokenizer.
        tokenizer: gives the tokenizer's files.
    """
    found = {name: donor for name in donor.files if not _TOKENIZER.fullmatch(name)}
    found |= {name: tokenizer for name in tokenizer.files if _TOKENIZER.fullmatch(name)}
    return [(found[name], name) for name in sorted(found.keys() - _WRITTEN)]


def names_of_files(donor: Checkpoint, tokenizer: Checkpoint) -> list[str]:
    """The names of what ``files_of`` gives."""
    copied = [name for _, name in files_to_copy(donor, tokenizer)]
    return [*copied, *([CONFIG] if donor.config else []), CARD]


def files_of(
    recipe: Recipe,
    outputs: Outputs,
    donor: Checkpoint,
    tokenizer: Checkpoint,
    read: Callable[[Checkpoint, str], bytes],
    *,
    version: str,
) -> dict[str, bytes]:
    """The files that a loader reads beside the shards, and the model card.

    Args:
        donor: gives the configuration, and everything but the tokenizer.
        tokenizer: gives the tokenizer's files.
        read: gives a file of a checkpoint.
        version: of shardmerge.
    """
    copied = files_to_copy(donor, tokenizer)
    files = {name: read(checkpoint, name) for checkpoint, name in copied}
    if donor.config:
        files[CONFIG] = as_json(config_of(outputs, donor))
    files[CARD] = model_card(recipe, outputs, version=version).encode()
    return files


def config_of(outputs: Outputs, donor: Checkpoint) -> dict[str, object]:
    """The ``config.json`` of the output.

    Raises:
        PlanError: for layers that it cannot describe.
    """
    return patched_config(
        donor.config,
        dtype=written_dtype(outputs.tensors),
        layer_count=outputs.layer_count,
        layers=outputs.layers,
        untied=outputs.untied,
        vocab_size=outputs.vocab_size,
    )


def as_json(value: object) -> bytes:
    """A JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


# --- model card ---------------------------------------------------------------------------------

_HUB = re.compile(r"[A-Za-z0-9][\w-]*(?:\.[\w-]+)*/[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"(?<![\w.:/~@-])(?:~|\.{1,2})?/(?:[^\s/'\"`,\]}:]+/)+([^\s/'\"`,\]}:]+)/?")
"""An absolute path, or one from the home folder or here; its last part is a group."""
_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/")


def model_card(recipe: Recipe, outputs: Outputs, *, version: str) -> str:
    """The README.md of the output, with the front matter that model hubs read.

    Absolute paths are shortened to their last part: they say something about this machine only.

    Args:
        version: of shardmerge.
    """
    models = _models(recipe)
    hub = [name for name in map(hub_name, models) if name]
    estimated = recipe.merge_method in STAND_INS
    tags = ["shardmerge", "fisher" if estimated else "merge"]
    front: dict[str, object] = {"library_name": "transformers", "tags": tags}
    if hub:
        front["base_model"] = list(dict.fromkeys(hub))
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    shown = {model: f"`{_short(model)}`" for model in models}
    lines = [f"- {shown[model]}: {', '.join(roles)}" for model, roles in models.items()]
    notes = [f"- {_without_paths(note, models)}" for note in outputs.notes]
    elements = sum(tensor.models[0].numel for tensor in outputs.tensors)
    text = _without_paths(public_text(recipe.text), models).strip("\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    parts = [
        f"---\n{header}---\n",
        f"# {'Stand-in for Fisher information' if estimated else 'Merged model'}\n",
        f"{elements:,} parameters in {len(outputs.tensors):,} tensors, "
        f"{'computed' if estimated else 'merged'} with shardmerge {version}.\n",
        f"## {'Method' if len(_methods(recipe)) == 1 else 'Methods'}\n",
        "\n".join(_methods(recipe)) + "\n",
        "## Models\n",
        "\n".join(lines) + "\n",
        *(["## Notes\n", "\n".join(notes) + "\n"] if notes else []),
        "## Recipe\n",
        f"{fence}yaml\n{text}\n{fence}\n",
        "## Verify\n",
        "`shardmerge.json` holds the checksum of every shard, and what they were made from:\n",
        "```\nshardmerge verify .\n```\n",
    ]
    return "\n".join(parts)


def hub_name(model: ModelName) -> str | None:
    """The name of a model on the Hugging Face Hub, as far as its path tells; else None."""
    url = model.url.removeprefix("hf://")
    cached = _CACHED.search(url)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return url if _HUB.fullmatch(url) else None


def _models(recipe: Recipe) -> dict[ModelName, list[str]]:
    """Every checkpoint that the recipe names, and what it is there for."""
    roles: dict[ModelName, list[str]] = {}

    def add(model: ModelName | None, role: str) -> None:
        if model is not None and role not in roles.setdefault(model, []):
            roles[model].append(role)

    add(recipe.base_model, "base model")
    for recipe_slice in recipe.slices:
        add(recipe_slice.base.model if recipe_slice.base else None, "base model")
        for source in recipe_slice.sources:
            layers = (
                f" layers {source.layers[0]} to {source.layers[1] - 1}" if source.layers else ""
            )
            add(
                source.model, f"{'model' if recipe.merge_method in STAND_INS else 'merged'}{layers}"
            )
            for kind, extra in source.extras.items():
                add(extra, f"{kind} of {_short(source.model)}")
    for rule in recipe.rules:
        add(rule.take_from, "some tensors")
    add(recipe.tokenizer_source, "tokenizer")
    return roles


def _methods(recipe: Recipe) -> list[str]:
    """One line for each method that is used, with its summary and reference."""
    names = [recipe.merge_method, *(rule.merge_method for rule in recipe.rules)]
    lines = []
    for name in dict.fromkeys(name for name in names if name):
        page = (STAND_INS.get(name) or methods.get(name)).page
        summary = page.partition("\n")[0].replace("``", "`")
        reference = re.search(r"^Reference: *(.*?)(?:\n\n|\Z)", page, re.MULTILINE | re.DOTALL)
        source = f" {' '.join(reference[1].split())}" if reference else ""
        lines.append(f"- `{name}`: {summary}{source}")
    return lines


def _short(model: ModelName) -> str:
    """A model's name without its place on this machine, and without credentials."""
    url = hub_name(model) or public_text(model.url)
    if _is_local(url):
        url = url.rstrip("/").rpartition("/")[2] or url
    name = str(ModelName(url, model.revision)).replace("`", "'")
    return name if model.adapter is None else f"{name}+{_short(model.adapter)}"


def _is_local(url: str) -> bool:
    return url.startswith(("/", "~", "./", "../", "file:"))


def _without_paths(text: str, models: Iterable[ModelName]) -> str:
    """A text in which paths on this machine are shortened to their last part."""
    for model in sorted(models, key=lambda model: -len(model.url)):
        if _is_local(model.url):
            short = hub_name(model) or model.url.rstrip("/").rpartition("/")[2]
            text = text.replace(model.url, short)
    return _PATH.sub(r"\1", text)


# --- provenance ---------------------------------------------------------------------------------


def checksums(files: Mapping[str, bytes]) -> dict[str, dict[str, object]]:
    """Size and CRC-32 of each file; not of the model card, since cards are edited."""
    return {
        name: {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        for name, content in files.items()
        if name != CARD
    }


def _source(checkpoint: Checkpoint) -> dict[str, object]:
    found: dict[str, object] = {
        "url": public_text(checkpoint.url),
        "versions": dict(checkpoint.versions),
    }
    if checkpoint.adapter is not None:
        found["adapter"] = _source(checkpoint.adapter)
    return found


def provenance(
    *,
    version: str,
    fingerprint: str,
    recipe: Recipe,
    sources: Mapping[ModelName, Checkpoint],
    shards: Mapping[str, Mapping[str, object]],
    files: Mapping[str, bytes],
    non_finite: int,
    notes: Sequence[str],
    sums: Sequence[float],
) -> bytes:
    """What ``shardmerge.json`` says: what the shards were made from, and their checksums.

    Credentials and query strings of URLs are left out.

    Args:
        version: of shardmerge.
        fingerprint: of all that the output's bytes depend on.
        shards: ``bytes`` and ``crc32`` of each, by file name.
        files: the other files; the model card's checksum is left out, since cards are edited.
        non_finite: how many inputs and results hold NaN or infinity; 0 unless the recipe allows it.
        notes: every default that was used.
        sums: what the method has summed up over the model; none for most.
    """
    record: dict[str, object] = {
        "shardmerge": version,
        "fingerprint": fingerprint,
        "recipe": public_text(recipe.text),
        "sources": {
            public_text(str(name)): _source(checkpoint) for name, checkpoint in sources.items()
        },
        "shards": {name: dict(found) for name, found in shards.items()},
        "files": checksums(files),
        "non_finite_tensors": non_finite,
        "notes": [public_text(note) for note in notes],
    }
    if sums:
        record["sums"] = list(sums)
    return as_json(record)
