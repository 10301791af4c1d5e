"""torch-fidelity 0.4.0 without torchvision: its modules one by one, its `__init__` left out."""

import importlib
import importlib.util
import sys
import types
from typing import Any


def module(name: str) -> Any:
    """The module torch_fidelity.NAME. The package's `__init__` would import torchvision."""
    if "torch_fidelity" not in sys.modules:
        found = importlib.util.find_spec("torch_fidelity")
        if found is None:
            raise ImportError("no torch-fidelity: `make oracles` installs it")
        package = types.ModuleType("torch_fidelity")
        package.__path__ = list(found.submodule_search_locations or ())
        sys.modules["torch_fidelity"] = package
    return importlib.import_module(f"torch_fidelity.{name}")
