"""What else is in a checkpoint's folder: its config, the files that a copy needs, other weights."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from shardmerge.errors import CheckpointError
from shardmerge.stores.api import Stat, Store, scheme_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
"""The one file of an adapter, as PEFT names it."""
CONFIG = "config.json"
SAFETENSORS = ".safetensors"

MAX_COPIED_BYTES = 64 << 20
"""Nothing beside the weights is larger; a bigger file is data that somebody left there."""

AT_A_TIME = 16
"""Files of a checkpoint that are looked at together."""

TRAINING_STATE = re.compile(
    r"(training_args|trainer_state|scheduler|scaler)\..*|(optimizer|rng_state).*"
    r"|(all|train|eval|predict)_results\.json"
)


def read_small(url: str, store: Store, name: str, versions: dict[str, str]) -> bytes:
    """The bytes of a small file in the folder; its version goes to ``versions``."""
    place = store.join(url, name)
    found = store.stat(place)
    if found is None:
        raise CheckpointError(f"{place}: a link to a file that is gone. Download it again.")
    versions[name] = found.version
    return store.read(place)


def read_config(url: str, store: Store, versions: dict[str, str]) -> dict[str, object]:
    """The parsed ``config.json`` of the folder; its version goes to ``versions``."""
    try:
        config = json.loads(read_small(url, store, CONFIG, versions))
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(
            f"{store.join(url, CONFIG)} is not JSON: {problem}. Download it again, or correct it."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{store.join(url, CONFIG)} is not a JSON object. Download it again, or correct it."
        )
    return config


def home_of(folder: str, store: Store, names: Sequence[str]) -> tuple[str, str]:
    """The folder with the ``config.json`` of weights in ``folder``: this one, or the one above it.

    Returns:
        That folder, and what leads from it to the weights: ``""``, or a name with a ``/``. Where
        neither has a config, the folder itself.
    """
    above, _, name = folder.rstrip("/").rpartition("/")
    rooted = above and not above.endswith(("/", ":")) and name not in (".", "..")
    if CONFIG not in names and rooted and store.is_folder(above) and CONFIG in store.names(above):
        return above, f"{name}/"
    return folder, ""


def few(names: Iterable[str], count: int = 3) -> str:
    """The first ``count`` names and the number of the others, for messages."""
    listed = list(names)
    others = f" and {len(listed) - count:,} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + others


def not_found(url: str, store: Store) -> str:
    """That there is nothing at ``url``, and what is near it."""
    if scheme_of(url) in ("http", "https"):  # nothing tells what is near it
        inside = "" if url.endswith(SAFETENSORS) else f", no {INDEX} and no {SINGLE} in it"
        return f"{url}: no such folder or file{inside}. Check the address."
    folder, _, name = url.rstrip("/").rpartition("/")
    parent = folder or ("/" if url.startswith("/") else ".")
    if store.is_folder(parent):
        names = [found.rstrip("/") for found in store.names(parent)]
        near = difflib.get_close_matches(name, names, n=3)
        if near:
            return f"{url}: no such folder or file. Near it there is: {', '.join(near)}."
        where = "here" if parent == "." else f"in {parent}"
        return f"{url}: no such folder or file {where}. Check the path."
    message = f"{url}: no such folder or file; {parent} does not exist either. Check the path."
    return message


# --- the other files of a folder ------------------------------------------------------------------

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth|pt|ckpt|gguf|h5|msgpack|onnx|onnx_data|distcp|npz|index\.json)"
    r"|consolidated\..*"
)
_COPIED = re.compile(
    r".*\.(json|model|txt|jinja|py|tiktoken|spm|bpe|codes)|tokenizer\..*|(LICENSE|NOTICE).*"
)
_NOT_COPIED = frozenset(
    {
        INDEX,
        "quantize_config.json",
        "quant_config.json",
        "hf_quant_config.json",
        "adapter_config.json",
        "zero_to_fp32.py",
        "zero_to_torch.py",
        "shardmerge.json",  # how that checkpoint was made; a copy would be untrue
    }
)
_NOT_ENTERED = frozenset({"original/", "runs/", "logs/", "wandb/", "__pycache__/", "lost+found/"})


def beside(
    url: str, store: Store, names: Sequence[str], read: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files that a copy of the checkpoint needs, and the names of weights that are not read.

    Args:
        names: of all that is in the folder.
        read: those of them that hold the checkpoint itself, its index among them.
    """
    files = [name for name in names if _is_copied(name) and name != CONFIG]
    ignored = [name for name in names if _is_weights(name) and name not in read]
    ignored += [name for name in names if name == "original/"]
    for folder in names:
        if not folder.endswith("/") or folder in _NOT_ENTERED | read or folder.startswith("."):
            continue
        inner = store.names(store.join(url, folder))
        if any(map(_is_weights, inner)):
            ignored.append(folder)  # such as another format's folder, or a training checkpoint
        else:
            files += [folder + name for name in inner if _is_copied(name)]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        sizes = pool.map(lambda name: store.stat(store.join(url, name)), files)
        small = [name for name, found in zip(files, sizes, strict=True) if _is_small(found)]
    return tuple(sorted(small)), tuple(sorted(ignored))


def _is_small(found: Stat | None) -> bool:
    return found is not None and found.size <= MAX_COPIED_BYTES


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None and TRAINING_STATE.fullmatch(name) is None


def _is_copied(name: str) -> bool:
    return (
        _COPIED.fullmatch(name) is not None
        and _WEIGHTS.fullmatch(name) is None
        and TRAINING_STATE.fullmatch(name) is None
        and name not in _NOT_COPIED
        and not name.startswith(".")
        and not name.endswith("/")
    )
