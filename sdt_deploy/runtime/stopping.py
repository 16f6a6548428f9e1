"""Deadlines and cancellation: a check between the engine calls of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from sdt_deploy.checks import plain
from sdt_deploy.config import is_number, shown
from sdt_deploy.errors import DeadlineExceededError, InputError, RunCancelledError

StopCheck = Callable[[], None]
"""Raises if the run is to stop."""


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
    deadline = None if timeout_s is None else monotonic() + timeout_s

    def check() -> None:
        if cancel is not None and cancel.is_set():
            raise RunCancelledError("the run was cancelled")
        if deadline is not None and monotonic() >= deadline:
            raise DeadlineExceededError(f"the run did not end within timeout_s={timeout_s:g}")

    return check
