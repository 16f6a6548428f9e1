"""The session: a bundle, opened and ready to run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn, Self, get_args

import numpy.typing as npt

from sdt_deploy.bundle import Bundle, Manifest
from sdt_deploy.choices import PathChoice, PathName
from sdt_deploy.config import compared, shown
from sdt_deploy.costs import active_shares
from sdt_deploy.errors import BackendError, InputError
from sdt_deploy.forking import fork_safe_lock
from sdt_deploy.runtime import dispatch
from sdt_deploy.runtime.backend import Backend, HostMemory, SparseLoop
from sdt_deploy.runtime.backends import default_padded_tokens, open_backend
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.buffers import BufferPool
from sdt_deploy.runtime.caches import CacheUsage
from sdt_deploy.runtime.calibration import calibration_tokens, measure_costs, random_batch
from sdt_deploy.runtime.device_loop import DeviceLoop, device_loop
from sdt_deploy.runtime.device_routing import check_routing
from sdt_deploy.runtime.inputs import chosen_thresholds, read_batch, read_thresholds
from sdt_deploy.runtime.padded import run_padded
from sdt_deploy.runtime.result import RunResult
from sdt_deploy.runtime.sparse import PythonLoop
from sdt_deploy.runtime.splitting import PartLimits, merge, select, split_batch
from sdt_deploy.runtime.statistics import MAX_DEPTH_DRIFT, DepthMonitor, SessionStatistics
from sdt_deploy.runtime.stopping import StopCheck, stop_check
from sdt_deploy.runtime.windows import join_windows
from sdt_deploy.tokenization import Overflow, TextTokenizer

PATHS = get_args(PathChoice)


class Session:
    """Runs a bundle. Thread-safe: concurrent runs use buffers of their own.

    Buffers are as large as the largest batch needed and are kept for later runs until ``close``.

    Servers that fork their workers open the session before they do: it runs in every child, on one
    thread each, and the children share its weights. Fork while no run is under way. A process that
    is started anew (``multiprocessing`` with ``spawn``) opens a session of its own.

    ::

        with Session.open("bundle") as session:
            result = session.run(input_ids, cu_seqlens)
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        part_limits: PartLimits | None = None,
        max_depth_drift: float | None = MAX_DEPTH_DRIFT,
    ) -> None:
        if isinstance(backend, DeviceMemory):
            check_routing(bundle.manifest.model, backend.name)
        self._device_loop = device_loop(bundle, backend)
        self._part_limits = replace(
            part_limits or PartLimits(),
            profiles=backend.profiles,
            bucketed=self._device_loop is not None,
        )
        self._monitor = DepthMonitor(bundle.manifest, max_depth_drift)
        self.bundle = bundle
        self.backend = backend
        self._limits = compared(bundle.manifest.model.thresholds)
        self._calibration_lock = fork_safe_lock()
        self._buffers = BufferPool(backend, bundle.manifest.graphs["entry"].outputs[0])
        self._tokenizer: TextTokenizer | None = None
        self._costs: dispatch.CostModel | None = None
        self._closed = False
        self._choice: dispatch.Choice | None = None
        self._loop: SparseLoop | None = None
        if self._device_loop is None:
            self._loop = PythonLoop(backend, bundle.manifest)
        self._compiled_loop = backend.compiled_loop() if isinstance(backend, HostMemory) else None

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        backend: str = "onnxruntime-cpu",
        n_threads: int | None = None,
        max_padded_tokens: int | None = None,
        max_memory_mb: float | None = None,
        max_depth_drift: float | None = MAX_DEPTH_DRIFT,
        check_files: bool = True,
    ) -> Self:
        """Open a bundle: its entry, stages and head. Baselines open when they are first used.

        Args:
            bundle: its directory, or an opened one.
            backend: ``onnxruntime-cpu``, ``onnxruntime-compiled``, ``onnxruntime-cuda``, ``torch``,
                or, if the bundle has engines for this GPU, ``tensorrt`` or ``tensorrt-rtx``.
            n_threads: threads of the pool that all sessions of the process share; see
                :func:`sdt_deploy.ort.ensure_thread_pool`.
            max_padded_tokens: batches whose ``batch × longest sequence`` exceeds this run in parts
                of similar lengths, with the same results; the dense baseline is not split. None:
                1024 per thread, 2048 at least; 131072 on a GPU.
            max_memory_mb: batches that would need more memory than this above the weights, by
                :func:`sdt_deploy.costs.scratch_bytes_per_sequence`, run in parts too; None: no cap.
                Each of several concurrent runs may need as much.
            max_depth_drift: layers by which the recent mean depth may differ from that on the
                calibration text before a ``DepthDriftWarning`` says so; None: never.
            check_files: compare the SHA-256 of every file with the manifest before use.

        Raises:
            BundleError: if the bundle cannot be used.
            ConfigError: if an argument is out of range.
            BackendError: if the backend cannot be opened.
            MissingExtraError: if the backend's library is not installed.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, check_files=check_files)
        limits = PartLimits(max_memory_mb=max_memory_mb)
        opened = open_backend(backend, bundle, n_threads=n_threads)
        try:
            if max_padded_tokens is None:
                max_padded_tokens = default_padded_tokens(backend)
            limits = replace(limits, max_padded_tokens=max_padded_tokens)
            return cls(bundle, opened, part_limits=limits, max_depth_drift=max_depth_drift)
        except BaseException:
            opened.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def part_limits(self) -> PartLimits:
        """What batches are cut into parts by."""
        return self._part_limits

    @property
    def on_device(self) -> bool:
        """Whether batches stay on a GPU, in captured graphs, from their ids to their outputs."""
        return self._device_loop is not None

    @property
    def device_loop(self) -> DeviceLoop | None:
        """What keeps batches :attr:`on_device`; None where they are not."""
        return self._device_loop

    @property
    def tokenizer(self) -> TextTokenizer:
        """The bundle's tokenizer.

        Raises:
            InputError: if the bundle has none.
            BackendError: if the session is closed.
        """
        self._check_open()
        tokenizer = self._tokenizer
        if tokenizer is None:
            tokenizer = self._tokenizer = TextTokenizer.of(self.bundle)
        return tokenizer

    def close(self) -> None:
        """Free engines, buffers, their memory and the tokenizer; may be called again.

        Later runs raise :class:`~sdt_deploy.errors.BackendError`. A run that is under way in
        another thread ends, with its result or with that error, and then frees what it holds.
        """
        self._closed = True
        self._buffers.close()
        if self._device_loop is not None:
            self._device_loop.close()
        self._tokenizer = self._costs = self._choice = self._loop = self._compiled_loop = None
        self.backend.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("the session is closed")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a session cannot be pickled: pass the path of its bundle, {str(self.bundle.path)!r}, "
            "and open it where it is needed; forked processes may use this one as it is"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
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
        target_depth: float | None = None,
        path: PathChoice = "auto",
        timeout_s: float | None = None,
        cancel: threading.Event | None = None,
    ) -> RunResult:
        """Run a batch.

        Args:
            inputs: token ids, packed ``[n_tokens]`` with ``cu_seqlens`` or padded ``[batch, seq]``;
                or texts, one sequence each.
            cu_seqlens: ``[batch + 1]``, cumulative sequence lengths.
            attention_mask: ``[batch, seq]`` for padded ids; None: nothing is padding.
            token_type_ids: shaped as the ids; None: zeros.
            overflow: what to do with texts longer than the model's positions: ``error``,
                ``truncate``, or ``split`` into windows, see
                :func:`sdt_deploy.runtime.windows.join_windows`.
            thresholds: one per layer, instead of the model's.
            target_depth: mean depth to aim at, instead of thresholds; see
                :func:`sdt_deploy.costs.thresholds_for_depth`.
            path: ``sparse`` compacts between stages; ``single`` does so inside one graph, in one
                call; ``masked`` computes the same function without compaction; ``auto`` picks the
                fastest of them by a cost model that is calibrated when it is first needed
                (``sparse`` with routing ``per_layer``); ``dense`` is the baseline.
            timeout_s: seconds after which the run stops; None: no limit.
            cancel: set from another thread, it stops the run.

        Whether to stop is looked at before the run, between the stages of ``sparse`` and between
        the parts of a large batch; a call of an engine, such as all of ``single``, is finished, and
        so is the calibration of ``auto``, which :meth:`warmup` has done beforehand.

        Returns:
            Arrays that belong to the caller, packed whichever way the ids came.

        Raises:
            InputError: if the batch cannot be run.
            ConfigError: if ``thresholds`` are not one per layer and nondecreasing, or
                ``target_depth`` cannot be reached.
            BackendError: if the engine fails or the session is closed.
            RunCancelledError: if ``cancel`` was set.
            DeadlineExceededError: if ``timeout_s`` have passed.
        """
        check = stop_check(timeout_s, cancel)
        batch, cu_windows = read_batch(
            inputs,
            cu_seqlens,
            attention_mask,
            token_type_ids,
            config=self.manifest.model,
            overflow=overflow,
            tokenizer=lambda: self.tokenizer,
        )
        limits = chosen_thresholds(thresholds, target_depth, self.manifest)
        result = self._run_checked(batch, limits, path, check)
        if cu_windows is None:
            return result
        return join_windows(result, cu_windows, self.manifest.model.head)

    def run_batch(
        self,
        batch: TokenBatch,
        *,
        thresholds: Sequence[float] | None = None,
        path: PathChoice = "auto",
        timeout_s: float | None = None,
        cancel: threading.Event | None = None,
    ) -> RunResult:
        """Run a checked batch; see :meth:`run`."""
        return self._run_checked(batch, thresholds, path, stop_check(timeout_s, cancel))

    def _run_checked(
        self,
        batch: TokenBatch,
        thresholds: Sequence[float] | None,
        path: PathChoice,
        check: StopCheck | None,
    ) -> RunResult:
        self._check_open()
        if not isinstance(path, str) or path not in PATHS:
            raise InputError(f"path must be one of {', '.join(PATHS)}, not {shown(path)}")
        config = self.manifest.model
        limits = self._limits if thresholds is None else read_thresholds(thresholds, config)
        if check is not None:
            check()
        if path == "dense":
            return self._run_one(batch, limits, path)
        if path == "single" and not self.backend.has("single"):
            raise InputError(
                f'{self.bundle.path} holds no graph for path="single" on {self.backend.name}; '
                'export it with --single-file, for ONNX Runtime, or take path="auto"'
            )
        groups = split_batch(batch.lengths, config, self._part_limits)
        if path == "auto" and config.routing == "per_layer":
            path = "sparse"  # how many tokens go on is not known beforehand
        parts = [select(batch, group) for group in groups] if groups else [batch]
        if path == "auto":
            choice = self._choice or dispatch.remembered_choice(self.cost_model(), self.manifest)
            self._choice = choice
            path = choice(tuple(tuple(part.lengths.tolist()) for part in parts), limits)
        results = [self._run_one(part, limits, path, check) for part in parts]
        result = results[0]
        if groups:
            result = merge(results, groups, batch, per_sequence=config.head.per_sequence)
        if thresholds is None:
            self._monitor.count(result.layer_usage.depth_histogram)
        return result

    def _run_one(
        self,
        batch: TokenBatch,
        thresholds: tuple[float, ...],
        path: PathName,
        check: StopCheck | None = None,
    ) -> RunResult:
        if check is not None:
            check()
        if self._device_loop is not None:
            return self._device_loop.run(batch, thresholds, path, check)
        with self.backend.running():
            if path == "sparse":
                loop = self._loop
                if check is None or check.cancel is None:
                    loop = self._compiled_loop or loop
                if loop is None:
                    raise BackendError("the session is closed")
                return loop.run(self._buffers, batch, thresholds, check)
            graph = self.backend.graph(path)
            return run_padded(self.manifest.model, graph, batch, thresholds, path)

    def warmup(self, lengths: Sequence[Sequence[int]]) -> None:
        """Do beforehand what the first batch of a size would wait for.

        Engines are opened, buffers allocated, the cost model is calibrated, and on a GPU the CUDA
        graphs are captured that batches of these sizes are likely to need: at the expected shares
        of active tokens and somewhat around them.

        Args:
            lengths: for every batch to expect, the tokens of each of its sequences.

        Raises:
            InputError: if such a batch could not be run.
        """
        config = self.manifest.model
        shares = active_shares(self.manifest, config.thresholds)
        for one in lengths:
            batch = random_batch(config, one)
            self.run_batch(batch, thresholds=config.thresholds)  # given, so they are not counted
            if self._device_loop is not None:
                groups = split_batch(batch.lengths, config, self._part_limits)
                parts = [batch.lengths[group] for group in groups] or [batch.lengths]
                for part in parts:
                    self._device_loop.warmup(part.tolist(), shares)

    def statistics(self) -> SessionStatistics:
        """Return what was run and generated so far, and how deep the tokens went."""
        return self._monitor.statistics()

    def count_generation(
        self, depth_histogram: Sequence[int], n_new_tokens: int, cache: CacheUsage
    ) -> None:
        """Count a generation at the model's own thresholds, for :meth:`statistics`.

        :func:`sdt_deploy.runtime.generation.generate` does so.

        Args:
            depth_histogram: of all tokens that were run.
            n_new_tokens: tokens that were chosen.
            cache: at its end.
        """
        self._monitor.count(depth_histogram, n_new_tokens=n_new_tokens, cache=cache)

    def cost_model(self) -> dispatch.CostModel:
        """Return the cost model behind ``path="auto"``, calibrating it on the first call.

        Calibration runs the paths to choose from, :func:`sdt_deploy.runtime.dispatch.candidates`,
        on three random batches within the session's limits; it takes about a second for a model of
        MiniLM's size.

        Raises:
            InputError: if ``max_memory_mb`` is too little for any sequence.
        """
        config = self.manifest.model
        with self._calibration_lock:
            costs = self._costs
            if costs is None:
                limits = self._part_limits
                sizes = dispatch.calibration_sizes(
                    limits.longest(config),
                    n_tokens=calibration_tokens(limits, on_device=self.on_device),
                    max_sequences=partial(limits.max_sequences, config),
                )
                costs = self._costs = measure_costs(
                    config,
                    active_shares(self.manifest, config.thresholds),
                    dispatch.candidates(config, self.backend.has),
                    self._run_one,
                    sizes,
                )
            return costs
