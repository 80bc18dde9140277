"""Python files of users (recipes, tasks), loaded by path."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from vlmamba.errors import ConfigError, MissingFileError
from vlmamba.registry import close_matches


def names_in(folder: str | Path) -> list[str]:
    """Names of the Python files in a folder, but for those that begin with an underscore."""
    return sorted(p.stem for p in Path(folder).glob("*.py") if not p.stem.startswith("_"))


def find_file(name: str, folder: str | Path, kind: str, example: str) -> Path:
    """The file that a name in a folder, or a path, means.

    Args:
        name: ``pope`` for ``<folder>/pope.py``, or a path with a folder or the suffix .py.
        folder: Where files given by name alone live, under the current directory.
        kind: What it is ("recipe"), for messages.
        example: A path that would do, for messages.

    Raises:
        ConfigError: There is no file of this name; the message lists what there is.
        MissingFileError: A path was given and there is no such file.
    """
    if is_path(name):
        if not Path(name).is_file():
            raise MissingFileError(f"there is no {kind} file {name} (looked in {Path.cwd()}).")
        return Path(name)
    found = names_in(folder)
    if name not in found:
        raise unknown_name(name, found, folder, kind, example)
    return Path(folder) / f"{name}.py"


def is_path(name: str) -> bool:
    """Whether a word is a path of a file rather than a name in a folder."""
    return Path(name).suffix == ".py" or len(Path(name).parts) > 1


def unknown_name(name: str, found: list[str], folder: str | Path, kind: str, example: str) -> ConfigError:
    """The error for a name that no file of a folder has."""
    where = f"{folder}/ under {Path.cwd()}"
    listing = f"Found in {where}: {', '.join(found)}." if found else f"There is no {kind} in {where}."
    return ConfigError(
        f"unknown {kind} {name!r}.{close_matches(name, found)} {listing} A path such as {example} works too."
    )


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
