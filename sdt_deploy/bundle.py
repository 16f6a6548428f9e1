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

from sdt_deploy.bundle_files import (
    MANIFEST,
    check_entry,
    check_file,
    check_inside,
    read_manifest,
    typed,
)
from sdt_deploy.combinations import check_combination
from sdt_deploy.config import MAX_SIZE, ExportConfig, ModelConfig, is_integer, is_number, shown
from sdt_deploy.engines import EngineSet
from sdt_deploy.errors import BundleFormatError, BundleIntegrityError, ConfigError
from sdt_deploy.external_data import check_places
from sdt_deploy.files import MAX_JSON_BYTES, is_partial, parse_json, read_bytes, write_file

FORMAT = "sdt-bundle"
FORMAT_VERSION = 7
"""Written; older ones are read as well. Version 1 knows no precision but float32."""
ATTENTION_LAYOUTS: Mapping[int, Mapping[str, str]] = {
    1: {"decomposed": "padded"},
    2: {"decomposed": "padded-heads"},
    3: {"decomposed": "padded-heads", "fused": "padded-rows"},
    4: {"decomposed": "padded-heads", "fused": "padded-rows"},
    5: {"decomposed": "padded-heads", "fused": "padded-rows"},
    6: {"decomposed": "padded-heads", "fused": "padded-rows"},
    7: {"decomposed": "padded-heads", "fused": "padded-rows"},
}
"""How a stage lays rows out for attention, by format version and :attr:`ExportConfig.attention`."""
MARKER = MANIFEST, FORMAT
"""By which a bundle is known; see :func:`sdt_deploy.files.new_directory`."""
WEIGHTS = "weights.bin"
REFERENCE = "reference.npz"
TOKENIZER = "tokenizer.json"
SAMPLE = "sample.npz"
STATES = frozenset(
    {
        *("hidden_states", "context_states", "updated_states", "mixed_states"),
        *("query", "key_value", "key", "value", "up_product", "inner_states"),
    }
)
"""Inputs and outputs in the precision of the export; the others are float32 or integers in all."""
DTYPES = ("float32", "float16", "bfloat16", "int32", "int64")
PROJECT, UPDATE = "project", "update"
"""The graphs before and after the attention of a fused stage, each for all layers."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    axes: tuple[str | int, ...]
    """A name for each dynamic axis, a length for each static one."""
    dtype: str
    """NumPy name, or ``bfloat16``, which NumPy lacks."""

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter of a layer, given as an input; these alone have a dot."""
        return "." in self.name

    def __post_init__(self) -> None:
        _check_text("name of a tensor", self.name)
        for axis in self.axes:
            if not (isinstance(axis, str) and axis) and not is_integer(axis, 1):
                raise ConfigError(
                    f"{self.name}: an axis is a name or a length up to {MAX_SIZE}, "
                    f"not {shown(axis)}"
                )
        if self.dtype not in DTYPES:
            raise ConfigError(f"{self.name} is {shown(self.dtype)}, not {' or '.join(DTYPES)}")


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
    """See :data:`ATTENTION_LAYOUTS`; None for graphs that are no stages."""
    layers: tuple[int, int] | None = None
    """First layer and one past the last (stages only)."""

    def __post_init__(self) -> None:
        _check_text("name of a graph", self.name)
        _check_text(f"file of graph {self.name}", self.file)
        _check_text(f"graph_sha256 of graph {self.name}", self.graph_sha256)
        if not is_number(self.max_abs_error) or self.max_abs_error < 0:
            raise ConfigError(
                f"graph {self.name}: max_abs_error must be a number, not "
                f"{shown(self.max_abs_error)}"
            )
        if self.layers is not None and (
            len(self.layers) != 2 or not all(is_integer(layer, 0) for layer in self.layers)
        ):
            raise ConfigError(
                f"graph {self.name}: layers are the first and one past the last, not "
                f"{shown(self.layers)}"
            )


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
    engines: tuple[EngineSet, ...] = ()
    """What was built from the graphs, see ``sdt-deploy build-engine``."""
    format_version: int = FORMAT_VERSION
    """Version of the format that the bundle was written in."""

    @property
    def stages(self) -> tuple[GraphSpec, ...]:
        """The stage graphs in order."""
        return tuple(spec for spec in self.graphs.values() if spec.layers is not None)

    @property
    def in_pieces(self) -> bool:
        """Whether fused stages come in two pieces as well, one graph for all layers each."""
        return self.format_version >= 6 and PROJECT in self.graphs

    @property
    def stage_layers(self) -> tuple[tuple[int, int], ...]:
        """``(first layer, one past the last)`` of every stage."""
        return tuple(spec.layers for spec in self.stages if spec.layers is not None)

    def _width(self, name: str) -> int:
        """Return the last axis of a tensor among :data:`STATES`."""
        if name in ("up_product", "inner_states"):
            return self.model.d_ff
        return self.model.d_model * (2 if name == "key_value" else 1)

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
            body = parse_json(content)
        except ValueError as error:
            raise BundleFormatError(f"{where} is not JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise BundleFormatError(f'{where} is not the manifest of a bundle (no "{FORMAT}")')
        version = body.get("format_version")
        if not is_integer(version, min(ATTENTION_LAYOUTS), max(ATTENTION_LAYOUTS)):
            raise BundleFormatError(
                f"{where} has format version {shown(version)}; this release of sdt-deploy reads "
                f"versions {', '.join(map(str, ATTENTION_LAYOUTS))}. Export again, or use the "
                "release that wrote it"
            )
        if body.pop("digest", None) != _digest(body):
            raise BundleIntegrityError(f"{where} was altered after the export: digest mismatch")
        try:
            manifest = cls._from_body(body)
            if version == 1 and manifest.export.numbers != "float32":
                raise ConfigError(f"version 1 knows float32, not {manifest.export.numbers}")
            return manifest
        except KeyError as error:
            raise BundleFormatError(f"{where} cannot be read: {error} is missing") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise BundleFormatError(f"{where} cannot be read: {error}") from error

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Self:
        graphs = [_graph(raw) for raw in typed("graphs", body["graphs"], list)]
        quantiles = body["score_quantiles"]
        manifest = cls(
            model=ModelConfig.from_dict(body["model"]),
            export=ExportConfig(**typed("export", body["export"], dict)),
            graphs={spec.name: spec for spec in graphs},
            files=typed("files", body["files"], dict),
            created_by=typed("created_by", body["created_by"], dict),
            provenance=typed("provenance", body["provenance"], dict),
            score_quantiles=(
                None if quantiles is None else tuple(typed("score_quantiles", quantiles, list))
            ),
            pinned_share=body["pinned_share"],
            quality=(None if body["quality"] is None else typed("quality", body["quality"], dict)),
            engines=tuple(
                map(EngineSet.from_dict, typed("engines", body.get("engines", []), list))
            ),
            format_version=body["format_version"],
        )
        if len(manifest.graphs) != len(graphs):
            raise ConfigError("two graphs have one name")
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Check what the parts do not check themselves.

        Raises:
            BundleIntegrityError: if a path leads outside the bundle.
            ConfigError: if the parts contradict each other.
        """
        for name, entry in self.files.items():
            check_inside(name)
            check_entry(name, entry)
        for tool, version in self.created_by.items():
            _check_text(f"created_by: {tool}", version)
        check_combination(self.model, self.export, single_file="single" in self.graphs)
        if missing := {"entry", "head", "dense", "masked"} - self.graphs.keys():
            raise ConfigError(f"graphs are missing: {', '.join(sorted(missing))}")
        for spec in self.graphs.values():
            if spec.file not in self.files:
                raise ConfigError(f"graph {spec.name} names a file that is not listed: {spec.file}")
            layouts = ATTENTION_LAYOUTS[self.format_version]
            if spec.attention_layout not in (None, layouts.get(self.export.attention)):
                raise ConfigError(
                    f"graph {spec.name}: attention layout {shown(spec.attention_layout)} is not "
                    f"known in format version {self.format_version}"
                )
            for tensor in (*spec.inputs, *spec.outputs):
                is_state = tensor.name in STATES
                precision, others = (self.export.precision,), ("float32", "int32", "int64")
                allowed = precision if is_state or tensor.is_parameter else others
                if tensor.dtype not in allowed:
                    raise ConfigError(
                        f"graph {spec.name}: {tensor.name} is {tensor.dtype}, not "
                        f"{' or '.join(allowed)}"
                    )
                n_axes = 3 if self.export.attention == "fused" else 2
                width = self._width(tensor.name)
                if is_state and (len(tensor.axes) != n_axes or tensor.axes[-1] != width):
                    raise ConfigError(
                        f"graph {spec.name}: {tensor.name} has the axes {shown(tensor.axes)}, "
                        f"not {n_axes} of which the last is {width}"
                    )
        expected = 0
        for first, stop in self.stage_layers:
            if first != expected or stop <= first:
                raise ConfigError(f"stages do not follow each other: {shown(self.stage_layers)}")
            expected = stop
        if expected != self.model.n_layers:
            raise ConfigError(f"stages cover {expected} of {self.model.n_layers} layers")
        if WEIGHTS in self.files:
            n_bytes = self.files[WEIGHTS]["size_bytes"]
            if 4 * self.model.largest_tensor > n_bytes:
                raise ConfigError(
                    f"the model has a parameter of {4 * self.model.largest_tensor} bytes, "
                    f"and {WEIGHTS} has {n_bytes}"
                )
        if len({engines.name for engines in self.engines}) != len(self.engines):
            raise ConfigError("two engine sets are for the same GPUs")
        for engines in self.engines:
            if unknown := engines.engines.keys() - self.graphs.keys():
                raise ConfigError(f"engines of no graph: {', '.join(map(shown, unknown))}")
        if self.score_quantiles is not None and (
            len(self.score_quantiles) != 101 or not all(map(is_number, self.score_quantiles))
        ):
            raise ConfigError("score_quantiles must be 101 numbers")
        if not is_number(self.pinned_share) or not 0.0 <= self.pinned_share <= 1.0:
            raise ConfigError(f"pinned_share must lie in 0..1, not {shown(self.pinned_share)}")


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
            BundleIntegrityError: if a file is missing or altered, the manifest included, or if a
                graph has weights elsewhere than in the weights file.
        """
        directory, content = read_manifest(Path(path))
        if is_partial(directory):
            raise BundleFormatError(
                f"{directory} is what an export that was killed left behind: remove it and export "
                "again"
            )
        manifest = Manifest.from_json(content, where=str(directory / MANIFEST))
        for name, expected in manifest.files.items():
            try:
                check_file(directory, name, expected, check_files)
            except (OSError, ValueError, RuntimeError) as error:  # odd names, loops of links
                raise BundleIntegrityError(f"{directory / name} cannot be read: {error}") from error
        n_bytes = manifest.files[WEIGHTS]["size_bytes"] if WEIGHTS in manifest.files else 0
        for spec in manifest.graphs.values():
            check_places(directory / spec.file, weights=directory / WEIGHTS, n_bytes=n_bytes)
        return cls(path=directory, manifest=manifest)

    def check_current(self) -> None:
        """Check that what was read from the directory until now is of this bundle.

        Whoever reads a file later than :meth:`open` calls this afterwards: a bundle is replaced as
        a whole, so while its manifest lists the same files, they are the same.

        Raises:
            BundleIntegrityError: if another export, or nothing, stands in its place.
        """
        self._content_now()

    def current(self) -> Manifest:
        """Read the manifest as it stands now; records and engines may have been added to it.

        Raises:
            BundleIntegrityError: if another export, or nothing, stands in its place.
        """
        return Manifest.from_json(self._content_now(), where=str(self.path / MANIFEST))

    def _content_now(self) -> bytes:
        try:
            content = read_bytes(self.path / MANIFEST, max_bytes=MAX_JSON_BYTES)
            body = parse_json(content)
        except (OSError, ValueError) as error:
            raise BundleIntegrityError(
                f"{self.path} was removed after it was opened: {error}"
            ) from error
        if not isinstance(body, dict) or body.get("files") != self.manifest.files:
            raise BundleIntegrityError(
                f"{self.path} was exported anew after it was opened; open it again"
            )
        return content

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


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest`` into ``directory``, whole or not at all."""
    write_file(directory / MANIFEST, manifest.to_json())


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _graph(raw: Any) -> GraphSpec:
    values = dict(typed("a graph", raw, dict))
    for side in ("inputs", "outputs"):
        values[side] = tuple(
            TensorSpec(
                name=typed("a tensor", tensor, dict)["name"],
                axes=tuple(typed("axes", tensor["axes"], list)),
                dtype=tensor["dtype"],
            )
            for tensor in typed(side, values[side], list)
        )
    if values["layers"] is not None:
        values["layers"] = tuple(typed("layers", values["layers"], list))
    return GraphSpec(**values)


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{what} must be a string, not {shown(value)}")
