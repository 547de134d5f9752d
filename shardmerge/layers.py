"""Names of tensors: of which layer one is, where that layer is, what a tensor is tied to. Pure.

A stack is a run of layers numbered under one prefix: ``model.layers.12.mlp.up_proj.weight`` is
of layer 12 of the stack ``model.layers.``. Numbers further to the right (``experts.7.``) are part
of the layer. Nothing is known of architectures: stacks are found in the names of a checkpoint.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""How configs name the number of layers."""
TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where configs of multimodal models keep those of the language model."""

_LAYER = re.compile(r"(?:^|\.)(0|[1-9][0-9]{0,5})(?:\.|$)")
_TOWER = re.compile(r"vision|visual|image|audio|speech|video|projector|connector|aligner|resampler")
_OUTPUT = re.compile(r"embed_out|unembed|lm_head|output_embed")
_EMBEDDING = re.compile(
    r"embed|(^|\.)w[tp]e\.|word_emb|tok_emb|(^|\.)shared\.|rotary_emb|project_in\."
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the number of a layer stands in a tensor's name.

    Args:
        prefix: of the name, up to the number: the stack.
        layer: the number.
        suffix: of the name, from the end of the number.
    """

    prefix: str
    layer: int
    suffix: str


@dataclass(frozen=True, slots=True)
class Layout:
    """The layers of one checkpoint.

    Args:
        places: of the tensors that belong to a layer of any stack, by name.
        lengths: number of layers of each stack, by prefix.
        main: prefix of the stack that holds the language model's (or the only) layers; None
            where a checkpoint has no layers.
        declared: number of layers in its config, if that is no more than there are.
    """

    places: Mapping[str, Place]
    lengths: Mapping[str, int]
    main: str | None
    declared: int | None

    @property
    def layer_count(self) -> int:
        """Layers of the main stack; layers beyond the declared number (MTP) do not count."""
        return 0 if self.main is None else self.declared or self.lengths[self.main]

    def layers_among(self, names: Iterable[str]) -> int:
        """How many layers of the main stack these tensors reach."""
        found = (self.places.get(name) for name in names)
        return max((p.layer + 1 for p in found if p and p.prefix == self.main), default=0)

    def depth(self, name: str) -> float:
        """How deep in its stack a tensor lies: 0 for the first layer, 1 for the last or only one.

        Tensors outside of all stacks are at 0.
        """
        place = self.places.get(name)
        if place is None:
            return 0.0
        count = self.layer_count if place.prefix == self.main else self.lengths[place.prefix]
        return depth(place.layer, count)


def depth(layer: int, count: int) -> float:
    """How deep layer number ``layer`` of ``count`` is, 0 to 1; 1 for an only layer, as mergekit."""
    return 1.0 if count < 2 else min(1.0, layer / (count - 1))


# --- stacks -------------------------------------------------------------------------------------


def place_of(name: str) -> Place | None:
    """The first number among the parts of ``name``, as a layer; None where there is no number."""
    found = _LAYER.search(name)
    if found is None:
        return None
    start, stop = found.span(1)
    return Place(name[:start], int(name[start:stop]), name[stop:])


def layout_of(names: Iterable[str], config: Mapping[str, object]) -> Layout:
    """The layers in the names of a checkpoint's tensors.

    Numbers under one prefix are a stack if they run from 0 without a gap; so the second and fourth
    module of a projector are not. The main stack may have gaps.
    """
    places: dict[str, Place] = {}
    numbers: dict[str, set[int]] = {}
    sizes: Counter[str] = Counter()
    for name in names:
        place = place_of(name)
        if place is not None:
            places[name] = place
            numbers.setdefault(place.prefix, set()).add(place.layer)
            sizes[place.prefix] += 1
    lengths = {prefix: max(found) + 1 for prefix, found in numbers.items()}
    declared = layer_count_of(config)
    whole = {prefix for prefix, found in numbers.items() if len(found) == lengths[prefix]}
    main = _main_stack(lengths, whole, sizes, declared)
    stacks = {
        prefix: length
        for prefix, length in lengths.items()
        if prefix == main or (prefix in whole and length > 1)
    }
    return Layout(
        places={name: place for name, place in places.items() if place.prefix in stacks},
        lengths=stacks,
        main=main,
        declared=declared if main is not None and declared and declared <= stacks[main] else None,
    )


def _main_stack(
    lengths: Mapping[str, int], whole: Set[str], sizes: Mapping[str, int], declared: int | None
) -> str | None:
    """The stack of the declared length, else the shortest longer one (MTP), else the longest.

    Among equals, those with gaps and towers for images or sound come last, and stacks of many
    tensors first.
    """

    def order(prefix: str) -> tuple[int, bool, int, bool, int, str]:
        length = lengths[prefix]
        fits = 0 if length == declared else 1 if declared and length > declared else 2
        by_length = length if fits == 1 else -length
        return (
            fits,
            prefix not in whole,
            by_length,
            _TOWER.search(prefix) is not None,
            -sizes[prefix],
            prefix,
        )

    return min(lengths, key=order, default=None)


def layer_count_of(config: Mapping[str, object]) -> int | None:
    """The number of layers that a config declares; of the language model where it has a section."""
    for section in (*text_sections(config), config):
        for key in LAYER_COUNT_KEYS:
            value = section.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None


def text_sections(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """The sections of a config that describe a language model inside it, innermost first."""
    for key in TEXT_SECTIONS:
        section = config.get(key)
        if isinstance(section, dict):
            yield from text_sections(section)
            yield section


def is_encoder_decoder(layout: Layout, config: Mapping[str, object]) -> bool:
    """Whether a model has two stacks of layers that its config counts (t5, bart)."""
    if config.get("is_encoder_decoder"):
        return True
    main = layout.main or ""
    twins = {re.sub(r"encoder", "decoder", main), re.sub(r"decoder", "encoder", main)} - {main}
    return any(twin in layout.lengths for twin in twins)


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the main stack comes before its layers: embeddings, image towers."""
    if _OUTPUT.search(name):
        return False
    return bool(_EMBEDDING.search(name) or _TOWER.search(name))


def is_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor are tokens, by its name: input and output embeddings."""
    return bool(_EMBEDDING.search(name) or _OUTPUT.search(name) or _OUTPUT_EMBEDDING.search(name))


# --- tied embeddings ----------------------------------------------------------------------------

# Endings are looked at first: most names have none of them, and patterns are slow to search.
_OUTPUT_ENDINGS = tuple(
    f"{ending}.weight"
    for ending in ("lm_head", "embed_out", "output", "proj_out", "lm_head.decoder", "s.decoder")
)
_OUTPUT_EMBEDDING = re.compile(
    r"(^|\.)(lm_head|embed_out|lm_head\.decoder|cls\.predictions\.decoder)\.weight$"
    r"|^(language_model\.)?output\.weight$|^proj_out\.weight$"
)
_INPUT_ENDINGS = tuple(
    f"{ending}.weight"
    for ending in ("embed_tokens", "wte", "embed_in", "embeddings", "tokens_embed", "shared")
)
_INPUT_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|tokens_embed"
    r"|backbone\.embeddings)\.weight$"
)
_SHARED = re.compile(r"(^|\.)shared\.weight$")


def output_embeddings(names: Iterable[str]) -> list[str]:
    """The names that can be tied to an input embedding, in the order given."""
    likely = [name for name in names if name.endswith(_OUTPUT_ENDINGS)]
    return [name for name in likely if _is_outside(name, _OUTPUT_EMBEDDING)]


def _is_outside(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether a name matches, and belongs to no layer."""
    return pattern.search(name) is not None and place_of(name) is None


def input_embedding(names: Collection[str]) -> str | None:
    """The name of the token embedding; None where there is none, or there are several."""
    likely = [name for name in names if name.endswith(_INPUT_ENDINGS)]
    shared = [name for name in likely if _SHARED.search(name)]
    if len(shared) == 1:
        return shared[0]
    found = [
        name for name in likely if _is_outside(name, _INPUT_EMBEDDING) and not _TOWER.search(name)
    ]
    if len(found) > 1:
        found = [name for name in found if "decoder" in name]
    return found[0] if len(found) == 1 else None


def is_tied(config: Mapping[str, object]) -> bool:
    """Whether a checkpoint without an output embedding has it tied to the input embedding.

    Only a config that says no, and nowhere yes, is taken for a no: many leave the key out.
    """
    sections = (config, *text_sections(config))
    said = [s["tie_word_embeddings"] for s in sections if "tie_word_embeddings" in s]
    return any(said) or not said
