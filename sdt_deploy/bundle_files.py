"""The files that a bundle lists: their names, sizes and hashes."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdt_deploy.config import is_integer, shown
from sdt_deploy.errors import BundleFormatError, BundleIntegrityError, ConfigError
from sdt_deploy.files import MAX_JSON_BYTES, check_utf8, read_bytes, sha256

MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifest(directory: Path) -> tuple[Path, bytes]:
    """Return the absolute path of a bundle and what its manifest holds, unchecked.

    Absolute, since a process may change its directory, as daemons do.

    Raises:
        BundleFormatError: if there is no manifest, or it cannot be read.
    """
    try:
        directory = directory.absolute()
        check_utf8(directory)
        return directory, read_bytes(directory / MANIFEST, max_bytes=MAX_JSON_BYTES)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EMFILE, errno.ENFILE):
            raise BundleFormatError(f"{directory} cannot be read: {error}") from error
        hint = ""
        if (directory / "config.json").is_file():
            hint = f"; it looks like a model: sdt-deploy export {directory} BUNDLE makes one"
        raise BundleFormatError(f"{directory} is not a bundle: {error}{hint}") from error


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Return :attr:`Manifest.files` for everything in ``directory`` but the manifest."""
    return {
        path.relative_to(directory).as_posix(): {
            "sha256": sha256(path),
            "size_bytes": path.stat().st_size,
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def typed(what: str, value: Any, kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """Return ``value``, which is of a kind that JSON has.

    Raises:
        ConfigError: if it is not.
    """
    if not isinstance(value, kind):
        name = "an object" if kind is dict else "a list"
        raise ConfigError(f"{what} must be {name}, not {shown(value)}")
    return value


def check_inside(name: str) -> None:
    """Check that a listed name stays in the bundle.

    Raises:
        BundleIntegrityError: if it does not.
    """
    parts = name.split("/")
    if not all(parts) or ".." in parts or "." in parts or "\\" in name or ":" in name:
        raise BundleIntegrityError(f"the manifest names a file outside the bundle: {name!r}")


def check_entry(name: str, entry: Any) -> None:
    """Check what the manifest says of a file.

    Raises:
        ConfigError: if that is no hash and size.
    """
    if name == MANIFEST:
        raise ConfigError(f"files: {MANIFEST} cannot list itself")
    entry = typed(f"files: {name}", entry, dict)
    digest = entry["sha256"]
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ConfigError(
            f"files: sha256 of {name} must be 64 hexadecimal digits, not {shown(digest)}"
        )
    if not is_integer(entry["size_bytes"], 0, 2**63 - 1):
        raise ConfigError(
            f"files: size_bytes of {name} must be a size, not {shown(entry['size_bytes'])}"
        )


def check_file(
    directory: Path, name: str, expected: Mapping[str, Any], check_content: bool
) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        BundleIntegrityError: if it is missing or another.
    """
    path = directory / name
    if not path.is_file():
        raise BundleIntegrityError(f"{path} is missing or not a regular file")
    if path.resolve() != directory.resolve() / name:
        raise BundleIntegrityError(
            f"{path} is a symbolic link, or lies behind one; a bundle holds its files itself. Copy "
            "it with cp -rL, or, from a model hub, download it into a local directory"
        )
    size = path.stat().st_size
    if size != expected["size_bytes"]:
        raise BundleIntegrityError(
            f"{path} has {size} bytes, the manifest says {expected['size_bytes']}"
        )
    if check_content and sha256(path) != expected["sha256"]:
        raise BundleIntegrityError(f"{path} was altered after the export: SHA-256 mismatch")
