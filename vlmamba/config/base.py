"""The `Config` base class, its YAML form on disk, and the difference of two configs.

Configs are Python: a recipe is a function that returns one. The files on disk are output, written so that a
run can be repeated from its own `config.yaml`.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NamedTuple,
    Self,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from vlmamba.config.values import from_plain, is_config, is_union, parse_yaml, to_plain, type_name
from vlmamba.errors import ConfigError, MissingFileError
from vlmamba.registry import close_matches

CLASS_KEY = "class"
FREE, LATER = "may change at a resume", "came later"

T = TypeVar("T")
Free = Annotated[T, FREE]
"""Type of a setting that may change at a resume, since it changes no result beyond rounding: ``every: Free[int]``."""
Later = Annotated[T, LATER]
"""Type of a setting that came after the first runs; at its default they are what they were."""

POSITIVE, NOT_NEGATIVE, SHARE = "must be positive", "must not be negative", "is a share from 0 to 1"
Positive = Annotated[T, POSITIVE]
NotNegative = Annotated[T, NOT_NEGATIVE]
Share = Annotated[T, SHARE]
"""Types of numbers within bounds (or None, where that is allowed)."""


class Change(NamedTuple):
    """One difference between two configs."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: {_show(self.old)} -> {_show(self.new)}"


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Config:
    """Base of all configs: every subclass is a frozen, keyword-only dataclass without writing the decorator.

    Fields are documented by a string under each; `describe` and the command line's help show it. Bounds are declared
    in a field's type (`Positive`, `NotNegative`, `Share`); checks between fields belong in `__post_init__` and raise
    `ConfigError`.

    Args:
        at: Dotted path of the config in its recipe, for messages about bounds.
    """

    def __init_subclass__(cls, at: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own_checks = vars(cls).get("__post_init__")

        def check(self: Config) -> None:
            for name, marks in _bounds(cls).items():  # type: ignore[arg-type]
                value = getattr(self, name)
                inside = value is None or (value > 0 if POSITIVE in marks else value >= 0)
                if not inside or (SHARE in marks and value > 1):
                    says = next(m for m in (POSITIVE, NOT_NEGATIVE, SHARE) if m in marks)
                    raise ConfigError(f"{_join(at, name)} {says}, got {value}.")
            if own_checks is not None:
                own_checks(self)

        cls.__post_init__ = check  # type: ignore[attr-defined]
        for name, value in list(vars(cls).items()):
            if isinstance(value, dict) and not name.startswith("__"):
                # Each config gets its own copy of a dict default.
                setattr(cls, name, dataclasses.field(default_factory=functools.partial(copy.deepcopy, value)))
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; checks run again.

        Raises:
            ConfigError: There is no such field.
        """
        for name in changes:
            self._require_field(name, "")
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def code(self) -> list[str]:
        """Functions that it names and that will be run, ``path/to/file.py:function`` or ``package.module:function``."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: what JSON and YAML can hold."""
        return {name: to_plain(getattr(self, name)) for name in self.field_types()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str = "") -> Self:
        """Build from plain values, the inverse of `to_dict`.

        Args:
            values: Field names to values; fields with a default may be left out.
            path: Dotted path of this config inside another, for messages.

        Raises:
            ConfigError: A key is unknown, a value is of the wrong type, or a required field is missing.
        """
        annotations = cls.field_types()
        for name in values:
            cls._require_field(name, path)
        fields = cls._fields()
        missing = [n for n, f in fields.items() if n not in values and _is_required(f)]
        if missing:
            raise ConfigError(f"{path or cls.__name__}: missing {', '.join(missing)} (of {cls.__name__}).")
        return cls(**{n: from_plain(v, annotations[n], _join(path, n)) for n, v in values.items()})

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Field names to resolved type annotations, in order."""
        return _annotations(cls)  # type: ignore[arg-type]

    @classmethod
    def _fields(cls) -> dict[str, dataclasses.Field[Any]]:
        return {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def _require_field(cls, name: str, path: str) -> None:
        known = list(cls.field_types())
        if name not in known:
            raise ConfigError(
                f"unknown key {_join(path, name)!r}: {cls.__name__} has no field {name!r}."
                f"{close_matches(str(name), known)} Known: {', '.join(known)}."
            )


C = TypeVar("C", bound=Config)


@functools.cache
def _annotations(cls: type[Config]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {name: hints[name] for name in cls._fields()}


@functools.cache
def _bounds(cls: type[Config]) -> dict[str, tuple[Any, ...]]:
    """Fields whose type declares bounds, and what their types declare."""
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError:  # a class in a function, whose names cannot be found
        return {}
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {n: m for n, m in marks.items() if {POSITIVE, NOT_NEGATIVE, SHARE} & set(map(str, m))}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


# --- on disk ------------------------------------------------------------------------------------------------


def dump_yaml(config: Config) -> str:
    """The whole config as YAML, with its class named at the top."""
    cls = type(config)
    values = {CLASS_KEY: f"{cls.__module__}:{cls.__qualname__}", **config.to_dict()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def load_yaml(source: str | Path, cls: type[C] | None = None) -> Config:
    """Read a config that `dump_yaml` wrote.

    Args:
        source: Path of the file.
        cls: The class expected; without it, the one named in the file (of vlmamba only).

    Raises:
        MissingFileError: There is no such file.
        ConfigError: It is not YAML, or not a config of that class.
    """
    file = Path(source)
    if not file.is_file():
        raise MissingFileError(f"there is no config file {file}.")
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be read: it is no config.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected keys and values at the top, got {type(values).__name__}.")
    named = values.pop(CLASS_KEY, None)
    if cls is None:
        cls = _class_named(named, file)
    try:
        return cls.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _class_named(name: Any, file: Path) -> type[Any]:
    if not isinstance(name, str) or not name.startswith("vlmamba.") or ":" not in name:
        raise ConfigError(
            f"{file}: the key {CLASS_KEY!r} at the top must name a config class of vlmamba "
            f"('vlmamba.training.config:TrainConfig'), got {name!r}."
        )
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{file}: there is no config class {name!r} in this version of vlmamba.") from error
    if not is_config(found):
        raise ConfigError(f"{file}: {name!r} is not a config class.")
    return found


# --- differences and documentation --------------------------------------------------------------------------


def flatten(values: Any, path: str = "") -> dict[str, Any]:
    """Dotted keys to leaf values of a config or of nested plain values; empty containers are leaves."""
    values = to_plain(values)
    if isinstance(values, Mapping) and values:
        items = list(values.items())
    elif isinstance(values, list) and any(isinstance(v, Mapping) for v in values):
        items = list(enumerate(values))
    else:
        return {path: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten(value, _join(path, key)))
    return flat


def diff_configs(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[Change]:
    """The dotted keys in which two configs differ, in the order of the fields."""
    before, after = flatten(old), flatten(new)
    keys = [*before, *(k for k in after if k not in before)]
    changes = [Change(k, before.get(k, ABSENT), after.get(k, ABSENT)) for k in keys]
    return [c for c in changes if c.old is ABSENT or c.new is ABSENT or not _same(c.old, c.new)]


def _same(old: Any, new: Any) -> bool:
    return bool(old == new) and isinstance(old, bool) == isinstance(new, bool)


def _show(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def marked(cls: type[Config], mark: str, path: str = "") -> dict[str, Any]:
    """Dotted keys of the settings that declare `FREE` or `LATER`, those of nested configs too, and their defaults (None
    of a required one).
    """
    found: dict[str, Any] = {}
    for name, annotation in get_type_hints(cls, include_extras=True).items():
        key, field = _join(path, name), cls._fields()[name]
        if mark in getattr(annotation, "__metadata__", ()):
            found[key] = None if _is_required(field) else _default(field)
        elif is_config(annotation):
            found.update(marked(annotation, mark, key))
    return found


@functools.cache
def field_docs(cls: type[Config]) -> dict[str, str]:
    """The string written under each field, of the class and its bases; empty where the source is not at
    hand.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_config(base) or base is Config:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                doc = following.value if isinstance(following, ast.Expr) else None
                if isinstance(doc, ast.Constant) and isinstance(doc.value, str):
                    docs[statement.target.id] = " ".join(inspect.cleandoc(doc.value).split())
    return docs


class FieldInfo(NamedTuple):
    """One line of a config's documentation."""

    path: str
    type: str
    default: str
    doc: str


def field_infos(cls: type[Config], path: str = "") -> list[FieldInfo]:
    """Every field that an override can set: dotted key, type, default and documentation."""
    lines: list[FieldInfo] = []
    docs = field_docs(cls)  # type: ignore[arg-type]
    for name, annotation in cls.field_types().items():
        key = _join(path, name)
        inner = _inner_config(annotation)
        if inner is not None:
            index = "0" if get_origin(annotation) is tuple else ""
            lines.extend(field_infos(inner, _join(key, index) if index else key))
            continue
        field = cls._fields()[name]
        default = "(required)" if _is_required(field) else _show(_default(field))
        lines.append(FieldInfo(key, type_name(annotation), default, docs.get(name, "")))
    return lines


def describe(cls: type[Config]) -> str:
    """`field_infos` as text: one dotted key a line with its type and default, its documentation below."""
    lines = []
    for info in field_infos(cls):
        lines.append(f"--{info.path}  {info.type}  [{info.default}]")
        if info.doc:
            lines.append(f"    {info.doc}")
    return "\n".join(lines)


def _inner_config(annotation: Any) -> type[Config] | None:
    if is_config(annotation):
        found: type[Config] = annotation
        return found
    if is_union(annotation) or get_origin(annotation) is tuple:
        for argument in get_args(annotation):
            if is_config(argument):
                inner: type[Config] = argument
                return inner
    return None


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return to_plain(field.default_factory())
    return to_plain(field.default)
