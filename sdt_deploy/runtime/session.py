"""The session: a bundle, opened and ready to run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from sdt_deploy.bundle import TOKENIZER, Bundle, Manifest
from sdt_deploy.config import check_thresholds, shown
from sdt_deploy.costs import dense_flops
from sdt_deploy.errors import BackendError, ConfigError, InputError
from sdt_deploy.runtime import dispatch
from sdt_deploy.runtime.backend import Array, Backend, Call
from sdt_deploy.runtime.backends import open_backend
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.loop import BoundStages, StateBuffers, bind_stages
from sdt_deploy.runtime.result import LayerUsage, PathName, RunResult, Timings
from sdt_deploy.runtime.routing import RoutePlan, depths_from_scores, padded_layout, plan_route
from sdt_deploy.runtime.splitting import merge, select, split_by_padding
from sdt_deploy.tokenization import Overflow, TextTokenizer

PathChoice = Literal["auto", "sparse", "masked", "dense"]
PATHS = get_args(PathChoice)
DEFAULT_MAX_PADDED_TOKENS = 16_384


class Session:
    """Runs a bundle. Thread-safe: concurrent runs use buffers of their own.

    Buffers are as large as the largest batch needed and are kept for later runs until ``close``.

    ::

        with Session.open("bundle") as session:
            result = session.run(input_ids, cu_seqlens)
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        max_padded_tokens: int = DEFAULT_MAX_PADDED_TOKENS,
    ) -> None:
        if max_padded_tokens < 1:
            raise ConfigError(f"max_padded_tokens must be positive, not {max_padded_tokens}")
        self._max_padded_tokens = max_padded_tokens
        self.bundle = bundle
        self.backend = backend
        self._lock = threading.Lock()
        self._calibration_lock = threading.Lock()
        self._idle_buffers: list[StateBuffers] = []
        self._tokenizer: TextTokenizer | None = None
        self._costs: dispatch.CostModel | None = None
        self._closed = False
        self._entry, self._head = backend.graph("entry"), backend.graph("head")
        self._stages = [(spec, backend.graph(spec.name)) for spec in self.manifest.stages]

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        backend: str = "onnxruntime-cpu",
        n_threads: int | None = None,
        max_padded_tokens: int = DEFAULT_MAX_PADDED_TOKENS,
        check_files: bool = True,
    ) -> Self:
        """Open a bundle: its entry, stages and head. Baselines open when they are first used.

        Args:
            bundle: its directory, or an opened one.
            backend: ``onnxruntime-cpu``.
            n_threads: threads of the pool that all sessions of the process share; see
                :func:`sdt_deploy.ort.ensure_thread_pool`.
            max_padded_tokens: batches whose ``batch × longest sequence`` exceeds this run in parts
                of similar lengths, which bounds memory and the padding inside attention; results
                are the same. The dense baseline is not split.
            check_files: compare the SHA-256 of every file with the manifest before use.

        Raises:
            BundleError: if the bundle cannot be used.
            BackendError: if the backend cannot be opened.
            MissingExtraError: if the backend's library is not installed.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, check_files=check_files)
        opened = open_backend(backend, bundle, n_threads=n_threads)
        return cls(bundle, opened, max_padded_tokens=max_padded_tokens)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def tokenizer(self) -> TextTokenizer:
        """The bundle's tokenizer.

        Raises:
            InputError: if the bundle has none.
        """
        if self._tokenizer is None:
            if not self.bundle.has(TOKENIZER):
                raise InputError("this bundle has no tokenizer; pass token ids instead of texts")
            content = self.bundle.file(TOKENIZER).read_bytes()
            self._tokenizer = TextTokenizer(content)
        return self._tokenizer

    def close(self) -> None:
        """Free the engines; later runs raise."""
        with self._lock:
            self._closed = True
            self._idle_buffers.clear()
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self,
        inputs: npt.ArrayLike | str | Sequence[str],
        cu_seqlens: npt.ArrayLike | None = None,
        *,
        attention_mask: npt.ArrayLike | None = None,
        token_type_ids: npt.ArrayLike | None = None,
        overflow: Overflow = "error",
        thresholds: Sequence[float] | None = None,
        path: PathChoice = "auto",
    ) -> RunResult:
        """Run a batch.

        Args:
            inputs: token ids, packed ``[n_tokens]`` with ``cu_seqlens`` or padded ``[batch, seq]``;
                or texts, one sequence each.
            cu_seqlens: ``[batch + 1]``, cumulative sequence lengths.
            attention_mask: ``[batch, seq]`` for padded ids; None: nothing is padding.
            token_type_ids: shaped as the ids; None: zeros.
            overflow: what to do with texts that are longer than the model's positions.
            thresholds: one per layer, instead of the model's.
            path: ``sparse`` compacts between stages; ``masked`` computes the same function in one
                graph; ``auto`` picks the faster of the two by a cost model that is calibrated when
                it is first needed; ``dense`` is the baseline, every token through every layer.

        Returns:
            Arrays that belong to the caller, packed whichever way the ids came.

        Raises:
            InputError: if the batch cannot be run.
            ConfigError: if ``thresholds`` are not one per layer and nondecreasing.
            BackendError: if the engine fails or the session is closed.
        """
        config = self.manifest.model
        texts = _as_texts(inputs)
        if texts is not None:
            if cu_seqlens is not None or attention_mask is not None or token_type_ids is not None:
                raise InputError("texts come alone; cu_seqlens and masks belong to token ids")
            inputs, cu_seqlens = self.tokenizer.encode(
                texts, max_length=config.max_positions, overflow=overflow
            )
        ids: npt.ArrayLike = inputs
        if cu_seqlens is None:
            batch = TokenBatch.from_padded(ids, attention_mask, token_type_ids, config=config)
        elif attention_mask is None:
            batch = TokenBatch.from_packed(ids, cu_seqlens, token_type_ids, config=config)
        else:
            raise InputError("pass cu_seqlens with packed ids or attention_mask with padded ones")
        return self.run_batch(batch, thresholds=thresholds, path=path)

    def run_batch(
        self,
        batch: TokenBatch,
        *,
        thresholds: Sequence[float] | None = None,
        path: PathChoice = "auto",
    ) -> RunResult:
        """Run a checked batch; see :meth:`run`."""
        if not isinstance(path, str) or path not in PATHS:
            raise InputError(f"path must be one of {', '.join(PATHS)}, not {shown(path)}")
        config = self.manifest.model
        limits = config.thresholds
        if thresholds is not None:
            limits = _as_thresholds(thresholds, config.n_layers)
        if path == "dense":
            return self._run_padded(batch, limits, path)
        groups = split_by_padding(batch.lengths, self._max_padded_tokens)
        if path == "auto":
            shares = dispatch.active_shares(self.manifest, limits)
            lengths = [batch.lengths[group].tolist() for group in groups]
            path = self.cost_model().choose(config, lengths, shares)
        if len(groups) == 1:
            return self._run_one(batch, limits, path)
        parts = [self._run_one(select(batch, group), limits, path) for group in groups]
        return merge(parts, groups, batch, per_sequence=config.head.per_sequence)

    def _run_one(
        self, batch: TokenBatch, thresholds: tuple[float, ...], path: dispatch.Path
    ) -> RunResult:
        if path == "sparse":
            return self._run_sparse(batch, thresholds)
        return self._run_padded(batch, thresholds, path)

    def cost_model(self) -> dispatch.CostModel:
        """Return the cost model behind ``path="auto"``, calibrating it on the first call.

        Calibration runs both paths on two random batches; it takes well under a second for a model
        of MiniLM's size and opens the masked graph.
        """
        with self._calibration_lock:
            if self._costs is None:
                self._costs = dispatch.calibrate(self.manifest.model, self._measure)
            return self._costs

    def _measure(self, path: dispatch.Path, lengths: Sequence[int]) -> tuple[float, float]:
        config = self.manifest.model
        cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, cu_seqlens[-1])
        batch = TokenBatch.from_packed(ids, cu_seqlens, config=config)
        runs = [self.run_batch(batch, path=path) for _ in range(6)]
        milliseconds = min(run.timings.total_ms for run in runs[1:])
        if path == "masked":
            return dense_flops(config, lengths), milliseconds
        return dispatch.needed_flops(config, runs[0].depths, cu_seqlens), milliseconds

    @contextlib.contextmanager
    def _buffers(self, n_tokens: int) -> Iterator[tuple[Array, Array]]:
        """Lend two state buffers ``[n_tokens, d_model]`` to one run."""
        with self._lock:
            if self._closed:
                raise BackendError("the session is closed")
            idle = self._idle_buffers
            states = self.manifest.graphs["entry"].outputs[0]
            buffers = idle.pop() if idle else StateBuffers(self.backend, states)
        try:
            yield buffers.reserve(n_tokens)
        finally:
            with self._lock:
                if not self._closed:
                    self._idle_buffers.append(buffers)

    def _run_sparse(self, batch: TokenBatch, thresholds: tuple[float, ...]) -> RunResult:
        start = perf_counter()
        config, backend = self.manifest.model, self.backend
        n_tokens = batch.n_tokens
        with self._buffers(n_tokens) as (states, other):
            scores = np.empty(n_tokens, dtype=np.float32)
            ids = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
            if config.n_token_types:
                ids["token_type_ids"] = _types(batch)
            entry = self._entry.bind(ids, {"hidden_states": states, "scores": scores})
            entry_ms = timed(entry)
            entered = perf_counter()
            depths = depths_from_scores(scores, thresholds)
            plan = plan_route(
                depths,
                batch.cu_seqlens,
                self.manifest.stage_layers,
                config.context,
                config.n_heads,
            )
            sort_ms = 0.0
            if plan.order is not None:
                sort_ms = timed(partial(backend.take, states, plan.order, other))
                states, other = other, states
            bound = bind_stages(plan, states, other, self._stages)
            rows = len(batch.lengths) if config.head.per_sequence else n_tokens
            output = np.empty((rows, config.output_width), dtype=np.float32)
            head_inputs = self._head_inputs(batch, plan, bound)
            head = self._head.bind(head_inputs, {"output": output})
            route_ms = (perf_counter() - entered) * 1e3 - sort_ms
            stage_ms, move_ms = bound.run()
            if not config.head.per_sequence and plan.order is not None:
                move_ms += timed(partial(backend.take, bound.states, plan.row_of, bound.other))
            head_ms = timed(head)
        return RunResult(
            output=output,
            depths=depths,
            scores=scores,
            input_ids=batch.input_ids.copy(),
            cu_seqlens=batch.cu_seqlens.copy(),
            layer_usage=LayerUsage.from_depths(depths, config.n_layers),
            timings=Timings(
                total_ms=(perf_counter() - start) * 1e3,
                entry_ms=entry_ms,
                route_ms=route_ms,
                stage_ms=tuple(stage_ms),
                move_ms=sort_ms + move_ms,
                head_ms=head_ms,
            ),
            path="sparse",
        )

    def _head_inputs(
        self, batch: TokenBatch, plan: RoutePlan, bound: BoundStages
    ) -> dict[str, Array]:
        head = self.manifest.model.head
        if not head.per_sequence:
            return {"hidden_states": bound.states if plan.order is None else bound.other}
        inputs = {"hidden_states": bound.states}
        if head.pooling == "cls":
            inputs["first_index"] = plan.row_of[batch.cu_seqlens[:-1]]
        else:
            layout = padded_layout(batch.lengths, plan.row_of)
            inputs["gather_index"], inputs["lengths"] = layout.gather_index, layout.lengths
        return inputs

    def padded_arrays(
        self, batch: TokenBatch, thresholds: Sequence[float], path: str
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Make the inputs and the empty outputs of a whole-model graph, ``masked`` or ``dense``."""
        config = self.manifest.model
        mask = batch.attention_mask
        inputs: dict[str, Array] = {
            "input_ids": batch.padded(batch.input_ids),
            "attention_mask": mask.astype(np.int32),
        }
        if config.n_token_types:
            inputs["token_type_ids"] = batch.padded(_types(batch))
        shape = mask.shape[:1] if config.head.per_sequence else mask.shape
        outputs = {"output": np.empty((*shape, config.output_width), dtype=np.float32)}
        if path == "masked":
            inputs["thresholds"] = np.asarray(thresholds, dtype=np.float32)
            outputs["scores"] = np.empty(mask.shape, dtype=np.float32)
        return inputs, outputs

    def _run_padded(
        self, batch: TokenBatch, thresholds: tuple[float, ...], path: PathName
    ) -> RunResult:
        start = perf_counter()
        config = self.manifest.model
        if self._closed:
            raise BackendError("the session is closed")
        inputs, outputs = self.padded_arrays(batch, thresholds, path)
        self.backend.graph(path).bind(inputs, outputs)()
        mask = inputs["attention_mask"] > 0
        output, scores = outputs["output"], None
        depths = np.full(batch.n_tokens, config.n_layers, dtype=np.int32)
        if path == "masked":
            scores = outputs["scores"][mask]
            depths = depths_from_scores(scores, thresholds)
        return RunResult(
            output=output if config.head.per_sequence else output[mask],
            depths=depths,
            scores=scores,
            input_ids=batch.input_ids.copy(),
            cu_seqlens=batch.cu_seqlens.copy(),
            layer_usage=LayerUsage.from_depths(depths, config.n_layers),
            timings=Timings(total_ms=(perf_counter() - start) * 1e3),
            path=path,
        )


def timed(call: Call) -> float:
    """Make a call; return the milliseconds it took."""
    start = perf_counter()
    call()
    return (perf_counter() - start) * 1e3


def _as_thresholds(values: object, n_layers: int) -> tuple[float, ...]:
    try:
        if isinstance(values, str | bytes):
            raise TypeError("a string was given")
        thresholds = tuple(map(float, values))  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"thresholds must be {n_layers} numbers: {error}") from error
    check_thresholds(thresholds, n_layers)
    return thresholds


def _as_texts(inputs: object) -> list[str] | None:
    """Return ``inputs`` as texts, or None if they are token ids."""
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, (list, tuple)) and inputs and isinstance(inputs[0], str):
        return list(inputs)
    return None


def _types(batch: TokenBatch) -> Array:
    if batch.token_type_ids is None:
        return np.zeros(batch.n_tokens, dtype=np.int32)
    return batch.token_type_ids
