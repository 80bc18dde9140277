"""Registries of named parts: exact names, lazy entries, errors with close matches, and parts from outside.

A name ``package.module:attribute`` means a part in code of the user's own. What a person writes (a recipe, a word of
the command line) is imported. What is read from a file (an export's config.json, a run's config.yaml) is not: there the
module must have been imported already, or be named in the environment variable VLMAMBA_PLUGINS (modules, packages or
files, separated by commas), so that nothing that is read can choose what code runs. Either way it must be of the
registry's kind.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, get_type_hints

from vlmamba.errors import ConfigError

T = TypeVar("T")

PLUGINS = "VLMAMBA_PLUGINS"
_users_words: ContextVar[bool] = ContextVar("users_words", default=False)
_admitted: set[str] = set()


def close_matches(name: str, names: list[str]) -> str:
    """A sentence such as ``Did you mean 'mlp'?``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def plugins() -> list[str]:
    """Modules from outside that this process may import: those of VLMAMBA_PLUGINS, and what a person has named here.

    What starts another process gives it these (``VLMAMBA_PLUGINS``), so that it may use them too.
    """
    named = (word.strip() for word in os.environ.get(PLUGINS, "").split(","))
    return sorted({*_admitted, *(word for word in named if word)})


@contextmanager
def users_words() -> Iterator[None]:
    """While names come from a person, not from a file that was read: modules that they name are imported."""
    token = _users_words.set(True)
    try:
        yield
    finally:
        _users_words.reset(token)


def admit(name: str) -> None:
    """Remember that a person named this code, ``package.module[:attribute]`` or ``path/to/file.py[:function]``."""
    _admitted.add(_place(name))


def is_admitted(name: str) -> bool:
    """Whether a part of a known kind that was named so may be looked up here; being imported already is enough."""
    return is_named(name) or _place(name) in sys.modules


def is_named(name: str) -> bool:
    """Whether a person named this code here or in VLMAMBA_PLUGINS."""
    place = _place(name)
    return _users_words.get() or any(
        place == _place(each) or place.startswith(f"{each}.") for each in plugins()
    )


def check_named(name: str, kind: str) -> None:
    """Raise unless a person named a function that a file names.

    A function may be anything, so that its module is imported already (as ``os`` is) says nothing for it.

    Raises:
        ConfigError: Nobody did.
    """
    if not is_named(name):
        raise ConfigError(_refusal(name, kind, f"set {PLUGINS}={_place(name)}"))


def _refusal(name: str, kind: str, way: str) -> str:
    return (
        f"{kind} {name!r} is code from outside of vlmamba, and a name that was read from a file imports nothing. "
        f"If you trust it, {way}."
    )


def _place(name: str) -> str:
    """The module, or the whole path of the file, that a name begins with."""
    place = name.rpartition(":")[0] or name
    return os.path.realpath(place) if place.endswith(".py") else place


def outside(name: str, kind: str, base: type) -> Any:
    """The part of the user's own that ``package.module:attribute`` names.

    Args:
        name: Of a subclass of `base`, or of a function that is annotated to return one.
        kind: What it is, in words for messages.
        base: What it must be.

    Raises:
        ConfigError: It was read from a file and is not admitted, there is no such module, or it is something else.
    """
    module, _, attribute = name.partition(":")
    if not is_admitted(name):
        raise ConfigError(_refusal(name, kind, f"import {module} first, or set {PLUGINS}={module}"))
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{kind} {name!r}: there is no module {module!r} here ({error}). Install the package that it is in, or put "
            "the folder of its file on PYTHONPATH."
        ) from error
    if _users_words.get():
        admit(name)
    entry = getattr(found, attribute, None)
    if not _is_a(entry, base):
        fitting = sorted(
            key for key, value in vars(found).items() if value is not base and _is_a(value, base)
        )
        raise ConfigError(
            f"{kind} {name!r}: {module} has no {attribute!r} that is a {base.__name__} or a function annotated to "
            f"return one.{close_matches(attribute, fitting)} It has: {', '.join(fitting) or 'none'}."
        )
    return entry


def _is_a(entry: object, base: type) -> bool:
    if isinstance(entry, type):
        return issubclass(entry, base)
    if not inspect.isfunction(entry):
        return False
    try:
        returned = get_type_hints(entry).get("return")
    except (NameError, TypeError):  # annotations of names that are there for type checkers alone
        return False
    return isinstance(returned, type) and issubclass(returned, base)


class Registry(Generic[T]):
    """Maps exact, case-sensitive names to objects of one kind.

    Entries are either objects or lazy ``"module:attribute"`` strings, which are imported on first use; so a registry
    costs nothing to fill, and an optional package is needed only by whoever asks for its entry.

    Args:
        kind: What the entries are, in words for error messages ("connector").
        base: Class of the entries (or of what they return), where names of parts from outside are taken too.
    """

    def __init__(self, kind: str, base: type | None = None) -> None:
        self.kind = kind
        self.base = base
        self._entries: dict[str, T | str] = {}

    def add(self, name: str, entry: T | str) -> None:
        """Add an object, or ``"module:attribute"`` to be imported when asked for.

        Raises:
            ConfigError: The name is taken by another entry.
        """
        taken = self._entries.get(name)
        if taken is not None and taken != entry:
            raise ConfigError(
                f"{self.kind} {name!r} is registered twice: as {_owner(taken)} and as {_owner(entry)}. Rename one."
            )
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `add`."""

        def decorate(entry: T) -> T:
            self.add(name, entry)
            return entry

        return decorate

    def get(self, name: str) -> T:
        """The entry of that exact name, or what ``package.module:attribute`` names.

        Raises:
            ConfigError: There is none; the message lists the known names. See `outside` for the others.
        """
        if name not in self._entries and self.base is not None and ":" in name:
            part: T = outside(name, self.kind, self.base)
            return part
        if name not in self._entries:
            names = self.names()
            raise ConfigError(
                f"unknown {self.kind} {name!r}.{close_matches(name, names)} Known: {', '.join(names) or 'none'}."
            )
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            loaded: T = getattr(importlib.import_module(module), attribute)
            self._entries[name] = loaded
            return loaded
        return entry

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)


def _owner(entry: object) -> str:
    if isinstance(entry, str):
        return entry
    return f"{getattr(entry, '__module__', '?')}:{getattr(entry, '__qualname__', repr(entry))}"
