"""Registries of named parts: exact names, lazy entries, errors with close matches."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Generic, TypeVar

from vlmamba.errors import ConfigError

T = TypeVar("T")


def close_matches(name: str, names: list[str]) -> str:
    """A sentence such as ``Did you mean 'mlp'?``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


class Registry(Generic[T]):
    """Maps exact, case-sensitive names to objects of one kind.

    Entries are either objects or lazy ``"module:attribute"`` strings, which are imported on first use; so a registry
    costs nothing to fill, and an optional package is needed only by whoever asks for its entry.

    Args:
        kind: What the entries are, in words for error messages ("connector").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
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
        """The entry of that exact name.

        Raises:
            ConfigError: There is none; the message lists the known names.
        """
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
