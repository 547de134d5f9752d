"""How many threads linear algebra uses."""

from __future__ import annotations

import threading

from threadpoolctl import threadpool_info

from shardmerge.kernels import blas


def test_one_thread_whoever_asks():
    """In every thread of a process, and until the last has left."""

    def threads() -> set[int]:
        return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

    before, seen = threads(), []
    inside = threading.Barrier(3)

    def work() -> None:
        for _ in range(3):
            inside.wait()
            with blas.one_thread():
                seen.append(threads())
                inside.wait()
            inside.wait()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == [{1}] * 9 and threads() == before
