"""What adding one model to a state costs, from the first to the last, beside the budget.

The first has nothing to be projected against; from the second on a step reads the base model, the
sum and one model, whatever is in the state. Each step is a process of its own, measured whole.
"""

from __future__ import annotations

import logging
import sys

from benchmarks import harness
from benchmarks.families import llama, make
from benchmarks.harness import Report, Workplace, mib, size

log = logging.getLogger("benchmarks")

HEADS = ("model", "wall s", "CPU s", "of the second", "read MiB", "written MiB", "peak MiB", "load")


def main() -> None:
    """Add every model, and print one row for each."""
    parser = harness.arguments(__doc__, family="0.3B")
    parser.add_argument("--models", type=int, default=8, help="that are added (default 8)")
    parser.add_argument("--method", default="opcm", help="of the state (default opcm)")
    parser.add_argument("--memory", default="2GiB", help="budget of each step (default 2GiB)")
    args = parser.parse_args()
    place = Workplace(args.dir, "continual")
    family = make(llama(args.family), place.families, models=args.models, seed=args.seed)
    state = place.fresh("state")
    command = [sys.executable, "-m", "shardmerge", "continual"]
    harness.run([*command, "init", state, "--base", family.base, "--method", args.method])
    report = Report("continual", args.family, method=args.method, memory=args.memory)
    rows, second = [], 0.0
    for number, model in enumerate(family.models, 1):
        log.info("model %d of %d", number, args.models)
        add = ["add", state, model, "--memory", args.memory, "--device", "cpu", "--quiet"]
        found = harness.run([*command, *add])
        within = found.peak_anon_bytes <= size(args.memory)
        report.line("step", number=number, within=within, **found.figures())
        second = found.cpu_s if number == 2 else second
        rows.append([
            number, f"{found.wall_s:.1f}", f"{found.cpu_s:.1f}",
            f"{found.cpu_s / second:.2f}" if second else "", mib(found.read_bytes),
            mib(found.written_bytes), mib(found.peak_anon_bytes), f"{found.load_before:.1f}",
        ])  # fmt: skip
    place.fresh("state")
    report.table(HEADS, rows)


if __name__ == "__main__":
    main()
