"""Which failures may pass, and how long they are borne."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from shardmerge.errors import Stopped, StoreError

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 20.0
_TICK_S = 0.2
_QUIET_S = 10.0
"""Seconds of trouble after which the user is told of it."""
_UNKNOWN_S = 30.0
"""Seconds of patience with a server that has never answered: its name is more likely wrong."""
WRONG_ANSWERS = 5
"""Answers that break the protocol after which a server is not asked again: it will not learn."""


class TransientError(Exception):
    """A failure that may pass.

    Args:
        reason: in words, without credentials.
        wait_s: the least time until the next try, as the server wishes.
        reached: whether a server answered at all.
        wrong: whether it answered against the protocol.
    """

    def __init__(
        self, reason: str, *, wait_s: float = 0.0, reached: bool = True, wrong: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.reached = reached
        self.wrong = wrong


@dataclass(slots=True)
class Patience:
    """How long failures of one server are borne. Threads share it; so do servers ``stopping``.

    Args:
        minutes: that one request may fail again and again.
        stopping: the user wants the run to end; ends every wait when set.
        ending: the workers are to end, whatever the reason is.
    """

    minutes: float
    stopping: threading.Event = field(default_factory=threading.Event)
    ending: threading.Event = field(default_factory=threading.Event)
    retries: int = 0
    _answered: bool = False

    def for_server(self) -> Patience:
        """The same for another server: one that answers says nothing of others."""
        return Patience(self.minutes, self.stopping, self.ending)

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be begun any more."""
        return self.stopping.is_set() or self.ending.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait; gives whether the wait was ended."""
        until = time.monotonic() + seconds
        while not self.is_over:
            left_s = until - time.monotonic()
            if left_s <= 0:
                return False
            self.stopping.wait(min(left_s, _TICK_S))
        return True

    def run(self, attempt: Callable[[], T], what: str) -> T:
        """The result of ``attempt``, tried until it gives one.

        Args:
            what: is being done, for messages: ``reading s3://bucket/key``.
        Raises:
            StoreError: patience is at its end.
            Stopped: the run is being stopped.
        """
        began = time.monotonic()
        tries = wrong = 0
        told = False
        while True:
            try:
                result = attempt()
            except TransientError as problem:
                reason, floor = problem, problem.wait_s
            else:
                self._answered = True
                return result
            tries += 1
            wrong += reason.wrong
            self.retries += 1
            self._answered = self._answered or reason.reached
            failing_s = time.monotonic() - began
            limit_s = self.minutes * 60 if self._answered else min(_UNKNOWN_S, self.minutes * 60)
            wait_s = max(floor, pause_s(tries))
            if wrong >= WRONG_ANSWERS or failing_s + wait_s > limit_s:
                raise StoreError(self._given_up(what, reason, tries, failing_s)) from None
            if failing_s > _QUIET_S and not told:
                told = True
                log.warning("%s: %s; trying again for %g minutes", what, reason, self.minutes)
            if self.wait(wait_s):
                raise Stopped(f"stopped while {what} failed: {reason}") from None

    def _given_up(self, what: str, reason: TransientError, tries: int, failing_s: float) -> str:
        if reason.wrong:
            advice = "The server cannot be used like this; is there a proxy in between?"
        elif not self._answered:
            advice = "No server has answered at all: check its address and the network."
        else:
            advice = (
                "Run the same command again to go on from there, or give it more time with "
                "--patience MINUTES."
            )
        return f"{what}: failed {tries} times in {failing_s:.0f} s, at last: {reason}.\n  {advice}"


def pause_s(tries: int) -> float:
    """Seconds to wait after ``tries`` failures: exponential, with full jitter.

    Jitter spreads what a thousand workers ask again after one outage (Brooker, "Exponential backoff
    and jitter", 2015).
    """
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(tries - 1, 30))
    return random.uniform(longest / 4, longest)
