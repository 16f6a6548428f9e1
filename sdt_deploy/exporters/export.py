"""A model becomes a bundle."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sdt_deploy.bundle import (
    MARKER,
    REFERENCE,
    SAMPLE,
    TOKENIZER,
    WEIGHTS,
    Bundle,
    Manifest,
    write_manifest,
)
from sdt_deploy.bundle_files import list_files
from sdt_deploy.combinations import knows_single_file
from sdt_deploy.config import ExportConfig, ModelConfig
from sdt_deploy.errors import ConfigError
from sdt_deploy.exporters.baselines import MaskedGraph
from sdt_deploy.exporters.onnx import WeightsWriter, graph_hash, parameters_of, save, trace
from sdt_deploy.exporters.partition import GraphPart, partition
from sdt_deploy.exporters.quantization import quantize
from sdt_deploy.exporters.repeated import with_layers
from sdt_deploy.exporters.single import single_graph
from sdt_deploy.exporters.verify import assert_dynamic, verify_graph
from sdt_deploy.files import new_directory
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.inference import oracle_output
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.version import __version__

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


def export(
    checkpoint: Checkpoint,
    target: Path,
    config: ExportConfig | None = None,
    *,
    single_file: bool | None = None,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Export a model, check every graph against it, and write the bundle whole or not at all.

    Args:
        checkpoint: the model with its tokenizer and provenance.
        target: directory to make.
        config: how to cut the model; default: one layer per stage, float32.
        single_file: write the whole loop as one graph too; None: with precision float32,
            decomposed attention and routing ``once``, which alone it knows.
        overwrite: replace ``target`` if it exists.
        progress: see :data:`Progress`.

    Raises:
        ConfigError: if a single file is asked for in half precision, or ``config`` does not fit
            the model.
        ExportError: if a graph cannot be exported, or a weight is beyond the precision's range.
        VerificationError: if a graph disagrees with the model.
        OutputError: if ``target`` exists or cannot be written.
    """
    config = config or ExportConfig()
    if single_file is None:
        single_file = knows_single_file(checkpoint.model.config, config)
    if single_file and (config.precision != "float32" or config.attention != "decomposed"):
        raise ConfigError(
            "the single file is float32 or int8, with decomposed attention, not "
            f"{config.numbers} with {config.attention}; export with --no-single-file"
        )
    model = checkpoint.model.eval()
    parts = list(partition(model, config, single_file=single_file))
    with new_directory(target, marker=MARKER, overwrite=overwrite) as directory:
        hashes = _write_graphs(parts, model.config, directory, config, progress)
        graphs = {}
        for i, part in enumerate(parts):
            progress(f"verify {part.name}", len(parts) + i, 2 * len(parts))
            path = directory / f"{part.name}.onnx"
            specs = [*part.module.inputs, *part.module.outputs]
            assert_dynamic(path, {spec.name: spec.axes for spec in specs})
            graphs[part.name] = part.spec(
                config,
                graph_sha256=hashes[part.name],
                max_abs_error=verify_graph(path, part.name, part.layers, model, config),
            )
        progress("write manifest", 2 * len(parts), 2 * len(parts))
        arrays: dict[str, Any] = reference_arrays(model, checkpoint.sample)
        np.savez(directory / REFERENCE, **arrays)
        if checkpoint.tokenizer is not None:
            (directory / TOKENIZER).write_bytes(checkpoint.tokenizer)
        if checkpoint.sample is not None:
            sample = checkpoint.sample
            np.savez(directory / SAMPLE, input_ids=sample.input_ids, cu_seqlens=sample.cu_seqlens)
        tools = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
        manifest = Manifest(
            model=model.config,
            export=config,
            graphs=graphs,
            files=list_files(directory),
            created_by={"sdt-deploy": __version__, **tools},
            provenance=checkpoint.provenance,
            score_quantiles=checkpoint.score_quantiles,
            pinned_share=checkpoint.pinned_share,
        )
        write_manifest(directory, manifest)
    return manifest


def export_stages(
    model: SparseDepthTransformer, directory: Path, config: ExportConfig, progress: Progress
) -> Bundle:
    """Write entry, stages and head into an existing directory, unchecked, to be timed.

    What comes back describes them, and is no bundle to keep: it has no baselines.
    """
    parts = [
        part
        for part in partition(model, config)
        if part.layers is not None or part.name in ("entry", "head")
    ]
    hashes = _write_graphs(parts, model.config, directory, config, progress)
    graphs = {part.name: part.spec(config, graph_sha256=hashes[part.name]) for part in parts}
    files = list_files(directory)
    manifest = Manifest(
        model=model.config, export=config, graphs=graphs, files=files, created_by={}
    )
    write_manifest(directory, manifest)
    return Bundle(path=directory, manifest=manifest)


def _write_graphs(
    parts: list[GraphPart],
    model: ModelConfig,
    directory: Path,
    config: ExportConfig,
    progress: Progress,
) -> dict[str, str]:
    """Make each topology once, write every part's graph and all weights; return graph hashes."""
    traced: dict[str, onnx.ModelProto] = {}
    hashes = {}
    to_quantize = config.quantization == "int8"
    with (directory / WEIGHTS).open("wb") as stream:
        weights = WeightsWriter(stream, location=WEIGHTS)
        for i, part in enumerate(parts):
            progress(f"export {part.name}", i, 2 * len(parts))
            if part.name == "single":
                assert isinstance(part.module, MaskedGraph)
                traced[part.topology] = single_graph(
                    part.module, model, opset=config.opset, to_quantize=to_quantize
                )
            elif part.topology not in traced:
                traced[part.topology] = trace(part.module, opset=config.opset)
                if part.repeated is not None:
                    if "layer" not in traced:
                        traced["layer"] = trace(part.repeated, opset=config.opset)
                    traced[part.topology] = with_layers(traced[part.topology], traced["layer"])
            proto, parameters = traced[part.topology], parameters_of(part.module)
            if to_quantize:
                proto, parameters = quantize(proto, parameters)
            proto = weights.fill(proto, parameters)
            hashes[part.name] = graph_hash(proto)
            save(proto, directory / f"{part.name}.onnx")
    return hashes


REFERENCE_LENGTHS = ((7,), (1, 12, 5), (9, 9))


def reference_arrays(
    model: SparseDepthTransformer, sample: TokenSample | None
) -> dict[str, np.ndarray]:
    """Make a few batches with the oracle's answers, for use where torch is not installed.

    Keys are ``{case}/{input_ids, cu_seqlens, output, dense_output, scores, depths}``, all packed.
    The last case holds the first sequences of ``sample``, the others random ids.
    """
    config = model.config
    rng = np.random.default_rng(0)
    batches = []
    for lengths in REFERENCE_LENGTHS:
        cu = np.cumsum([0, *np.minimum(lengths, config.max_positions)], dtype=np.int32)
        batches.append((rng.integers(0, config.vocab_size, cu[-1], dtype=np.int32), cu))
    if sample is not None:
        cu = sample.cu_seqlens[:5]
        batches.append((sample.input_ids[: cu[-1]], cu))
    arrays: dict[str, np.ndarray] = {}
    for case, (ids, cu) in enumerate(batches):
        sparse, dense = oracle_output(model, ids, cu), oracle_output(model.as_dense(), ids, cu)
        answers = {
            "output": sparse.output,
            "dense_output": dense.output,
            "scores": sparse.scores,
            "depths": sparse.depths,
        }
        arrays |= {f"{case}/input_ids": ids, f"{case}/cu_seqlens": cu}
        arrays |= {f"{case}/{name}": array for name, array in answers.items()}
    return arrays
