"""What a bundle says about the engines that were built from its graphs."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Self

from sdt_deploy.buckets import BatchLimits, OptimizationProfile, plan_profiles, planned_for
from sdt_deploy.config import EngineFlavour, Precision, check_choice, is_integer, is_number, shown
from sdt_deploy.errors import BundleIntegrityError, ConfigError
from sdt_deploy.files import read_bytes
from sdt_deploy.gpu import read_capability

ENGINES = "engines"
"""Folder of the bundle that holds them."""
ATTENTIONS = ("decomposed", "fused", "packed")
"""``decomposed``: products and a softmax over padding. ``fused``: one kernel over padding.
``packed``: one kernel over queries without padding."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine file."""

    graph: str
    """The graph that it was built from."""
    file: str
    """Relative to the bundle."""
    sha256: str
    size_bytes: int
    key: str
    """Hash of everything that the engine depends on; an equal key means that nothing changed."""
    build_s: float
    """Seconds that the build took, on the machine that built it."""
    attention: str | None
    """One of :data:`ATTENTIONS`: what this engine got; None: it has no attention."""
    scratch_bytes: int | None = None
    """Scratch memory of its largest profile; None: not known without a GPU."""
    layers: Sequence[str] | None = None
    """Names of its layers after fusion, in order; None: not known without a GPU."""
    attention_reason: str | None = None
    """Why it is decomposed although it was to be fused: the library's first error; None: it is not,
    or that was not noted."""

    def __post_init__(self) -> None:
        for name in ("graph", "file"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"an engine's {name} must be a string")
        parts = self.file.split("/")
        if (
            parts[0] != ENGINES
            or len(parts) != 2
            or parts[1] in ("", ".", "..")
            or "\\" in parts[1]
        ):
            raise ConfigError(f"an engine lies in {ENGINES}/, not at {shown(self.file)}")
        if self.attention not in (None, *ATTENTIONS):
            raise ConfigError(f"an engine's attention is not {shown(self.attention)}")
        if not isinstance(self.attention_reason, str | None):
            raise ConfigError(
                f"an engine's attention_reason is a text, not {shown(self.attention_reason)}"
            )
        for name in ("sha256", "key"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _SHA256.fullmatch(value):
                raise ConfigError(f"an engine's {name} must be 64 hexadecimal digits")
        for name in ("size_bytes", "scratch_bytes"):
            value = getattr(self, name)
            optional = value is None and name != "size_bytes"
            if not optional and not is_integer(value, 0, 2**63 - 1):
                raise ConfigError(f"an engine's {name} must be a count, not {shown(value)}")
        layers = self.layers
        if layers is not None and (
            not isinstance(layers, Sequence)
            or isinstance(layers, str)
            or not all(isinstance(name, str) for name in layers)
        ):
            raise ConfigError(f"an engine's layers must be names, not {shown(layers)}")
        if not is_number(self.build_s) or self.build_s < 0:
            raise ConfigError(f"an engine's build_s must be seconds, not {shown(self.build_s)}")


@dataclass(frozen=True, kw_only=True)
class EngineSet:
    """The engines of one bundle for one kind of GPU."""

    flavour: EngineFlavour
    version: str
    """Of the library that built them; no other one reads them."""
    compute_capabilities: tuple[str, ...]
    """GPUs that they run on."""
    profiles: tuple[OptimizationProfile, ...]
    attention: str
    """One of :data:`ATTENTIONS`: what was asked for."""
    workspace_mb: int | None
    """Bound on the scratch memory that was set for the build; None: the library's own."""
    engines: Mapping[str, EngineSpec]
    """By graph. A graph whose build failed is missing."""
    precision: Precision | None = None
    """Of the graphs that they were built from; None: it was not noted."""

    def __post_init__(self) -> None:
        check_choice("engine flavour", self.flavour, EngineFlavour)
        if not isinstance(self.version, str) or not self.version:
            raise ConfigError("an engine set's version must be a string")
        if self.precision is not None:
            check_choice("an engine set's precision", self.precision, Precision)
        if self.attention not in ATTENTIONS:
            raise ConfigError(f"an engine set's attention is not {shown(self.attention)}")
        if not self.compute_capabilities or not self.profiles:
            raise ConfigError("an engine set names its compute capabilities and its profiles")
        for capability in self.compute_capabilities:
            if not isinstance(capability, str):
                raise ConfigError(f"a compute capability is a string, not {shown(capability)}")
            read_capability(capability)
        if self.workspace_mb is not None and not is_integer(self.workspace_mb, 1):
            raise ConfigError(f"workspace_mb must be a size, not {shown(self.workspace_mb)}")

    @property
    def name(self) -> str:
        """Flavour and GPUs; a bundle holds one set of each name."""
        return f"{self.flavour} for {', '.join(self.compute_capabilities)}"

    def differences(self, other: EngineSet) -> Iterator[tuple[str, str, str]]:
        """Yield each setting that another set of this name has otherwise, with both values."""
        for name in ("version", "precision", "attention", "workspace_mb"):
            own, others = getattr(self, name), getattr(other, name)
            if own != others:
                yield name, str(own), str(others)
        if self.profiles != other.profiles:
            yield "profiles", _shown(self.profiles), _shown(other.profiles)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuild a set from JSON.

        Raises:
            ConfigError: if it is none.
        """
        values = dict(_checked(cls, data))
        for name in ("compute_capabilities", "profiles"):
            if not isinstance(values[name], Sequence) or isinstance(values[name], str):
                raise ConfigError(f"an engine set's {name} must be a list")
        values["compute_capabilities"] = tuple(values["compute_capabilities"])
        values["profiles"] = tuple(map(OptimizationProfile.from_dict, values["profiles"]))
        engines = values["engines"]
        if not isinstance(engines, Mapping):
            raise ConfigError("an engine set's engines must be an object")
        values["engines"] = {
            name: EngineSpec(**_checked(EngineSpec, spec)) for name, spec in engines.items()
        }
        for name, spec in values["engines"].items():
            if spec.graph != name:
                raise ConfigError(f"the engine of {name} says that it is of {shown(spec.graph)}")
        return cls(**values)


def _shown(profiles: Sequence[OptimizationProfile]) -> str:
    """Say what batches profiles take: the smallest, best and largest size of each axis."""
    return ", ".join(
        " × ".join(f"{name} {axis.min}–{axis.opt}–{axis.max}" for name, axis in vars(each).items())
        for each in profiles
    )


def build_command(
    bundle: Path,
    engines: EngineSet,
    graphs: Sequence[str] = (),
    *,
    limits: BatchLimits | None = None,
    lengths: Path | None = None,
    further: Sequence[str] = (),
) -> str:
    """Return the command that builds a set, or some engines of it, with the settings it has.

    Args:
        bundle: where it is.
        engines: the set.
        graphs: names of graphs; none: all.
        limits: what its profiles were planned for; None: they are found out.
        lengths: recorded lengths that they were planned for. They cannot be found out: the command
            then names ``FILE``.
        further: options that are no settings of a set.
    """
    if limits is None:
        limits = planned_for(engines.profiles)
        lengths = None if plan_profiles(limits) == engines.profiles else Path("FILE")
    words = ["sdt-deploy", "build-engine", str(bundle), "--target", engines.flavour]
    for capability in engines.compute_capabilities:
        words += ["--compute-capability", capability]
    values = {each.name: getattr(limits, each.name) for each in fields(limits)}
    values |= {"workspace_mb": engines.workspace_mb, "lengths": lengths}
    for name, value in values.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if engines.attention == "packed":
        words += ["--attention", "packed"]
    words += further
    for graph in graphs:
        words += ["--graph", graph]
    return shlex.join(words)


def _checked(cls: type, data: Any) -> Mapping[str, Any]:
    names = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    if not isinstance(data, Mapping) or not needed <= set(data) <= names:
        raise ConfigError(f"{cls.__name__} has {', '.join(sorted(names))}, not {shown(data)}")
    return data


def read_engine(bundle: Path, spec: EngineSpec) -> bytes:
    """Read an engine's file.

    Raises:
        BundleIntegrityError: if it is missing or not the one that was built.
    """
    path = bundle / spec.file
    try:
        if path.resolve() != bundle.resolve() / spec.file:
            raise BundleIntegrityError(f"{path} is a link to elsewhere")
        content = read_bytes(path, max_bytes=spec.size_bytes)
    except OSError as error:
        raise BundleIntegrityError(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != spec.sha256:
        raise BundleIntegrityError(
            f"{path} was altered after it was built: SHA-256 mismatch. Build it again"
        )
    return content
