"""Outputs of a model with mean pooling, computed by the runtime itself.

An engine makes float32 rows of all states, and a masked copy of them, before it sums them up: twice
the memory of the states each. Where stages come in pieces, the means are taken as the states are
read; what is left is small.

:class:`TorchPooling` says what is computed, and serves CPUs and tests;
:class:`~sdt_deploy.runtime.triton_pooling.TritonPooling` does the same in one kernel.
"""

from __future__ import annotations

from typing import Any, Protocol

from sdt_deploy.config import HeadConfig, ModelConfig
from sdt_deploy.extras import require
from sdt_deploy.runtime.device_entry import Parameters


class DevicePooling(Protocol):
    """Means of the states of sequences."""

    def __call__(self, states: Any, lengths: Any) -> Any:
        """Return ``[batch, d_model]`` float32, summed in float32.

        Args:
            states: ``[batch, max_seqlen, d_model]``, in the precision of the export.
            lengths: ``[batch]`` int64, tokens of each sequence; its first places. The mean of none
                is 0.
        """


class TorchPooling:
    """The definition, operator by operator."""

    def __init__(self) -> None:
        self._torch: Any = require("torch", extra="gpu", purpose="Pooling on a device")

    def __call__(self, states: Any, lengths: Any) -> Any:
        """See :meth:`DevicePooling.__call__`."""
        torch = self._torch
        is_token = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        total = torch.where(is_token[..., None], states.float(), 0.0).sum(dim=1)
        return total / lengths.clamp_min(1)[:, None]


class DeviceHead:
    """The head of a model that :func:`pools_itself`.

    Args:
        parameters: by the names that the graph ``head`` has for them.
        config: of the model.
        pooling: what takes means on this device.
    """

    def __init__(self, parameters: Parameters, config: ModelConfig, pooling: DevicePooling) -> None:
        self._parameters, self._config, self._pooling = parameters, config.head, pooling

    def __call__(self, states: Any, lengths: Any, output: Any) -> None:
        """Fill ``output``.

        Args:
            states: see :meth:`DevicePooling.__call__`.
            lengths: likewise.
            output: ``[batch, width]`` float32; of sequences without tokens it means nothing.
        """
        output.copy_(outputs_of(self._pooling(states, lengths), self._parameters, self._config))


def pools_itself(config: ModelConfig) -> bool:
    """Tell whether :class:`DeviceHead` serves a model; a last norm of all rows is for engines."""
    return config.head.pooling == "mean" and not config.final_norm


def outputs_of(rows: Any, parameters: Parameters, head: HeadConfig) -> Any:
    """Turn normed and pooled rows, float32 tensors, into outputs of the same type.

    Products are in the type of their weights.
    """
    if head.dense_tanh:
        rows = _linear(parameters, "head.dense", rows).tanh()
    if "head.projection.weight" in parameters:
        rows = _linear(parameters, "head.projection", rows)
    if head.normalize:
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return rows


def _linear(parameters: Parameters, name: str, rows: Any) -> Any:
    weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    product = rows.to(weight.dtype) @ weight
    return (product if bias is None else product + bias).float()
