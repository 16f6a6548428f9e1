"""What an engine of one layer costs to build with its weights as inputs instead of constants.

    python benchmarks/weights_as_inputs.py --model base --precision float16

One engine would then serve all layers. Built ahead of time by TensorRT-RTX for a GPU that is not
here, one profile, in turns; what it costs to run is not measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import onnx
from gpu import make

from sdt_deploy.buckets import BatchLimits, plan_profiles
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig, ExportConfig
from sdt_deploy.console import console
from sdt_deploy.engines import EngineSet
from sdt_deploy.exporters.engine_plan import plan_jobs, worker_options
from sdt_deploy.exporters.engine_process import EngineJob, run_worker
from sdt_deploy.exporters.export import export
from sdt_deploy.trt import checked_version, features, flavour


def with_inputs(job: EngineJob, directory: Path) -> EngineJob:
    """Return a job whose graph takes all stored weights as inputs."""
    proto = onnx.load(job.onnx, load_external_data=False)
    graph, fixed = proto.graph, {}
    for tensor in [each for each in graph.initializer if each.external_data]:
        shape = tuple(tensor.dims)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
        graph.initializer.remove(tensor)
        fixed[tensor.name] = (shape, shape, shape)
    path = directory / "inputs.onnx"
    onnx.save(proto, path)
    profiles = tuple({**profile, **fixed} for profile in job.profiles)
    return EngineJob(
        graph="inputs", onnx=path, profiles=profiles, attention=job.attention, key=job.key
    )


def main() -> None:
    """Read the command line, build, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="base")
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--max-seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chosen = flavour("tensorrt-rtx")
    config = BuildConfig(flavour=chosen.name, compute_capabilities=("8.9",))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        export(
            make(options.model, "all", "graded"),
            directory / "bundle",
            ExportConfig(precision=options.precision),
        )
        bundle = Bundle.open(directory / "bundle")
        engines = EngineSet(
            flavour=chosen.name,
            version=checked_version(chosen),
            compute_capabilities=config.compute_capabilities,
            profiles=plan_profiles(BatchLimits(max_seqlen=options.max_seqlen)),
            attention="decomposed",
            workspace_mb=None,
            engines={},
        )
        (job,) = plan_jobs(bundle, engines, ("stage-00",))
        jobs = [job, with_inputs(job, directory)]
        worker = worker_options(
            config, bundle.manifest, features(chosen, engines.version), ("8.9",)
        )
        seconds: dict[str, list[float]] = {"stage-00": [], "inputs": []}
        sizes = {}
        for number in range(options.rounds):
            for built in run_worker(jobs[:: -1 if number % 2 else 1], directory, worker):
                assert built.problem is None, built.problem
                seconds[built.graph].append(built.build_s)
                sizes[built.graph] = built.output.stat().st_size
    console.print(
        json.dumps(
            {
                name: {"seconds": median(values), "megabytes": round(sizes[name] / 1e6, 2)}
                for name, values in seconds.items()
            }
        )
    )


if __name__ == "__main__":
    main()
