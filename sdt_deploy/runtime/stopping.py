"""Deadlines and cancellation: a check between the engine calls of a run."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import monotonic

from sdt_deploy.checks import plain
from sdt_deploy.config import is_number, shown
from sdt_deploy.errors import DeadlineExceededError, InputError, RunCancelledError


@dataclass(frozen=True)
class StopCheck:
    """Called, it raises if the run is to stop."""

    timeout_s: float | None
    """Seconds that the run may take; None: any time."""
    deadline: float | None
    """When these are over, by ``time.monotonic``."""
    cancel: threading.Event | None
    """Set, it stops the run."""

    def __call__(self) -> None:
        """See above.

        Raises:
            RunCancelledError: if ``cancel`` is set.
            DeadlineExceededError: if the deadline has passed.
        """
        if self.cancel is not None and self.cancel.is_set():
            raise RunCancelledError("the run was cancelled")
        if self.deadline is not None and monotonic() >= self.deadline:
            raise self.exceeded()

    def left_ns(self) -> int:
        """Return the nanoseconds until the deadline, 0 if it has passed; -1: there is none."""
        return -1 if self.deadline is None else max(0, int((self.deadline - monotonic()) * 1e9))

    def exceeded(self) -> DeadlineExceededError:
        """Return what to raise after the deadline."""
        return DeadlineExceededError(f"the run did not end within timeout_s={self.timeout_s:g}")


def stop_check(timeout_s: float | None, cancel: threading.Event | None) -> StopCheck | None:
    """Return a check of the deadline, which counts from now, and of ``cancel``; None: no need.

    Raises:
        InputError: if ``timeout_s`` is negative or no number, or ``cancel`` is no event.
    """
    if timeout_s is None and cancel is None:
        return None
    timeout_s = plain(timeout_s)
    if timeout_s is not None and not (is_number(timeout_s) and timeout_s >= 0):
        raise InputError(f"timeout_s must be a number, 0 or more, it is {shown(timeout_s)}")
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise InputError(f"cancel must be a threading.Event, not {shown(cancel)}")
    return StopCheck(timeout_s, None if timeout_s is None else monotonic() + timeout_s, cancel)
