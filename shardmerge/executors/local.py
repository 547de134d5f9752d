"""Tasks on threads of this process; kernels, reads and writes run without the interpreter lock."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

from shardmerge.errors import Stopped
from shardmerge.outputs.api import ShardWriter
from shardmerge.plan import Plan, Task
from shardmerge.runs import Decided, Stopping
from shardmerge.stores import Stores
from shardmerge.work import Done, Shared, Worker


class LocalExecutor:
    """Worker threads with memory of their own; at most ``plan.kernels`` compute at a time."""

    def __init__(self, plan: Plan, writer: ShardWriter, stores: Stores) -> None:
        self._most = plan.workers + 1  # one task waits, so that no worker does
        self._flying = 0
        self._tasks: queue.SimpleQueue[tuple[Task, Decided] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()
        self._plan = plan
        self._shared = Shared.of(plan, stores)
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(Worker(self._shared, writer),),
                name=f"worker-{number}",
                daemon=True,
            )
            for number in range(plan.workers)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, worker: Worker) -> None:
        while (item := self._tasks.get()) is not None:
            if self._shared.stopping.is_set():
                continue
            try:
                self._done.put(worker.run(*item, self._plan))
            except (Stopping, Stopped):
                continue
            except BaseException as problem:  # handed to the driver, which raises it
                self._done.put(problem)

    def has_room(self) -> bool:
        """Whether one more task keeps a worker busy."""
        return self._flying < self._most

    def submit(self, task: Task, decided: Decided) -> None:
        """Run ``task`` with the decisions that it needs."""
        self._flying += 1
        self._tasks.put((task, decided))

    def next_done(self, timeout_s: float) -> Done | None:
        """The next task that ended; None after ``timeout_s`` without one. Raises a task's error."""
        try:
            done = self._done.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self._flying -= 1
        if isinstance(done, BaseException):
            raise done
        return done

    def stop(self) -> None:
        """Make running tasks end early and wait for them."""
        self._shared.stopping.set()
        waiting = self._shared.stores.patience.ending
        waiting.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        waiting.clear()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
