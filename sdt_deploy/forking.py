"""Locks for processes that fork: a web server's workers, ``multiprocessing`` on Linux.

A forked child has the thread that forked and no other. A lock that another thread held would stay
locked there for ever.
"""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

_locks: WeakSet[threading.RLock] = WeakSet()


def fork_safe_lock() -> threading.RLock:
    """Return a lock that is free in every forked child.

    Its thread may take it again: a signal handler that closes a session runs in the middle of
    whatever that thread does.
    """
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def _free_locks() -> None:
    for lock in _locks:
        lock._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library's own locks


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_free_locks)
