"""The pure parts of ``benchmarks.quality``: how texts are divided, and what accuracies come to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.demo.tasks import Example, Task
from benchmarks.quality.candidates import Candidate, batch_candidates, recipe
from benchmarks.quality.corpus import _from_tree
from benchmarks.quality.figures import Run, relative, spread
from benchmarks.quality.report import Result, Row, as_dict, tables
from benchmarks.quality.tasks import Divided, Sizes, build_divided, divide

SOURCE = '''
def find_all(self, limit=None, *, strict=True):
    """Return the items that are there."""
    self.found = []
    if limit is not None:
        return self.items.pop(limit)
'''


@pytest.fixture(scope="module")
def divided() -> list[Divided]:
    return build_divided(Sizes(train=2048, validation=40, test=80), every=3)


def test_no_text_is_in_two_parts_of_a_task(divided: list[Divided]) -> None:
    for each in divided:
        parts = (each.task.train, each.validation.test, each.task.test)
        texts = [{example.text for example in part} for part in parts]
        assert len(set.union(*texts)) == sum(len(part) for part in parts), each.task.name


def test_there_are_eight_tasks_with_enough_examples_of_every_class(divided: list[Divided]) -> None:
    assert len({each.task.name for each in divided}) == 8
    for each in divided:
        assert len(each.task.train) >= 250
        assert (len(each.validation.test), len(each.task.test)) == (40, 80)
        classes = set(range(len(each.task.classes)))
        for part in (each.task.train, each.validation.test, each.task.test):
            assert {example.target for example in part} == classes, each.task.name


def test_validation_comes_out_of_training() -> None:
    examples = tuple(Example(str(i), 0) for i in range(10))
    task = Task("numbers", ("all",), train=examples[:6], test=examples[6:])
    found = divide(task, Sizes(train=3, validation=2, test=3))
    assert found.validation.test == examples[:2]
    assert found.task.train == examples[2:5]
    assert found.task.test == examples[6:9]


def test_what_is_hidden_is_the_label() -> None:
    found = {
        (kind, label, " ".join(text.split()))
        for kind, label, text in _from_tree(ast.parse(SOURCE), SOURCE.splitlines())
    }
    assert found == {
        ("value", "NoneType", "limit = [MASK]"),
        ("value", "List", "self.found = [MASK]"),
        ("operator", "is not", "if limit [MASK] None:"),
        ("method", "pop", "return self.items. [MASK] (limit)"),
        ("verb", "return", "[MASK] the items that are there."),
    }


def test_relative_accuracy_is_the_mean_of_ratios() -> None:
    assert relative({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9, "c": 0.1}) == pytest.approx(0.75)


def test_backward_transfer_leaves_the_last_task_out() -> None:
    after = ({"a": 0.8}, {"a": 0.7, "b": 0.6}, {"a": 0.5, "b": 0.7, "c": 0.9})
    run = Run(("a", "b", "c"), after)
    assert run.backward_transfer == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)


def test_spread() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.std, found.least, found.most) == (2.0, 1.0, 1.0, 3.0)
    assert spread([0.5]).std == 0.0


def test_every_recipe_lists_the_models_in_order(tmp_path: Path) -> None:
    for candidates in batch_candidates(quick=False).values():
        for candidate in candidates:
            models = recipe(candidate, tmp_path, ["b", "a"])["models"]
            names = [entry["model"].rpartition("/")[2] for entry in models]
            assert names == ["b", "a"]


def test_tables_and_json_say_the_same() -> None:
    run = Run(("a", "b"), ({"a": 0.8}, {"a": 0.6, "b": 0.5}))
    row = Row("in sequence", Candidate("opcm", {"alpha": 0.5}), (run.final,), (run,))
    result = Result({"a": 0.4, "b": 0.5}, {"a": 0.8, "b": 0.5}, [row], [], {})
    last = as_dict(result)["rows"][-1]
    assert last["accuracy"]["mean"] == 0.55
    assert last["relative"]["mean"] == 0.875
    assert last["of_base"]["mean"] == 1.25
    assert last["backward_transfer"]["mean"] == -0.2
    assert tables(result).splitlines()[-1].split() == [
        *("in", "sequence", "opcm", "alpha", "0.5"),
        *("55.0", "87.5", "125.0", "0.0", "55.0", "55.0", "-20.0"),
    ]
