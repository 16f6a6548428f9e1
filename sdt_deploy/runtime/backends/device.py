"""Memory of a GPU, through torch's caching allocator: the memory half of the GPU backends.

Everything happens on the caller's current CUDA stream. Buffers that are freed while work on that
stream still uses them are reused in stream order only, so nothing has to wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import BackendError
from sdt_deploy.extras import require
from sdt_deploy.runtime.backend import Array, HostArray
from sdt_deploy.runtime.device_attention import DeviceAttention, TorchAttention
from sdt_deploy.runtime.device_entry import DeviceEntry, Parameters, TorchEntry
from sdt_deploy.runtime.device_head import DeviceHead, TorchPooling
from sdt_deploy.runtime.device_plan import DeviceRouting, TorchRouting, aligned
from sdt_deploy.runtime.device_routing import plan_on_device
from sdt_deploy.runtime.parameters import graph_parameters, layer_parameters
from sdt_deploy.runtime.routing import RoutePlan, RouteRules


class DeviceMemory:
    """Buffers as torch tensors.

    Args:
        device: ``cuda``, ``cuda:1``, …; ``cpu`` serves tests.

    Raises:
        MissingExtraError: if torch is not installed.
        BackendError: if torch finds no such GPU.
    """

    name: str = "GPU"
    captures = True
    """Whether calls of its graphs may be captured in CUDA graphs."""

    def __init__(self, device: str = "cuda") -> None:
        torch = require("torch", extra="gpu", purpose="Running on a GPU")
        self._torch: Any = torch
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BackendError(
                f"torch {torch.__version__} finds no GPU; `sdt-deploy doctor` says what is missing"
            )

    @property
    def torch(self) -> Any:
        """The module."""
        return self._torch

    @functools.cached_property
    def routing(self) -> DeviceRouting:
        """What routes on this device."""
        if self.device.type != "cuda":
            return TorchRouting()
        require("triton", extra="gpu", purpose="Routing on a GPU")
        from sdt_deploy.runtime.triton_routing import TritonRouting

        return TritonRouting()

    @functools.cached_property
    def attention(self) -> DeviceAttention:
        """What attends on this device, between the pieces of stages."""
        if self.device.type != "cuda":
            return TorchAttention()
        require("triton", extra="gpu", purpose="Attention on a GPU")
        from sdt_deploy.runtime.triton_attention import TritonAttention

        return TritonAttention()

    def entry(self, parameters: Parameters, config: ModelConfig) -> DeviceEntry:
        """Return what embeds and scores on this device, before stages in pieces."""
        if self.device.type != "cuda":
            return TorchEntry(parameters, config)
        require("triton", extra="gpu", purpose="Embedding on a GPU")
        from sdt_deploy.runtime.triton_entry import TritonEntry

        return TritonEntry(parameters, config)

    def head(self, parameters: Parameters, config: ModelConfig) -> DeviceHead:
        """Return what pools on this device and computes outputs, after stages in pieces."""
        if self.device.type != "cuda":
            return DeviceHead(parameters, config, TorchPooling())
        require("triton", extra="gpu", purpose="Pooling on a GPU")
        from sdt_deploy.runtime.triton_pooling import TritonPooling

        return DeviceHead(parameters, config, TritonPooling())

    def parameters(self, bundle: Bundle, name: str) -> Parameters:
        """Return the parameters of a graph of ``bundle`` in this memory, by name.

        Raises:
            BundleIntegrityError: if the files do not describe them.
        """
        return graph_parameters(bundle, bundle.manifest.graphs[name], self._torch, self.device)

    def layers(self, bundle: Bundle) -> Sequence[Parameters]:
        """Return the parameters of each layer in this memory, as pieces of stages take them.

        Raises:
            BundleIntegrityError: if the files do not describe them.
        """
        return layer_parameters(bundle, self._torch, self.device)

    @property
    def stream(self) -> int:
        """Handle of the caller's current stream; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        return int(self._torch.cuda.current_stream(self.device).cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """See :meth:`sdt_deploy.runtime.backend.Backend.empty`.

        Raises:
            BackendError: if there is not so much memory.
        """
        with self.surfacing():
            return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def upload(self, arrays: Sequence[HostArray]) -> list[Array]:
        """Return arrays in the GPU's memory, where some may be already; one copy for the others.

        The caller must not change them while the results are in use.
        """
        on_host = [array for array in arrays if isinstance(array, np.ndarray)]
        with self.surfacing():
            moved = iter(self._moved(on_host) if on_host else ())
        return [next(moved) if isinstance(array, np.ndarray) else array for array in arrays]

    def _moved(self, arrays: Sequence[HostArray]) -> list[Array]:
        torch = self._torch
        starts, total = aligned([array.nbytes for array in arrays])
        pinned = self.device.type == "cuda"
        block = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
        flat = block.numpy()
        for array, start in zip(arrays, starts, strict=True):
            flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view("u1")
        block = block.to(self.device, non_blocking=True)
        return [
            block[start : start + array.nbytes]
            .view(getattr(torch, str(array.dtype)))
            .view(array.shape)
            for array, start in zip(arrays, starts, strict=True)
        ]

    def running(self) -> AbstractContextManager[None]:
        """See :meth:`sdt_deploy.runtime.backend.Backend.running`."""
        return nullcontext()

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        """Select a stream that waits for the caller's, which waits for it in turn afterwards."""
        cuda = self._torch.cuda
        outer = cuda.current_stream(self.device)
        stream.wait_stream(outer)
        try:
            with cuda.stream(stream):
                yield
        finally:
            outer.wait_stream(stream)

    def plan(
        self,
        scores: Array,
        thresholds: Sequence[float],
        cu_seqlens: HostArray,
        rules: RouteRules,
    ) -> RoutePlan:
        """See :meth:`sdt_deploy.runtime.backend.Backend.plan`; it waits for the GPU once."""
        return plan_on_device(self, scores, thresholds, cu_seqlens, rules)

    def fetch(self, *arrays: Array) -> tuple[HostArray, ...]:
        """See :meth:`sdt_deploy.runtime.backend.Backend.fetch`; it waits for the GPU once."""
        pinned = self.device.type == "cuda"
        copies = []
        with self.surfacing():
            for array in arrays:
                copy = self._torch.empty(array.shape, dtype=array.dtype, pin_memory=pinned)
                copies.append(copy.copy_(array, non_blocking=True))
        self.wait()
        return tuple(copy.numpy().copy() if pinned else copy.numpy() for copy in copies)

    def mark(self) -> Callable[[], None]:
        """Return what waits for all that was enqueued on the current stream so far.

        That raises a :class:`BackendError` if some of it failed.
        """
        if self.device.type != "cuda":
            return lambda: None
        with self.surfacing():
            event = self._torch.cuda.Event()
            event.record()

        def wait() -> None:
            with self.surfacing():
                event.synchronize()

        return wait

    @contextmanager
    def surfacing(self) -> Iterator[None]:
        """Make a :class:`BackendError` of what torch raises: here failures of work come to light.

        Work on a GPU fails after it was enqueued, and torch raises at whatever call comes next.
        """
        try:
            yield
        except self._torch.OutOfMemoryError as error:
            raise BackendError(
                self.failure(f"the memory does not suffice, run smaller batches: {error}")
            ) from error
        except RuntimeError as error:
            raise BackendError(
                self.failure(
                    "work on the GPU failed after it was enqueued, so results are not to be used. "
                    f"No more can be run in this process; start it again: {error}"
                )
            ) from error

    def failure(self, what: str) -> str:
        """Return ``what`` with what else is known about a failure."""
        return f"{self.name}: {what}"

    def wait(self) -> None:
        """Wait for what was enqueued on the current stream so far."""
        self.mark()()

    def clock(self, run: Callable[[], object]) -> float:
        """Make a call; return the milliseconds between events before and behind its work."""
        begin, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Make a call; return how much of the GPU's memory it took that was free before.

        By what the driver says is free, so that the memory of engines counts too. No allocator
        gives memory back by itself, so what is taken afterwards is the peak. It comes in blocks of
        some MB, and whatever else runs on that GPU counts as well.
        """
        cuda = self._torch.cuda
        cuda.synchronize(self.device)
        cuda.empty_cache()
        before, _ = cuda.mem_get_info(self.device)
        run()
        cuda.synchronize(self.device)
        after, _ = cuda.mem_get_info(self.device)
        return int(before - after)

    def take(self, rows: Array, index: Array, out: Array) -> None:
        """See :meth:`sdt_deploy.runtime.backend.Backend.take`."""
        self._torch.index_select(rows, 0, index, out=out)

    def on_device(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array], dtypes: Mapping[str, str]
    ) -> tuple[dict[str, Array], dict[str, Array], Callable[[], None]]:
        """Return inputs and outputs in device memory, and what brings outputs to their places.

        Args:
            inputs: device arrays, or NumPy arrays, which are copied.
            outputs: device arrays, or NumPy arrays, which are filled by the third result; that
                waits for the stream.
            dtypes: of the outputs.
        """
        on_host = {name: a for name, a in inputs.items() if isinstance(a, np.ndarray)}
        uploaded = dict(zip(on_host, self.upload(list(on_host.values())), strict=True))
        there = {name: uploaded.get(name, array) for name, array in inputs.items()}
        targets = {name: a for name, a in outputs.items() if isinstance(a, np.ndarray)}
        made = {name: self.empty(a.shape, dtypes[name]) for name, a in targets.items()}

        def fetch() -> None:
            if targets:
                found = self.fetch(*(made[name] for name in targets))
                for target, array in zip(targets.values(), found, strict=True):
                    target[...] = array

        return there, {name: made.get(name, array) for name, array in outputs.items()}, fetch
