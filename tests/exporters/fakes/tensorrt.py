"""In the place of NVIDIA's module, for processes that have this directory on their path."""

import os
from typing import Any

from tests.exporters.fake_builder import BuildingLibrary

_library = BuildingLibrary(os.environ["FAKE_TENSORRT"])
__version__ = _library.number


def __getattr__(name: str) -> Any:
    return getattr(_library, name)
