"""Where the time of a sparse run goes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from sdt_deploy.runtime.result import Timings


def parts_of(timings: Timings, stages: Sequence[str]) -> dict[str, float]:
    """Return the milliseconds of each part of one run, in the order of the run.

    Args:
        timings: of a sparse run.
        stages: names of all stages; those that were not run take 0.

    Returns:
        ``entry``, each stage, ``head``; ``copies``, the rows that were moved; ``runtime``, all
        else, planning the route included. Their sum is ``timings.total_ms``.
    """
    spent = dict.fromkeys(stages, 0.0)
    for stage, ms in zip(timings.stages, timings.stage_ms, strict=True):
        spent[stages[stage]] += ms
    return {
        "entry": timings.entry_ms,
        **spent,
        "head": timings.head_ms,
        "copies": timings.move_ms,
        "runtime": timings.overhead_ms,
    }


def median_parts(runs: Sequence[Timings], stages: Sequence[str]) -> dict[str, float] | None:
    """Return the median of each part over several runs; None if no stage was timed by itself.

    On a GPU with captured graphs none is: the host does not wait between them.
    """
    if not any(run.stage_ms for run in runs):
        return None
    each = [parts_of(run, stages) for run in runs]
    return {name: median(one[name] for one in each) for name in each[0]}
