"""Which backends work here, and what is missing for the others."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from sdt_deploy import trt
from sdt_deploy.errors import SdtDeployError
from sdt_deploy.gpu import Driver, driver
from sdt_deploy.ort import runtime


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found out about one backend."""

    backend: str
    version: str | None
    """Of its library; None: not installed."""
    builds: bool | None
    """Whether engines can be built for it here; None: it needs none."""
    runs: bool
    remark: str
    """What is missing and how to mend it, in one sentence; empty if nothing is."""


def diagnose() -> tuple[Diagnosis, ...]:
    """Look at every backend; nothing is built or run."""
    return (_onnxruntime_cpu(), *(_tensorrt(each, driver()) for each in trt.FLAVOURS.values()))


def _onnxruntime_cpu() -> Diagnosis:
    try:
        providers = runtime().get_available_providers()
        found = str(runtime().__version__)
    except SdtDeployError as error:
        return Diagnosis(
            backend="onnxruntime-cpu", version=None, builds=None, runs=False, remark=str(error)
        )
    usable = "CPUExecutionProvider" in providers
    return Diagnosis(
        backend="onnxruntime-cpu",
        version=found,
        builds=None,
        runs=usable,
        remark="" if usable else f"it has no CPUExecutionProvider, only {', '.join(providers)}",
    )


def _tensorrt(flavour: trt.Flavour, here: Driver) -> Diagnosis:
    found, problems = trt.installed_version(flavour), []
    try:
        found = trt.checked_version(flavour)
        trt.load(flavour)
    except SdtDeployError as error:
        problems.append(str(error))
    runs = not problems
    if find_spec("polygraphy") is None:
        problems.append(f'building needs polygraphy: pip install "sdt-deploy[{flavour.name}]"')
    builds = not problems and (flavour.builds_for_other_gpus or here.problem is None)
    gpu_problem = here.problem or _refused(flavour, here)
    if gpu_problem:
        problems.append(f"to run engines: {gpu_problem}")
    return Diagnosis(
        backend=flavour.name,
        version=found,
        builds=builds,
        runs=runs and gpu_problem is None,
        remark="; ".join(problems),
    )


def _refused(flavour: trt.Flavour, here: Driver) -> str | None:
    """Say why the first GPU cannot run a flavour's engines."""
    gpu, supported = here.gpus[0], flavour.compute_capabilities
    if supported is None or gpu.compute_capability in supported:
        return None
    return (
        f"{gpu.name} has compute capability {gpu.compute_capability}, {flavour.name} runs on "
        f"{', '.join(supported)}; use --target tensorrt"
    )
