"""The teacher's last states, computed once and kept where there is room, else as they are needed.

The states serve every head: its outputs follow from them at little cost.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdt_deploy.errors import TrainingError
from sdt_deploy.files import write_file
from sdt_deploy.model.transformer import DenseTransformer
from sdt_deploy.training.batches import DeviceTokens
from sdt_deploy.training.gates import layer_forward

TEACHER_BATCH = 64


class Teacher:
    """Gives the dense model's last states for any batch.

    Args:
        model: the dense model; it is put into evaluation mode.
        tokens: the texts.
        autocast: makes the context in which the model runs.
    """

    def __init__(
        self,
        model: DenseTransformer,
        tokens: DeviceTokens,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self._tokens, self._autocast = tokens, autocast
        self._states: Tensor | None = None

    def cache_bytes(self) -> int:
        """Return the size of the cache that :meth:`fill_cache` would make."""
        return 2 * len(self._tokens.input_ids) * self.model.config.d_model

    @torch.no_grad()
    def fill_cache(self, path: Path | None, progress: Callable[[int, int], None]) -> None:
        """Compute the states of all texts in float16, or read them from ``path``.

        A file at ``path`` is used if it was made of the same weights and ids, else replaced.

        Raises:
            TrainingError: if a state is beyond float16.
        """
        tokens = self._tokens
        key = self._key()
        shape = (len(tokens.input_ids), self.model.config.d_model)
        if path is not None and (found := _read(path, key, shape)) is not None:
            self._states = torch.from_numpy(found).to(tokens.input_ids.device)
            return
        states = torch.zeros(shape, dtype=torch.float16, device=tokens.input_ids.device)
        order = np.argsort(tokens.lengths, kind="stable")
        for start in range(0, len(order), TEACHER_BATCH):
            ids, mask, index = tokens.padded(order[start : start + TEACHER_BATCH])
            states[index[mask]] = self._compute(ids, mask)[mask].half()
            progress(min(start + TEACHER_BATCH, len(order)), len(order))
        if not bool(states.isfinite().all()):
            raise TrainingError(
                "the teacher's states are beyond float16, so they cannot be cached: pass "
                "--cache-mb 0"
            )
        if path is not None:
            stream = io.BytesIO()
            np.savez(stream, key=np.array(key), states=states.cpu().numpy())
            write_file(path, stream.getvalue())
        self._states = states

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        """Return the states ``[batch, seq, d_model]`` of what :meth:`DeviceTokens.padded` gave."""
        if self._states is not None:
            return self._states[index].float() * mask[..., None]
        return self._compute(ids, mask)

    def _compute(self, ids: Tensor, mask: Tensor) -> Tensor:
        with self._autocast():
            hidden = self.model.embed(ids)
            for layer in self.model.blocks:
                hidden = layer_forward(layer, hidden, mask)
        return hidden.float()

    def _key(self) -> str:
        digest = hashlib.sha256(repr(self.model.config).encode())
        for name, weight in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.cpu().numpy().tobytes())
        digest.update(self._tokens.lengths.tobytes())
        digest.update(self._tokens.input_ids.cpu().numpy().tobytes())
        return digest.hexdigest()


def _read(path: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key or arrays["states"].shape != shape:
                return None
            return np.asarray(arrays["states"], dtype=np.float16)
    except Exception:  # NumPy and zipfile raise many kinds on damaged files: compute it again
        return None
