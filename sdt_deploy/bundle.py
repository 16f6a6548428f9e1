"""The bundle: the one thing that passes from export to runtime.

``docs/bundle-format.md`` specifies the directory; this module reads and writes its manifest. A
bundle opens with the standard library alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.errors import BundleFormatError, BundleIntegrityError, ConfigError
from sdt_deploy.files import sha256, write_file

FORMAT = "sdt-bundle"
FORMAT_VERSION = 2
"""Written; version 1 is read as well, which knows no precision but float32."""
ATTENTION_LAYOUTS: Mapping[int, str] = {1: "padded", 2: "padded-heads"}
"""What a stage takes to lay packed rows out for attention, by format version."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
REFERENCE = "reference.npz"
TOKENIZER = "tokenizer.json"
SAMPLE = "sample.npz"
STATES = frozenset({"hidden_states", "context_states", "updated_states"})
"""Inputs and outputs in the precision of the export; the others are float32 or int32 in all."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    axes: tuple[str | int, ...]
    """A name for each dynamic axis, a length for each static one."""
    dtype: str
    """NumPy name, or ``bfloat16``, which NumPy lacks."""


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One ONNX graph of a bundle."""

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graph_sha256: str
    """Hash of the graph without the place of its weights; equal for layers of equal topology."""
    max_abs_error: float
    """Largest deviation from the float32 PyTorch model when the graph was exported."""
    attention_layout: str | None = None
    """``padded-heads`` for stages (``padded`` in format version 1); None for other graphs."""
    layers: tuple[int, int] | None = None
    """First layer and one past the last (stages only)."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a bundle except the bytes of its files."""

    model: ModelConfig
    export: ExportConfig
    graphs: Mapping[str, GraphSpec]
    """By name, in the order entry, stages, head, baselines."""
    files: Mapping[str, Mapping[str, Any]]
    """``sha256`` and ``size_bytes`` of every file but the manifest, by relative path."""
    created_by: Mapping[str, str]
    """Versions of the tools that wrote the bundle."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights come from, their licence, and how the probe was made."""
    score_quantiles: tuple[float, ...] | None = None
    """101 quantiles (0 %, 1 %, …) of the scores of unpinned tokens on the calibration text."""
    pinned_share: float = 0.0
    """Share of pinned tokens on the calibration text."""
    quality: Mapping[str, Any] | None = None
    """What ``sdt-deploy evaluate`` measured; None until then."""
    format_version: int = FORMAT_VERSION
    """Version of the format that the bundle was written in."""

    @property
    def stages(self) -> tuple[GraphSpec, ...]:
        """The stage graphs in order."""
        return tuple(spec for spec in self.graphs.values() if spec.layers is not None)

    @property
    def stage_layers(self) -> tuple[tuple[int, int], ...]:
        """``(first layer, one past the last)`` of every stage."""
        return tuple(spec.layers for spec in self.stages if spec.layers is not None)

    def to_json(self) -> bytes:
        """Serialise, with the digest that :meth:`from_json` checks."""
        body: dict[str, Any] = {
            "format": FORMAT,
            **dataclasses.asdict(self),
        }
        body["graphs"] = [dataclasses.asdict(spec) for spec in self.graphs.values()]
        body["digest"] = _digest(body)
        return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, *, where: str = MANIFEST) -> Self:
        """Parse and check a manifest.

        Raises:
            BundleFormatError: if it is no manifest, or of another format version.
            BundleIntegrityError: if its digest does not match.
        """
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BundleFormatError(f"{where} is not JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise BundleFormatError(f'{where} is not the manifest of a bundle (no "{FORMAT}")')
        version = body.get("format_version")
        if isinstance(version, bool) or version not in tuple(ATTENTION_LAYOUTS):
            raise BundleFormatError(
                f"{where} has format version {version!r}; this release of sdt-deploy reads "
                f"versions {' and '.join(map(str, ATTENTION_LAYOUTS))}. Export again, or use the "
                "release that wrote it"
            )
        if body.pop("digest", None) != _digest(body):
            raise BundleIntegrityError(f"{where} was altered after the export: digest mismatch")
        try:
            manifest = cls._from_body(body)
            if version == 1 and manifest.export.precision != "float32":
                raise ConfigError(f"version 1 has no precision {manifest.export.precision}")
            return manifest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleFormatError(f"{where} cannot be read: {error!r}") from error

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Self:
        graphs = {}
        for raw in body["graphs"]:
            values = dict(raw)
            for side in ("inputs", "outputs"):
                values[side] = tuple(
                    TensorSpec(name=t["name"], axes=tuple(t["axes"]), dtype=t["dtype"])
                    for t in values[side]
                )
            if values["layers"] is not None:
                values["layers"] = tuple(values["layers"])
            graphs[values["name"]] = GraphSpec(**values)
        quantiles = body["score_quantiles"]
        manifest = cls(
            model=ModelConfig.from_dict(body["model"]),
            export=ExportConfig(**body["export"]),
            graphs=graphs,
            files=body["files"],
            created_by=body["created_by"],
            provenance=body["provenance"],
            score_quantiles=None if quantiles is None else tuple(quantiles),
            pinned_share=body["pinned_share"],
            quality=body["quality"],
            format_version=body["format_version"],
        )
        manifest._check(n_graphs=len(body["graphs"]))
        return manifest

    def _check(self, n_graphs: int) -> None:
        """Check what the types alone do not say.

        Raises:
            BundleIntegrityError: if a path leads outside the bundle.
            ConfigError: if the parts contradict each other.
        """
        for name, entry in self.files.items():
            _check_inside(name)
            if not isinstance(entry["sha256"], str) or not isinstance(entry["size_bytes"], int):
                raise ConfigError(f"files: {name} needs a sha256 and a size_bytes")
        missing = {"entry", "head", "dense", "masked"} - self.graphs.keys()
        if missing or len(self.graphs) != n_graphs:
            raise ConfigError(f"graphs are missing or named twice: {sorted(missing)}")
        for spec in self.graphs.values():
            if spec.file not in self.files:
                raise ConfigError(f"graph {spec.name} names a file that is not listed: {spec.file}")
            if spec.attention_layout not in (None, ATTENTION_LAYOUTS[self.format_version]):
                raise ConfigError(f"graph {spec.name}: attention layout {spec.attention_layout!r}")
            for tensor in (*spec.inputs, *spec.outputs):
                is_state = tensor.name in STATES
                allowed = (self.export.precision,) if is_state else ("float32", "int32")
                if tensor.dtype not in allowed:
                    raise ConfigError(
                        f"graph {spec.name}: {tensor.name} is {tensor.dtype!r}, not "
                        f"{' or '.join(allowed)}"
                    )
        expected = 0
        for first, stop in self.stage_layers:
            if first != expected or stop <= first:
                raise ConfigError(f"stages do not follow each other: {self.stage_layers}")
            expected = stop
        if expected != self.model.n_layers:
            raise ConfigError(f"stages cover {expected} of {self.model.n_layers} layers")
        if self.score_quantiles is not None and len(self.score_quantiles) != 101:
            raise ConfigError("score_quantiles must be 101 numbers")
        if not 0.0 <= self.pinned_share <= 1.0:
            raise ConfigError(f"pinned_share must lie in 0..1, not {self.pinned_share!r}")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, check_files: bool = True) -> Self:
        """Read a bundle.

        Args:
            path: its directory.
            check_files: compare the SHA-256 of every file with the manifest, not only its size.

        Raises:
            BundleFormatError: if ``path`` is no bundle, or of another format version.
            BundleIntegrityError: if a file is missing or altered, the manifest included.
        """
        directory = Path(path)
        try:
            content = (directory / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleFormatError(f"{directory} is not a bundle: {error}") from error
        manifest = Manifest.from_json(content, where=str(directory / MANIFEST))
        for name, expected in manifest.files.items():
            _check_file(directory, name, expected, check_files)
        return cls(path=directory, manifest=manifest)

    def file(self, name: str) -> Path:
        """Return the path of a listed file.

        Raises:
            BundleFormatError: if the bundle holds no such file.
        """
        if name not in self.manifest.files:
            raise BundleFormatError(f"{self.path} holds no {name}")
        return self.path / name

    def has(self, name: str) -> bool:
        """Tell whether the bundle holds the file ``name``."""
        return name in self.manifest.files


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Return :attr:`Manifest.files` for everything in ``directory`` but the manifest."""
    return {
        path.relative_to(directory).as_posix(): {
            "sha256": sha256(path),
            "size_bytes": path.stat().st_size,
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest`` into ``directory``, whole or not at all."""
    write_file(directory / MANIFEST, manifest.to_json())


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_inside(name: str) -> None:
    parts = name.split("/")
    if not all(parts) or ".." in parts or "." in parts or "\\" in name or ":" in name:
        raise BundleIntegrityError(f"the manifest names a file outside the bundle: {name!r}")


def _check_file(
    directory: Path, name: str, expected: Mapping[str, Any], check_content: bool
) -> None:
    path = directory / name
    if not path.is_file() or path.resolve() != directory.resolve() / name:
        raise BundleIntegrityError(f"{path} is missing or not a regular file")
    size = path.stat().st_size
    if size != expected["size_bytes"]:
        raise BundleIntegrityError(
            f"{path} has {size} bytes, the manifest says {expected['size_bytes']}"
        )
    if check_content and sha256(path) != expected["sha256"]:
        raise BundleIntegrityError(f"{path} was altered after the export: SHA-256 mismatch")
