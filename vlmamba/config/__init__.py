"""Typed configuration: frozen dataclasses, YAML on disk, dotted overrides, recipes loaded by path."""

from __future__ import annotations

from vlmamba.config.base import (
    Change,
    Config,
    describe,
    diff_configs,
    dump_yaml,
    field_docs,
    field_infos,
    flatten,
    load_yaml,
)
from vlmamba.config.files import load_python_file
from vlmamba.config.overrides import apply_overrides, parse_overrides
from vlmamba.config.recipe import Recipe, list_recipes, load_recipe, recipe_functions

__all__ = [
    "Change",
    "Config",
    "Recipe",
    "apply_overrides",
    "describe",
    "diff_configs",
    "dump_yaml",
    "field_docs",
    "field_infos",
    "flatten",
    "list_recipes",
    "load_python_file",
    "load_recipe",
    "load_yaml",
    "parse_overrides",
    "recipe_functions",
]
