"""Files of text as tokens: which examples are used, and what a task asks of each.

Three kinds of files: ``.txt`` with an example in each line, ``.jsonl`` with an object in each line,
and ``.parquet``. Examples without any text (blank lines) are passed over.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from shardmerge.errors import DataError, UsageError

SAMPLES = 256
"""Examples, unless the user says so."""
MAX_LENGTH = 1024
"""Tokens of an example, unless the user says so or the model takes fewer."""
MASKED_SHARE = 0.15
"""Of an example's tokens, those that a masked language model has to find: as BERT was trained."""
IGNORED = -1
"""A target of a position that nothing is asked of."""
_SPECIAL = "special_tokens_mask"


class Task(StrEnum):
    """What a model is asked, so which probability is meant."""

    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    CLASSIFICATION = "classification"


@dataclass(frozen=True, slots=True)
class Question:
    """Which examples a model is run on, and what it is asked of each.

    Args:
        data: files of examples.
        text_fields: where the texts are; two for pairs of texts, of classifiers only.
        task: one of ``Task``; None: the one that the model was made for.
        samples: examples that are drawn from ``data``.
        max_length: tokens of an example; None: as many as fit, up to a default.
        seed: of the drawing and of masks.
    """

    data: Sequence[str]
    text_fields: Sequence[str] = ("text",)
    task: str | None = None
    samples: int = SAMPLES
    max_length: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """An example as its file has it.

    Args:
        where: file and line (or row), from 1, for messages.
        texts: one, or two that are classified as a pair.
        label: a number, or a name that the model's config knows; None where none is read.
    """

    where: str
    texts: tuple[str, ...]
    label: int | str | None


@dataclass(frozen=True, slots=True)
class Sample:
    """The examples that are used.

    Args:
        chosen: in the order of the files.
        total: examples in the files.
        digest: of the content of those that were chosen: another one, another result.
    """

    chosen: tuple[Text, ...]
    total: int
    digest: str


@dataclass(frozen=True, slots=True)
class Example:
    """An example as a model takes it, alone in its batch.

    Args:
        where: file and line, for messages.
        inputs: arguments of the model's ``forward``, as the tokenizer names them (``input_ids``,
            ``attention_mask``, ...): integers of shape [tokens].
        targets: for each position of the logits the token or label whose probability is meant, or
            ``IGNORED``. Of a language model [tokens], of a classifier [1].
    """

    where: str
    inputs: Mapping[str, tuple[int, ...]]
    targets: tuple[int, ...]


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    mask_token_id: int | None
    name_or_path: str

    def __call__(
        self, *texts: str, truncation: bool, max_length: int, return_special_tokens_mask: bool
    ) -> Mapping[str, list[int]]:
        """The tokens of a text, or of a pair of texts."""


# --- reading --------------------------------------------------------------------------------------


def read_sample(
    files: Sequence[str],
    *,
    text_fields: Sequence[str] = ("text",),
    label_field: str | None = None,
    samples: int,
    seed: int,
) -> Sample:
    """Choose examples from files, at random but always the same ones.

    Every example is read and checked; of each, ``seed`` and its number make a random number, and
    those with the smallest are chosen. So a smaller sample is a part of a larger one.

    Args:
        text_fields: of objects and of Parquet columns; two for pairs of texts.
        label_field: as well; None where no label is needed.
        samples: how many; all, where there are fewer.
    Raises:
        DataError: for a file that cannot be read, is empty, or holds what is no example.
        UsageError: for a file of an unknown kind, or that cannot have what is asked of it.
    """
    if not 1 <= len(text_fields) <= 2:
        raise UsageError(f"{len(text_fields)} text fields; give one, or two for pairs of texts.")
    fields = (*text_fields, *([label_field] if label_field is not None else []))
    total = 0

    def numbered() -> Iterator[tuple[int, int, Text]]:
        nonlocal total
        for text in _texts(files, fields, len(text_fields)):
            yield _draw("example", seed, total), total, text
            total += 1

    smallest = heapq.nsmallest(samples, numbered())
    if not total:
        raise DataError(f"{', '.join(files)}: no example with any text in it.")
    chosen = tuple(text for _, _, text in sorted(smallest, key=lambda item: item[1]))
    content = json.dumps([(text.texts, text.label) for text in chosen])
    return Sample(chosen, total, hashlib.blake2b(content.encode(), digest_size=16).hexdigest())


def _draw(*keys: object) -> int:
    """A random number of 64 bits that depends on the keys alone."""
    found = hashlib.blake2b(json.dumps(keys).encode(), digest_size=8).digest()
    return int.from_bytes(found, "little")


def _texts(files: Sequence[str], fields: Sequence[str], count: int) -> Iterator[Text]:
    """Every example that has a text; the first ``count`` fields are texts, then the label."""
    for file in files:
        readers = {".txt": _lines, ".jsonl": _objects, ".parquet": _rows}
        reader = readers.get(Path(file).suffix)
        if reader is None:
            raise UsageError(
                f"{file}: data is read from .txt (an example in each line), .jsonl (an object in "
                "each line) and .parquet."
            )
        for where, record in reader(file, fields):
            texts = tuple(_text(record, field, where) for field in fields[:count])
            if any(text.strip() for text in texts):
                label = _label(record, fields[count], where) if len(fields) > count else None
                yield Text(where, texts, label)


def _lines(file: str, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, object]]]:
    if len(fields) > 1:
        raise UsageError(
            f"{file}: a .txt file has texts alone, and {fields[-1]!r} is to be read too. "
            "Give a .jsonl or .parquet file."
        )
    for number, line in _read(file):
        yield f"{file}:{number}", {fields[0]: line}


def _objects(file: str, _: Sequence[str]) -> Iterator[tuple[str, Mapping[str, object]]]:
    for number, line in _read(file):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise DataError(f"{where}: this line is not JSON: {problem}") from None
        if not isinstance(record, dict):
            raise DataError(f'{where}: a JSON object is needed, such as {{"text": "..."}}.')
        yield where, record


def _read(file: str) -> Iterator[tuple[int, str]]:
    """The lines of a file, without their ends, by number from 1."""
    try:
        with Path(file).open(encoding="utf-8-sig") as opened:
            for number, line in enumerate(opened, 1):
                yield number, line.rstrip("\n")
    except OSError as problem:
        raise DataError(f"cannot read {file}: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        raise DataError(f"{file}: not text in UTF-8: {problem}") from None


def _rows(file: str, fields: Sequence[str]) -> Iterator[tuple[str, Mapping[str, object]]]:
    import pyarrow  # data of other kinds need not wait for it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            missing = [field for field in fields if field not in opened.schema_arrow.names]
            if missing:
                held = ", ".join(opened.schema_arrow.names)
                raise DataError(f"{file}: no column {missing[0]!r}; it has {held}. {_NAME_THEM}")
            number = 0
            for batch in opened.iter_batches(columns=list(fields)):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", record
    except OSError as problem:
        raise DataError(f"cannot read {file}: {problem}") from None
    except pyarrow.ArrowInvalid as problem:
        raise DataError(f"{file}: not a Parquet file: {problem}") from None


_NAME_THEM = "Give --text-field and --label-field."


def _field(record: Mapping[str, object], field: str, where: str) -> object:
    if field not in record:
        held = ", ".join(record) or "none"
        raise DataError(f"{where}: no field {field!r}; its fields are {held}. {_NAME_THEM}")
    return record[field]


def _text(record: Mapping[str, object], field: str, where: str) -> str:
    text = _field(record, field, where)
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {json.dumps(text, default=str)}, not a text.")
    return text


def _label(record: Mapping[str, object], field: str, where: str) -> int | str:
    label = _field(record, field, where)
    if isinstance(label, float) and label.is_integer():
        return int(label)  # what becomes of whole numbers in a column with a gap
    if isinstance(label, bool) or not isinstance(label, int | str):
        shown = json.dumps(label, default=str)
        raise DataError(
            f"{where}: field {field!r} is {shown}; a label is a whole number or a name."
        )
    return label


# --- tokens ---------------------------------------------------------------------------------------


def tokenised(
    texts: Iterable[Text],
    tokenizer: Tokenizer,
    task: Task,
    *,
    max_length: int,
    seed: int = 0,
    labels: Mapping[str, int] | None = None,
) -> tuple[Example, ...]:
    """Examples as a model takes them.

    Of a causal language model, each token but the first is a target. Of a masked one,
    ``MASKED_SHARE`` of the tokens are, and are replaced by the mask; which ones depends on ``seed``
    and the text alone. Of a classifier, the label is.

    Args:
        max_length: tokens; a text is cut off there.
        seed: of the masks.
        labels: number of each label by its name; needed where texts have labels.
    Raises:
        DataError: for a text of which nothing can be asked, or a label that the model has not.
        UsageError: for a task that the tokenizer does not serve.
    """
    if task is Task.MASKED_LM and tokenizer.mask_token_id is None:
        raise UsageError(
            f"{tokenizer.name_or_path}: its tokenizer has no mask token, so {task} has no meaning."
        )
    return tuple(
        _tokenised(text, tokenizer, task, max_length, seed, labels or {}) for text in texts
    )


def _tokenised(
    text: Text,
    tokenizer: Tokenizer,
    task: Task,
    max_length: int,
    seed: int,
    labels: Mapping[str, int],
) -> Example:
    found = tokenizer(
        *text.texts, truncation=True, max_length=max_length, return_special_tokens_mask=True
    )
    inputs = {name: tuple(values) for name, values in found.items() if name != _SPECIAL}
    ids = inputs["input_ids"]
    if task is Task.CLASSIFICATION:
        return Example(text.where, inputs, (_label_number(text, labels),))
    if task is Task.CAUSAL_LM:
        targets = (*ids[1:], IGNORED)
    else:
        hidden = _masked(ids, found[_SPECIAL], seed)
        targets = tuple(token if i in hidden else IGNORED for i, token in enumerate(ids))
        mask = tokenizer.mask_token_id
        assert mask is not None
        inputs["input_ids"] = tuple(mask if i in hidden else t for i, t in enumerate(ids))
    if set(targets) <= {IGNORED}:
        raise DataError(
            f"{text.where}: no token of this text can be predicted from others: its tokens are "
            f"{len(ids)} in all. Remove it, or give a longer text."
        )
    return Example(text.where, inputs, targets)


def _masked(ids: Sequence[int], special: Sequence[int], seed: int) -> set[int]:
    """Positions that are masked: of those that are no special tokens, at least one."""
    content = hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest()
    plain = [position for position, is_special in enumerate(special) if not is_special]
    plain.sort(key=lambda position: _draw("mask", seed, content, position))
    return set(plain[: math.ceil(MASKED_SHARE * len(plain))])


def _label_number(text: Text, labels: Mapping[str, int]) -> int:
    """The label of a text as the model counts; ``IGNORED`` where none was read."""
    label = text.label
    if label is None:
        return IGNORED
    if isinstance(label, str) and label in labels:
        return labels[label]
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    raise DataError(
        f"{text.where}: label {label!r} is none of the model's {len(labels)}: "
        f"{', '.join(f'{number} ({name})' for name, number in labels.items())}."
    )
