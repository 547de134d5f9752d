"""Peak memory of a merge against its budget: more models, and a tensor larger than the budget."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from benchmarks import harness
from benchmarks.families import Family, huge, llama, make
from benchmarks.harness import CommandError, Report, Workplace, mib, size
from benchmarks.recipes import METHODS, recipe

log = logging.getLogger("benchmarks")

HUGE_BYTES = 3 << 29
HUGE_TINY_BYTES = 8 << 20
HUGE_MODELS = 3
HEADS = (
    "what", "method", "models", "input MiB", "budget MiB", "peak MiB", "of budget", "wall s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One merge under one budget."""

    what: str
    method: str
    family: Family
    budget: str


def measure(case: Case, place: Workplace, report: Report) -> list[object]:
    """Run one case and report it; the row of the table."""
    chosen = recipe(case.method, case.family)
    budget = size(case.budget)
    models = len(case.family.models)
    log.info("%s, %s, %d models, %s", case.what, case.method, models, case.budget)
    fields = {
        "what": case.what, "method": case.method, "models": models,
        "input_bytes": chosen.input_bytes(), "budget_bytes": budget,
    }  # fmt: skip
    row = [case.what, case.method, models, mib(chosen.input_bytes()), mib(budget)]
    file = chosen.write(place.file("recipe.yaml"))
    try:
        measured = harness.shardmerge(
            file, place.fresh("out"), memory=case.budget, env=place.kernel_caches()
        )
    except CommandError as error:
        if "MemoryBudgetError" not in str(error):
            raise
        report.line("refused", **fields, error=str(error).splitlines()[-3:])
        return [*row, "refused", "", ""]
    share = measured.peak_anon_bytes / budget
    report.line("run", **fields, within=share <= 1, **measured.figures())
    return [*row, mib(measured.peak_anon_bytes), f"{share:.0%}", f"{measured.wall_s:.2f}"]


def main() -> None:
    """Measure every case."""
    parser = harness.arguments(__doc__, family="0.3B")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["linear", "ties"])
    parser.add_argument("--models", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--memory", nargs="+", default=["512MiB", "1GiB"], help="budgets")
    parser.add_argument("--huge-bytes", type=size, help="size of the one tensor (1.5GiB)")
    args = parser.parse_args()
    place = Workplace(args.dir, "memory")
    small = HUGE_TINY_BYTES if args.family == "tiny" else HUGE_BYTES
    one = huge(args.huge_bytes or small)
    models = max(args.models)
    many = make(llama(args.family), place.families, models=models, seed=args.seed)
    single = make(one, place.families, models=HUGE_MODELS, seed=args.seed)
    cases = [
        Case(what, method, family, budget)
        for what, family in (
            *((args.family, many.first(n)) for n in args.models),
            ("one tensor", single),
        )
        for method in args.methods
        for budget in args.memory
    ]
    report = Report("memory", args.family)
    rows = [measure(case, place, report) for case in cases]
    place.fresh("out")
    report.table(HEADS, rows)


if __name__ == "__main__":
    main()
