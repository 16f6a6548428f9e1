"""NumPy files from anyone: what a header claims is compared with the file before memory is taken.

Arrays lie uncompressed in the file, as ``numpy.savez`` writes them, so none can be larger than it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from typing import IO
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np

from sdt_deploy.files import read_bytes

MAX_ARRAY_BYTES = 2**32
"""Largest ``.npy`` or ``.npz`` file that is read."""
_HEADERS: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npy(path: Path) -> np.ndarray:
    """Read a ``.npy`` file.

    Raises:
        ValueError: if it is none, or its header does not fit its size.
        OSError: if it cannot be read.
    """
    content = read_bytes(path, max_bytes=MAX_ARRAY_BYTES)
    return _array(io.BytesIO(content), len(content))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a ``.npz`` file.

    Raises:
        ValueError: if it is none, holds compressed arrays, or a header does not fit its size.
        OSError: if it cannot be read.
    """
    content = read_bytes(path, max_bytes=MAX_ARRAY_BYTES)
    arrays = {}
    try:
        with ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if any(member.compress_type != ZIP_STORED for member in members):
                raise ValueError("it holds compressed arrays; numpy.savez writes what is expected")
            if sum(member.file_size for member in members) > len(content):
                raise ValueError("it claims to hold more bytes than it has")
            for member in members:
                with archive.open(member) as stream:
                    name = member.filename.removesuffix(".npy")
                    arrays[name] = _array(stream, member.file_size)
    except (BadZipFile, RuntimeError, NotImplementedError) as error:  # encrypted, later versions
        raise ValueError(str(error)) from error
    return arrays


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"version {version} of the .npy format is not read")
        shape, fortran_order, dtype = _HEADERS[version](stream)
    except (TokenError, SyntaxError, RecursionError, TypeError, OverflowError) as error:
        raise ValueError(f"it has no header of a .npy file: {error}") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    rest = size - stream.tell()
    if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != rest:
        raise ValueError(f"its header says {dtype} of shape {shape}, and {rest} bytes follow")
    flat = np.frombuffer(stream.read(rest), dtype=dtype, count=math.prod(shape))
    return flat.reshape(shape, order="F" if fortran_order else "C").copy()
