"""The projection of OPCM beside the reference's step, for one matrix: errors, and time.

The reference's step is a float32 SVD by torch with all singular vectors and four products; its thin
form does the same without the null space's vectors. Errors are relative to the result of a float64
SVD. Steps alternate, with as many BLAS threads each. The time of a 70B model is not measured: it is
what a law of a matrix's sides, fitted to the measured sizes, gives for its tensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from benchmarks.families import Llama
from benchmarks.harness import Report, installed
from shardmerge.kernels.projection import RANK, TIE, project, workspace_bytes
from shardmerge.merge import merge
from shardmerge.recipe import Recipe

log = logging.getLogger("benchmarks")

Matrix = npt.NDArray[np.floating]
LLAMA_70B = Llama(
    hidden=8192, layers=80, intermediate=28672, vocab=128256, heads=64, kv_heads=8
)  # fmt: skip
ALPHAS = (0.0, 0.5, 0.9, 0.99)
SIZES = ("256x256", "512x512", "512x1408", "1024x1024", "1024x2816", "2816x1024", "2048x2048")
PARTS = ("growth", "accuracy", "speed", "project")
GOLDENS = Path(__file__).parent.parent / "tests" / "golden" / "papers"


# --- whole merges -------------------------------------------------------------------------------


def growth(report: Report) -> None:
    """How far merges of more and more models are from the reference's in float64."""
    rows = []
    for step in range(4):
        models = [{"model": str(GOLDENS / f"task{k}.safetensors")} for k in range(step + 1)]
        recipe = {
            "merge_method": "opcm", "base_model": str(GOLDENS / "base.safetensors"),
            "models": models, "parameters": {"alpha": 0.5}, "dtype": "float32",
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            merge(Recipe.parse(json.dumps(recipe)), f"{folder}/out", threads=1)
            found = load_file(f"{folder}/out/model.safetensors")
        expected = load_file(GOLDENS / f"opcm_a05_step{step}.safetensors")
        error = max(float(np.abs(found[name] - value).max()) for name, value in expected.items())
        report.line("growth", models=step + 1, error=error)
        rows.append([step + 1, f"{error:.1e}"])
    report.table(["models", "largest absolute error"], rows)


# --- matrices -----------------------------------------------------------------------------------


def rotated(random: np.random.Generator, shape: tuple[int, int], singular: Matrix) -> Matrix:
    """A float32 matrix of these singular values, before it was rounded."""
    left = np.linalg.qr(random.standard_normal((shape[0], len(singular))))[0]
    right = np.linalg.qr(random.standard_normal((shape[1], len(singular))))[0]
    return ((left * singular) @ right.T).astype(np.float32)


def low_rank(random: np.random.Generator, shape: tuple[int, int], rank: int) -> Matrix:
    """Product of Gaussian factors, rounded to float32: as of LoRA."""
    left, right = random.standard_normal((shape[0], rank)), random.standard_normal((rank, shape[1]))
    return (left @ right).astype(np.float32)


def matrix(family: str, shape: tuple[int, int], random: np.random.Generator) -> Matrix:
    """A sum of task vectors whose singular values are those of ``family``."""
    places = np.arange(min(shape)) / (min(shape) - 1)
    match family.split():
        case ["gaussian"]:
            return random.standard_normal(shape, dtype=np.float32)
        case ["rank", rank]:
            return low_rank(random, shape, int(rank))
        case ["geometric"]:
            return rotated(random, shape, 10 ** (-6 * places))
        case ["power"]:
            return rotated(random, shape, 1 / (1 + 1000 * places))
        case ["steep"]:
            return rotated(random, shape, 1 / (1 + 1000 * places) ** 2)
        case ["half", low]:
            return rotated(random, shape, np.where(places < 0.5, 1, float(low)))
    raise AssertionError


FAMILIES = ("gaussian", "power", "steep", "geometric", "half 1e-2", "half 1e-6", "rank 4",
            "rank 64")  # fmt: skip
TIMED = ("gaussian", "steep", "rank 16")
"""Needs one Gram matrix, two, and one of which few vectors are used."""


# --- steps --------------------------------------------------------------------------------------


def exact(total: Matrix, delta: Matrix) -> Callable[[float], Matrix]:
    """The result for any alpha, from one float64 SVD; singular values of rounding are zero."""
    left, singular, right = np.linalg.svd(total.astype(np.float64), full_matrices=False)
    rank = int(np.sum(singular > RANK * singular[0]))
    left, right = left[:, :rank], right[:rank]
    sums = np.cumsum(singular[:rank])
    inside = left.T @ delta @ right.T

    def result(alpha: float) -> Matrix:
        leading = int(np.sum(sums <= (alpha + TIE) * sums[-1]))
        removed = np.diag(np.diag(inside))
        removed[:leading, :leading] = inside[:leading, :leading]
        return delta - left @ removed @ right

    return result


def reference(total: torch.Tensor, delta: torch.Tensor, alpha: float) -> torch.Tensor:
    """The reference's step: every singular vector, and products with all of them."""
    left, singular, right = _svd(total, full=True)
    leading = _leading(singular, alpha)
    inside = left.T @ delta @ right.T
    inside.diagonal().zero_()
    inside[:leading, :leading] = 0
    return left @ inside @ right


def thin(total: torch.Tensor, delta: torch.Tensor, alpha: float) -> torch.Tensor:
    """The same without the null space's vectors: what is removed is subtracted."""
    left, singular, right = _svd(total, full=False)
    leading = _leading(singular, alpha)
    inside = left.T @ delta @ right.T
    removed = torch.diag(inside.diagonal())
    removed[:leading, :leading] = inside[:leading, :leading]
    return delta - left @ removed @ right


def ours(total: torch.Tensor, delta: torch.Tensor, alpha: float) -> torch.Tensor:
    """The kernel: numpy on the CPU, torch elsewhere."""
    if total.is_cuda:
        return project(total, delta, alpha, xp=torch)
    return torch.from_numpy(project(total.numpy(), delta.numpy(), alpha))


def _svd(total: torch.Tensor, *, full: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    driver = "gesvd" if total.is_cuda else None  # as the reference does
    return torch.linalg.svd(total, full_matrices=full, driver=driver)


def _leading(singular: torch.Tensor, alpha: float) -> int:
    return int((singular.cumsum(0) / singular.sum() > alpha).float().argmax())


STEPS = {"ours": ours, "reference": reference, "thin": thin}


# --- measurements -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timed:
    """Medians of one step for one matrix."""

    wall_s: float
    cpu_s: float


def timed(total: torch.Tensor, delta: torch.Tensor, alpha: float, runs: int) -> dict[str, Timed]:
    """Run the steps in turn, ``runs`` times each after one to warm up."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in STEPS}
    for run, (name, step) in itertools.product(range(-1, runs), STEPS.items()):
        if run < 0 and total.numel() > 1 << 19 and not total.is_cuda:
            continue  # nothing is left to warm up
        wall, cpu = time.perf_counter(), time.process_time()
        step(total, delta, alpha)
        if total.is_cuda:
            torch.cuda.synchronize()
        if run >= 0:
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: Timed(*(statistics.median(column) for column in zip(*pairs, strict=True)))
        for name, pairs in spent.items()
    }


def accuracy(report: Report, device: str, sizes: Sequence[tuple[int, int]], seed: int) -> None:
    """Print errors of ours and the reference's, for each family and alpha."""
    rows = []
    for shape, family in itertools.product(sizes, FAMILIES):
        random = np.random.default_rng(seed)
        total = matrix(family, shape, random)
        delta = random.standard_normal(shape, dtype=np.float32)
        expected = exact(total, delta)
        tensors = torch.from_numpy(total).to(device), torch.from_numpy(delta).to(device)
        errors = []
        for alpha, name in itertools.product(ALPHAS, ("ours", "reference")):
            off = STEPS[name](*tensors, alpha).cpu().numpy() - expected(alpha)
            errors.append(float(np.linalg.norm(off) / np.linalg.norm(expected(alpha))))
            report.line(
                "error", matrix=family, shape=shape, alpha=alpha, step=name, error=errors[-1]
            )
        pairs = zip(errors[::2], errors[1::2], strict=True)
        rows.append([f"{shape[0]}x{shape[1]} {family}", *(f"{a:.0e} {b:.0e}" for a, b in pairs)])
    report.table(["matrix", *(f"alpha {alpha}: ours, ref." for alpha in ALPHAS)], rows)


Measured = dict[str, dict[tuple[int, int], float]]
"""Seconds of each step, by size: of the CPU, or of the device's."""


def speed(
    report: Report, device: str, sizes: Sequence[tuple[int, int]], runs: int, seed: int
) -> Measured:
    """Print times of each family and size; those of the Gaussian one are returned."""
    rows, found = [], {name: {} for name in STEPS}
    for shape, family in itertools.product(sizes, TIMED):
        log.info("%s, %s", shape, family)
        random = np.random.default_rng(seed)
        total = torch.from_numpy(matrix(family, shape, random)).to(device)
        delta = torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).to(device)
        load = round(os.getloadavg()[0], 2)
        times = timed(total, delta, 0.5, runs)
        seconds = {name: t.wall_s if total.is_cuda else t.cpu_s for name, t in times.items()}
        for name, t in times.items():
            figures = {"wall_s": t.wall_s, "cpu_s": t.cpu_s, "runs": runs, "load": load}
            report.line("time", matrix=family, shape=shape, step=name, **figures)
            if family == "gaussian":
                found[name][shape] = seconds[name]
        rows.append(
            [f"{shape[0]}x{shape[1]} {family}"]
            + [f"{1e3 * seconds[name]:.1f}" for name in STEPS]
            + [f"{1e3 * t.wall_s:.1f}" for t in times.values()]
            + [f"{seconds[name] / seconds['ours']:.2f}x" for name in ("reference", "thin")]
            + [f"{workspace_bytes(*shape) / (1 << 20):.0f}", load]
        )  # fmt: skip
    kind = "device ms" if device == "cuda" else "CPU ms"
    heads = [f"{name} {kind}" for name in STEPS] + [f"{name} wall" for name in STEPS]
    heads += ["reference/ours", "thin/ours", "workspace MiB", "load"]
    report.table(["matrix", *heads], rows)
    return found


# --- a model of 70B -----------------------------------------------------------------------------

LAWS = {"ours": ((3, 0), (2, 1)), "thin": ((3, 0), (2, 1)), "reference": ((2, 1), (1, 2))}
"""Powers of the shorter and the longer side that a step's products and decompositions take."""


def law(step: str, seconds: dict[tuple[int, int], float]) -> Callable[[tuple[int, int]], float]:
    """The best sum of the step's terms, none of them negative, for relative errors."""
    sides = np.array([sorted(shape) for shape in seconds], dtype=float)
    measured = np.array(list(seconds.values()))
    best: tuple[float, list[tuple[float, tuple[int, int]]]] = (np.inf, [])
    terms = LAWS[step]
    for chosen in [*itertools.combinations(terms, 1), terms]:
        relative = np.stack([sides[:, 0] ** a * sides[:, 1] ** b for a, b in chosen], 1)
        relative /= measured[:, None]
        factors = np.linalg.lstsq(relative, np.ones(len(measured)), rcond=None)[0]
        left = float(np.linalg.norm(relative @ factors - 1))
        if np.all(factors >= 0) and left < best[0]:
            best = left, list(zip(factors, chosen, strict=True))
    return lambda shape: sum(f * min(shape) ** a * max(shape) ** b for f, (a, b) in best[1])


def model(report: Report, found: Measured) -> None:
    """Print the time that adding one model of 70B takes by law, from sizes of 1024 and more."""
    shapes = [
        shape
        for name, shape in LLAMA_70B.tensors()
        if len(shape) == 2 and not name.startswith("model.embed_tokens")
    ]
    rows = []
    for step, seconds in found.items():
        large = {shape: s for shape, s in seconds.items() if min(shape) >= 1024} or seconds
        of = law(step, large)
        hours = sum(of((rows, columns)) for rows, columns in shapes) / 3600
        off = max(abs(of(shape) / measured - 1) for shape, measured in large.items())
        sizes = [f"{rows}x{columns}" for rows, columns in large]
        report.line("projected", step=step, hours=hours, matrices=len(shapes), fitted_to=sizes,
                    largest_misfit=round(off, 3))  # fmt: skip
        rows.append([step, len(shapes), f"{hours:.1f}", f"{off:.0%}", f"{of((8192, 8192)):.0f}",
                     f"{of((8192, 28672)):.0f}"])  # fmt: skip
    heads = [
        "step",
        "matrices",
        "hours by law, one worker",
        "misfit",
        "8192x8192 s",
        "8192x28672 s",
    ]
    report.table(heads, rows)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each step and matrix, at least 1")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="such as 1024x2816")
    parser.add_argument("--threads", type=int, default=1, help="of BLAS, for every step")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    versions = installed(("torch", "threadpoolctl"))
    report = Report("opcm", "llama-70B", threads=args.threads, device=args.device, torch=versions)
    if args.device == "cuda" and not torch.cuda.is_available():
        report.line("skipped", why=f"torch {torch.__version__} finds no CUDA device")
        return
    if args.only in (None, "growth"):
        growth(report)
    sizes = [(int(rows), int(columns)) for rows, columns in (s.split("x") for s in args.sizes)]
    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        if args.only in (None, "accuracy"):
            small = [size for size in sizes if max(size) <= 1408] or sizes
            accuracy(report, args.device, small, args.seed)
        if args.only not in ("accuracy", "growth"):
            found = speed(report, args.device, sizes, max(1, args.runs), args.seed)
            if args.only != "speed":
                model(report, found)


if __name__ == "__main__":
    main()
