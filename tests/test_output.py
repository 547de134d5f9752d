"""What lies at OUT, who writes there, and what becomes of a run that cannot go on."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardmerge import runs
from shardmerge.errors import (
    CheckpointError,
    LedgerMismatchError,
    LockedError,
    NonFiniteError,
    OutputError,
    ShardmergeError,
    SourceChangedError,
    StoreError,
)
from shardmerge.merge import merge
from shardmerge.numerics import DType
from shardmerge.outputs import local as outputs_local
from shardmerge.outputs.api import LOCK, STAGING
from shardmerge.outputs.local import LEDGER_FILE as LEDGER
from shardmerge.outputs.local import LocalOutput
from shardmerge.progress import Quiet
from shardmerge.publish import Published
from shardmerge.stores.local import LocalStore
from tests import support
from tests.crash_child import Merges
from tests.support import (
    HALVES,
    INDEX,
    SINGLE,
    Pwrites,
    Specs,
    all_parts,
    least_memory,
    path_of,
    receipts,
    recipe_of,
    set_element,
    tree,
    visible,
    write_checkpoint,
    write_recipe,
)


@pytest.fixture(autouse=True)
def small_engine(monkeypatch):
    support.shrink(monkeypatch.setattr)


class Case:
    """A recipe over three checkpoints in a folder of their own."""

    def __init__(self, folder: Path, specs: Specs = HALVES, *, shards: int = 2) -> None:
        self.folder = folder
        self.base = write_checkpoint(folder / "base", specs, shards=shards)
        self.models = [
            write_checkpoint(folder / name, specs, seed=seed)
            for seed, name in enumerate(("a", "b"), 1)
        ]
        self.out = folder / "out"
        self.recipe = ""
        self.write()

    def write(self, **top: object) -> None:
        own = {model: {"weight": 1.0} for model in self.models}
        recipe = recipe_of("task_arithmetic", self.base, own, **top)
        self.recipe = write_recipe(self.folder / "r.yml", recipe)

    def merge(self, **options: object) -> Published:
        memory_bytes = least_memory(self.recipe)
        return merge(
            self.recipe, str(self.out), **{"threads": 1, "memory_bytes": memory_bytes} | options
        )

    def refused(self, error: type[ShardmergeError] = OutputError, **options: object) -> str:
        """The message of a merge that is refused."""
        with pytest.raises(error) as caught:
            self.merge(**options)
        return str(caught.value)

    def arguments(self) -> list[str]:
        memory = str(least_memory(self.recipe))
        return ["merge", self.recipe, str(self.out), "--threads", "1", "--memory", memory]

    def quiet(self) -> dict[str, bytes]:
        """What the recipe makes somewhere else."""
        there = self.folder / "quiet"
        shutil.rmtree(there, ignore_errors=True)
        merge(self.recipe, str(there), threads=1)
        return tree(there)

    def goes_on(self) -> None:
        """The same command again makes what it should, and writes no part that has a receipt."""
        kept = receipts(self.out)
        shards = support.plan_of(self.recipe).shards
        with pytest.MonkeyPatch.context() as patch:
            written = Pwrites(patch)
            self.merge()
        assert tree(self.out) == self.quiet()
        assert written.parts(shards) == all_parts(shards) - kept


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when something is written to a folder or a file in it."""
    return {
        str(path.relative_to(folder)): (found.st_mtime_ns, found.st_ino, found.st_size)
        for path in [folder, *folder.rglob("*")]
        for found in [path.lstat()]
    }


def failing(name: str, error: int, *, at: str = "", times: int = 1, after: int = 0):
    """A call of ``os`` that fails with ``error`` for paths that end with ``at``, a few times."""
    real = getattr(os, name)
    calls = iter(range(10**9))

    def call(*arguments, **more):
        if path_of(*arguments, **more).endswith(at) and after <= next(calls) < after + times:
            raise OSError(error, os.strerror(error), path_of(*arguments, **more))
        return real(*arguments, **more)

    return call


# --- what lies at OUT already ---------------------------------------------------------------------


def put_single(out: Path) -> None:
    write_checkpoint(out, HALVES, seed=9, files={"tokenizer.json": "old"})


def put_sharded(out: Path) -> None:
    write_checkpoint(out, HALVES, seed=9, shards=4, files={"tokenizer.json": "old"})


def put_torch(out: Path) -> None:
    out.mkdir()
    (out / "pytorch_model.bin").write_text("weights")


def put_gguf(out: Path) -> None:
    out.mkdir()
    (out / "model-q4.gguf").write_text("weights")


def put_config(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")


OCCUPANTS = {
    SINGLE: put_single,
    INDEX: put_sharded,
    "pytorch_model.bin": put_torch,
    "model-q4.gguf": put_gguf,
    "config.json": put_config,
}


@pytest.mark.parametrize("name", OCCUPANTS)
def test_another_checkpoint_is_refused_and_nothing_is_touched(case, name):
    OCCUPANTS[name](case.out)
    before = tree(case.out)
    message = case.refused()
    assert str(case.out) in message and "--overwrite" in message
    assert name in message or "..." in message
    assert tree(case.out) == before
    assert not (case.out / STAGING).exists()


@pytest.mark.parametrize("name", OCCUPANTS)
def test_overwrite_replaces_another_checkpoint(case, name):
    OCCUPANTS[name](case.out)
    case.merge(overwrite=True)
    assert tree(case.out) == case.quiet()


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_stay_as_they_are(case, overwrite):
    if overwrite:
        put_sharded(case.out)
    others = ["notes.md", "loss.png", "runs/events.log", ".gitattributes", "optimizer.pt"]
    for name in others:
        (case.out / name).parent.mkdir(parents=True, exist_ok=True)
        (case.out / name).write_text(name)
    before = stamps(case.out)
    case.merge(overwrite=overwrite)
    after = stamps(case.out)
    assert {name: after[name] for name in others} == {name: before[name] for name in others}
    assert visible(case.out) == case.quiet() | {name: name.encode() for name in others}


def test_published_again_nothing_is_written(case):
    first = case.merge()
    assert not first.already
    before = stamps(case.out)
    for options in ({}, {"overwrite": True}, {"threads": 4, "memory_bytes": 2**30}):
        assert case.merge(**options).already
        assert stamps(case.out) == before


def test_published_with_another_recipe_is_refused_and_stays_published(case):
    case.merge()
    before = tree(case.out)
    case.write(parameters={"lambda": 0.5})
    assert "--overwrite" in case.refused()
    case.write()
    assert case.merge().already
    assert tree(case.out) == before
    case.write(parameters={"lambda": 0.5})
    assert not case.merge(overwrite=True).already
    assert tree(case.out) == case.quiet() != before


def damage_length(out: Path) -> None:
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def damage_index(out: Path) -> None:
    (out / INDEX).unlink()


def damage_shard(out: Path) -> None:
    next(out.glob("*.safetensors")).unlink()


def damage_record(out: Path) -> None:
    (out / "shardmerge.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_length, damage_index, damage_shard, damage_record])
def test_what_is_not_whole_is_not_taken_for_published(case, damage):
    case.merge()
    damage(case.out)
    case.refused()
    assert not case.merge(overwrite=True).already
    assert tree(case.out) == case.quiet()


def test_a_checkpoint_that_came_during_the_run_is_kept(case, tmp_path):
    class Copies(Quiet):
        def task(self, done, task):
            super().task(done, task)
            (case.out / "pytorch_model.bin").write_text("weights")

    assert "pytorch_model.bin" in case.refused(progress=Copies())
    assert visible(case.out) == {"pytorch_model.bin": b"weights"}
    case.refused()
    (case.out / "pytorch_model.bin").unlink()
    goes_on_without_reading(case)


def goes_on_without_reading(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Context, "fetch", None)
        case.merge()
    assert tree(case.out) == case.quiet()


def test_the_checkpoint_may_lie_in_folders_that_do_not_exist_yet(case, tmp_path):
    case.out = tmp_path / "x" / "y" / "z"
    case.merge()
    assert tree(case.out) == case.quiet()


# --- places that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize("which", ["base", "model", "link", "dots"])
def test_a_source_is_never_written_to(case, tmp_path, which):
    if which == "link":
        (tmp_path / "link").symlink_to(case.base)
    places = {
        "base": case.base,
        "model": case.models[1],
        "link": tmp_path / "link",
        "dots": case.models[0] / ".." / "base",
    }
    case.out = places[which]
    before = stamps(case.out.resolve())
    for options in ({}, {"overwrite": True}, {"fresh": True, "overwrite": True}):
        assert "source" in case.refused(**options)
    assert stamps(case.out.resolve()) == before


def test_out_is_a_file(case):
    case.out.write_text("something")
    assert str(case.out) in case.refused()
    assert case.out.read_text() == "something"


def test_out_is_in_a_file(case, tmp_path):
    (tmp_path / "file").write_text("something")
    case.out = tmp_path / "file" / "out"
    assert str(case.out) in case.refused()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_out_cannot_be_written(case, monkeypatch, error):
    case.out.mkdir()
    monkeypatch.setattr(os, "mkdir", failing("mkdir", error, at=STAGING, times=99))
    message = case.refused()
    assert f"{case.out}" in message and os.strerror(error) in message
    assert list(case.out.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_out_belongs_to_somebody_else(case):
    case.out.mkdir(mode=0o555)
    assert "Permission denied" in case.refused()


@pytest.mark.parametrize("left", ["bytes", "files"])
def test_a_full_disk_is_found_before_anything_is_read(case, monkeypatch, left):
    real = os.statvfs

    def statvfs(path):
        found = real(path)
        values = {key: getattr(found, key) for key in dir(found) if key.startswith("f_")}
        change = {"f_bavail": 5} if left == "bytes" else {"f_files": 1000, "f_favail": 3}
        return SimpleNamespace(**values | change)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(runs.Context, "fetch", None)
    message = case.refused()
    assert str(case.out) in message
    assert f"{5 * real(case.folder).f_frsize:,} bytes free" in message or "3 more files" in message
    assert list(case.out.iterdir()) == []


def test_a_file_system_without_inode_counts_is_not_full(case, monkeypatch):
    real = os.statvfs

    def statvfs(path):
        found = real(path)
        return SimpleNamespace(
            f_bavail=found.f_bavail, f_frsize=found.f_frsize, f_files=0, f_favail=0
        )

    monkeypatch.setattr(os, "statvfs", statvfs)
    case.merge()


# --- writes that fail -----------------------------------------------------------------------------


def refusing(error: int, at: str) -> Callable[[int, int, int, int], int]:
    """The system's ``fallocate``, which fails for files whose path ends with ``at``."""

    def fallocate(file: int, _mode: int, _start: int, _nbytes: int) -> int:
        if not path_of(file).endswith(at):
            return 0
        ctypes.set_errno(error)
        return -1

    return fallocate


def test_space_is_reserved_before_anything_is_read(case, monkeypatch):
    with monkeypatch.context() as patch:
        at = "-00002-of-00002.safetensors.part"
        patch.setattr(outputs_local, "_fallocate", lambda: refusing(errno.ENOSPC, at))
        patch.setattr(runs.Context, "fetch", None)
        assert "no space left" in case.refused()
    case.goes_on()


def test_a_file_system_that_cannot_reserve_will_do(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(outputs_local, "_fallocate", lambda: refusing(errno.EOPNOTSUPP, ""))
        case.merge()
    assert tree(case.out) == case.quiet()


@pytest.mark.parametrize("after", [0, 1, 20, 60])
def test_no_space_in_the_middle_and_on_from_there(case, monkeypatch, after):
    with monkeypatch.context() as patch:
        call = failing("pwrite", errno.ENOSPC, at=".safetensors.part", after=after, times=99)
        patch.setattr(os, "pwrite", call)
        message = case.refused()
    assert "no space left" in message and "run the same command again" in message
    assert visible(case.out) == {}
    assert receipts(case.out) or after < 20
    case.goes_on()


def test_writes_may_be_short(case, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda file, data, at: real(file, data[: len(data) // 2 + 1], at)
    )
    case.merge()
    monkeypatch.undo()
    support.shrink(monkeypatch.setattr)
    assert tree(case.out) == case.quiet()


def test_parts_that_could_not_be_synced_are_written_again(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing("fdatasync", errno.EIO))
        assert os.strerror(errno.EIO) in case.refused()
    assert not receipts(case.out)
    case.goes_on()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_ledger_line_that_was_cut_off_by_a_full_disk(case, monkeypatch, after):
    real = os.write
    calls = iter(range(10**9))

    def write(file, data):
        if path_of(file).endswith(LEDGER):
            number = next(calls)
            if number > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            if number == after:
                return real(file, data[: len(data) // 2])
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        assert "no space left" in case.refused()
    case.goes_on()


@pytest.mark.parametrize("name", [".config.json.part", "-00002-of-00002.safetensors.part", ".part"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_publishing_that_fails_is_finished_by_the_next_run(case, monkeypatch, name, error):
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing("rename", error, at=name, after=name == ".part"))
        message = case.refused()
    assert str(case.out) in message
    assert INDEX not in visible(case.out)
    goes_on_without_reading(case)


# --- two runs -------------------------------------------------------------------------------------


@pytest.fixture
def merges() -> Iterator[Merges]:
    with Merges() as process:
        yield process


def test_a_second_run_is_refused_and_told_of_the_first(case, tmp_path, merges):
    log = tmp_path / "log"
    first = merges.start(case.arguments(), log, op="pwrite", path=".part", nth=3, when="before")
    before = stamps(case.out)
    for options in ({}, {"fresh": True}, {"overwrite": True}):
        message = case.refused(LockedError, **options)
        assert f"process {first} on {os.uname().nodename}" in message
        assert str(case.out) in message
    assert stamps(case.out) == before
    assert merges.go_on(log) == 0
    assert tree(case.out) == case.quiet()


def test_the_lock_of_a_killed_run_is_free(case, tmp_path, merges):
    log = tmp_path / "log"
    first = merges.start(case.arguments(), log, op="pwrite", path=".part", nth=3, when="before")
    case.refused(LockedError)
    os.kill(first, signal.SIGKILL)
    assert merges.answer() == -signal.SIGKILL
    case.merge()
    assert tree(case.out) == case.quiet()


def test_runs_in_one_process_lock_each_other_out(case):
    class Again(Quiet):
        def task(self, done, task):
            super().task(done, task)
            assert "process" in case.refused(LockedError)

    case.merge(progress=Again())
    assert tree(case.out) == case.quiet()


def test_the_lock_of_a_run_that_ended_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """Between opening and locking the file, the run that held it removes the folder."""
    folder = tmp_path / STAGING
    real, removed = fcntl.flock, []

    def flock(file, how):
        if not removed:
            removed.append(True)
            shutil.rmtree(folder)
        real(file, how)

    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    output = LocalOutput(folder.parent)
    with output.locked():
        assert (folder / LOCK).exists()
        with pytest.raises(LockedError), output.locked():
            pass
    with output.locked():
        pass


def test_another_run_that_begins_while_the_folder_is_removed(case, monkeypatch):
    """It has made a lock of its own by then, which must stay."""
    real = os.rmdir

    def rmdir(path, **more):
        if str(path).endswith(STAGING):
            (case.out / STAGING / LOCK).touch()
        real(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", rmdir)
        case.merge()
    assert [path.name for path in (case.out / STAGING).iterdir()] == [LOCK]
    assert case.merge().already
    assert tree(case.out) == case.quiet()


# --- signals --------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_run_and_the_next_goes_on(case, tmp_path, merges, number):
    log = tmp_path / "log"
    process = merges.start(case.arguments(), log, op="pwrite", path=".part", nth=30, when="before")
    os.kill(process, number)
    wait_for(lambda: "stopping" in Path(f"{log}.err").read_text())
    assert merges.go_on(log) == 3
    assert "run the same command again" in Path(f"{log}.err").read_text()
    assert visible(case.out) == {}
    assert receipts(case.out)
    case.goes_on()


def test_a_second_signal_ends_the_run_at_once(case, tmp_path, merges):
    log = tmp_path / "log"
    process = merges.start(case.arguments(), log, op="pwrite", path=".part", nth=9, when="before")
    os.kill(process, signal.SIGINT)
    wait_for(lambda: "stopping" in Path(f"{log}.err").read_text())
    os.kill(process, signal.SIGINT)
    assert merges.answer() == -signal.SIGINT
    case.merge()
    assert tree(case.out) == case.quiet()


def test_a_batch_system_may_say_it_twice(case, tmp_path, merges):
    log = tmp_path / "log"
    process = merges.start(case.arguments(), log, op="pwrite", path=".part", nth=30, when="before")
    for times in (1, 2):
        os.kill(process, signal.SIGUSR1)
        wait_for(lambda times=times: Path(f"{log}.err").read_text().count("stopping") == times)
    assert merges.go_on(log) == 3
    case.goes_on()


def test_a_stop_before_the_first_task(case):
    stop = threading.Event()
    stop.set()
    with pytest.raises(ShardmergeError, match="stopped") as caught:
        case.merge(stop=stop)
    assert caught.value.exit_code == 3
    case.merge()
    assert tree(case.out) == case.quiet()


# --- sources that change or cannot be read --------------------------------------------------------


class Once(Quiet):
    """Does something when the first task has ended."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act

    def task(self, done, task):
        super().task(done, task)
        if self.tasks_done == 1:
            self._act()


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


CHANGES: Mapping[str, Callable[[Case], object]] = {
    "a model": lambda case: touch(case.models[1] / SINGLE),
    "a shard": lambda case: touch(case.base / "model-00002-of-00002.safetensors"),
    "the index": lambda case: touch(case.base / INDEX),
    "the config": lambda case: touch(case.base / "config.json"),
    "a config is gone": lambda case: (case.models[0] / "config.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_meanwhile(case, change):
    act = CHANGES[change]
    message = case.refused(SourceChangedError, progress=Once(lambda: act(case)))
    assert "changed" in message and "--fresh" in message
    assert visible(case.out) == {}
    case.refused(LedgerMismatchError)
    case.merge(fresh=True)
    assert tree(case.out) == case.quiet()


def test_a_failed_read_stops_the_run_and_keeps_the_rest(case, monkeypatch):
    """Also the parts of other workers that end while the run is being stopped."""
    real, reads = LocalStore.read_ranges, []

    def read_ranges(store, ranges):
        for item in ranges:
            reads.append(item.url)
            if item.url.endswith(f"b/{SINGLE}") and len(reads) > 60:
                raise StoreError(f"{item.url}: cannot be read at byte {item.offset:,}")
        real(store, ranges)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read_ranges", read_ranges)
        message = case.refused(StoreError, memory_bytes=least_memory(case.recipe, workers=4))
    assert "cannot be read at byte" in message
    assert visible(case.out) == {}
    assert receipts(case.out)
    case.goes_on()


def test_a_source_that_was_cut_off_is_told(case):
    shard = case.models[0] / SINGLE

    def act() -> None:
        shard.write_bytes(shard.read_bytes()[:-2000])

    message = case.refused(StoreError, progress=Once(act))
    assert str(shard) in message
    assert visible(case.out) == {}


def test_integers_that_differ_are_told(tmp_path):
    case = Case(tmp_path, {"ids": (DType.I64, (9,)), "w": (DType.F32, (9,))}, shards=1)
    data = (case.models[1] / SINGLE).read_bytes()
    at = data.index((8).to_bytes(8, "little"))
    (case.models[1] / SINGLE).write_bytes(data[:at] + b"\7" + data[at + 1 :])
    message = case.refused(CheckpointError)
    assert "ids" in message and str(case.models[1]) in message and "from" in message
    assert visible(case.out) == {}


# --- NaN and infinity -----------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def test_every_tensor_and_model_with_nan_is_told(tmp_path):
    case = Case(tmp_path, shards=1)
    a, b = case.models
    set_element(case.base, "model.layers.0.weight", 0, -INF)
    set_element(a, "model.layers.3.weight", 743, NAN)
    set_element(a, "model.layers.5.weight", 100, INF)
    set_element(b, "model.layers.5.weight", 600, NAN)
    message = case.refused(NonFiniteError)
    told = [line.strip() for line in message.splitlines() if "model.layers" in line]
    assert told == [
        f"model.layers.0.weight: {case.base / SINGLE}",
        f"model.layers.3.weight: {a / SINGLE}",
        f"model.layers.5.weight: {a / SINGLE}, {b / SINGLE}",
    ]
    assert "allow_non_finite" in message
    assert visible(case.out) == {}
    # Told again without reading, and published without reading once it is allowed.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Context, "fetch", None)
        assert case.refused(NonFiniteError) == message
    case.write(allow_non_finite=True)
    goes_on_without_reading(case)


def test_what_overflows_is_told_as_the_result(tmp_path):
    specs = {"small": (DType.F16, (5,)), "large": (DType.F16, (200,))}
    case = Case(tmp_path, specs, shards=1)
    for model in case.models:
        set_element(model, "large", 130, 60_000.0)
    message = case.refused(NonFiniteError)
    assert "large: the result" in message
    assert "small" not in message
    assert str(case.models[0]) not in message
