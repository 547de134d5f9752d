"""Suites that every plug-in must pass, shipped so that a new one has them for free.

    laws      check_method("ties"): laws of merge methods; one by one in ``METHOD_LAWS``
    stores    StoreSuite: what a place that bytes are read from promises
    executors ExecutorSuite: what a place that tasks are run at promises
    outputs   OutputSuite: what a place that a checkpoint is published at promises

They need pytest and hypothesis, and are imported where they are used.
"""

from shardmerge.testing.laws import METHOD_LAWS, check_method

__all__ = ["METHOD_LAWS", "check_method"]
