"""Exported graphs against the oracle, at sizes that are not the example sizes.

ONNX Runtime runs float32 and float16 graphs. Its CPU provider computes much of float16 in float32
and has no bfloat16 kernels, so graphs of half precision run on the reference evaluator of onnx too,
or on that alone: it rounds the result of every operator to the operator's type, as a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sdt_deploy.bundle import STATES
from sdt_deploy.config import (
    INT8_TOLERANCE,
    TOLERANCES,
    ExportConfig,
    Precision,
)
from sdt_deploy.errors import VerificationError
from sdt_deploy.exporters.cases import graph_case
from sdt_deploy.exporters.onnx import numpy_dtype
from sdt_deploy.exporters.pieces import CONTRIB
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.ort import open_session

CHECK_LENGTHS = ((1,), (2,), (6, 1), (3, 9, 4), (17, 17))
"""Sequence lengths to check at; cut to the model's positions."""


Engine = Callable[[list[str], dict[str, np.ndarray]], Any]
"""Runs one graph: names of outputs and named inputs to outputs."""


class MatMul(OpRun):
    """A product with sums in float32, in any type: GPUs and BLAS compute it so, NumPy does not."""

    op_domain = ""

    def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
        return ((a.astype(np.float32) @ b.astype(np.float32)).astype(a.dtype),)


class LayerNormalization(OpRun):
    """Rows normed in float32, as ``stash_type`` 1 asks for; the evaluator's own squares in half."""

    op_domain = ""

    def _run(
        self,
        rows: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray | None = None,
        axis: int = -1,
        epsilon: float = 1e-5,
        stash_type: int = 1,
    ) -> tuple[np.ndarray]:
        if (axis, stash_type) != (-1, 1):
            raise NotImplementedError(f"axis {axis}, stash_type {stash_type}")
        return (_normed(rows.astype(np.float32), weight, bias, epsilon).astype(rows.dtype),)


class SkipLayerNormalization(OpRun):
    """A sum of rows and a bias, normed in float32: an operator of ONNX Runtime's."""

    op_domain = CONTRIB

    def _run(
        self,
        rows: np.ndarray,
        skip: np.ndarray,
        weight: np.ndarray,
        bias: np.ndarray,
        added: np.ndarray,
        epsilon: float,
    ) -> tuple[np.ndarray]:
        total = rows.astype(np.float32) + skip.astype(np.float32) + added.astype(np.float32)
        return (_normed(total, weight, bias, epsilon).astype(rows.dtype),)


def _normed(
    rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, epsilon: float
) -> np.ndarray:
    """Norm float32 rows."""
    rows = rows - rows.mean(axis=-1, keepdims=True)
    scale = np.sqrt(np.square(rows).mean(axis=-1, keepdims=True) + np.float32(epsilon))
    scaled = weight.astype(np.float32) * (rows / scale)
    normed: np.ndarray = scaled if bias is None else scaled + bias.astype(np.float32)
    return normed


def engines(path: Path, precision: Precision) -> Mapping[str, Engine]:
    """Open a graph on every engine that can tell whether it is right, by the engine's name."""
    opened: dict[str, Engine] = {}
    if precision != "bfloat16":
        opened["ONNX Runtime"] = open_session(path).run
    if precision != "float32":
        opened["the reference evaluator"] = ReferenceEvaluator(
            str(path), new_ops=[MatMul, LayerNormalization, SkipLayerNormalization]
        ).run
    return opened


def verify_graph(
    path: Path,
    name: str,
    layers: tuple[int, int] | None,
    model: SparseDepthTransformer,
    config: ExportConfig,
    *,
    on: Mapping[str, Engine] | None = None,
    tolerances: Mapping[str, float] = TOLERANCES,
) -> float:
    """Run one exported graph on random inputs and compare it with the float32 oracle.

    ``on``: what runs it, by name; None: :func:`engines`. ``tolerances``: by precision.

    A row passes if the root mean square of its deviations is within the tolerance of the precision,
    relative to the root mean square of all values. Scores have the tolerance of float32. What int8
    layers compute is judged as a whole, with :data:`~sdt_deploy.config.INT8_TOLERANCE`.

    Returns:
        The largest absolute deviation; in half precision it contains the rounding of weights and of
        the states that come in.

    Raises:
        VerificationError: if a row does not pass.
    """
    precision, cases = config.precision, []
    is_int8 = config.quantization == "int8" and name not in ("entry", "head")
    for lengths in CHECK_LENGTHS:
        cut = np.minimum(lengths, model.config.max_positions)
        rng = np.random.default_rng(sum(lengths))
        with torch.no_grad():
            inputs, expected = graph_case(name, layers, model, config.attention, cut, rng)
        for key in inputs:
            if key in STATES or "." in key:  # parameters have dots
                inputs[key] = inputs[key].astype(numpy_dtype(precision))
        cases.append((cut, inputs, {key: tensor.numpy() for key, tensor in expected.items()}))
    worst = 0.0
    for engine, run in (on or engines(path, precision)).items():
        found = [run(list(wanted), inputs) for _, inputs, wanted in cases]
        for i, key in enumerate(cases[0][2]):
            size = _root_mean_square(np.concatenate([case[2][key].ravel() for case in cases]))
            width = 1 if key == "scores" else cases[0][2][key].shape[-1]
            tolerance = tolerances["float32" if key == "scores" else precision]
            if is_int8 and key != "scores":
                width, tolerance = -1, INT8_TOLERANCE
            by_token = key == "scores" or not model.config.head.per_sequence
            for (cut, inputs, wanted), outputs in zip(cases, found, strict=True):
                size_of = tuple(slice(n) for n in wanted[key].shape)  # rows may follow
                error = np.abs(outputs[i][size_of].astype(np.float32) - wanted[key])
                if "attention_mask" in inputs and by_token:  # what stands at padding means nothing
                    error[inputs["attention_mask"] == 0] = 0.0
                if width < 0:
                    size = _root_mean_square(wanted[key].ravel())
                rows = error.reshape(-1, error.size if width < 0 else width)
                deviation = _root_mean_square(rows).max()
                if not deviation <= tolerance * size:
                    raise VerificationError(
                        f"graph {name} deviates by {deviation:.3g} from the PyTorch model in {key} "
                        f"(sequences of {cut.tolist()} tokens, {config.numbers}, {engine}). Values "
                        f"are about {size:.3g}, and {tolerance:g} of that passes for rounding"
                        f"{'' if config.numbers == 'float32' else '. Try float32'}"
                    )
                worst = max(worst, float(error.max()))
    return worst


def _root_mean_square(values: np.ndarray) -> np.ndarray:
    """Take the root mean square over the last axis."""
    mean: np.ndarray = np.square(values).mean(axis=-1)
    return np.sqrt(mean)


def assert_dynamic(path: Path, declared: Mapping[str, tuple[str | int, ...]]) -> None:
    """Check in the written file that every declared dynamic axis is symbolic.

    Raises:
        VerificationError: if one is not.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    for value in [*graph.input, *graph.output]:
        for dim, axis in zip(value.type.tensor_type.shape.dim, declared[value.name], strict=True):
            if isinstance(axis, str) and dim.dim_param != axis:
                raise VerificationError(f"{path.name}: axis {axis} of {value.name} is static")
