"""The loop on a GPU: everything stays there, calls are captured, and the host waits once.

A batch is padded to a bucket (:mod:`sdt_deploy.runtime.ladders`), and the entry runs on all places
of it. From the scores a few kernels make the route plan (:mod:`sdt_deploy.runtime.device_plan`).
The host reads how many tokens are active in each layer, chooses a bucket for each stage, and
launches the stages, which read and write rows sorted by falling depth; finished rows, and with
``context="all"`` all of them, go back to their places. The head runs on the places.

Where the backend has stages in two pieces, attention is not its part: a kernel of
:mod:`sdt_deploy.runtime.device_attention` runs between them, on the rows as they lie. Nor are the
entry and means of sequences then, see :mod:`sdt_deploy.runtime.device_entry` and
:mod:`sdt_deploy.runtime.device_head`.

Every piece is a CUDA graph, captured when its bucket occurs for the first time. The pieces of a
batch run one after the other on one stream, so all captures share one pool of scratch memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

from sdt_deploy.buckets import longest_sequence
from sdt_deploy.bundle import PROJECT, Bundle
from sdt_deploy.choices import PathName
from sdt_deploy.errors import BackendError, RunCancelledError
from sdt_deploy.runtime.backend import Backend
from sdt_deploy.runtime.backends.device import DeviceMemory
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.device_buffers import DeviceBackend, Frame, Workspace
from sdt_deploy.runtime.device_entry import DeviceEntry
from sdt_deploy.runtime.device_head import DeviceHead, pools_itself
from sdt_deploy.runtime.device_pieces import StagePieces
from sdt_deploy.runtime.graph_cache import GraphCache, Observer
from sdt_deploy.runtime.ladders import (
    Bucket,
    batch_bucket,
    is_one_piece,
    likely_buckets,
    stage_bucket,
)
from sdt_deploy.runtime.result import LayerUsage, RunResult, Timings
from sdt_deploy.runtime.routing import depths_from_scores
from sdt_deploy.runtime.stopping import StopCheck

MAX_FRAMES = 64
"""Buckets whose small buffers a session keeps, with their graphs; the least recently used ones go
first."""


class DeviceLoop:
    """Runs batches on a device; one at a time, in whatever thread.

    Args:
        bundle: whose stages have the layout ``padded-rows``.
        backend: its engines and memory.
        capture: make CUDA graphs; False: for devices that have none.
    """

    def __init__(self, bundle: Bundle, backend: DeviceBackend, *, capture: bool) -> None:
        manifest = bundle.manifest
        self._config = manifest.model
        self._dtype = manifest.export.precision
        self._layers = [first for first, _ in manifest.stage_layers]
        self._backend = backend
        self._torch = backend.torch
        self._max_seqlen = longest_sequence(backend.profiles, manifest.model.max_positions)
        self._pieces: StagePieces | None = None
        self._entry: DeviceEntry | None = None
        self._own_head: DeviceHead | None = None
        self._graphs = GraphCache(backend.torch, enabled=capture)
        self._lock = threading.Lock()
        self._closed = False
        self._frames: OrderedDict[Bucket, Frame] = OrderedDict()
        self._space: Workspace | None = None
        names = ["entry", *(spec.name for spec in manifest.stages), "head"]
        if manifest.in_pieces and backend.has(PROJECT):
            names = ["head"]
            self._pieces = StagePieces(bundle, backend)
            self._entry = backend.entry(backend.parameters(bundle, "entry"), manifest.model)
            if pools_itself(manifest.model):
                names = []
                self._own_head = backend.head(backend.parameters(bundle, "head"), manifest.model)
        for name in names:  # baselines open when they are first used
            backend.graph(name)

    @property
    def n_graphs(self) -> int:
        """Graphs captured and kept."""
        return len(self._graphs)

    def run(
        self,
        batch: TokenBatch,
        thresholds: Sequence[float],
        path: PathName,
        check: StopCheck | None = None,
    ) -> RunResult:
        """Run a batch through ``sparse``, ``masked`` or ``dense``.

        The host waits for the device once for the counts, ``sparse`` only, and once at the end.

        Args:
            batch: the batch.
            thresholds: one per layer, nondecreasing.
            path: the path.
            check: called before each stage.

        Returns:
            Arrays that belong to the caller.

        Raises:
            BackendError: if an engine fails or the session is closed.
            RunCancelledError: from ``check``.
        """
        start = perf_counter()
        config = self._config
        bucket = batch_bucket(batch.lengths.tolist(), max_seqlen=self._max_seqlen)
        n, longest = len(batch.lengths), batch.max_seqlen
        with self._lock, self._backend.running():
            frame = self._frame(bucket)
            frame.send(batch, thresholds)
            stage_rows: tuple[int, ...] = ()
            usage: LayerUsage | None = None
            if path == "sparse":
                self._reserve(bucket.n_tokens)
                if is_one_piece(bucket):
                    self._launch_all(frame)
                    stage_rows = (bucket.n_tokens,) * len(self._layers)
                else:
                    whole = None
                    if thresholds[0] <= 0.0:  # scores are positive
                        whole = self._sized(batch.n_tokens, longest, bucket)
                    try:
                        active, stage_rows = self._run_stages(frame, whole, check)
                    except RunCancelledError:
                        self._backend.wait()  # the next run writes to the same buffers
                        raise
                    usage = LayerUsage.from_active(batch.n_tokens, active)
            else:
                self._launch_whole(frame, path)
            with self._backend.surfacing():
                frame.result.fetch()
            input_ids, cu_seqlens = batch.input_ids.copy(), batch.cu_seqlens.copy()
            self._backend.wait()
            output = frame.result.here["output"][:n]
            if config.head.per_sequence:
                output = output.copy()
            else:
                output = batch.packed(output[:, :longest]).copy()
            scores, depths = (
                batch.packed(frame.result.here[name][:n, :longest]).copy()
                for name in ("scores", "depths")
            )
        if path == "dense":
            depths.fill(config.n_layers)
            usage = LayerUsage.from_active(batch.n_tokens, (batch.n_tokens,) * config.n_layers)
        elif path == "masked":
            depths = depths_from_scores(scores, thresholds)
        usage = usage or LayerUsage.from_depths(depths, config.n_layers)
        return RunResult(
            output=output,
            depths=depths,
            scores=None if path == "dense" else scores,
            input_ids=input_ids,
            cu_seqlens=cu_seqlens,
            layer_usage=usage,
            timings=Timings(total_ms=(perf_counter() - start) * 1e3),
            path=path,
            stage_rows=stage_rows,
        )

    def warmup(self, lengths: Sequence[int], active_shares: Sequence[float]) -> None:
        """Capture what batches in the bucket of ``lengths`` are likely to launch.

        Args:
            lengths: tokens of each sequence.
            active_shares: expected share of active tokens in each layer.
        """
        bucket = batch_bucket(lengths, max_seqlen=self._max_seqlen)
        with self._lock, self._backend.running():
            frame = self._frame(bucket)
            self._reserve(bucket.n_tokens)
            frame.clear()  # indices and lengths that any size may be captured with
            if self._backend.has("masked"):
                self._launch_whole(frame, "masked")
            if is_one_piece(bucket):
                self._launch_all(frame)
                self._backend.wait()
                return
            self._launch_part("entry", frame, self._enter)
            for number, layer in enumerate(self._layers):
                share = active_shares[layer]
                for size in likely_buckets(bucket, share, in_pieces=self._in_pieces):
                    self._launch_stage(frame, number, size)
            self._launch_part("head", frame, self._head)
            self._backend.wait()

    def observe(self, observer: Observer | None) -> None:
        """Enter ``observer`` around every launch from now on; None: nothing."""
        with self._lock:
            self._graphs.observer = observer

    def close(self) -> None:
        """Free graphs and buffers; nothing can be run afterwards."""
        with self._lock:
            self._closed = True
            self._graphs.clear()
            self._frames.clear()
            self._space, self._pieces, self._entry, self._own_head = None, None, None, None

    def _run_stages(
        self, frame: Frame, whole: Bucket | None, check: StopCheck | None
    ) -> tuple[list[int], tuple[int, ...]]:
        """Run entry, stages and head; return active tokens by layer and rows by stage that ran.

        ``whole``: the bucket of the first stage, if every token is active there.
        """
        bucket = frame.bucket
        self._launch_part("entry", frame, self._enter)
        with self._backend.surfacing():
            frame.counts.fetch()
        counted = self._backend.mark()
        processed = []

        def run(number: int, size: Bucket) -> None:
            if check is not None:
                check()
            self._launch_stage(frame, number, size)
            processed.append(size.n_tokens)

        first = 0
        if whole is not None:  # known beforehand, so the device works while the host waits
            run(0, whole)
            first = 1
        counted()
        counts = frame.counts.here["counts"]
        for number, layer in enumerate(self._layers[first:], first):
            n_active, longest = counts[:, layer].tolist()
            if not n_active:
                break
            run(number, self._sized(n_active, longest, bucket))
        self._launch_part("head", frame, self._head)
        return counts[0].tolist(), tuple(processed)

    def _sized(self, n_active: int, longest: int, bucket: Bucket) -> Bucket:
        return stage_bucket(n_active, longest, bucket, in_pieces=self._in_pieces)

    def _launch_part(self, name: str, frame: Frame, part: Callable[[Frame], None]) -> None:
        """Launch what may as well run twice."""
        work = partial(part, frame)
        self._graphs.launch((name, frame.bucket), work, settle=work)

    def _launch_whole(self, frame: Frame, path: PathName) -> None:
        self._launch_part(path, frame, partial(self._whole, path=path))

    def _launch_stage(self, frame: Frame, number: int, size: Bucket) -> None:
        work, settle = (partial(f, frame, number, size) for f in (self._stage, self._settle))
        self._graphs.launch(("stage", number, frame.bucket, size), work, settle=settle)

    def _launch_all(self, frame: Frame) -> None:
        settle = partial(self._settle, frame, 0, frame.bucket)  # stages are alike
        key = "sparse", frame.bucket
        self._graphs.launch(key, partial(self._all_stages, frame), settle=settle)

    def _settle(self, frame: Frame, number: int, size: Bucket) -> None:
        if self._pieces is not None:
            inputs = self._inputs(frame, self._workspace.rows[0][None, : size.n_tokens])
            self._pieces.settle(self._workspace, self._layers[number], inputs)

    def _all_stages(self, frame: Frame) -> None:
        """Run everything with all rows of the bucket; nothing has to be known."""
        self._enter(frame)
        for number in range(len(self._layers)):
            self._stage(frame, number, frame.bucket)
        self._head(frame)

    def _enter(self, frame: Frame) -> None:
        there, scores = frame.sent.there, frame.result.there["scores"]
        states = self._states(frame)
        if self._entry is not None:
            ids = frame.ids
            self._entry(ids["input_ids"], ids.get("token_type_ids"), self._padded(frame), scores)
        else:
            inputs = {**frame.ids, "position_ids": frame.position_ids}
            self._call("entry", inputs, {"hidden_states": self._padded(frame), "scores": scores})
        routing = self._backend.routing
        routing.plan(scores.view(-1), there["lengths"], there["thresholds"], frame.plan)
        routing.take_rows(frame.plan, states, self._workspace.rows[0][: len(states)])

    def _stage(self, frame: Frame, number: int, size: Bucket) -> None:
        layer, buffers = self._layers[number], self._workspace.rows
        rows, updated = (
            buffers[turn % len(buffers)][None, : size.n_tokens] for turn in (number, number + 1)
        )
        inputs, key_lengths = self._inputs(frame, rows), self._key_lengths(frame, layer)
        if self._pieces is not None:
            self._pieces.run(self._workspace, frame, layer, size, inputs, key_lengths)
        else:
            names = "gather_index", "scatter_index"
            indices = self._backend.routing.stage_indices(frame.plan, layer, size)
            inputs |= dict(zip(names, indices, strict=True))
            inputs["key_lengths"] = key_lengths
            self._call(f"stage-{number:02d}", inputs, {"updated_states": updated})
        states, finished = self._states(frame), self._config.context != "all"
        self._backend.routing.put_rows(frame.plan, updated[0], layer, states, finished=finished)

    def _inputs(self, frame: Frame, rows: Any) -> dict[str, Any]:
        if self._config.context == "all":
            return {"hidden_states": rows, "context_states": self._padded(frame)}
        return {"hidden_states": rows}

    def _key_lengths(self, frame: Frame, layer: int) -> Any:
        if self._config.context == "all":
            return frame.sent.there["lengths"]
        return frame.plan.active_lengths[layer]

    def _head(self, frame: Frame) -> None:
        output = frame.result.there["output"]
        if self._own_head is not None:
            self._own_head(self._padded(frame), frame.sent.there["lengths"], output)
            return
        inputs = {"hidden_states": self._padded(frame)}
        if self._config.head.pooling == "mean":
            inputs["attention_mask"] = frame.sent.there["attention_mask"]
        self._call("head", inputs, {"output": output})

    def _whole(self, frame: Frame, *, path: PathName) -> None:
        inputs = {**frame.ids, "attention_mask": frame.sent.there["attention_mask"]}
        outputs = {"output": frame.result.there["output"]}
        if path != "dense":
            inputs["thresholds"] = frame.sent.there["thresholds"]
            outputs["scores"] = frame.result.there["scores"]
        self._call(path, inputs, outputs)

    def _states(self, frame: Frame) -> Any:
        """Return the states of the frame's places, ``[n_places, d_model]``."""
        return self._workspace.states[: frame.bucket.n_tokens]

    def _padded(self, frame: Frame) -> Any:
        """Return the same as ``[batch, max_seqlen, d_model]``."""
        return self._states(frame).view(*frame.plan.grid.shape, -1)

    @property
    def _in_pieces(self) -> bool:
        return self._pieces is not None

    @property
    def _workspace(self) -> Workspace:
        assert self._space is not None
        return self._space

    def _reserve(self, n_places: int) -> None:
        """Have room for the states of so many tokens."""
        if self._space is not None and n_places <= self._space.n_places:
            return
        self._graphs.clear()  # they name addresses that are about to go
        self._space = None
        self._space = Workspace(
            self._backend, n_places, self._config, self._dtype, in_pieces=self._in_pieces
        )

    def _call(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        self._backend.graph(name).bind(inputs, outputs)()

    def _frame(self, bucket: Bucket) -> Frame:
        """Return the buffers of ``bucket``.

        Raises:
            BackendError: if the session is closed, as it may be once the lock is free.
        """
        if self._closed:
            raise BackendError("the session is closed")
        if bucket not in self._frames:
            self._frames[bucket] = Frame(self._backend, self._config, bucket)
            if len(self._frames) > MAX_FRAMES:
                oldest, _ = self._frames.popitem(last=False)
                # Keys are a name, maybe the number of a stage, and the bucket of the batch.
                self._graphs.discard(lambda key: isinstance(key, tuple) and oldest in key[:3])
        self._frames.move_to_end(bucket)
        return self._frames[bucket]


def for_devices(bundle: Bundle) -> bool:
    """Tell whether the stages of a bundle are laid out for the loop on a device."""
    return all(spec.attention_layout == "padded-rows" for spec in bundle.manifest.stages)


def device_loop(bundle: Bundle, backend: Backend) -> DeviceLoop | None:
    """Return what runs a bundle with fused stages; None: its stages take another layout.

    Raises:
        BackendError: if ``backend`` does not run on a GPU.
    """
    if not for_devices(bundle):
        return None
    if not isinstance(backend, DeviceMemory):
        raise BackendError(
            f"{bundle.path} was exported with fused attention, for GPUs, and {backend.name} runs "
            "on the CPU; export it with --attention decomposed, or open it with "
            'backend="onnxruntime-cuda"'
        )
    return DeviceLoop(bundle, backend, capture=backend.device.type == "cuda" and backend.captures)
