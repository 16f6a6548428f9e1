"""NumPy files from anyone: nothing is allocated on the word of a header."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sdt_deploy.arrays import read_npy, read_npz


def header(shape: tuple[int, ...], descr: str = "<i4") -> bytes:
    stream = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


BAD_NPY = {
    "nothing": b"",
    "no header": b"x" * 100,
    "terabytes": header((10**12,)) + b"abcd",
    "more than 64 bits": header((10**30,)) + b"abcd",
    "a product that wraps": header((2**62, 4)) + b"abcd",
    "no rows, endless columns": header((2**62, 2**62, 0)) + b"abcd",
    "negative": header((-1,)) + b"abcd",
    "cut": header((3,)) + b"abcdabcd",
    "more than it says": header((1,)) + b"abcdabcd",
    "objects": header((1,), "|O") + b"abcdabcd",
    "endless text": header((1,), "<U1000000000") + b"abcd",
    "header beyond the end": b"\x93NUMPY\x01\x00\xff\xff",
    "not Python": b"\x93NUMPY\x01\x00\x05\x00{{{{{",
    "deep": b"\x93NUMPY\x02\x00" + struct.pack("<I", 5000) + b"(" * 5000,
    "a call": b"\x93NUMPY\x01\x00\x0a\x00print('x')",
    "version 9": b"\x93NUMPY\x09\x00\x05\x00{{{{{",
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_bad_headers(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.npy").write_bytes(BAD_NPY[name])
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", BAD_NPY[name])
    tracemalloc.start()
    with pytest.raises(ValueError):  # noqa: PT011 - the message differs
        read_npy(tmp_path / "x.npy")
    with pytest.raises(ValueError):  # noqa: PT011
        read_npz(tmp_path / "x.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.zeros((0, 3)),
        np.array(7, dtype=">i2"),
    ],
)
def test_what_numpy_writes_is_read(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", a=array, b=array)
    for found in (read_npy(tmp_path / "x.npy"), *read_npz(tmp_path / "x.npz").values()):
        np.testing.assert_array_equal(found, array, strict=True)


def test_zip_bombs(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header((25_000_000,)) + bytes(10**8))
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match="compressed"):
        read_npz(path)
    content = header((2500,)) + bytes(10**4)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content)
        for i in range(50):  # fifty names for the same bytes
            member = zipfile.ZipInfo(f"{i}.npy")
            member.CRC, member.file_size = archive.filelist[0].CRC, len(content)
            member.compress_size, member.header_offset = len(content), 0
            archive.filelist.append(member)
            archive.NameToInfo[member.filename] = member
    with pytest.raises(ValueError, match="more bytes than it has"):
        read_npz(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "none", Path("/dev/zero"), Path("a\0b")):
        for read in (read_npy, read_npz):
            with pytest.raises(OSError):  # noqa: PT011
                read(path)
