"""What an engine of one layer costs with its weights as inputs instead of constants.

    python benchmarks/weights_as_inputs.py --model base --precision float16
    python benchmarks/weights_as_inputs.py --model base --target tensorrt --rounds 1

One engine would then serve all layers. TensorRT-RTX builds ahead of time for a GPU that is not
here; ``tensorrt`` builds for the one that is here, and then both engines also run, in turns, at the
best shapes of each profile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import onnx
from gpu import make
from onnx import helper

from sdt_deploy import trt
from sdt_deploy.buckets import BatchLimits, plan_profiles
from sdt_deploy.bundle import Bundle
from sdt_deploy.config import BuildConfig, ExportConfig
from sdt_deploy.engines import EngineSet
from sdt_deploy.exporters.engine_plan import plan_jobs, target_gpus, worker_options
from sdt_deploy.exporters.engine_process import EngineJob, run_worker
from sdt_deploy.exporters.export import export
from sdt_deploy.runtime.backends.device import DeviceMemory

RUNS = 200
"""Of each engine and profile."""


def with_inputs(job: EngineJob, directory: Path) -> EngineJob:
    """Return a job whose graph takes all stored weights as inputs."""
    directory.mkdir()
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


def inputs_of(job: EngineJob, profile: int, memory: DeviceMemory) -> dict[str, Any]:
    """Return inputs of a job's graph at the best shapes of a profile: random states, indices 0."""
    made = {}
    for value in onnx.load(job.onnx, load_external_data=False).graph.input:
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        made[value.name] = memory.empty(job.profiles[profile][value.name][1], dtype)
        made[value.name].normal_(0, 0.05) if "float" in dtype else made[value.name].zero_()
    if "key_lengths" in made:
        made["key_lengths"].fill_(job.profiles[profile]["key_lengths"][1][0])
    return made


def prepared(
    library: Any, engine: Any, profile: int, given: Mapping[str, Any], memory: DeviceMemory
) -> Callable[[], object]:
    """Return a call of an engine, with all of its memory."""
    context = trt.create_context(library, engine)
    assert context.set_optimization_profile_async(profile, memory.stream)
    for name, tensor in given.items():
        assert context.set_input_shape(name, tuple(tensor.shape)), name
        assert context.set_tensor_address(name, tensor.data_ptr()), name
    kept = [memory.empty((max(trt.scratch_bytes(engine, profile), 1),), "uint8")]
    trt.set_scratch(context, kept[0].data_ptr(), kept[0].numel())
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        if name not in given:
            dtype = {"FLOAT": "float32", "HALF": "float16"}[engine.get_tensor_dtype(name).name]
            kept.append(memory.empty(tuple(context.get_tensor_shape(name)), dtype))
            assert context.set_tensor_address(name, kept[-1].data_ptr()), name

    def call() -> object:
        assert kept
        return context.execute_async_v3(memory.stream)

    return call


def run_times(
    library: Any, jobs: list[EngineJob], files: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Run both engines in turns; return, for each profile, the medians in milliseconds."""
    memory = DeviceMemory()
    runtime = library.Runtime(trt.logger(library))
    engines = {
        job.graph: runtime.deserialize_cuda_engine(files[job.graph].read_bytes()) for job in jobs
    }
    found = []
    for profile, shapes in enumerate(jobs[0].profiles):
        calls = {
            job.graph: prepared(
                library, engines[job.graph], profile, inputs_of(job, profile, memory), memory
            )
            for job in jobs
        }
        for call in (*calls.values(),) * 10:
            assert call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(RUNS):
            for name, call in calls.items():
                times[name].append(memory.clock(call))
        row: dict[str, Any] = {name: median(values) for name, values in times.items()}
        states = shapes["hidden_states"][1]
        found.append({"hidden_states": states, "ratio": row["inputs"] / row["stage-00"], **row})
    return found


def main() -> None:
    """Read the command line, build, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="base")
    parser.add_argument("--target", default="tensorrt-rtx", choices=trt.FLAVOURS)
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--max-seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chosen = trt.flavour(options.target)
    gpus = ("8.9",) if chosen.builds_for_other_gpus else ()
    config = BuildConfig(flavour=chosen.name, compute_capabilities=gpus)
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
            version=trt.checked_version(chosen),
            compute_capabilities=target_gpus(config, chosen),
            profiles=plan_profiles(BatchLimits(max_seqlen=options.max_seqlen)),
            attention="decomposed",
            workspace_mb=None,
            engines={},
        )
        (job,) = plan_jobs(bundle, engines, ("stage-00",))
        jobs = [job, with_inputs(job, directory / "inputs")]
        found = trt.features(chosen, engines.version)
        worker = worker_options(config, bundle.manifest, found, engines.compute_capabilities)
        seconds: dict[str, list[float]] = {"stage-00": [], "inputs": []}
        files = {}
        for number in range(options.rounds):
            for built in run_worker(jobs[:: -1 if number % 2 else 1], directory, worker):
                assert built.problem is None, f"{built.graph}: {built.problem}"
                seconds[built.graph].append(built.build_s)
                files[built.graph] = built.output
        report: dict[str, Any] = {
            name: {
                "seconds": median(values),
                "megabytes": round(files[name].stat().st_size / 1e6, 2),
            }
            for name, values in seconds.items()
        }
        if not chosen.builds_for_other_gpus:
            report["run_ms"] = run_times(trt.load(chosen), jobs, files)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
