"""Recipes: Python files, loaded by path, whose functions return a config.

Nothing has to be importable under the name of a recipe's folder: the file is loaded under a private module
name and `sys.path` stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from vlmamba.config.base import Change, Config, diff_configs, load_yaml
from vlmamba.config.files import find_file, load_python_file
from vlmamba.config.overrides import apply_overrides, parse_overrides
from vlmamba.config.values import from_text, is_config
from vlmamba.errors import ConfigError, MissingFileError
from vlmamba.registry import check_named, close_matches, users_words


class Recipe(NamedTuple):
    """A config, where it came from, and what the command line changed."""

    config: Any
    changes: list[Change]
    """Differences from the recipe as written."""
    path: Path
    function: str
    """Name of the function, or an empty string for a run's ``config.yaml``."""


def load_recipe(
    spec: str, arguments: Sequence[str] = (), *, folder: str | Path = "train", default: str | None = None
) -> Recipe:
    """Load the config that a recipe describes.

    Args:
        spec: ``path/to/file.py:function``, ``name:function`` for ``<folder>/name.py`` under the current
            directory, the same without ``:function`` where `default` or the file leaves no choice, or a
            ``config.yaml`` of a run.
        arguments: Command-line words. Flags named as a parameter of the function (``--connector qmamba``)
            are passed to it; all others are dotted overrides of the config.
        folder: Where recipes given by name alone live.
        default: Function taken when `spec` names none.

    Raises:
        ConfigError: There is no such recipe or function (with close matches and what there is), the function
            does not return a config, or an override does not fit.
        MissingFileError: A path was given and there is no such file.
    """
    name, function_name = _split_spec(spec)
    path = _resolve(name, Path(folder))
    flags = parse_overrides(arguments)
    if path.suffix in (".yaml", ".yml"):
        written = load_yaml(path)
        for named in written.code():
            check_named(named, f"{path}: the function")
        with users_words():
            config, changes = apply_overrides(written, flags)
        return Recipe(config, changes, path, "")
    functions = recipe_functions(path)
    function = _pick(functions, function_name or default, path)
    keywords, required = _keywords(function, flags, path)
    with users_words():
        written = function(**required)
        config = function(**keywords) if keywords != required else written
        if not isinstance(config, Config):
            raise ConfigError(f"{path}:{function.__name__} returned {type(config).__name__}, not a config.")
        final = apply_overrides(config, flags).config
    return Recipe(final, diff_configs(written, final), path, function.__name__)


def _split_spec(spec: str) -> tuple[str, str | None]:
    name, colon, function = spec.rpartition(":")
    if not colon or not function.isidentifier() or len(name) == 1:  # "C:\..." is a drive, not a recipe
        return spec, None
    return name, function


def _resolve(name: str, folder: Path) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or (path / "config.yaml").is_file():
        file = path if path.suffix else path / "config.yaml"
        if not file.is_file():
            raise MissingFileError(f"there is no recipe file {file} (looked in {Path.cwd()}).")
        return file
    return find_file(name, folder, "recipe", "my/recipe.py:finetune")


def recipe_functions(path: str | Path) -> dict[str, Callable[..., Any]]:
    """The functions of a file that are recipes: public, defined there, and not annotated to return something
    else.
    """
    module = load_python_file(Path(path), "recipe")
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and is_config(get_type_hints(value).get("return", Config))
    }


def _pick(functions: dict[str, Callable[..., Any]], name: str | None, path: Path) -> Callable[..., Any]:
    names = list(functions)
    if not names:
        raise ConfigError(f"{path} defines no function that returns a config, hence no recipe.")
    listing = ", ".join(names)
    if name is None:
        if len(names) > 1:
            raise ConfigError(
                f"{path} holds several recipes: {listing}. Name one, for example {path}:{names[0]}."
            )
        name = names[0]
    if name not in functions:
        raise ConfigError(f"{path} has no recipe {name!r}.{close_matches(name, names)} It has: {listing}.")
    return functions[name]


def _keywords(
    function: Callable[..., Any], flags: dict[str, str], path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the flags meant for the recipe's own parameters out of `flags`: all of them, and the required
    ones.
    """
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters
    given: dict[str, Any] = {}
    required: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in flags:
            given[name] = from_text(flags.pop(name), hints.get(name, str), name)
        if parameter.default is inspect.Parameter.empty:
            if name not in given:
                raise ConfigError(f"{path}:{function.__name__} needs --{name} on the command line.")
            required[name] = given[name]
    returned = hints.get("return")
    fields = list(returned.field_types()) if returned is not None and is_config(returned) else []
    for flag in flags:
        if "." not in flag and fields and flag not in fields:
            names = list({*parameters, *fields})
            own = ", ".join("--" + p for p in parameters) or "no flags of its own"
            raise ConfigError(
                f"unknown flag --{flag}.{close_matches(flag, names)} {path}:{function.__name__} takes "
                f"{own}; all others are dotted keys of the config."
            )
    return given, required
