"""Checkpoints of a run that is under way: one safetensors file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sdt_deploy.errors import CheckpointError, OutputError
from sdt_deploy.files import parse_json, write_file

FORMAT = "sdt-training"
CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
TEACHER_CACHE = "teacher.npz"


def run_key(*parts: object) -> str:
    """Return a hash of what must be the same for a run to go on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def save_state(path: Path, tensors: Mapping[str, Tensor], *, step: int, key: str) -> None:
    """Write the state after ``step`` steps.

    Raises:
        OutputError: if it cannot be written; an older state stays.
    """
    meta = {"format": FORMAT, "step": str(step), "key": key}
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, safetensors.torch.save(content, metadata=meta))


def load_state(path: Path, *, key: str) -> tuple[dict[str, Tensor], int]:
    """Read a state and the number of steps that led to it.

    Raises:
        CheckpointError: if it cannot be read, or belongs to another run.
    """
    if not path.is_file():
        raise CheckpointError(f"there is nothing to resume: {path} does not exist")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step = int(meta["step"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if meta.get("format") != FORMAT or meta.get("key") != key:
        raise CheckpointError(
            f"{path} is of another run: teacher, texts and options must be the same to resume. "
            "Give the same ones, or another output"
        )
    return tensors, step


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state, by the number of the parameter and the name of the value."""
    return {
        f"optimizer/{number}/{name}": torch.as_tensor(value)
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, number, value = name.split("/")
            state.setdefault(int(number), {})[value] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class JsonLog:
    """One JSON object a line; a resumed run drops the lines after its checkpoint.

    Args:
        path: the file; None: nowhere.
        from_step: steps that are done; 0 begins a new file.
    """

    def __init__(self, path: Path | None, *, from_step: int) -> None:
        self._path = path
        if path is None:
            return
        kept = []
        if from_step and path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if parse_json(line.encode()).get("step", 0) <= from_step:
                        kept.append(line)
                except ValueError:
                    break  # cut short by a kill
        write_file(path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, **values: Any) -> None:
        """Append a line.

        Raises:
            OutputError: if it cannot be written.
        """
        if self._path is None:
            return
        try:
            with self._path.open("a") as stream:
                stream.write(json.dumps(values) + "\n")
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error}") from error
