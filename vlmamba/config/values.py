"""Checking and converting plain values against type annotations.

The annotations a `Config` may use: bool, int, float, str, Path, Enum, Literal, `X | None` and other unions,
`tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`, Any, and other Configs. Everything here names the dotted path
of what is wrong.
"""

from __future__ import annotations

import enum
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from vlmamba.errors import ConfigError
from vlmamba.registry import close_matches

NONE_WORDS = ("none", "null", "~")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number, as in YAML 1.2 (PyYAML alone reads it as text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """YAML text as plain Python values; raises `yaml.YAMLError` when it is not YAML."""
    return yaml.load(text, Loader=_Loader)


def is_config(annotation: Any) -> bool:
    """Whether an annotation is a Config class."""
    from vlmamba.config.base import Config

    return isinstance(annotation, type) and issubclass(annotation, Config)


def is_union(annotation: Any) -> bool:
    """Whether an annotation is a union, written either way."""
    return get_origin(annotation) in (Union, types.UnionType)


def type_name(annotation: Any) -> str:
    """An annotation as a user would write it."""
    if annotation is type(None):
        return "None"
    if is_union(annotation):
        return " | ".join(type_name(a) for a in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " | ".join(repr(a) for a in get_args(annotation))
    if get_origin(annotation) is not None:
        inner = ", ".join("..." if a is Ellipsis else type_name(a) for a in get_args(annotation))
        return f"{get_origin(annotation).__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def to_plain(value: Any) -> Any:
    """A field's value as dicts, lists, strings and numbers."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    return value


def from_plain(value: Any, annotation: Any, path: str) -> Any:
    """Convert a plain value to what the annotation asks for.

    Args:
        value: From YAML, JSON or Python.
        annotation: A resolved type annotation.
        path: Dotted path of the value, for messages.

    Raises:
        ConfigError: The value is of another type; names the path, the type expected and the value.
    """
    if annotation is Any:
        return value
    if is_union(annotation):
        return _from_union(value, annotation, path)
    if is_config(annotation):
        if isinstance(value, annotation):
            return value
        if not isinstance(value, Mapping):
            raise wrong_type(value, annotation, path)
        return annotation.from_dict(value, path=path)
    origin = get_origin(annotation)
    if origin is Literal:
        for choice in get_args(annotation):
            if value == choice and type(value) is type(choice):
                return choice
        raise _unknown_choice(value, list(get_args(annotation)), path)
    if origin is tuple:
        return _from_sequence(value, annotation, path)
    if origin is dict or annotation is dict:
        return _from_mapping(value, annotation, path)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        for member in annotation:
            if value is member or value == member.value:
                return member
        raise _unknown_choice(value, [m.value for m in annotation], path)
    return _from_scalar(value, annotation, path)


def _from_scalar(value: Any, annotation: Any, path: str) -> Any:
    if annotation is type(None) and value is None:
        return None
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if isinstance(annotation, type) and isinstance(value, annotation):
        if annotation in (int, float) and isinstance(value, bool):
            raise wrong_type(value, annotation, path)
        return value
    raise wrong_type(value, annotation, path)


def _from_union(value: Any, annotation: Any, path: str) -> Any:
    options = get_args(annotation)
    if value is None and type(None) in options:
        return None
    rest = [a for a in options if a is not type(None)]
    if len(rest) == 1:
        return from_plain(value, rest[0], path)
    for exact in rest:
        if isinstance(exact, type) and type(value) is exact:
            return value
    for option in rest:
        try:
            return from_plain(value, option, path)
        except ConfigError:
            continue
    raise wrong_type(value, annotation, path)


def _from_sequence(value: Any, annotation: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise wrong_type(value, annotation, path)
    arguments = get_args(annotation)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(from_plain(v, arguments[0], f"{path}.{i}") for i, v in enumerate(value))
    if len(value) != len(arguments):
        raise ConfigError(
            f"{path}: expected {len(arguments)} values, {type_name(annotation)}; got {value!r}."
        )
    return tuple(
        from_plain(v, a, f"{path}.{i}") for i, (v, a) in enumerate(zip(value, arguments, strict=True))
    )


def _from_mapping(value: Any, annotation: Any, path: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise wrong_type(value, annotation, path)
    arguments = get_args(annotation) or (str, Any)
    return {
        from_plain(k, arguments[0], f"{path} (a key)"): from_plain(v, arguments[1], f"{path}.{k}")
        for k, v in value.items()
    }


def from_text(text: str, annotation: Any, path: str) -> Any:
    """Convert the text of a command-line override to what the annotation asks for.

    ``none`` is None where None is allowed; tuples are comma lists or YAML lists; Configs and dicts are YAML
    mappings.

    Raises:
        ConfigError: The text does not say a value of that type.
    """
    if is_union(annotation):
        options = get_args(annotation)
        if type(None) in options and text.strip().lower() in NONE_WORDS:
            return None
        rest = [a for a in options if a is not type(None)]
        if len(rest) == 1:
            return from_text(text, rest[0], path)
        is_list = text.strip().startswith("[") or "," in text
        for option in sorted(rest, key=lambda a: a is str):
            if get_origin(option) is tuple and not is_list:
                continue
            try:
                return from_text(text, option, path)
            except ConfigError:
                continue
        raise wrong_type(text, annotation, path)
    if annotation in (str, Path):
        return annotation(text)
    if annotation is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{path}: expected true or false, got {text!r}.")
        return text.lower() == "true"
    if get_origin(annotation) is tuple:
        return from_plain(_split_list(text, annotation, path), annotation, path)
    if get_origin(annotation) is Literal and text in get_args(annotation):
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {text!r} is not valid YAML: {error}") from error
    if annotation is not Any and isinstance(value, str) and value.lower() in ("inf", "-inf", "nan"):
        value = float(value)
    return from_plain(value, annotation, path)


def _split_list(text: str, annotation: Any, path: str) -> Any:
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            value = parse_yaml(stripped)
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: {text!r} is not a valid YAML list: {error}") from error
        if isinstance(value, list):
            return value
    parts = [p.strip() for p in stripped.split(",") if p.strip()]
    arguments = get_args(annotation)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return [from_text(p, arguments[0], f"{path}.{i}") for i, p in enumerate(parts)]
    if len(parts) != len(arguments):
        raise ConfigError(
            f"{path}: expected {len(arguments)} values ({type_name(annotation)}), got {text!r}."
        )
    return [from_text(p, a, f"{path}.{i}") for i, (p, a) in enumerate(zip(parts, arguments, strict=True))]


def wrong_type(value: Any, annotation: Any, path: str) -> ConfigError:
    """The error for a value of the wrong type."""
    return ConfigError(
        f"{path or 'config'}: expected {type_name(annotation)}, got {value!r} ({type(value).__name__})."
    )


def _unknown_choice(value: Any, choices: list[Any], path: str) -> ConfigError:
    hint = close_matches(value, [str(c) for c in choices]) if isinstance(value, str) else ""
    return ConfigError(f"{path}: {value!r} is not one of {', '.join(repr(c) for c in choices)}.{hint}")
