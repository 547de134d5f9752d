"""Checkpoints that are computed tensor after tensor, on every kind of output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open

from shardmerge.computed import write_computed
from shardmerge.errors import LedgerMismatchError, NonFiniteError, OutputError
from shardmerge.layout import Spec
from shardmerge.numerics import DType, to_floats, to_stored
from shardmerge.outputs import open_output
from shardmerge.sources import open_checkpoint
from shardmerge.stores import Stores
from shardmerge.verify import verify

SPECS = (
    Spec("a.weight", DType.F32, (3, 4)),
    Spec("b.bias", DType.F16, (7,)),
    Spec("empty", DType.F32, (0, 2)),
    Spec("c.weight", DType.BF16, (5, 2)),
    Spec("scalar", DType.F64, ()),
)
IDENTITY = {"what": "numbers of a test"}


class Numbers:
    """Computes the same numbers every time; counts what it was asked for."""

    def __init__(self, fail_at: str | None = None, specs=SPECS):
        self.specs = {spec.name: spec for spec in specs}
        self.asked: list[str] = []
        self.fail_at = fail_at

    def value(self, name: str) -> np.ndarray:
        seed = list(self.specs).index(name)
        return np.random.default_rng(seed).normal(size=self.specs[name].shape)

    def __call__(self, names):
        self.asked += names
        for name in names:
            if name == self.fail_at:
                raise KeyboardInterrupt
            yield self.value(name)


def write(out: Path, numbers: Numbers, **options):
    specs = tuple(numbers.specs.values())
    options = {"identity": IDENTITY, "files": {"config.json": b"{}"}, **options}
    return write_computed(open_output(str(out), Stores()), specs, numbers, **options)


def test_what_is_published_is_what_was_computed(tmp_path):
    numbers = Numbers()
    published = write(tmp_path / "out", numbers)
    assert published.shards == ("model.safetensors",) and not published.already
    found = open_checkpoint(str(tmp_path / "out"))
    assert {name: (ref.dtype, ref.shape) for name, ref in found.tensors.items()} == {
        spec.name: (spec.dtype, spec.shape) for spec in SPECS
    }
    for spec in SPECS:
        ref = found.tensors[spec.name]
        start = ref.segments[0].offset if ref.segments else 0
        stored = (tmp_path / "out" / "model.safetensors").read_bytes()[start : start + ref.nbytes]
        assert stored == to_stored(numbers.value(spec.name), spec.dtype).tobytes()
    report = verify(str(tmp_path / "out"))
    assert report.checksums and not report.problems
    assert not (tmp_path / "out" / ".shardmerge").exists()


def test_it_is_not_computed_twice(tmp_path):
    write(tmp_path / "out", Numbers())
    again = Numbers()
    assert write(tmp_path / "out", again).already
    assert not again.asked


LARGE = tuple(Spec(f"layers.{n}.weight", DType.F32, (1024, 2048)) for n in range(6))


def test_a_run_that_was_stopped_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", Numbers("layers.4.weight", LARGE), shard_bytes=2 * 2**23)
    again = Numbers(specs=LARGE)
    write(tmp_path / "out", again, shard_bytes=2 * 2**23)
    assert again.asked == ["layers.4.weight", "layers.5.weight"]
    write(tmp_path / "whole", Numbers(specs=LARGE), shard_bytes=2 * 2**23)
    for shard in (tmp_path / "whole").glob("*.safetensors*"):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()


def test_another_computation_does_not_go_on_with_it(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", Numbers("layers.4.weight", LARGE), shard_bytes=2 * 2**23)
    with pytest.raises(LedgerMismatchError, match="what changed"):
        write(tmp_path / "out", Numbers(specs=LARGE), identity={"what": "others"})
    write(tmp_path / "out", Numbers(specs=LARGE), identity={"what": "others"}, fresh=True)
    assert not verify(str(tmp_path / "out")).problems


def test_another_checkpoint_is_kept_unless_it_may_be_replaced(tmp_path):
    write(tmp_path / "out", Numbers())
    with pytest.raises(OutputError, match="--overwrite"):
        write(tmp_path / "out", Numbers(), identity={"what": "others"})
    write(tmp_path / "out", Numbers(), identity={"what": "others"}, overwrite=True)
    made = json.loads((tmp_path / "out" / "shardmerge.json").read_text())["made"]
    assert made["what"] == "others"


def test_one_file_may_have_a_name_of_its_own(tmp_path):
    single = "adapter_model.safetensors"
    assert write(tmp_path / "out", Numbers(), single=single).shards == (single,)
    with safe_open(tmp_path / "out" / single, "pt") as file:
        assert set(file.keys()) == {spec.name for spec in SPECS}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_what_is_not_finite_is_not_published(tmp_path, value):
    class Bad(Numbers):
        def value(self, name):
            return super().value(name) * value

    with pytest.raises(NonFiniteError, match=r"scalar|a\.weight"):
        write(tmp_path / "out", Bad())
    assert not (tmp_path / "out" / "model.safetensors").exists()


ANY = arrays.arrays(
    np.float64, 20, elements=st.floats(width=64) | st.floats(width=32) | st.floats(width=16)
)


@given(ANY)
def test_values_are_rounded_once(values):
    with np.errstate(over="ignore"):
        for dtype, kind in ((DType.F32, np.float32), (DType.F16, np.float16)):
            want = values.astype(kind)
            assert np.array_equal(to_stored(values, dtype).view(kind), want, equal_nan=True)


@given(ANY)
def test_bfloat16_is_the_nearest(values):
    """Of float32 as torch has it; of float64 no other bfloat16 is nearer."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
        want = torch.from_numpy(single).to(torch.bfloat16).view(torch.uint16).numpy()
        got = to_stored(single, DType.BF16).view(np.uint16)
        nan = np.isnan(single)
        assert np.array_equal(got[~nan], want[~nan])
        assert np.isnan(to_floats(to_stored(values, DType.BF16), DType.BF16))[
            np.isnan(values)
        ].all()
        finite = np.abs(values) < 1e38
        code = to_stored(values[finite], DType.BF16).view(np.uint16)
        error = np.abs(_value(code) - values[finite])
        for other in (code + 1, code - 1):
            closer = np.abs(_value(other.astype(np.uint16)) - values[finite]) < error
            assert not closer.any()


def _value(codes: np.ndarray) -> np.ndarray:
    return to_floats(codes.view(np.uint8), DType.BF16).astype(np.float64)
