"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sdt_deploy.errors import OutputError


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_tree(directory: Path) -> None:
    """Flush every file under ``directory``, and the directory itself, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def new_directory(
    target: Path, *, marker: tuple[str, str], overwrite: bool = False
) -> Iterator[Path]:
    """Yield a temporary directory beside ``target`` that becomes ``target`` on success.

    On an exception nothing remains, and what stood at ``target`` before stays.

    Args:
        target: directory to make.
        marker: name of a JSON file and the value of ``format`` in it, by which a directory of the
            same kind is known; only such a one, or an empty one, is ever replaced.
        overwrite: replace ``target`` if it exists.

    Raises:
        OutputError: if ``target`` exists and must not be replaced, or cannot be written.
    """
    if target.exists():
        if not overwrite:
            raise OutputError(f"{target} exists already; choose another path or pass --overwrite")
        if not _is_replaceable(target, marker):
            raise OutputError(
                f"{target} will not be replaced: it is neither empty nor a directory with a "
                f"{marker[0]} of format {marker[1]!r}. Choose another path or remove it yourself"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from error
    try:
        temporary.chmod(0o755)
        yield temporary
        sync_tree(temporary)
        if target.exists() and not overwrite:
            raise OutputError(f"{target} exists already: it was made while this was being written")
        _replace_directory(temporary, target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_replaceable(target: Path, marker: tuple[str, str]) -> bool:
    name, kind = marker
    try:
        if not any(target.iterdir()):
            return True
        content = json.loads((target / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == kind


def _replace_directory(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(aside / target.name)
    try:
        source.rename(target)
    except BaseException:
        (aside / target.name).rename(target)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_file(target: Path, content: bytes) -> None:
    """Write ``target`` whole or not at all, replacing what was there.

    Raises:
        OutputError: if it cannot be written; what was there before stays.
    """
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
