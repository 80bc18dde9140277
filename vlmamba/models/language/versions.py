"""What differs between the supported releases of transformers, in one place.

Up to 5.23 a cache is called `past_key_values`, and `cache_params` where there are no keys and values; from 5.24 on it
is `cache` everywhere. The name is read off the classes, never off a version number.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

from vlmamba.errors import ShapeError

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Every name that a cache has had."""

CACHE = next(
    name for name in CACHE_NAMES if name in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)}
)
"""Its name in the outputs and in `generate` of the installed release."""


def cache_of(output: Any) -> Any:
    """The cache in a model's output, None where there is none."""
    return next((output[name] for name in (CACHE, "cache_params") if name in output), None)


def one_cache(kwargs: dict[str, Any]) -> Any:
    """Take the cache out of keyword arguments, whatever they call it.

    Raises:
        ShapeError: Two names hold different caches.
    """
    given = {name: value for name in CACHE_NAMES if (value := kwargs.pop(name, None)) is not None}
    if len({id(value) for value in given.values()}) > 1:
        raise ShapeError(f"{' and '.join(given)} are names of the same argument; give one of them")
    return next(iter(given.values()), None)


@lru_cache(maxsize=64)
def arguments_of(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments of a (class's) forward function."""
    return frozenset(inspect.signature(forward).parameters)


def recompute_activations(model: Any, enabled: bool = True) -> None:
    """Let a transformers model compute its activations again in the backward pass, or not; in training mode only."""
    if not enabled:
        model.gradient_checkpointing_disable()
    elif hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
