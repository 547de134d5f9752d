"""What the engine asks of a place to run tasks. An executor only runs; it decides nothing.

Promises, which ``testing.ExecutorSuite`` checks for every executor:

- every task that is submitted ends in exactly one ``Done`` or one error raised by ``next_done``.
- after ``stop`` no task is started; those that are running end soon, with a ``Done`` or without,
  and ``next_done`` still gives every ``Done``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from shardmerge.plan import Task
from shardmerge.runs import Decided
from shardmerge.work import Done


class Executor(Protocol):
    """A place to run tasks."""

    def has_room(self) -> bool:
        """Whether one more task keeps a worker busy; more would only wait in line."""

    def submit(self, task: Task, decided: Decided) -> None:
        """Run ``task`` with the decisions that it needs."""

    def next_done(self, timeout_s: float) -> Done | None:
        """The next task that ended; None after ``timeout_s`` without one. Raises a task's error."""

    def stop(self) -> None:
        """Make running tasks end early and wait for them."""

    def __enter__(self) -> Executor: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
