"""Tasks on threads of this process; kernels, reads and writes run without the interpreter lock."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

from shardmerge.kernels.trace import Kernels
from shardmerge.plan import Plan, Task
from shardmerge.shards import ShardWriter
from shardmerge.work import Decided, Done, Stopping, Worker


class LocalExecutor:
    """Worker threads with memory of their own; at most ``plan.kernels`` compute at a time."""

    def __init__(self, plan: Plan, writer: ShardWriter) -> None:
        self.slots = plan.workers + 1
        self._tasks: queue.SimpleQueue[tuple[Task, Decided] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()
        self._stopping = threading.Event()
        permits = threading.Semaphore(plan.kernels)
        kernels = Kernels()
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(Worker(plan, writer, kernels, permits, self._stopping),),
                name=f"worker-{number}",
                daemon=True,
            )
            for number in range(plan.workers)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, worker: Worker) -> None:
        while (item := self._tasks.get()) is not None:
            if self._stopping.is_set():
                continue
            try:
                self._done.put(worker.run(*item))
            except Stopping:
                continue
            except BaseException as problem:  # handed to the driver, which raises it
                self._done.put(problem)

    def submit(self, task: Task, decided: Decided) -> None:
        """Run ``task`` with the decisions that it needs."""
        self._tasks.put((task, decided))

    def next_done(self, timeout_s: float) -> Done | None:
        """The next task that ended; None after ``timeout_s`` without one. Raises a task's error."""
        try:
            done = self._done.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(done, BaseException):
            raise done
        return done

    def stop(self) -> None:
        """Make running tasks end early and wait for them."""
        self._stopping.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
