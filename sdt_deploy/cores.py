"""How many cores this process may keep busy: by affinity and by quotas of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of cores that this process may keep busy, at least 1.

    A container with a limit sees all cores of its host, and is halted for the rest of each period
    once its threads have used up the limit together. So a quota of 2.5 cores counts as 2.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota(CGROUPS, MEMBERSHIP)
    return cores if quota is None else min(cores, max(1, int(quota)))


def cpu_quota(cgroups: Path, membership: Path) -> float | None:
    """Return how many cores' worth of time the control groups of a process allow it.

    Args:
        cgroups: where control groups are mounted, version 1, 2 or both; see cgroups(7).
        membership: the process's file of that name in ``/proc``.

    Returns:
        The smallest quota of its groups and of those around them; None: there is no limit, or no
        telling.
    """
    quotas = []
    for directory in _groups(cgroups, membership):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if (directory / "cpu.max").exists():
                quota, period = (directory / "cpu.max").read_text().split()
            else:
                quota = (directory / "cpu.cfs_quota_us").read_text()
                period = (directory / "cpu.cfs_period_us").read_text()
            if float(quota) > 0:  # "max" is no number, and -1 in version 1 means the same
                quotas.append(float(quota) / float(period))
    return min(quotas, default=None)


def _groups(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Find the directories of the groups that share out CPU time, and those above them.

    In a container, the path of a group may be that on the host, and its own directory the root. The
    directory of version 1 may name its controllers in another order than the process's file does,
    but is then called ``cpu`` as well.
    """
    try:
        lines = membership.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for name in {controllers, "cpu"} if controllers else {""}:
            root = cgroups / name
            group = root / path.strip("/")
            yield group
            yield from (one for one in group.parents if one.is_relative_to(root))
