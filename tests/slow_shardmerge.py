"""The real ``shardmerge``, with many small parts and time between them: something to interrupt.

``SHARDMERGE_TEST_PAUSE`` says how many seconds pass after each task.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from shardmerge import cli, execute, layout
from shardmerge.executors import local, placement

PAUSE_S = float(os.environ.get("SHARDMERGE_TEST_PAUSE", "0.25"))


def slow(kind: Any) -> None:
    """Let each task that ended be told a little later."""
    real = kind.next_done

    def next_done(self: Any, timeout_s: float) -> Any:
        done = real(self, timeout_s)
        if done is not None:
            time.sleep(PAUSE_S)
        return done

    kind.next_done = next_done


if __name__ == "__main__":
    layout.PART_BYTES = 2**17
    layout.LEAST_PART_BYTES = 2**12
    placement.UNIT_TASKS = placement.SMALL_UNITS = 1
    execute.COMMIT_S = 0.2
    slow(local.LocalExecutor)
    if "ray" in sys.argv:
        from shardmerge.executors.ray import RayExecutor

        slow(RayExecutor)
    sys.exit(cli.main())
