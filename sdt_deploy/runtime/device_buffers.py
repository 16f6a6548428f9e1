"""The buffers of the loop on a GPU, and what it asks of a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from sdt_deploy.bundle import Bundle
from sdt_deploy.config import ModelConfig
from sdt_deploy.runtime.backend import Backend
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.device_attention import DeviceAttention
from sdt_deploy.runtime.device_entry import DeviceEntry, Parameters
from sdt_deploy.runtime.device_head import DeviceHead
from sdt_deploy.runtime.device_plan import DevicePlan, DeviceRouting, aligned
from sdt_deploy.runtime.ladders import Bucket


class DeviceBackend(Backend, Protocol):
    """A backend whose buffers are torch tensors on :attr:`device`."""

    device: Any

    @property
    def torch(self) -> Any:
        """The module."""

    @property
    def routing(self) -> DeviceRouting:
        """What routes on this device."""

    @property
    def attention(self) -> DeviceAttention:
        """What attends on this device, between the pieces of stages."""

    def entry(self, parameters: Parameters, config: ModelConfig) -> DeviceEntry:
        """Return what embeds and scores on this device, before stages in pieces."""

    def head(self, parameters: Parameters, config: ModelConfig) -> DeviceHead:
        """Return what pools on this device and computes outputs, after stages in pieces."""

    def parameters(self, bundle: Bundle, name: str) -> Parameters:
        """Return the parameters of a graph on this device; see :class:`.DeviceMemory`."""

    def layers(self, bundle: Bundle) -> Sequence[Parameters]:
        """Return the parameters of each layer on this device; see :class:`.DeviceMemory`."""

    def surfacing(self) -> AbstractContextManager[None]:
        """Return a context in which failures of enqueued work are errors of the backend."""

    def mark(self) -> Callable[[], None]:
        """Return what waits for all that was enqueued on the current stream so far."""

    def wait(self) -> None:
        """Wait for what was enqueued on the current stream so far."""


class PinnedBlock:
    """Arrays side by side in one block on the device and one in pinned memory: one copy for all.

    Args:
        torch: the module.
        device: where.
        parts: shape and dtype by name.
    """

    def __init__(
        self, torch: Any, device: Any, parts: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> None:
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in parts.values()]
        starts, total = aligned(sizes)
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.there: dict[str, Any] = {}
        """The tensors on the device."""
        self.here: dict[str, np.ndarray] = {}
        """The arrays in pinned memory."""
        for (name, (shape, dtype)), begin, size in zip(parts.items(), starts, sizes, strict=True):
            end = begin + size
            self.there[name] = self._device[begin:end].view(getattr(torch, dtype)).view(shape)
            self.here[name] = self._host.numpy()[begin:end].view(dtype).reshape(shape)

    def send(self) -> None:
        """Copy to the device; nothing waits, so the arrays must stay as they are for now."""
        self._device.copy_(self._host, non_blocking=True)

    def fetch(self) -> None:
        """Copy to the host; they are there once the stream has been waited for."""
        self._host.copy_(self._device, non_blocking=True)


class Workspace:
    """The states of a batch's tokens, at fixed addresses.

    Args:
        backend: where they lie.
        n_places: of the largest batch.
        config: of the model.
        dtype: of the states.
        in_pieces: whether attention is between the pieces of stages.
    """

    def __init__(
        self,
        backend: DeviceBackend,
        n_places: int,
        config: ModelConfig,
        dtype: str,
        *,
        in_pieces: bool,
    ) -> None:
        def made(width: int) -> Any:
            return backend.empty((n_places, width), dtype)

        d_model = config.d_model
        self.n_places = n_places
        self.states = made(d_model)
        """``[n_places, d_model]``, the last state of every token, in its place."""
        self.rows = [made(d_model) for _ in range(1 if in_pieces else 2)]
        """``[n_places, d_model]``, active tokens by falling depth. Stages read one and write the
        other; pieces of stages, which attend to nothing while they write, have one for both."""
        self.query: Any = made(d_model) if in_pieces else None
        """``[n_places, d_model]``, of the active rows; attention writes in its place."""
        self._wide: Any = made(max(2 * d_model, config.d_ff)) if in_pieces else None

    def wide(self, *axes: int) -> Any:
        """Return the block that holds, one after the other, keys and values and the feed-forward.

        ``axes``: of the tensor to see it as: keys and values side by side of what active rows see,
        ``2 · d_model`` wide, until attention has read them, and then what the feed-forward makes of
        the rows, ``d_ff`` wide.
        """
        return self._wide.view(-1)[: math.prod(axes)].view(axes)


class Frame:
    """The small buffers of one bucket, at fixed addresses."""

    def __init__(self, backend: DeviceBackend, config: ModelConfig, bucket: Bucket) -> None:
        torch, device = backend.torch, backend.device
        batch, longest = padded = bucket.batch, bucket.max_seqlen
        sent = {
            "input_ids": (padded, "int32"),  # 0 in padding
            "attention_mask": (padded, "int32"),
            "lengths": ((batch,), "int64"),  # 0 for sequences that fill the bucket
            "thresholds": ((config.n_layers,), "float32"),
        }
        if config.n_token_types:
            sent["token_type_ids"] = (padded, "int32")
        rows = (batch,) if config.head.per_sequence else padded
        result = {
            "output": ((*rows, config.output_width), "float32"),
            "scores": (padded, "float32"),
            "depths": (padded, "int32"),
        }
        self.bucket = bucket
        self.sent = PinnedBlock(torch, device, sent)
        self.counts = PinnedBlock(torch, device, {"counts": ((2, config.n_layers), "int32")})
        self.result = PinnedBlock(torch, device, result)
        self.plan = DevicePlan.empty(
            torch,
            device,
            bucket,
            config.n_layers,
            counts=self.counts.there["counts"],
            depths=self.result.there["depths"].view(-1),
        )
        positions = torch.arange(longest, dtype=torch.int32, device=device)
        self.position_ids = positions.expand(padded).contiguous()
        """``[batch, max_seqlen]`` int32."""

    @property
    def ids(self) -> dict[str, Any]:
        """``input_ids``, and ``token_type_ids`` if the model has types."""
        names = ("input_ids", "token_type_ids")
        return {name: self.sent.there[name] for name in names if name in self.sent.there}

    def clear(self) -> None:
        """Write a batch without sequences."""
        for array in self.sent.here.values():
            array.fill(0)
        self.sent.send()

    def send(self, batch: TokenBatch, thresholds: Sequence[float]) -> None:
        """Write a batch: one copy, which nothing waits for.

        The block is free: the last run that used it has ended.
        """
        n, longest = len(batch.lengths), batch.max_seqlen
        here = self.sent.here
        padded = {
            "input_ids": batch.padded(batch.input_ids),
            "attention_mask": batch.attention_mask,
        }
        if "token_type_ids" in here:
            padded["token_type_ids"] = batch.padded(batch.types)
        for name, values in padded.items():
            if here[name].shape != values.shape:
                here[name].fill(0)
            here[name][:n, :longest] = values
        here["lengths"][:n] = batch.lengths
        here["lengths"][n:] = 0
        here["thresholds"][:] = thresholds
        self.sent.send()
