"""Engines of this machine's GPU against the oracle: ``python -m`` this module is the process.

polygraphy loads and runs the engines, in a process of its own since it chooses the flavour once.
They are judged as the graphs were at export, with the same inputs, and more strictly in float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sdt_deploy import trt
from sdt_deploy.buckets import fitting_profile
from sdt_deploy.bundle import Bundle, GraphSpec
from sdt_deploy.config import TOLERANCES
from sdt_deploy.engines import EngineSet, EngineSpec, read_engine
from sdt_deploy.errors import BackendError, ConfigError, SdtDeployError, VerificationError
from sdt_deploy.exporters.engine_process import early_end, environment
from sdt_deploy.exporters.engine_worker import own_output

FLOAT32_TOLERANCE = 2e-4
"""Of engines that are float32 throughout; TF32 is off."""
Opener = Callable[[Bundle, EngineSpec], Any]
"""Makes the runner of polygraphy for an engine."""


def compare_engines(
    bundle: Bundle, engines: EngineSet, graphs: Sequence[str] = ()
) -> dict[str, float]:
    """Run engines on random inputs and compare them with the float32 oracle.

    Args:
        bundle: holds the engines.
        engines: one of its sets, for a GPU that is here.
        graphs: which; none: all of the set.

    Returns:
        The largest absolute deviation, by graph.

    Raises:
        VerificationError: if engines deviate by more than rounding; it names them.
        BackendError: if an engine could not be run.
        ConfigError: in bfloat16, which polygraphy has no arrays for.
    """
    if bundle.manifest.export.precision == "bfloat16":
        raise ConfigError(
            "engines in bfloat16 cannot be compared one by one; compare the session: "
            f"sdt-deploy verify {bundle.path} --backend {engines.flavour}"
        )
    job = {
        "bundle": str(bundle.path.resolve()),
        "engines": engines.name,
        "graphs": list(graphs or engines.engines),
    }
    done = subprocess.run(
        [sys.executable, "-m", "sdt_deploy.exporters.engine_accuracy"],
        input=json.dumps(job).encode(),
        capture_output=True,
        env=environment(rtx=trt.flavour(engines.flavour).polygraphy_rtx),
        check=False,
    )
    if done.returncode:
        raise early_end("compares engines", done.returncode, done.stderr)
    found = json.loads(done.stdout)
    if found["problems"]:
        raise VerificationError("\n".join(found["problems"]))
    return dict(found["errors"])


def compare(
    bundle: Bundle, engines: EngineSet, graphs: Sequence[str], opener: Opener
) -> tuple[dict[str, float], list[str]]:
    """Compare engines in this process; return deviations by graph, and what is wrong."""
    from sdt_deploy.exporters.restore import restore
    from sdt_deploy.exporters.verify import verify_graph

    model, manifest = restore(bundle), bundle.manifest
    tolerances = dict(TOLERANCES)
    if manifest.export.precision == "float32":
        tolerances["float32"] = FLOAT32_TOLERANCE
    errors, problems = {}, []
    for name in graphs:
        spec = manifest.graphs[name]
        with _opened(opener(bundle, engines.engines[name]), spec) as run:
            on = {f"the engine of {engines.name}": run}
            try:
                errors[name] = verify_graph(
                    bundle.file(spec.file),
                    name,
                    spec.layers,
                    model,
                    manifest.export,
                    on=on,
                    tolerances=tolerances,
                )
            except VerificationError as error:
                problems.append(str(error))
    return errors, problems


@contextmanager
def _opened(runner: Any, spec: GraphSpec) -> Iterator[Callable[..., list[np.ndarray]]]:
    """Activate a runner of polygraphy and yield a function that runs it, profile by profile."""
    with runner:
        engine = getattr(runner, "engine", None)
        count = 0 if engine is None else engine.num_optimization_profiles
        profiles = [
            {each.name: trt.profile_shapes(engine, each.name, number) for each in spec.inputs}
            for number in range(count)
        ]

        def run(names: list[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            wanted = {each.name: inputs[each.name] for each in spec.inputs}
            if profiles:
                shapes = {name: array.shape for name, array in wanted.items()}
                number = fitting_profile(profiles, shapes)
                if number is None:
                    raise BackendError(f"the engine of {spec.name} has no profile for {shapes}")
                runner.set_profile(number)
            outputs = runner.infer(wanted)
            return [np.array(outputs[name]) for name in names]

        yield run


def _open_engine(bundle: Bundle, spec: EngineSpec) -> Any:
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return TrtRunner(EngineFromBytes(read_engine(bundle.path, spec)))


def main() -> None:
    """Read a job, compare, write the deviations."""
    answer = own_output()
    from polygraphy.exception import PolygraphyException

    job = json.load(sys.stdin)
    bundle = Bundle.open(Path(job["bundle"]))
    (engines,) = (each for each in bundle.manifest.engines if each.name == job["engines"])
    try:
        errors, problems = compare(bundle, engines, job["graphs"], _open_engine)
    except (PolygraphyException, SdtDeployError) as error:  # the reason may have been logged
        sys.exit(str(error))
    answer.write(json.dumps({"errors": errors, "problems": problems}))
    answer.flush()


if __name__ == "__main__":
    main()
