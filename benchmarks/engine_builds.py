"""How long engines take to build: all stages of a model against its dense engine.

    python benchmarks/engine_builds.py --model base --compute-capability 8.9

Weights are random; one process builds all graphs, in the order of the bundle, then once more in the
reverse order, without a cache. Reported are the seconds of each and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from gpu import make

from sdt_deploy.buckets import BatchLimits, plan_profiles
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig, ExportConfig
from sdt_deploy.console import console
from sdt_deploy.engines import EngineSet
from sdt_deploy.exporters.engine_plan import plan_jobs, worker_options
from sdt_deploy.exporters.engine_process import run_worker
from sdt_deploy.exporters.export import export
from sdt_deploy.trt import checked_version, features, flavour


def main() -> None:
    """Read the command line, build, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="base")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--attention", choices=("decomposed", "fused"), default="decomposed")
    parser.add_argument("--target", default="tensorrt-rtx")
    parser.add_argument("--compute-capability", default="8.9")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    chosen = flavour(options.target)
    version = checked_version(chosen)
    config = BuildConfig(flavour=chosen.name, compute_capabilities=(options.compute_capability,))
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "bundle"
        form = ExportConfig(precision=options.precision, attention=options.attention)
        export(make(options.model, "all", "graded"), target, form)
        bundle = Bundle.open(target)
        engines = EngineSet(
            flavour=chosen.name,
            version=version,
            compute_capabilities=config.compute_capabilities,
            profiles=plan_profiles(BatchLimits(max_seqlen=512)),
            attention=options.attention,
            workspace_mb=None,
            engines={},
        )
        jobs = plan_jobs(bundle, engines)
        seconds: dict[str, list[float]] = {job.graph: [] for job in jobs}
        sizes, got = {}, set()
        worker = worker_options(
            config, bundle.manifest, features(chosen, version), config.compute_capabilities
        )
        for number in range(options.rounds):
            for built in run_worker(jobs[:: -1 if number % 2 else 1], Path(directory), worker):
                assert built.problem is None, built.problem
                seconds[built.graph].append(built.build_s)
                got.add(built.attention or "none")
                sizes[built.graph] = built.output.stat().st_size
    medians = {name: median(values) for name, values in seconds.items()}
    stages = [name for name in medians if name.startswith("stage-")]
    console.print(
        json.dumps(
            {"seconds": medians, "megabytes": {k: round(v / 1e6, 1) for k, v in sizes.items()}}
        )
    )
    total = sum(medians[name] for name in stages)
    console.print(
        f"{len(stages)} stages {total:.2f} s, dense {medians['dense']:.2f} s: "
        f"{total / medians['dense']:.2f}; with entry and head "
        f"{(total + medians['entry'] + medians['head']) / medians['dense']:.2f}; attention "
        f"{', '.join(sorted(got))}"
    )


if __name__ == "__main__":
    main()
