"""Python files of users (recipes, tasks), loaded by path."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from vlmamba.errors import ConfigError


def load_python_file(path: str | Path, kind: str) -> ModuleType:
    """Run a Python file and return its module.

    The module gets a private name, so no folder has to be importable and `sys.path` stays as it is.

    Args:
        path: The file.
        kind: What it is ("recipe"), part of the private name.

    Raises:
        ConfigError: It is not Python; the message has the line.
    """
    resolved = Path(path).resolve()
    name = f"_vlmamba_{kind}_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be loaded as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and annotations of the file are resolved through it
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}.") from error
    return module
