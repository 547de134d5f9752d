"""Merges on an emulated CUDA device: the CPU's bytes, failures, what is missing."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from shardmerge import plan, whole, work
from shardmerge.cli import main
from shardmerge.errors import DeviceError, LedgerMismatchError, UsageError
from shardmerge.kernels import cuda_driver, cuda_memory, device, linalg
from shardmerge.kernels.cuda import Cuda
from shardmerge.kernels.device import choose_device, open_device
from shardmerge.kernels.trace import Kernels
from shardmerge.merge import merge
from shardmerge.prepare import Where, prepare
from tests import support
from tests.emulated_cuda import EmulatedDriver
from tests.support import LACKING, digests, recipe_of, write_checkpoint, write_recipe

# --- whole merges ---------------------------------------------------------------------------------

WAYS = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.7},
    "ties": {"weight": 0.7, "density": 0.4},
    "dare_ties": {"weight": 0.7, "density": 0.4},
    "slerp": {},
    "opcm": {},
}


@pytest.fixture
def family(tmp_path, monkeypatch) -> Callable[..., str]:
    """Writes the recipe of a method over tiny checkpoints, in a small engine."""
    support.shrink(monkeypatch.setattr)
    monkeypatch.setattr(work, "Kernels", Kernels)  # none is kept from one device to the next
    monkeypatch.setattr(cuda_memory, "SEGMENT_BYTES", 4096)
    for seed, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, seed=seed)

    def recipe(method: str) -> str:
        models = ["a"] if method == "slerp" else ["a", "b"]
        own = {tmp_path / name: WAYS[method] for name in models}
        more = {"parameters": {"t": 0.3}} if method == "slerp" else {}
        base = None if method == "linear" else tmp_path / "base"
        found = recipe_of(method, base, own, **more)
        return write_recipe(tmp_path / f"{method}.yml", found)

    return recipe


@pytest.fixture
def emulated(monkeypatch) -> Callable[..., EmulatedDriver]:
    """Makes ``cuda`` mean an emulated device, here and from now on."""
    monkeypatch.setattr(cuda_driver, "lacking", lambda: None)

    def use(**settings_: object) -> EmulatedDriver:
        driver = EmulatedDriver(**settings_)
        cuda = Cuda(driver)
        monkeypatch.setattr(device, "_cuda", lambda: cuda)
        return driver

    return use


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("method", [method for method in WAYS if method != "opcm"])
def test_a_merge_on_cuda_gives_the_cpu_s_bytes(
    method, resident, family, emulated, tmp_path, monkeypatch
):
    recipe, driver = family(method), emulated()
    if not resident:
        monkeypatch.setattr(plan, "resident_bytes", lambda *_: 2**40)
    merge(recipe, str(tmp_path / "cpu"), device="cpu")
    assert not driver.calls
    merge(recipe, str(tmp_path / "cuda"), device="cuda", threads=3)
    assert driver.calls["launch"]
    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")
    gc.collect()
    assert not driver.pinned


@pytest.mark.parametrize("method", WAYS)
def test_a_merge_on_a_real_device_gives_the_cpu_s_bytes(method, family, real_cuda, tmp_path):
    recipe = family(method)
    for name in ("cpu", "cuda"):
        merge(recipe, str(tmp_path / name), device=name)
    assert digests(tmp_path / "cuda") == digests(tmp_path / "cpu")


def test_without_being_told_a_device_is_used_where_there_is_one(family, emulated, tmp_path):
    driver = emulated()
    merge(family("linear"), str(tmp_path / "out"))
    assert driver.calls["launch"]


@pytest.mark.parametrize("kind", ["copy_in", "copy_out", "launch", "synchronize", "load"])
def test_a_merge_whose_device_fails_goes_on_from_there(family, emulated, tmp_path, capsys, kind):
    out, recipe = tmp_path / "out", family("ties")
    emulated(failing={kind: 5})
    assert main(["merge", recipe, str(out), "--device", "cuda", "--threads", "1"]) == 1
    message = capsys.readouterr().err
    assert f"{kind} gave CUDA_ERROR_UNKNOWN" in message and "Traceback" not in message
    with pytest.raises(LedgerMismatchError):
        merge(recipe, str(out), device="cpu")
    emulated()
    merge(recipe, str(out), device="cuda")
    merge(recipe, str(tmp_path / "cpu"), device="cpu")
    assert digests(out) == digests(tmp_path / "cpu")


def test_a_device_with_too_little_memory_is_told(family, emulated, tmp_path, capsys):
    emulated(memory_bytes=1000)
    arguments = ["merge", family("linear"), str(tmp_path / "out"), "--device", "cuda"]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "DeviceError: emulated device" in message and "--device cpu" in message


def test_a_plan_for_cuda_says_so(family, emulated, capsys):
    emulated()
    assert main(["plan", family("ties"), "--device", "cuda", "--threads", "32"]) == 0
    assert re.search(r"^device +cuda$", capsys.readouterr().out, re.MULTILINE)


def test_workers_do_not_outnumber_what_a_device_takes(family, emulated, tmp_path):
    emulated()
    where = Where(memory_bytes=2**32, threads=32, device="cuda")
    made = support.prepare(family("ties"), "OUT", where).plan
    assert made.device == "cuda" and made.kernels == 4 and made.workers > made.kernels


def test_matrices_are_decomposed_there_too(family, emulated, tmp_path, monkeypatch):
    """By PyTorch, of which this machine has the CPU's: another LAPACK, so other last bits."""
    emulated()
    monkeypatch.setattr(linalg, "lacking", lambda: None)
    used = []
    places = {"cpu": linalg.on_cpu, "cuda": linalg.OnTorch("cpu")}
    monkeypatch.setattr(whole, "linear_on", lambda name: used.append(name) or places[name])
    recipe = family("opcm")
    merge(recipe, str(tmp_path / "cpu"), device="cpu")
    assert set(used) == {"cpu"}
    merge(recipe, str(tmp_path / "cuda"), device="cuda")
    assert "cuda" in used
    found, expected = (support.read_tensors(tmp_path / name) for name in ("cuda", "cpu"))
    for name, (dtype, _, raw) in found.items():
        if dtype.is_float:
            got, same = support.loaded(raw, dtype), support.loaded(expected[name][2], dtype)
            assert np.allclose(got, same, rtol=2.0**-7, atol=1e-5), name


def test_without_pytorch_matrices_stay_on_the_cpus(family, emulated, tmp_path, monkeypatch):
    emulated()
    monkeypatch.setattr(linalg, "lacking", lambda: "PyTorch is not installed")
    recipe = family("opcm")
    with pytest.raises(UsageError, match="PyTorch is not installed, which decomposes matrices"):
        merge(recipe, str(tmp_path / "out"), device="cuda")
    assert prepare(recipe, "OUT", Where(device="auto")).first.plan.device == "cpu"


def test_a_matrix_that_the_device_has_no_room_for():
    def too_much(matrix, *, xp):
        raise xp.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.")

    with pytest.raises(DeviceError, match="matrix of 3x2: CUDA out of memory"):
        linalg.OnTorch("cpu")(too_much, np.zeros((3, 2), dtype=np.float32))


# --- what is missing ------------------------------------------------------------------------------


def fake_bindings(monkeypatch, **functions: object) -> None:
    monkeypatch.setattr(cuda_driver, "lacking", LACKING)
    status = SimpleNamespace(
        CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"),
        CUDA_ERROR_NO_DEVICE=SimpleNamespace(name="CUDA_ERROR_NO_DEVICE"),
        CUDA_ERROR_UNKNOWN=SimpleNamespace(name="CUDA_ERROR_UNKNOWN"),
    )
    attributes = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
    )
    api = ModuleType("cuda.bindings.driver")
    given = {
        "cuInit": lambda _: (status.CUDA_SUCCESS,),
        "cuDeviceGetCount": lambda: (status.CUDA_SUCCESS, 1),
        "cuDeviceGet": lambda _: (status.CUDA_SUCCESS, 0),
        "cuDeviceGetAttribute": lambda what, _: (status.CUDA_SUCCESS, {75: 9, 76: 0}[what]),
    }
    given |= {name: function(status) for name, function in functions.items()}
    for name, value in given.items():
        setattr(api, name, value)
    api.CUresult, api.CUdevice_attribute = status, attributes
    bindings = ModuleType("cuda.bindings")
    bindings.driver = api
    for name, module in (("cuda", ModuleType("cuda")), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", api)


def no_library(_: object) -> Callable[[int], object]:
    def raises(_: int) -> object:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    return raises


MISSING = {
    "libcuda.so.1": {"cuInit": no_library},
    "finds no CUDA device": {"cuInit": lambda s: lambda _: (s.CUDA_ERROR_NO_DEVICE,)},
    "CUDA_ERROR_UNKNOWN": {"cuInit": lambda s: lambda _: (s.CUDA_ERROR_UNKNOWN,)},
    "no CUDA device": {"cuDeviceGetCount": lambda s: lambda: (s.CUDA_SUCCESS, 0)},
    "compute capability 6.1": {
        "cuDeviceGetAttribute": lambda s: lambda what, _: (s.CUDA_SUCCESS, {75: 6, 76: 1}[what])
    },
}


@pytest.mark.parametrize("text", MISSING)
def test_what_cuda_lacks_is_told_by_name(monkeypatch, text):
    fake_bindings(monkeypatch, **MISSING[text])
    with pytest.raises(UsageError, match=text):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"


def test_bindings_that_are_not_installed_are_told(monkeypatch, capsys):
    monkeypatch.setattr(cuda_driver, "lacking", LACKING)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["merge", "recipe.yml", "out", "--device", "cuda"]) == 2
    message = capsys.readouterr().err
    assert "UsageError: --device cuda: the package cuda-bindings is not installed" in message
    assert choose_device("auto") == "cpu"


def test_a_worker_without_the_plan_s_device_says_so(monkeypatch):
    monkeypatch.setattr(cuda_driver, "lacking", lambda: "there is none")
    device._cuda.cache_clear()
    with pytest.raises(DeviceError, match="planned for a CUDA device, but here there is none"):
        open_device("cuda")


def test_a_device_that_suffices_is_chosen(monkeypatch):
    fake_bindings(monkeypatch)
    assert choose_device("auto") == choose_device("cuda") == "cuda"
    assert choose_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        choose_device("gpu")
