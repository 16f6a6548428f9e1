"""Files: read within bounds, written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdt_deploy.errors import OutputError

MAX_JSON_BYTES = 2**23
"""Largest manifest or configuration that is read; the largest known have less than a megabyte."""
_PARTIAL = ".partial"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Read a regular file.

    Raises:
        OSError: if it cannot be read, is no regular file (a FIFO is not waited for) or has more
            than ``max_bytes``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > max_bytes:
            reason = f"it has {status.st_size} bytes, at most {max_bytes} are read"
            raise OSError(errno.EFBIG, reason, str(path))
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(status.st_size)
    finally:
        os.close(descriptor)


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8 strictly: no key twice in one object, no NaN, no infinity.

    Raises:
        ValueError: if it is not such JSON, or nested too deeply.
    """
    try:
        return json.loads(
            content.decode(),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_partial(directory: Path) -> bool:
    """Tell whether ``directory`` is what a killed writer left behind, by its name."""
    name = directory.resolve().name
    return name.startswith(".") and name.endswith(_PARTIAL)


def sync_tree(directory: Path) -> None:
    """Flush every file under ``directory``, and the directory itself, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_parent(path: Path) -> None:
    # What was renamed is whole already; a parent that cannot be opened for reading is no failure.
    with contextlib.suppress(OSError):
        _sync(path.parent)


@contextlib.contextmanager
def new_directory(
    target: Path, *, marker: tuple[str, str], overwrite: bool = False
) -> Iterator[Path]:
    """Yield a temporary directory beside ``target`` that becomes ``target`` on success.

    On an exception nothing remains, and what stood at ``target`` before stays. A process that is
    killed may leave the temporary directory, ``.NAME.….partial``, see :func:`is_partial`.

    Args:
        target: directory to make.
        marker: name of a JSON file and the value of ``format`` in it, by which a directory of the
            same kind is known; only such a one, or an empty one, is ever replaced.
        overwrite: replace ``target`` if it exists.

    Raises:
        OutputError: if ``target`` exists and must not be replaced, or cannot be written.
    """
    temporary = None
    try:
        place = _checked(target, marker, overwrite)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(place)
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        if _checked(target, marker, overwrite) != place:
            raise OutputError(f"{target} leads elsewhere than when this was begun; try again")
        try:
            _put_in_place(temporary, place, overwrite=overwrite)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _checked(target, marker, overwrite)  # another writer came between: as if it had before
            raise
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            _remove(temporary)


def check_utf8(path: Path) -> None:
    """Check that a path can be given to libraries that take UTF-8 only, as ONNX Runtime does.

    Raises:
        OSError: if it cannot.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        reason = "the path is not UTF-8, which ONNX Runtime needs"
        raise OSError(errno.EILSEQ, reason, os.fsencode(path)) from error


def check_replaceable(target: Path, marker: tuple[str, str], *, overwrite: bool) -> None:
    """Check, before long work, that :func:`new_directory` could put something at ``target``.

    Raises:
        OutputError: if it could not, as far as that can be told without writing.
    """
    try:
        _checked(target, marker, overwrite)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from error


def check_writable(target: Path) -> None:
    """Check, before long work, that :func:`write_file` could write ``target``.

    Raises:
        OutputError: if it could not. The folder of ``target`` is made, as it will be needed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except (OSError, ValueError) as error:
        raise OutputError(f"{target} cannot be written: {error}") from error


def _temporary(place: Path) -> Path:
    """Name what is to become ``place``; known before it is made, so a signal finds it to remove."""
    return place.with_name(f".{place.name[:40]}.{secrets.token_hex(8)}{_PARTIAL}")


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except BaseException:  # a signal: finish first
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _checked(target: Path, marker: tuple[str, str], overwrite: bool) -> Path:
    """Return where ``target`` leads, links followed, if it is free or may be replaced."""
    try:
        place = target.resolve()
    except (RuntimeError, ValueError) as error:  # a loop of links (Python < 3.13), a NUL
        raise OSError(errno.EINVAL, str(error), str(target)) from error
    check_utf8(place)
    if is_partial(place):
        raise OutputError(
            f"{target} has a name of temporary directories (.….partial); choose another"
        )
    if not os.path.lexists(place):
        return place
    if not overwrite:
        raise OutputError(f"{target} exists already; choose another path or pass --overwrite")
    if not _is_replaceable(place, marker):
        raise OutputError(
            f"{target} will not be replaced: it is neither empty nor a directory with a "
            f"{marker[0]} of format {marker[1]!r}. Choose another path or remove it yourself"
        )
    return place


def _is_replaceable(target: Path, marker: tuple[str, str]) -> bool:
    name, kind = marker
    try:
        if not any(target.iterdir()):
            return True
        content = parse_json(read_bytes(target / name, max_bytes=MAX_JSON_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == kind


def _put_in_place(source: Path, target: Path, *, overwrite: bool) -> None:
    """Move the directory ``source`` to ``target``, which is free or, to overwrite, one to replace.

    An existing ``target`` is exchanged with ``source`` in one step, so there is one at any moment,
    the old or the new. Where the system cannot do that (Linux can, on almost every file system),
    the old one is moved aside first, and a kill between the two steps leaves it under the name
    ``.NAME.….partial``; an exception puts it back.
    """
    if not overwrite or not target.exists():
        source.rename(target)  # fails where another writer has put something since
    elif not _exchange(source, target):
        aside = _temporary(target)
        try:
            target.rename(aside)
            source.rename(target)
        finally:
            if os.path.lexists(target):
                _remove(aside)
            else:
                aside.rename(target)
    _sync_parent(target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two directories in one step; False where the system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(second))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[..., int] | None = getattr(
        ctypes.CDLL(None, use_errno=True), "renameat2", None
    )
    return function


def write_file(target: Path, content: bytes) -> None:
    """Write ``target`` whole or not at all, replacing what was there.

    Raises:
        OutputError: if it cannot be written; what was there before stays.
    """
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target)
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(target)
        _sync_parent(target)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or no name at all
        raise OutputError(f"{target} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
