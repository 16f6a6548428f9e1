"""Optional dependencies: import them when they are needed, or say which command installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from sdt_deploy.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, which the optional dependency group ``extra`` installs.

    Raises:
        MissingExtraError: one sentence that names the pip command, if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f'{purpose} needs {module}, which is not installed: pip install "sdt-deploy[{extra}]"'
        ) from error
