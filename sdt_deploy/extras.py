"""Optional dependencies: import them when they are needed, or say which command installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from sdt_deploy.errors import BackendError, MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, which the optional dependency group ``extra`` installs.

    Raises:
        MissingExtraError: one sentence that names the pip command, if the module is not installed.
        BackendError: if it is, and something that it needs in turn is not.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        top = module.split(".")[0]
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == top:
            raise MissingExtraError(
                f"{purpose} needs {module}, which is not installed: pip install "
                f'"sdt-deploy[{extra}]"'
            ) from error
        raise BackendError(f"{module} is installed and cannot be loaded: {error}") from error
