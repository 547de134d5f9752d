"""The shape of the package: imports go one way, heavy packages are imported where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "shardmerge"

ORDER = [
    ["errors", "numerics", "layers", "architectures"],
    ["stores.api"],
    ["header", "kernels.language", "kernels.philox", "stores.retry", "stores.settings"],
    ["kernels.blas", "kernels.projection", "kernels.factors"],
    ["sources.tensor", "sources.folder", "stores.local", "stores.remote", "kernels.emit"],
    ["stores.http", "kernels.compile", "sources.pickles", "sources.zips"],
    ["kernels.lowrank"],
    ["decode"],
    ["stores.s3", "stores.hub", "stores.portable"],
    ["stores"],
    ["kernels.cuda_code"],
    ["kernels.cuda_driver"],
    ["kernels.cuda_memory"],
    ["kernels.cuda"],
    ["kernels.device"],
    ["kernels.linalg"],
    ["kernels.regression"],
    ["sources.quantised", "sources.torch_file"],
    ["sources.adapter_settings", "sources.sharded", "sources.zero_layout", "sources.zero_states"],
    ["sources.torch_bin"],
    ["methods.api", "sources.hf", "sources.zero", "sources.dcp"],
    ["sources.adapter"],
    ["sources", "methods.*", "kernels.trace", "summaries"],
    ["methods", "arrays", "recipe_yaml", "verify", "diff"],
    ["recipe_parts"],
    ["matrices"],
    ["recipe_settings"],
    ["recipe_read"],
    ["recipe"],
    ["state"],
    ["mismatch"],
    ["parts"],
    ["inputs"],
    ["extras"],
    ["match", "layout"],
    ["outputs.api"],
    ["outputs.local", "outputs.s3_lock"],
    ["outputs.s3"],
    ["outputs"],
    ["memory", "assets"],
    ["plan"],
    ["window", "excerpt"],
    ["runs"],
    ["whole"],
    ["work"],
    ["kept"],
    ["records"],
    ["ledger"],
    ["executors.api", "executors.local", "publish", "progress"],
    ["execute", "describe", "staging", "report", "executors.placement"],
    ["executors.node", "computed"],
    ["executors.ray_cluster", "executors.ray_worker"],
    ["executors.ray"],
    ["executors"],
    ["prepare"],
    ["merge"],
    ["slices", "steps"],
    ["continual", "estimate.stand_ins"],
    ["extract.names", "extract.deltas", "extract.finished"],
    ["extract.choice", "extract.report"],
    ["extract.decompose"],
    ["extract.lora"],
    ["extract"],
    ["estimate.examples", "estimate.tensors", "estimate.counting", "estimate.saved"],
    ["estimate.models"],
    ["arguments", "console"],
    ["estimate.sums", "estimate.gram"],
    ["estimate.fisher", "estimate.fisher_zero3"],
    ["cli_estimate"],
    ["cli"],
    ["__main__", "testing.*"],
    ["testing"],
]
"""Each module may import from the groups above its own (and methods.* from each other)."""

ONLY_IN = {
    "ray": {"executors.ray", "executors.ray_cluster", "executors.ray_worker"},
    "deepspeed": {"estimate.fisher_zero3"},
    "transformers": {
        "estimate.tensors",
        "estimate.models",
        "estimate.gram",
        "estimate.fisher_zero3",
    },
    "torch": {
        "kernels.linalg",
        "estimate.tensors",
        "estimate.models",
        "estimate.sums",
        "estimate.gram",
        "estimate.fisher",
        "estimate.fisher_zero3",
    },
    "cuda": {"kernels.cuda_driver"},
    "botocore": {"stores.s3"},
    "fsspec": {"stores.portable"},
    "huggingface_hub": {"stores.hub"},
    "pyarrow": {"records", "estimate.examples"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def level(name: str) -> int:
    exact = [i for i, group in enumerate(ORDER) if name in group]
    if exact:
        return exact[0]
    parent = name.rpartition(".")[0]
    return next(i for i, group in enumerate(ORDER) if f"{parent}.*" in group)


def test_imports_go_one_way():
    names = modules()
    wrong = []
    for name, path in names.items():
        if name in ("", "kernels", "estimate"):
            continue
        for imported in imports_of(path):
            target = imported.removeprefix("shardmerge.")
            if imported == target or target not in names or target == name:
                continue
            siblings = name.startswith("methods.") and target.startswith("methods.")
            if level(target) >= level(name) and not (siblings and level(target) == level(name)):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_heavy_packages_are_imported_where_they_are_used():
    wrong = [
        f"{name} imports {package}"
        for name, path in modules().items()
        for package in {imported.partition(".")[0] for imported in imports_of(path)}
        if name not in ONLY_IN.get(package, {name})
    ]
    assert not wrong


def test_a_merge_needs_none_of_them():
    code = "import sys, shardmerge.cli, shardmerge.merge; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(ONLY_IN) & {name.partition(".")[0] for name in loaded}


def test_nothing_from_a_checkpoint_is_executed():
    """No module imports what could run a checkpoint's content."""
    banned = {"pickle", "marshal", "shelve", "importlib.machinery", "runpy"}
    wrong = [
        f"{name}: {banned & imports_of(path)}"
        for name, path in modules().items()
        if banned & imports_of(path)
    ]
    assert not wrong
