"""Checkpoints from anyone: typed errors, and no memory on the word of a header or a config."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from sdt_deploy.config import MAX_LAYERS
from sdt_deploy.errors import CheckpointError
from sdt_deploy.model import checkpoints
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import load_any
from tests.model.test_checkpoints import CONFIG
from tests.model.test_original import Original
from tests.samples import THOROUGH, random_model

HUGE = 10**12


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    sample = TokenSample(input_ids=np.arange(5), cu_seqlens=np.array([0, 2, 5]))
    checkpoint = Checkpoint(model=random_model(CONFIG, 0), tokenizer=b"{}", sample=sample)
    checkpoints.save(checkpoint, path)
    return path


@pytest.fixture
def native(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(scope="module")
def loaded_modules(pristine: Path) -> None:
    """What torch imports when a first model is loaded, no file's doing."""
    load_any(pristine)


@pytest.fixture(autouse=True)
def bounded_memory(loaded_modules: None) -> Any:
    """Tensors are not traced; those of such sizes could not be made at all."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def edit(native: Path, **changes: Any) -> None:
    path = native / "config.json"
    config = json.loads(path.read_text())
    config["model"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": HUGE},
        {"vocab_size": 2**31 - 1},
        {"vocab_size": 2**31 - 1, "d_model": 2**31 - 2},
        {"d_model": 2**30, "d_ff": 2**30},
        {"d_ff": 10**6},
        {"n_layers": 10**9},
        {"n_layers": MAX_LAYERS, "thresholds": []},
        {"n_layers": 3, "thresholds": []},
        {"n_layers": 10**4000},
        {"max_positions": 2**31 - 1},
        {"position_offset": 2**31 - 1},
        {"n_token_types": 2**31 - 1},
        {"vocab_size": "12"},
        {"vocab_size": 12.0},
        {"vocab_size": True},
        {"vocab_size": None},
        {"vocab_size": [12]},
        {"thresholds": [0, 10**400]},
        {"thresholds": [False, True]},
        {"thresholds": {"0": 1}},
        {"pinned_token_ids": [True]},
        {"pinned_token_ids": [10**30]},
        {"final_norm": 1},
        {"eps": "1e-5"},
        {"eps": 0},
        {"head": {"kind": ["classify"]}},
        {"head": {"kind": "classify", "pooling": "mean", "n_classes": HUGE}},
        {"head": {"kind": "classify", "pooling": "mean", "n_classes": 2**31 - 1}},
        {"head": "classify"},
        {"activation": {}},
    ],
)
def test_absurd_configs(native: Path, changes: dict[str, Any]) -> None:
    edit(native, **changes)
    with pytest.raises(CheckpointError) as error:
        load_any(native)
    assert len(str(error.value)) < 6000


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": {"n_layers": ' + b"9" * 5000 + b"}}",
        b'{"format": "sdt-model", "format": "sdt-model"}',
        b'{"format": "sdt-model", "pinned_share": NaN}',
        b'{"format": "sdt-model", "pinned_share": 1e999}',
        b"\xff\xfe{\x00}\x00",
        b"null",
        b" " * 10_000_000,
    ],
)
def test_what_json_allows(native: Path, content: bytes) -> None:
    (native / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_any(native)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score_quantiles", [0.5]),
        ("score_quantiles", "x" * 101),
        ("score_quantiles", [None] * 101),
        ("pinned_share", "x"),
        ("pinned_share", 2),
        ("pinned_share", True),
        ("provenance", []),
        ("format_version", True),
        ("format_version", 1.0),
        ("format_version", 2),
    ],
)
def test_other_keys(native: Path, key: str, value: Any) -> None:
    config = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=key.replace("_", ".")):
        load_any(native)


def safetensors_file(header: Any, data: bytes = b"") -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        safetensors_file(b"[" * 100_000),
        safetensors_file({"a": F32, "b": F32}, b"abcd"),
        safetensors_file({"a": {**F32, "shape": [HUGE]}}, b"abcd"),
        safetensors_file({"a": {**F32, "data_offsets": [0, 4 * HUGE]}}, b"abcd"),
        safetensors_file({"a": {**F32, "shape": [0, 2**63], "data_offsets": [0, 0]}}),
        safetensors_file({"a": {**F32, "shape": [-1]}}, b"abcd"),
        safetensors_file({"a": {**F32, "dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}),
        safetensors_file({"a": F32}, b"abcd"),
    ],
)
def test_safetensors_headers(native: Path, content: bytes) -> None:
    (native / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_any(native)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.double() * 1e300,
        lambda t: torch.full_like(t, torch.inf),
        lambda t: torch.full_like(t, torch.nan),
        lambda t: t.to(torch.complex64),
        lambda t: t.long(),
        lambda t: t.bool(),
    ],
)
def test_weights_that_are_no_finite_float32(
    native: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    path = native / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["scorer.weight"] = change(tensors["scorer.weight"])
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"scorer\.weight holds values that are not finite"):
        load_any(native)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64])
def test_other_floats_are_read(native: Path, dtype: torch.dtype) -> None:
    path = native / "model.safetensors"
    tensors = {k: t.to(dtype) for k, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)
    weight = load_any(native).model.scorer.weight
    assert torch.equal(weight, tensors["scorer.weight"].float())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_fifo_is_not_waited_for(native: Path, name: str) -> None:
    (native / name).unlink()
    os.mkfifo(native / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_any(native)


@pytest.mark.parametrize(
    "arrays",
    [
        {"input_ids": np.arange(5)},
        {"input_ids": np.arange(5), "cu_seqlens": np.array([0, 5, 2])},
        {"input_ids": np.arange(5), "cu_seqlens": np.array([0, 4])},
        {"input_ids": np.arange(5), "cu_seqlens": np.array(5)},
        {"input_ids": np.arange(5) + 8, "cu_seqlens": np.array([0, 5])},
        {"input_ids": np.arange(5.0), "cu_seqlens": np.array([0, 5])},
        {"input_ids": np.arange(10), "cu_seqlens": np.array([0, 10])},
        {"input_ids": np.arange(0), "cu_seqlens": np.array([0])},
    ],
)
def test_samples(native: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(native / "sample.npz", **arrays)
    with pytest.raises(CheckpointError, match=r"sample\.npz"):
        load_any(native)


def _expanded() -> torch.Tensor:
    return torch.empty(1).expand(HUGE)


@pytest.mark.parametrize(
    "tensor",
    [
        _expanded,
        lambda: torch.empty(HUGE, device="meta"),
        lambda: torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (HUGE,)),
        lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_what_is_stored(
    tmp_path: Path, tensor: Callable[[], torch.Tensor]
) -> None:
    torch.save({**Original(True).state_dict(), "embed.weight": tensor()}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"not dense, or larger .*: embed\.weight"):
        load_any(tmp_path / "odd.pt")


def test_a_compressed_checkpoint(tmp_path: Path) -> None:
    torch.save({**Original(True).state_dict(), "bomb": torch.zeros(10**6)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="packed into"):
        load_any(tmp_path / "b.pt")


def test_altered_bytes_of_a_checkpoint_never_escape(tmp_path: Path) -> None:
    """Cut or altered anywhere: a typed error, or tensors that pass every check."""
    torch.save(Original(True).state_dict(), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    rng = np.random.default_rng(0)
    refused, n = 0, 400 if THOROUGH else 20
    for position in rng.integers(0, len(content), n):
        altered = bytearray(content)
        altered[position] ^= int(rng.integers(1, 256))
        for bad in (bytes(altered), content[:position]):
            (tmp_path / "b.pt").write_bytes(bad)
            try:
                load_any(tmp_path / "b.pt")
            except CheckpointError:
                refused += 1
    assert refused >= n


def test_a_checkpoint_with_a_member_whose_name_is_not_text(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("Größe", b"")  # marked as UTF-8
    content = (tmp_path / "b.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(content.replace("ö".encode(), b"\xff\xff"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_any(tmp_path / "b.pt")


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 5000), Path("a\0b"), Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(CheckpointError):
            load_any(path)
