"""Engines that were built before, by the hash of everything that they depend on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

from sdt_deploy.engines import EngineSpec
from sdt_deploy.errors import ConfigError, OutputError
from sdt_deploy.files import MAX_JSON_BYTES, parse_json, read_bytes, sha256, write_file


def default_cache() -> Path:
    """Return the user's cache folder for engines, by the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sdt-deploy" / "engines"


class EngineCache:
    """A folder of engines; it may be shared, and may be removed at any time.

    Raises:
        OutputError: if it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise OutputError(
                f"the engine cache {directory} cannot be written: {error}. Name another with "
                "--cache, or build with --no-cache"
            ) from error

    def _engine(self, key: str) -> Path:
        return self.directory / f"{key}.engine"

    def _entry(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    def get(self, key: str, target: Path) -> EngineSpec | None:
        """Copy an engine to ``target`` and return how it was built; None if it is not there.

        An entry that is damaged counts as not there; then ``target`` is not there either.
        """
        try:
            entry = parse_json(read_bytes(self._entry(key), max_bytes=MAX_JSON_BYTES))
            spec = EngineSpec(**entry)
            shutil.copyfile(self._engine(key), target)
            if spec.key == key and sha256(target) == spec.sha256:
                return spec
        except (OSError, ValueError, TypeError, ConfigError):
            pass
        target.unlink(missing_ok=True)
        return None

    def put(self, spec: EngineSpec, engine: Path) -> None:
        """Keep an engine.

        Raises:
            OutputError: if it cannot be written.
        """
        temporary = self.directory / f".{spec.key}.{os.getpid()}"
        try:
            shutil.copyfile(engine, temporary)
            temporary.replace(self._engine(spec.key))
            write_file(self._entry(spec.key), json.dumps(dataclasses.asdict(spec)).encode())
        except OSError as error:
            raise OutputError(f"the engine cache {self.directory}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
