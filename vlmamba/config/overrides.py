"""Dotted overrides: `--optim.lr 1e-5`, typed from the dataclass annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from vlmamba.config.base import Change, Config, diff_configs
from vlmamba.config.values import from_plain, from_text, is_union, type_name
from vlmamba.errors import ConfigError

C = TypeVar("C", bound=Config)


class Overridden(NamedTuple):
    """A config after overrides, and what they changed."""

    config: Any
    changes: list[Change]


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Command-line words as dotted keys and text values.

    Understands ``--a.b value``, ``--a.b=value`` and ``a.b=value``; a flag followed by another flag, or by
    nothing, is ``true``. A later value of a key wins. Dashes in a key count as underscores.

    Raises:
        ConfigError: A word belongs to no flag.
    """
    parsed: dict[str, str] = {}
    words = list(arguments)
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        is_flag = word.startswith("--") and len(word) > 2
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not is_flag:
                raise ConfigError(
                    f"unexpected word {word!r} on the command line. Overrides are written --a.b value "
                    "or a.b=value."
                )
            if position < len(words) and not words[position].startswith("--"):
                value = words[position]
                position += 1
            else:
                value = "true"
        parsed[key.strip().replace("-", "_")] = value
    return parsed


def apply_overrides(config: C, overrides: Mapping[str, Any] | Sequence[str]) -> Overridden:
    """Change fields of a config by dotted keys.

    Texts are converted to the type of the field (``1e-5`` to a float, ``true`` to a bool, ``a,b`` to a
    tuple, ``none`` to None where allowed); other values must already fit. A key reaches into nested configs,
    into tuples by position (``data.sources.0.weight``) and into dicts (``model.connector.options.scan``,
    where a new key is fine).

    Args:
        config: Left as it is.
        overrides: A mapping of dotted keys to values, or command-line words as `parse_overrides` takes them.

    Returns:
        ``(config, changes)``: the changed copy, and every dotted key whose value differs now.

    Raises:
        ConfigError: A key does not exist (with close matches) or a value does not fit its type.
    """
    items = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    # All keys of one config are set together, so that checks between its fields see the final values only.
    tree: dict[str, Any] = {}
    for key, value in items.items():
        _insert(tree, key.split("."), value, key)
    changed = _apply_tree(config, type(config), tree, "")
    return Overridden(changed, diff_configs(config, changed))


class _Leaf(NamedTuple):
    value: Any


def _insert(tree: dict[str, Any], parts: list[str], value: Any, key: str) -> None:
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if isinstance(tree, _Leaf):
            raise ConfigError(f"override {key!r} reaches into a key that another override sets as a whole.")
    if isinstance(tree.get(parts[-1]), dict):
        raise ConfigError(f"override {key!r} sets a key as a whole that another override reaches into.")
    tree[parts[-1]] = _Leaf(value)


def _apply_tree(value: Any, annotation: Any, tree: Any, path: str) -> Any:
    if isinstance(tree, _Leaf):
        if isinstance(tree.value, str):
            return from_text(tree.value, annotation, path)
        return from_plain(tree.value, annotation, path)
    if isinstance(value, Config):
        return _apply_to_config(value, tree, path)
    if isinstance(value, tuple):
        return _apply_to_tuple(value, annotation, tree, path)
    if isinstance(value, dict):
        inner = (get_args(annotation) or (str, Any))[1] if get_origin(annotation) is dict else Any
        changed = dict(value)
        for key, subtree in tree.items():
            current = value.get(key, {} if isinstance(subtree, dict) else None)
            changed[key] = _apply_tree(current, inner, subtree, f"{path}.{key}")
        return changed
    reached = next(iter(tree))
    raise ConfigError(
        f"unknown key '{path}.{reached}': {path} is {value!r} ({type_name(annotation)}), which has no "
        "fields." + (f" Set it as a whole first: --{path} '{{...}}'." if value is None else "")
    )


def _apply_to_config(config: Config, tree: dict[str, Any], path: str) -> Config:
    annotations = config.field_types()
    changes: dict[str, Any] = {}
    for name, subtree in tree.items():
        dotted = f"{path}.{name}" if path else name
        type(config)._require_field(name, path)
        changes[name] = _apply_tree(getattr(config, name), annotations[name], subtree, dotted)
    return config.replace(**changes)


def _apply_to_tuple(
    value: tuple[Any, ...], annotation: Any, tree: dict[str, Any], path: str
) -> tuple[Any, ...]:
    if is_union(annotation):
        annotation = next(a for a in get_args(annotation) if get_origin(a) is tuple)
    arguments = get_args(annotation) or (Any, Ellipsis)
    changed = list(value)
    for key, subtree in tree.items():
        if not key.isdigit() or int(key) >= len(value):
            raise ConfigError(
                f"unknown key '{path}.{key}': {path} has {len(value)} entries; reach one by its position, "
                "from 0."
            )
        index = int(key)
        inner = arguments[0] if arguments[-1] is Ellipsis else arguments[index]
        changed[index] = _apply_tree(value[index], inner, subtree, f"{path}.{key}")
    return tuple(changed)
