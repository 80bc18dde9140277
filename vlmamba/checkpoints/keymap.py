"""Declarative two-way renaming of weights.

A map is a list of rules such as ``"llm.backbone.layers.{i}.{rest}" <-> "backbone.layers.{i}.{rest}"``: the
fields in braces carry over. ``{i}`` (any name of one letter) stands for a number, every other name for a part
of a name that is not empty. The first rule that matches wins. The same rules read from right to left give the
way back, so a map needs no second list, and a round trip is the identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from vlmamba.errors import CheckpointError

Value = TypeVar("Value")
_FIELD = re.compile(r"\{(\w+)\}")
_LISTED = 8


@dataclass(frozen=True)
class Rule:
    """One renaming.

    Attributes:
        theirs: Pattern of the name in the other project.
        ours: Pattern of the name here; it has the same fields.
    """

    theirs: str
    ours: str

    def __post_init__(self) -> None:
        theirs, ours = (_FIELD.findall(pattern) for pattern in (self.theirs, self.ours))
        if sorted(theirs) != sorted(ours) or len(set(theirs)) != len(theirs):
            raise ValueError(
                f"rule {self.theirs!r} <-> {self.ours!r}: both sides must have the same fields, once"
            )


@dataclass(frozen=True)
class KeyMap:
    """Rules from another project's names to ours and back.

    Attributes:
        name: What is mapped, for messages.
        rules: Tried in order.
        ignored: Patterns of their names that have no place here and may be dropped (buffers, mostly).
    """

    name: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    _forward: list[tuple[re.Pattern[str], str]] = field(init=False, repr=False, compare=False)
    _backward: list[tuple[re.Pattern[str], str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        forward = [(_pattern(rule.theirs), rule.ours) for rule in self.rules]
        backward = [(_pattern(rule.ours), rule.theirs) for rule in self.rules]
        object.__setattr__(self, "_forward", forward)
        object.__setattr__(self, "_backward", backward)

    def to_ours(self, state: Mapping[str, Value], *, where: str = "checkpoint") -> dict[str, Value]:
        """Rename their names to ours.

        Args:
            state: Their names to anything (tensors, shapes, ...).
            where: What is renamed, for messages.

        Raises:
            CheckpointError: A name that no rule matches, or two that become one.
        """
        skipped = [_pattern(pattern) for pattern in self.ignored]
        kept = {name: value for name, value in state.items() if not any(p.fullmatch(name) for p in skipped)}
        return self._rename(kept, self._forward, [rule.theirs for rule in self.rules], where)

    def to_theirs(self, state: Mapping[str, Value], *, where: str = "checkpoint") -> dict[str, Value]:
        """Rename our names to theirs; the reverse of `to_ours`.

        Raises:
            CheckpointError: A name that no rule matches, or two that become one.
        """
        return self._rename(state, self._backward, [rule.ours for rule in self.rules], where)

    def fits(self, names: Mapping[str, object]) -> bool:
        """Whether every one of their names is matched by a rule (and there is at least one)."""
        skipped = [_pattern(pattern) for pattern in self.ignored]
        patterns = [pattern for pattern, _ in self._forward] + skipped
        return bool(names) and all(any(p.fullmatch(name) for p in patterns) for name in names)

    def _rename(
        self,
        state: Mapping[str, Value],
        rules: list[tuple[re.Pattern[str], str]],
        wanted: list[str],
        where: str,
    ) -> dict[str, Value]:
        renamed: dict[str, Value] = {}
        source: dict[str, str] = {}
        unknown = []
        for name, value in state.items():
            new = _apply(name, rules)
            if new is None:
                unknown.append(name)
            elif new in renamed:
                raise CheckpointError(f"{where}: {source[new]} and {name} both become {new} ({self.name})")
            else:
                renamed[new], source[new] = value, name
        if unknown:
            more = f", and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
            raise CheckpointError(
                f"{where}: {len(unknown)} names are not known in {self.name}: "
                f"{', '.join(unknown[:_LISTED])}{more}. Known are: {', '.join(wanted)}."
            )
        return renamed


def add_prefix(state: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """Put a prefix before every name."""
    return {prefix + name: value for name, value in state.items()}


def part_of(state: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """The names that start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _apply(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        match = pattern.fullmatch(name)
        if match:
            return template.format(**match.groupdict())
    return None


def _pattern(text: str) -> re.Pattern[str]:
    parts = _FIELD.split(text)
    out = []
    for index, part in enumerate(parts):
        if index % 2 == 0:
            out.append(re.escape(part))
        else:
            out.append(f"(?P<{part}>{'[0-9]+' if len(part) == 1 else '.+'})")
    return re.compile("".join(out))
