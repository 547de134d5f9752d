"""LoRA adapters over a base: read in place, against copies that were merged to disk first.

For each rank, in alternation: PEFT merges one adapter and saves the model (what other tools do for
every adapter of a recipe), ours publishes the same model, ours merges three adapters over the base,
and ours merges three whole models of the same size.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from benchmarks import harness
from benchmarks.families import Family, llama, make
from benchmarks.harness import Measured, Report, Workplace, median, mib

log = logging.getLogger("benchmarks")

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = ("rank", "what", "wall s", "CPU s", "peak MiB", "PEFT / ours", "adapters / models")
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
ADAPTERS = 3


def write_adapter(folder: Path, name: str, rank: int, seed: int) -> Path:
    """An adapter of every linear layer of a llama, in bfloat16."""
    design = llama(name)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for weight, shape in design.tensors:
        module = weight.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            for part, sizes in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                values = 0.02 * torch.randn(sizes, generator=random)
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = values.bfloat16()
    from peft import LoraConfig

    folder.mkdir(parents=True)
    LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    ).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


class Bench:
    """The merges that are compared."""

    def __init__(self, place: Workplace, memory: str, family: Family) -> None:
        self._place = place
        self._memory = memory
        self._family = family

    def ours(self, name: str, method: str, models: Sequence[str]) -> Measured:
        """One merge of these models."""
        parameters = {} if method == "passthrough" else {"parameters": {"weight": 0.3}}
        base = {} if method == "passthrough" else {"base_model": str(self._family.base)}
        recipe = {
            "merge_method": method,
            **base,
            "models": [{"model": model, **parameters} for model in models],
        }
        file = self._place.file(f"{name}.yml")
        file.write_text(yaml.safe_dump(recipe))
        return harness.shardmerge(file, self._place.fresh("out"), memory=self._memory)

    def peft(self, adapter: Path) -> Measured:
        """PEFT's merge of one adapter, saved."""
        out = self._place.fresh("out")
        return harness.run([sys.executable, "-c", PEFT, self._family.base, adapter, out])


def main() -> None:
    """Measure each rank."""
    parser = harness.arguments(__doc__, family="0.3B")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", default="1GiB", help="budget of a merge of ours")
    args = parser.parse_args()
    place = Workplace(args.dir, "adapter")
    family = make(llama(args.family), place.families, models=ADAPTERS, seed=args.seed)
    report, rows = Report("adapter", args.family, memory=args.memory), []
    place.warm(family.checkpoints())
    bench = Bench(place, args.memory, family)
    for rank in args.ranks:
        adapters = [
            write_adapter(place.file(f"lora-{rank}-{number}"), args.family, rank, number)
            for number in range(ADAPTERS)
        ]
        over = [f"{family.base}+{adapter}" for adapter in adapters]
        whole = [str(model) for model in family.models]
        works = {
            "PEFT, one adapter": lambda a=adapters[0]: bench.peft(a),
            "ours, one adapter": lambda m=over[:1]: bench.ours("one", "passthrough", m),
            "ours, 3 adapters": lambda m=over: bench.ours("adapters", "task_arithmetic", m),
            "ours, 3 models": lambda m=whole: bench.ours("models", "task_arithmetic", m),
        }
        found: dict[str, list[Measured]] = {name: [] for name in works}
        for number in range(args.runs):
            for name, work in works.items():
                found[name].append(work())
                report.line("run", rank=rank, what=name, run=number, **found[name][-1].figures())
        rows += table(rank, found)
    place.fresh("out")
    report.table(HEADS, rows)


def table(rank: int, found: dict[str, list[Measured]]) -> list[list[object]]:
    """The rows of one rank: medians, and two ratios of wall seconds."""
    walls = {name: median([m.wall_s for m in runs]) for name, runs in found.items()}
    peft, one, adapters, models = walls.values()
    ratios = {1: [f"{peft / one:.1f}x", ""], 2: ["", f"{adapters / models:.2f}x"]}
    return [
        [
            rank,
            name,
            f"{walls[name]:.2f}",
            f"{median([m.cpu_s for m in runs]):.2f}",
            mib(max(m.peak_anon_bytes for m in runs)),
            *ratios.get(number, ["", ""]),
        ]
        for number, (name, runs) in enumerate(found.items())
    ]


if __name__ == "__main__":
    main()
