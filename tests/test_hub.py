"""Models of the Hugging Face Hub, from a server that behaves like it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from shardmerge.errors import CheckpointError, LedgerMismatchError, Stopped, StoreError
from shardmerge.merge import merge
from shardmerge.sources import open_checkpoint
from shardmerge.stores import Range, Settings, Stores, remote, retry
from shardmerge.verify import verify
from tests.servers.hub import Hub
from tests.support import (
    HALVES,
    SINGLE,
    StopsWhenPlanned,
    recipe_of,
    shrink,
    tree,
    write_checkpoint,
    write_recipe,
)

TOKEN = "hf_secret"


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
    """Folders: a base model, two fine-tunes, and a newer commit of the first."""
    files = {"tokenizer.json": "{}"}
    return {
        name: write_checkpoint(
            tmp_path / "models" / name, HALVES, seed=seed, shards=1 + seed % 2, files=files
        )
        for seed, name in enumerate(("base", "a", "b", "newer"))
    }


@pytest.fixture
def hub(models, tmp_path, monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.05)
    shrink(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING_FACE_")):
            monkeypatch.delenv(name)
    served = {
        "org/base": {"main": models["base"]},
        "org/a": {"main": models["a"], "v2": models["newer"]},
        "org/b": {"main": models["b"]},
        "org/inner": {"main": models["base"].parent},
        "org/bin": {"main": tmp_path / "bin"},
    }
    (tmp_path / "bin").mkdir()
    served["org/lora"] = {"main": write_adapter(tmp_path / "lora", base="org/base")}
    served["org/other"] = {"main": write_adapter(tmp_path / "other", base="org/elsewhere")}
    torch.save(load_file(models["base"] / SINGLE), tmp_path / "bin" / "pytorch_model.bin")
    with Hub(served, token=TOKEN) as hub:
        resolve = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", resolve)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub


def write_adapter(folder: Path, *, base: str) -> Path:
    """An adapter of one matrix of every model here."""
    name = next(name for name, (_, shape) in HALVES.items() if len(shape) == 2)
    rows, columns = HALVES[name][1]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "base_model_name_or_path": base}
    factors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight": torch.ones(shape)
        for x, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def recipe(folder: Path, base: Any, *models: str, name: str = "r.yml") -> str:
    named: dict[Any, dict[str, object]] = {model: {"weight": 0.4} for model in models}
    return write_recipe(folder / name, recipe_of("task_arithmetic", base, named, dtype="bfloat16"))


def merged(folder: Path, base: Any, *models: str, out: str = "out", **options: Any) -> bytes:
    """Weights of a merge."""
    merge(recipe(folder, base, *models), str(folder / out), threads=1, **options)
    assert verify(str(folder / out)).problems == ()
    return weights(folder / out)


def weights(folder: Path) -> bytes:
    return b"".join(data for name, data in tree(folder).items() if name.endswith(".safetensors"))


def local(folder: Path, models: dict[str, Path], *names: str) -> bytes:
    base, *others = (str(models[name]) for name in names)
    return merged(folder, base, *others, out="local")


def tensors(url: str, revision: str | None = None, **settings: Any) -> dict[str, bytes]:
    """Every tensor of a checkpoint, read through the stores."""
    stores = Stores(Settings(**{"patience_minutes": 0.02, **settings}))
    found = open_checkpoint(url, revision, stores)
    data = {name: bytearray(ref.segments[0].nbytes) for name, ref in found.tensors.items()}
    stores.read(
        Range(segment.url, segment.offset, memoryview(data[name]), segment.version)
        for name, ref in found.tensors.items()
        for segment in ref.segments
    )
    return {name: bytes(read) for name, read in data.items()}


def refusal(url: str, revision: str | None = None) -> str:
    with pytest.raises((StoreError, CheckpointError)) as error:
        tensors(url, revision)
    return str(error.value)


# --- merges ---------------------------------------------------------------------------------------


def test_a_merge_of_models_of_the_hub(hub, models, tmp_path):
    found = merged(tmp_path, "hf://org/base@main", "org/a", "hf://org/b")
    assert found == local(tmp_path, models, "base", "a", "b")
    assert "tokenizer.json" in tree(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "shardmerge.json").read_text())
    assert {source["url"] for source in record["sources"].values()} == {
        f"hf://org/{name}@{hub.commit(f'org/{name}')}" for name in ("base", "a", "b")
    }
    assert not (tmp_path / "cache").exists()  # nothing is downloaded


def test_a_local_base_and_a_revision(hub, models, tmp_path):
    found = merged(tmp_path, models["base"], "hf://org/a@v2", "org/b")
    assert found == local(tmp_path, models, "base", "newer", "b")
    commit = hub.commit("org/a", "v2")
    assert merged(tmp_path, models["base"], f"hf://org/a@{commit}", "org/b", out="2") == found
    assert merged(tmp_path, models["base"], "org/a@v2", "org/b", out="3") == found


def test_a_folder_of_a_model(hub, models):
    expected = tensors(str(models["a"]))
    assert tensors("hf://org/inner/a") == expected
    assert tensors("hf://org/inner@main/a") == expected
    assert tensors("hf://org/inner/a", "main") == expected
    assert tensors(f"hf://org/inner/base/{SINGLE}") == tensors(str(models["base"]))
    assert "no such folder" in refusal("hf://org/inner/c")


def test_weights_of_torch_save(hub, models):
    assert tensors("hf://org/bin") == tensors(str(models["base"]))


def test_the_commit_is_pinned_when_the_plan_is_made(hub, models, tmp_path):
    """What is pushed during a run is not read; a run that was stopped does not go on with it."""
    expected = local(tmp_path, models, "base", "a", "b")
    old = hub.commit("org/a")
    serve = hub.answer

    def answer(handler: Any, port: str) -> None:
        serve(handler, port)
        if port == "back" and hub.commit("org/a") == old:
            hub.push("org/a", "main", models["newer"])

    hub.answer = answer  # type: ignore[method-assign]
    assert merged(tmp_path, "org/base", "org/a", "org/b") == expected
    assert hub.commit("org/a") != old
    record = (tmp_path / "out" / "shardmerge.json").read_text()
    assert old in record and hub.commit("org/a") not in record
    hub.answer = serve  # type: ignore[method-assign]
    planned = StopsWhenPlanned()
    with pytest.raises(Stopped):
        merged(
            tmp_path, "org/base", "org/a", "org/b", out="next", stop=planned.stop, progress=planned
        )
    hub.push("org/a", "main", models["a"])
    with pytest.raises(LedgerMismatchError, match="org/a"):
        merged(tmp_path, "org/base", "org/a", "org/b", out="next")


def test_what_is_not_pinned_is_pinned_when_it_is_first_used(hub, models, tmp_path):
    merged(tmp_path, "org/base", "org/a", "org/b")
    hub.push("org/merged", "main", tmp_path / "out")
    hub.push("org/merged", "v1", tmp_path / "out")
    for url in ("hf://org/merged", "hf://org/merged@v1"):
        found = verify(url)
        assert found.problems == () and found.checksums
    stores = Stores()
    store = stores.open("hf://org/a")
    before = store.read("hf://org/a/config.json")
    (models["newer"] / "config.json").write_text("[]")
    hub.push("org/a", "main", models["newer"])
    assert store.read("hf://org/a/config.json") == before
    assert Stores().open("hf://org/a").read("hf://org/a/config.json") == b"[]"


# --- the local cache ------------------------------------------------------------------------------


def test_the_local_cache_is_used_first(hub, models):
    snapshot = huggingface_hub.snapshot_download("org/a")
    asked = len(hub.requests)
    stores = Stores()
    assert open_checkpoint("hf://org/a", None, stores).url == snapshot
    assert open_checkpoint("org/a", None, stores).url == snapshot
    assert open_checkpoint("org/a", hub.commit("org/a"), stores).url == snapshot
    assert tensors("org/a") == tensors(str(models["a"]))
    assert len(hub.requests) == asked
    assert tensors("org/a", "v2") == tensors(str(models["newer"]))  # which is not in it
    assert len(hub.requests) > asked


def test_a_cache_that_is_not_whole_is_passed_over(hub, models, monkeypatch):
    snapshot = Path(huggingface_hub.snapshot_download("org/a"))
    next(snapshot.glob("*.safetensors")).unlink()
    assert tensors("hf://org/a") == tensors("org/a") == tensors(str(models["a"]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for url in ("hf://org/a", "org/a"):
        assert "not in the local cache" in refusal(url) and "or not whole" in refusal(url)


def test_a_cache_of_weights_alone_is_no_checkpoint(hub, models):
    """Else a merge would have no tokenizer, only because somebody once looked at the weights."""
    huggingface_hub.snapshot_download("org/a", allow_patterns="*.safetensors*")
    found = open_checkpoint("org/a")
    assert found.config and "tokenizer.json" in found.files


def test_small_files_come_whole(hub, models):
    store = Stores(Settings(0.01)).open("hf://org/a")
    data = bytearray(5)
    store.read_ranges([Range("hf://org/a/config.json", 3, memoryview(data))])
    assert data == (models["a"] / "config.json").read_bytes()[3:8]
    with pytest.raises(StoreError, match=r"config\.json"):
        store.read_ranges([Range("hf://org/a/config.json", 10_000, memoryview(data))])
    with pytest.raises(StoreError, match=r"safetensors"):
        place = "hf://org/a/model-00001-of-00002.safetensors"
        store.read_ranges([Range(place, 10_000_000, memoryview(data))])


def test_offline_only_the_cache_is_asked(hub, models, monkeypatch):
    huggingface_hub.snapshot_download("org/a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert tensors("hf://org/a") == tensors("org/a") == tensors(str(models["a"]))
    for url, revision in (("hf://org/b", None), ("org/b", None), ("hf://org/a", "v2")):
        assert "not in the local cache" in refusal(url, revision)
        assert "HF_HUB_OFFLINE" in refusal(url, revision)
    assert len(hub.requests) == asked


# --- who may read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lists", [True, False])
def test_a_gated_model_needs_a_token(hub, models, monkeypatch, lists):
    hub.gated, hub.lists_gated = ["org/a"], lists
    told = refusal("hf://org/a")
    assert "hf://org/a" in told and "accept its licence" in told and "HF_TOKEN" in told
    assert "accept its licence" in refusal("org/a")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "HF_TOKEN" in refusal("hf://org/a") and "hf_wrong" not in refusal("hf://org/a")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert tensors("hf://org/a") == tensors(str(models["a"]))
    assert hub.leaked_tokens == []
    back = [seen for seen in hub.requests if seen.server == "back"]
    assert back and all("authorization" not in seen.headers for seen in back)


def test_a_token_from_the_login_is_used(hub, models, tmp_path):
    hub.private = ["org/a"]
    told = refusal("hf://org/a")
    assert "no such model, or it is private" in told and "hf auth login" in told
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert tensors("hf://org/a") == tensors(str(models["a"]))


def test_what_does_not_exist_fails_at_once(hub):
    assert "no such model" in refusal("hf://org/none")
    told = refusal("org/none")
    assert told.startswith("org/none: no such folder or file here; taken as a model of the Hub")
    assert "no revision 'v9'" in refusal("hf://org/a@v9")
    assert "no revision 'v9'" in refusal("org/a", "v9")
    assert "Write hf://org/name@revision" in refusal("hf://@v1")
    assert len(hub.requests) == 4


def test_a_token_is_written_nowhere(hub, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(0, "shardmerge")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    merged(tmp_path, "org/base", "org/a", "org/b")
    said = caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in said and "Signature" not in said
    assert all(
        TOKEN.encode() not in data and b"Signature" not in data
        for data in tree(tmp_path / "out").values()
    )


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", [1, 3, None])
def test_addresses_are_used_again_until_they_expire(hub, models, monkeypatch, uses):
    monkeypatch.setattr(remote, "REQUEST_BYTES", 500)
    hub.expire_after = uses
    expected = tensors(str(models["base"]))
    assert tensors("hf://org/base") == expected
    asked = [seen for seen in hub.requests if SINGLE in seen.path]
    ranges = [seen for seen in hub.requests if seen.server == "back" and seen.status == 206]
    assert len(ranges) > 15
    assert all(seen.status == 302 for seen in asked)
    if uses is None:
        assert len(asked) < len(ranges) / 2  # the first ones go out together
    hub.expire()
    assert tensors("hf://org/base") == expected


def test_an_address_that_expires_between_two_ranges_is_asked_for_again(hub, models):
    stores = Stores(Settings(0.02))
    found = open_checkpoint("hf://org/base", None, stores)
    place = f"{found.url}/{SINGLE}"
    data = bytearray(100)
    for _ in range(3):
        asked = len(hub.requests)
        stores.read([Range(place, 50, memoryview(data))])
        assert data == (models["base"] / SINGLE).read_bytes()[50:150]
        assert [seen.status for seen in hub.requests[asked:]] in ([206], [403, 302, 206])
        hub.expire()
    assert stores.patience.retries == 0


def test_a_hub_in_trouble_is_borne(hub, models):
    serve, troubled = hub.answer, []

    def answer(handler: Any, port: str) -> None:
        path = handler.path.partition("?")[0]  # behind it is a signature, each time another
        if path not in troubled:
            troubled.append(path)
            handler.send_body(503 if len(troubled) % 2 else 429, headers={"Retry-After": "0"})
            return
        serve(handler, port)

    hub.answer = answer  # type: ignore[method-assign]
    assert tensors("hf://org/a", patience_minutes=1) == tensors(str(models["a"]))
    assert len(troubled) > 4


def test_a_hub_that_is_not_there(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "No server has answered" in refusal("hf://org/a")
    assert "taken as a model of the Hub" in refusal("org/a")


# --- the command line -----------------------------------------------------------------------------


def command(folder: Path, hub: Hub, *arguments: str, **more: str) -> Sequence[Any]:
    env = {
        **{name: text for name, text in os.environ.items() if not name.startswith("HF_")},
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "home"),
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-m", "shardmerge", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line(hub, models, tmp_path):
    hub.gated = ["org/b"]
    text = recipe(tmp_path, "hf://org/base@main", "org/a", "org/b")
    code, _, said = command(tmp_path, hub, "merge", text, "cli", "--threads", "1")
    assert code == 1 and "accept its licence" in said and "Traceback" not in said
    code, _, said = command(tmp_path, hub, "merge", text, "cli", "--threads", "1", HF_TOKEN=TOKEN)
    assert code == 0, said
    merge(
        recipe(tmp_path, models["base"], str(models["a"]), str(models["b"]), name="l.yml"),
        str(tmp_path / "l"),
        threads=1,
    )
    names = HALVES.keys()
    assert {name: tensors(str(tmp_path / "cli"))[name] for name in names} == tensors(
        str(tmp_path / "l")
    )
    code, _, said = command(tmp_path, hub, "merge", text, "off", HF_HUB_OFFLINE="1")
    assert code == 1 and "HF_HUB_OFFLINE is set" in said
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


# --- adapters -------------------------------------------------------------------------------------


def test_an_adapter_of_the_hub(hub, models, tmp_path):
    want = local_adapted(tmp_path, models)
    assert merged(tmp_path, "org/base", "org/base+org/lora@main") == want
    assert merged(tmp_path, "org/base", "hf://org/base@main+hf://org/lora", out="again") == want


def local_adapted(tmp_path: Path, models: dict[str, Path]) -> bytes:
    base = str(models["base"])
    return merged(tmp_path, base, f"{base}+{tmp_path / 'lora'}", out="local")


def test_an_adapter_of_another_model_is_refused(hub, tmp_path):
    with pytest.raises(CheckpointError, match="trained on org/elsewhere, which is another model"):
        merged(tmp_path, "org/base", "org/base+org/other")
    model = {"model": "org/base", "lora": "org/other", "any_base": True}
    top = {"merge_method": "task_arithmetic", "base_model": "org/base", "dtype": "bfloat16"}
    path = write_recipe(
        tmp_path / "any.yml", {**top, "models": [{"model": model, "parameters": {"weight": 0.4}}]}
    )
    merge(path, str(tmp_path / "any"), threads=1)
    assert weights(tmp_path / "any") == merged(tmp_path, "org/base", "org/base+org/lora")
