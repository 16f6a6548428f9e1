"""Which backends work here, and what is missing for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

from sdt_deploy import trt
from sdt_deploy.errors import SdtDeployError
from sdt_deploy.extras import require
from sdt_deploy.gpu import Driver, driver
from sdt_deploy.ort import runtime
from sdt_deploy.ort_library import library_path


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
    here = driver()
    return (
        _onnxruntime("onnxruntime-cpu", "CPUExecutionProvider", "cpu", None),
        _compiled(),
        _onnxruntime("onnxruntime-cuda", "CUDAExecutionProvider", "gpu", here),
        *(_tensorrt(each, here) for each in trt.FLAVOURS.values()),
        _torch(here),
    )


def _onnxruntime(name: str, provider: str, extra: str, needed: Driver | None) -> Diagnosis:
    """Look at one provider of ONNX Runtime; ``needed``: the driver that it runs on."""
    found, problems = None, []
    try:
        found = str(runtime().__version__)
        providers = runtime().get_available_providers()
        if provider not in providers:
            problems.append(
                f"onnxruntime has no {provider}, only {', '.join(providers)}: "
                f'pip install "sdt-deploy[{extra}]"'
            )
    except SdtDeployError as error:
        problems.append(str(error))
    if needed is not None:
        problems += _gpu_problems(needed)
    return Diagnosis(
        backend=name, version=found, builds=None, runs=not problems, remark=_sentence(problems)
    )


def _compiled() -> Diagnosis:
    found, problems = None, []
    try:
        found = str(runtime().__version__)
        library_path()
        require("numba", extra="compiled", purpose="The compiled loop")
    except SdtDeployError as error:
        problems.append(str(error))
    return Diagnosis(
        backend="onnxruntime-compiled",
        version=found,
        builds=None,
        runs=not problems,
        remark=_sentence(problems),
    )


def _torch(here: Driver) -> Diagnosis:
    problems = _gpu_problems(here)
    return Diagnosis(
        backend="torch",
        version=_torch_version(),
        builds=None,
        runs=not problems,
        remark=_sentence(problems),
    )


def _tensorrt(flavour: trt.Flavour, here: Driver) -> Diagnosis:
    found, problems = trt.installed_version(flavour), []
    try:
        found = trt.checked_version(flavour)
        trt.load(flavour)
    except SdtDeployError as error:
        problems.append(str(error))
    to_run = _gpu_problems(here)
    if here.problem is None and (refused := _refused(flavour, here)):
        to_run.append(refused)
    runs = not problems and not to_run
    if find_spec("polygraphy") is None:
        problems.append(f'building needs polygraphy: pip install "sdt-deploy[{flavour.name}]"')
    builds = not problems and (flavour.builds_for_other_gpus or here.problem is None)
    if to_run:
        to_run[0] = f"to run engines, {to_run[0]}"
    return Diagnosis(
        backend=flavour.name,
        version=found,
        builds=builds,
        runs=runs,
        remark=_sentence([*problems, *to_run]),
    )


def _torch_version() -> str | None:
    return version("torch") if find_spec("torch") is not None else None


def _gpu_problems(here: Driver) -> list[str]:
    """Return what is missing of what every backend for GPUs needs, each with its remedy."""
    problems, found = [], _torch_version()
    if found is None:
        problems.append('torch is not installed: pip install "sdt-deploy[gpu]"')
    elif found.endswith("+cpu"):
        problems.append(f"torch {found} is built without CUDA: install torch from PyPI")
    elif find_spec("triton") is None:  # torch with CUDA brings it
        problems.append(
            "triton is not installed, which bundles with fused attention need: "
            'pip install "sdt-deploy[gpu]"'
        )
    if here.problem is not None:
        problems.append(here.problem)
    return problems


def _sentence(problems: Sequence[str]) -> str:
    """Join problems, each with its remedy behind a colon, into one sentence."""
    return ", and ".join(problem.rstrip(".") for problem in dict.fromkeys(problems))


def _refused(flavour: trt.Flavour, here: Driver) -> str | None:
    """Say why the first GPU cannot run a flavour's engines."""
    gpu, supported = here.gpus[0], flavour.compute_capabilities
    if supported is None or gpu.compute_capability in supported:
        return None
    return (
        f"{gpu.name} has compute capability {gpu.compute_capability}, {flavour.name} runs on "
        f"{', '.join(supported)}: use --target {flavour.alternative}"
    )
