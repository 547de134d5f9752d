"""Merge methods: every file of this folder that defines one, found by scanning it.

Adding a method is adding a file; nothing else is edited. ``get`` and ``names`` import them all.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from shardmerge.errors import UsageError
from shardmerge.methods import api
from shardmerge.methods.api import MethodInfo


def _scan() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


_scan()


def names() -> tuple[str, ...]:
    """Names of all methods, in alphabetical order."""
    return tuple(sorted(api.METHODS))


def get(name: str) -> MethodInfo:
    """The method called ``name``.

    Raises:
        UsageError: for an unknown name; names the nearest known one.
    """
    if name in api.METHODS:
        return api.METHODS[name]
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"unknown merge method '{name}' (there are {', '.join(names())}).{hint}")
