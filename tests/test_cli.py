"""The commands as a user meets them: what they print where, their exit status, what they promise."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from shardmerge import __version__, describe, methods, plan, progress
from shardmerge.cli import main
from shardmerge.numerics import DType
from shardmerge.testing import METHOD_SETTINGS
from tests.support import (
    HALVES,
    INDEX,
    SEVERAL_DTYPES,
    SINGLE,
    digests,
    least_memory,
    set_element,
    shrink,
    tree,
    write_checkpoint,
    write_recipe,
)
