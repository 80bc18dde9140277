"""Typed configuration: frozen dataclasses, YAML on disk, dotted overrides, recipes loaded by path."""

from __future__ import annotations

from vlmamba.config.base import (
    FREE,
    LATER,
    Change,
    Config,
    Free,
    Later,
    NotNegative,
    Positive,
    Share,
    describe,
    diff_configs,
    dump_yaml,
    field_docs,
    field_infos,
    flatten,
    load_yaml,
    marked,
)
from vlmamba.config.files import load_python_file, names_in
from vlmamba.config.overrides import apply_overrides, parse_overrides
from vlmamba.config.recipe import Recipe, load_recipe, recipe_functions

__all__ = [
    "FREE",
    "LATER",
    "Change",
    "Config",
    "Free",
    "Later",
    "NotNegative",
    "Positive",
    "Recipe",
    "Share",
    "apply_overrides",
    "describe",
    "diff_configs",
    "dump_yaml",
    "field_docs",
    "field_infos",
    "flatten",
    "load_python_file",
    "load_recipe",
    "load_yaml",
    "marked",
    "names_in",
    "parse_overrides",
    "recipe_functions",
]
