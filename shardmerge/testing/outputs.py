"""What every output promises; for pytest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from shardmerge.errors import LockedError, OutputError, StoreError
from shardmerge.layout import Shard, Spec, lay_out
from shardmerge.numerics import DType
from shardmerge.outputs.api import Output, Receipt

MIB = 2**20


def two_shards() -> tuple[Shard, ...]:
    """A plan of two shards; the first has three parts, which S3 takes as well."""
    specs = [Spec("a", DType.F32, (4 * MIB,)), Spec("b", DType.F32, (7,))]
    return lay_out(specs, [0, 1], None, part_bytes=6 * MIB)


def content_of(shard: Shard) -> bytes:
    """The header, and bytes that differ everywhere."""
    body = (b"%07d\n" * (shard.nbytes // 8 + 1)) % tuple(range(shard.nbytes // 8 + 1))
    return shard.header + body[: shard.nbytes - len(shard.header)]


class OutputSuite:
    """The promises of ``outputs.api``.

    A subclass ``TestMine`` gives the fixture ``outputs``: an endless iterator of outputs of one
    place, each as another process would open it.
    """

    @pytest.fixture
    def output(self, outputs: Iterator[Output]) -> Output:
        """One of them."""
        return next(outputs)

    @pytest.fixture
    def shards(self) -> tuple[Shard, ...]:
        """What is written."""
        return two_shards()

    def write(
        self, output: Output, shards: tuple[Shard, ...], handles: dict[int, str], *, every: int = 1
    ) -> dict[tuple[int, int], Receipt]:
        """Write every part, or every second one and so on; gives the receipts."""
        receipts = {}
        with closing(output.writer(shards, handles)) as writer:
            # Out of order, as workers do.
            for part in [part for shard in shards for part in shard.parts][::-1][::every]:
                sink = writer.part(part)
                data = content_of(shards[part.shard])[part.start : part.stop]
                sink.write(data[:100])
                sink.write(memoryview(data)[100:])
                receipt = sink.finish([])
                receipts[receipt.key] = receipt
            writer.sync({shard for shard, _ in receipts})
        return receipts

    def begin(self, output: Output, shards: tuple[Shard, ...]) -> dict[int, str]:
        """Begin every shard."""
        return dict(output.begin(shards, range(len(shards))))

    def test_small_files_are_written_whole_and_can_be_replaced(self, output: Output) -> None:
        with output.locked():
            output.write("config.json", b"old")
            output.write("folder/x.txt", b"1")
            output.write("config.json", b"newer")
        assert output.read("config.json") == b"newer"
        assert output.read("config.json", 3) == b"new"
        assert output.size("config.json") == 5
        assert output.size("gone") is None
        assert [n for n in output.names() if not n.startswith(".")] == ["config.json", "folder/"]
        output.remove(["config.json", "gone"])
        assert output.size("config.json") is None
        with pytest.raises((StoreError, OutputError), match=r"config\.json"):
            output.read("config.json")

    def test_what_was_never_written_to_is_empty(self, output: Output) -> None:
        assert output.names() == []
        assert not output.is_unfinished()
        assert output.leftovers() == []

    def test_a_shard_is_seen_only_when_it_is_sealed_and_then_whole(
        self, outputs: Iterator[Output], shards: tuple[Shard, ...]
    ) -> None:
        output = next(outputs)
        with output.locked():
            output.prove(shards, frozenset())
            handles = self.begin(output, shards)
            receipts = self.write(output, shards, handles)
            for shard in shards:
                assert next(outputs).size(shard.name) is None
            output.seal(shards, receipts, handles)
            for shard in shards:
                assert next(outputs).read(shard.name) == content_of(shard)
            output.seal(shards, receipts, handles)  # again, as after a crash
            output.tidy()
        assert next(outputs).names() == sorted(shard.name for shard in shards)
        assert next(outputs).leftovers() == []

    def test_a_part_may_be_written_twice(self, output: Output, shards: tuple[Shard, ...]) -> None:
        with output.locked():
            handles = self.begin(output, shards)
            self.write(output, shards, handles)
            receipts = self.write(output, shards, handles)
            output.seal(shards, receipts, handles)
        assert [output.read(s.name) for s in shards] == [content_of(s) for s in shards]

    def test_a_shard_that_is_begun_again_has_lost_what_was_written(
        self, output: Output, shards: tuple[Shard, ...]
    ) -> None:
        with output.locked():
            handles = self.begin(output, shards)
            receipts = self.write(output, shards, handles)
            handles |= dict(output.begin(shards, [0]))
            found = output.survey(shards, receipts, handles, cleared=False)
            assert found.lost == {key for key in receipts if key[0] == 0}
            assert found.open == handles

    def test_slices_have_locks_and_journals_of_their_own(
        self, outputs: Iterator[Output], shards: tuple[Shard, ...]
    ) -> None:
        output, other = next(outputs), next(outputs)
        with output.locked():
            assert output.slices() == []
            with closing(output.journal()) as journal:
                journal.append(["of the run"])
        for name in ("0-of-2", "1-of-2"):
            with output.locked(name), closing(output.journal(name)) as journal:
                journal.append([name])
                with pytest.raises(LockedError), other.locked(name):
                    raise AssertionError("two processes hold one lock")
                with other.locked():
                    assert name in other.slices()
        with other.locked():
            assert other.slices() == ["0-of-2", "1-of-2"]
            for name in ("", *other.slices()):
                with closing(other.journal(name)) as journal:
                    assert journal.lines() == [name or "of the run"]
            other.tidy()
        assert next(outputs).slices() == []
        assert next(outputs).leftovers() == []

    def test_another_process_goes_on(
        self, outputs: Iterator[Output], shards: tuple[Shard, ...]
    ) -> None:
        first, second = next(outputs), next(outputs)
        with first.locked():
            handles = self.begin(first, shards)
            receipts = self.write(first, shards, handles, every=2)
        with second.locked():
            found = second.survey(shards, receipts, handles, cleared=False)
            assert (found.sealed, found.lost) == (frozenset(), frozenset())
            begun = dict(second.begin(shards, [n for n in range(2) if n not in found.open]))
            handles = {**found.open, **begun}
            with closing(second.writer(shards, handles)) as writer:
                for part in (part for shard in shards for part in shard.parts):
                    if (part.shard, part.number) not in receipts:
                        sink = writer.part(part)
                        sink.write(content_of(shards[part.shard])[part.start : part.stop])
                        receipt = sink.finish([])
                        receipts[receipt.key] = receipt
            second.seal(shards, receipts, handles)
            found = second.survey(shards, receipts, handles, cleared=True)
            assert found.sealed == {0, 1} and not found.lost
        assert [first.read(s.name) for s in shards] == [content_of(s) for s in shards]

    def test_receipts_without_bytes_are_found(
        self, outputs: Iterator[Output], shards: tuple[Shard, ...]
    ) -> None:
        first, second = next(outputs), next(outputs)
        with first.locked():
            handles = self.begin(first, shards)
            receipts = self.write(first, shards, handles)
            first.forget()
        with second.locked():
            found = second.survey(shards, receipts, handles, cleared=False)
        assert found.lost == receipts.keys() and not found.open and not found.sealed

    def test_a_shard_that_is_there_counts_only_if_nothing_older_can_be(
        self, outputs: Iterator[Output], shards: tuple[Shard, ...]
    ) -> None:
        output = next(outputs)
        with output.locked():
            handles = self.begin(output, shards)
            receipts = self.write(output, shards, handles)
            output.seal(shards, receipts, handles)
        other = next(outputs)
        with other.locked():
            found = other.survey(shards, receipts, handles, cleared=False)
            assert not found.sealed

    def test_the_journal_is_read_again_in_order(self, outputs: Iterator[Output]) -> None:
        output = next(outputs)
        with output.locked():
            with closing(output.journal()) as journal:
                assert journal.lines() == []
                journal.append(["one", "two é"])
                journal.append(["three"])
            assert output.is_unfinished()
            with closing(output.journal()) as journal:
                assert journal.lines() == ["one", "two é", "three"]
                journal.append(["four"])
            output.forget()
            assert not output.is_unfinished()
            with closing(output.journal()) as journal:
                assert journal.lines() == []

    def test_a_second_lock_is_refused_while_the_first_is_held(
        self, outputs: Iterator[Output]
    ) -> None:
        first, second, third = (next(outputs) for _ in range(3))
        with first.locked():
            with pytest.raises(LockedError, match=f"process {os.getpid()}"), second.locked():
                pass
            first.check_lock()
        with third.locked():
            third.check_lock()

    def test_what_is_left_is_told_and_can_be_removed(
        self, outputs: Iterator[Output], shards: tuple[Shard, ...]
    ) -> None:
        output = next(outputs)
        with output.locked():
            self.write(output, shards, self.begin(output, shards))
            with closing(output.journal()) as journal:
                journal.append(["one"])
        other = next(outputs)
        assert any("ledger" in line for line in other.leftovers())
        with other.locked():
            other.forget()
            other.tidy()
        assert next(outputs).leftovers() == [] and next(outputs).names() == []

    def test_a_part_that_is_not_whole_has_no_receipt(
        self, output: Output, shards: tuple[Shard, ...]
    ) -> None:
        with output.locked():
            handles = self.begin(output, shards)
            with closing(output.writer(shards, handles)) as writer:
                sink = writer.part(replace(shards[1].parts[0]))
                sink.write(b"1")
                with pytest.raises(AssertionError, match="bytes"):
                    sink.finish([])
